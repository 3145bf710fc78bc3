"""
Checkpoints: a folder or a name on the hub -> policy and tokenizer; and back into a folder.

Wherever a model folder is expected, a run folder stands for the model/ in it. Nothing here runs a
checkpoint's own code: trust_remote_code stays off.
"""
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from plumbing import toy
from plumbing.flags import fail
from plumbing.rollout import eos_ids, pick, sample, token_logprobs


def load(auto_class, flag, name, **options):
    """A model in fp32 and its tokenizer, by from_pretrained -> (model, tokenizer), on the CPU.

    fp32 even where the checkpoint is bf16: an RL step is often smaller than the gap between two
    neighbouring bf16 numbers, and would be rounded away.
    """
    folder = Path(name).expanduser()
    if (folder / "checkpoint.pt").exists() and not (folder / "model").is_dir():
        fail(f"{flag} {name}: this run has not finished, so it has no model yet; --resume it")
    where = str(next((path for path in (folder / "model", folder) if path.is_dir()), name))
    transformers.utils.logging.set_verbosity_error()  # what matters of its reports is said here
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised, and all weights are trained in fp32 here; "
                             "choose the model that it was made from")
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model, info = auto_class.from_pretrained(
            where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **options)
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if missing:
            raise ValueError(f"{len(missing)} weights are missing or of the wrong shape, "
                             f"{missing[0]} for one; choose a complete model")
        eos, size = tokenizer.eos_token_id, config.get_text_config().vocab_size
        if eos is None or eos >= size:
            raise ValueError("its tokenizer has no EOS that the model knows, so that no completion "
                             "could end; set eos_token in its tokenizer_config.json")
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("some of its weights are nan or infinite; choose another model")
    except Exception as error:  # no such name, no network, a torn file, code of its own, ...
        fail(f"{flag} {name}: {' '.join(str(error).split())[:300] or type(error).__name__}")
    unused = sorted(key for key in info["unexpected_keys"] if "inv_freq" not in key)
    if unused:
        print(f"warning: {flag} {name}: {len(unused)} weights of the checkpoint have no place in "
              f"the model and are not used, {unused[0]} for one")
    if Path(where, "adapter_config.json").exists():
        print(f"warning: {flag} {name}: the adapter beside the model is not used")
    return remove_dropout(model), tokenizer


def remove_dropout(model):
    """In train mode too; with dropout, the ratio of a policy to itself would not be 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in [k for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]:
            setattr(module, key, 0.0)
    return model.eval()


def load_policy(name, device):
    """Hub name, model folder, run folder, or None for the toy's policy -> (policy, tokenizer)."""
    policy, tokenizer = load(AutoModelForCausalLM, "--model", name or str(toy.POLICY))
    # Whoever loads the trained model stops where the training did; nothing else of it is used.
    stop = eos_ids(policy.generation_config, tokenizer)
    policy.generation_config = GenerationConfig(eos_token_id=stop)
    probe(policy, tokenizer, name)
    return policy.to(device), tokenizer


@torch.no_grad()
def probe(policy, tokenizer, name):
    """Refuse a model that rollout.py would serve wrongly: Bloom, state-space, not causal, ...

    Three ways to the same log-probs must agree (fp32, on the CPU): the sampler, the shared-prompt
    pass, and a plain forward of each row, without padding or cache. Prompts are ragged, and lie on
    both sides of each length up to 1,024 that the config names: of a window, of a rope.
    """
    config, named = policy.config.get_text_config(), [4]
    rope = getattr(config, "rope_parameters", None) or {}
    for n in (getattr(config, "sliding_window", None), rope.get("original_max_position_embeddings"),
              getattr(config, "attention_chunk_size", None)):
        if n and 4 < n <= min(1024, config.max_position_embeddings - 5):
            named.append(n)
    vocabulary = policy.get_input_embeddings().num_embeddings
    try:
        for n in named:
            prompts = [[7 * i % vocabulary for i in range(length)] for length in (n + 2, n - 1)]
            batch = sample(policy, tokenizer, prompts, 2, 3, 0.7, torch.Generator().manual_seed(0))
            shared, plain = token_logprobs(policy, batch, torch.arange(4), 0.7), 0 * batch.mask
            for i, row in enumerate(plain_logprobs(policy, batch, 0.7)):
                plain[i, : len(row)] = row
            gap = max((plain - other).abs().max().item() for other in (batch.logprobs, shared))
            if not gap < 1e-3:
                raise ValueError(f"cached and plain log-probs differ by {gap:.1g} at {n} tokens")
    except Exception as error:  # whatever a foreign architecture says to our cache
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
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
