"""
Checkpoints: a folder or a name on the hub -> policy and tokenizer; and back into a folder.

Wherever a model folder is expected, a run folder stands for the model/ in it. Nothing here runs a
checkpoint's own code: trust_remote_code stays off.
"""
import contextlib
import functools
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plumbing import toy
from plumbing.flags import fail
from plumbing.rollout import eos_ids, pick, sample, token_logprobs


@functools.cache  # a name is looked up for its tokenizer and for its weights
def ask_hub(flag, name, kind):
    """One short question to the hub, because from_pretrained would retry for a minute.

    A name that does not exist ends the program; without a network, the local cache has to do.
    """
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)
    except (huggingface_hub.errors.HFValidationError,
            huggingface_hub.errors.RepositoryNotFoundError):
        fail(f"{flag} {name}: there is no such folder here, and no such {kind} on the hub (a "
             "private one needs `hf auth login`)")
    except Exception:  # of the network, of a proxy, of the hub
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # from now on transformers does not ask,
        os.environ["HF_HUB_OFFLINE"] = "1"               # nor does datasets, imported later


def locate(name):
    """What from_pretrained takes: a folder that holds a model, or a name on the hub."""
    folder = Path(os.path.expanduser(name or toy.POLICY))
    if (folder / "model" / "config.json").exists():
        folder = folder / "model"
    elif (folder / "checkpoint.pt").exists():
        fail(f"--model {name}: this run has not finished, so there is no model yet; --resume it")
    if not folder.is_dir():
        ask_hub("--model", name, "model")
        return name
    transformers.utils.logging.disable_progress_bar()  # bars are for downloads
    return str(folder)


def explain(name, error):
    """Whatever transformers says of a checkpoint that it cannot load, as our one sentence."""
    reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
    if "connect" in reason and huggingface_hub.constants.HF_HUB_OFFLINE:
        reason = ("there is no such folder here, it is not in the cache, and the hub cannot be "
                  "reached; name a folder, or mend the network (HF_ENDPOINT sets a mirror)")
    if "custom code" in reason or "trust_remote_code" in reason:
        reason = "it needs code of its own, which is not run here; choose an architecture that " \
                 "transformers knows"
    fail(f"--model {name}: {reason} (it must be what AutoTokenizer and AutoModelForCausalLM load)")


def load_tokenizer(name):
    """-> tokenizer, context in tokens, vocabulary size, the ids that end a completion.

    Reads no weights. Without a name, here and below, it is the toy's policy.
    """
    where, generation_config = locate(name), None
    transformers.utils.logging.set_verbosity_error()  # what matters of its reports is said below
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ...: one can be broken in many ways
        explain(name, error)
    kind = (config.architectures or [config.model_type])[0]
    if (type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            or re.search("MaskedLM|Classification|QuestionAnswering", kind)):
        fail(f"--model {name}: {kind} is no causal language model, so it cannot continue a prompt; "
             "choose a ...ForCausalLM")
    check_config("--model", name, config)
    config = config.get_text_config()
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= config.vocab_size:
        fail(f"--model {name}: its tokenizer has no EOS that the model knows, and no completion "
             "could end; set eos_token in its tokenizer_config.json")
    with contextlib.suppress(OSError):  # there may be none
        generation_config = transformers.GenerationConfig.from_pretrained(where)
    return (tokenizer, getattr(config, "max_position_embeddings", math.inf), config.vocab_size,
            eos_ids(generation_config, config, tokenizer))


def check_config(flag, name, config):
    """Refuse models that would load without an error, and compute wrong results."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        fail(f"{flag} {name}: it has layers of a kind that is not known here, "
             f"{', '.join(sorted(unknown))}; choose a model with full or sliding attention")
    if getattr(config, "quantization_config", None):
        fail(f"{flag} {name}: its weights are quantised, and all weights are trained in fp32 here; "
             "choose the model that it was made from")


def load_model(name):
    """-> the model, in fp32 on the CPU, in eval mode, and without dropout in train mode too.

    fp32 even where the checkpoint is bf16: an RL step is often smaller than the gap between two
    neighbouring bf16 numbers, and would be rounded away.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            locate(name), dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)
    except Exception as error:  # a torn file, a shape that does not fit, ...
        explain(name, error)
    random = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if random:
        fail(f"--model {name}: {len(random)} weights are missing or of the wrong shape, "
             f"{random[0]} for one, and would stay random; choose a complete ...ForCausalLM")
    return remove_dropout(model)


def load_policy(name, device):
    """Hub name, model folder, run folder, or None for the toy's policy -> (policy, tokenizer).

    fp32, without dropout, and tried out.
    """
    tokenizer, _, _, stop = load_tokenizer(name)
    policy = load_model(name)
    policy.generation_config.eos_token_id = stop  # also for whoever loads the trained model
    probe(policy, tokenizer, name)
    return policy.to(device), tokenizer


@torch.no_grad()
def probe(policy, tokenizer, name):
    """Refuse a model that rollout.py would serve wrongly: Bloom, state-space, not causal, ...

    Three ways to the same log-probs must agree on ragged prompts (fp32, on the CPU): the sampler,
    the shared-prompt pass, and a plain forward of each row, without padding or cache.
    """
    try:
        batch = sample(policy, tokenizer, [[5, 7, 6, 9, 8], [5, 7]], 2, 3, 0.7,
                       torch.Generator().manual_seed(0))
        shared = token_logprobs(policy, batch, torch.arange(4), 0.7)
        plain = torch.zeros_like(shared)
        for i, row in enumerate(plain_logprobs(policy, batch, 0.7)):
            plain[i, : len(row)] = row
        gap = max((plain - other).abs().max().item() for other in (batch.logprobs, shared))
        reason = f"cached and plain log-probs differ by {gap:.1g}" if not gap < 1e-3 else None
    except Exception as error:  # whatever a foreign architecture says to our cache and masks
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        fail(f"--model {name}: the architecture {policy.config.model_type} does not work with our "
             f"sampler ({reason}); use a causal decoder that keeps a key/value cache")


def plain_logprobs(policy, batch, temperature):
    """The definition, for checks: each row alone, no padding, no cache -> N tensors (L_i,)."""
    rows = []
    for owner, ids, mask in zip(batch.owner.tolist(), batch.completions, batch.mask.bool()):
        prompt = torch.tensor(batch.prompts[owner], device=ids.device)
        logits = policy(input_ids=torch.cat([prompt, ids[mask]])[None]).logits[0]
        rows.append(pick(logits[len(prompt) - 1 : -1], ids[mask], temperature))
    return rows


def remove_dropout(model):
    """Else log-probs would be random in train mode, and the ratio of a policy to itself not 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in [k for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]:
            setattr(module, key, 0.0)
    return model.eval()


def checkpoint_activations(model):
    """--gradient_checkpointing: keep a layer's input only, and run it again in the backward."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.2x
    try:
        (enable or model.gradient_checkpointing_enable)()
    except ValueError:
        fail(f"--gradient_checkpointing: {model.config.model_type} does not support it; leave it "
             "out, and lower --micro_batch_size instead")


def check_saving(model, tokenizer, folder):
    """Find out before the training if its result could not be saved after it."""
    config = getattr(model, "generation_config", None) or transformers.GenerationConfig()
    with tempfile.TemporaryDirectory(dir=folder) as trial:
        try:
            config.save_pretrained(trial)
        except ValueError:  # sampling settings without do_sample: transformers won't write them
            config.do_sample = True
        try:
            for part in (config, model.config, tokenizer):
                part.save_pretrained(trial)
        except ValueError as error:
            fail("--model: its settings could not be saved again; mend or delete its "
                 f"generation_config.json ({' '.join(str(error).split())})")


def save_policy(policy, tokenizer, folder):
    """Write folder/model, fp32, for from_pretrained; it replaces an old one when it is whole."""
    if not all(parameter.isfinite().all() for parameter in policy.parameters()):
        fail("the last update made weights nan or infinite; take a smaller --lr", code=1)
    temporary, final = Path(folder, "model.tmp"), Path(folder, "model")
    policy.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
