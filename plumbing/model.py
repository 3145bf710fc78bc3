"""
Checkpoints: a folder or a name on the hub -> policy and tokenizer.

Wherever a model folder is expected, a run folder stands for the model/ in it. Nothing here runs a
checkpoint's own code: trust_remote_code stays off.
"""
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.peft_utils import find_adapter_config_file

from plumbing import toy
from plumbing.flags import fail
from plumbing.rollout import eos_ids, pick, sample, token_logprobs


def load(auto_class, flag, name, **options):
    """A model in fp32 and its tokenizer, by from_pretrained -> (model, tokenizer), on the CPU.

    fp32 even where the checkpoint is bf16: an RL step is often smaller than the gap between two
    neighbouring bf16 numbers, and would be rounded away.
    """
    where = str(next((path for path in (Path(name, "model"), Path(name)) if path.is_dir()), name))
    try:
        if find_adapter_config_file(where):
            raise ValueError("it has an adapter; save what peft's merge_and_unload() gives")
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised; choose the model that it was made from")
        if "longrope" in str(getattr(config.get_text_config(), "rope_parameters", None)):
            raise ValueError("its positions change with the length of a text (LongRoPE)")
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        eos = tokenizer.eos_token_id
        if eos is None or eos >= config.get_text_config().vocab_size:
            raise ValueError("its tokenizer has no EOS that the model knows; set its eos_token")
        model, info = auto_class.from_pretrained(
            where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **options)
        for key in (*info["missing_keys"], *info["mismatched_keys"]):
            raise ValueError(f"weights are missing or of another shape, {key} for one")
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("some of its weights are nan or infinite")
    except Exception as error:  # no such name, no network, a torn file, code of its own, ...
        fail(f"{flag} {name}: {str(error)[:400] or type(error).__name__}")
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("padded_sdpa")  # rollout.py's, for this model alone
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
    policy.generation_config = GenerationConfig(
        eos_token_id=eos_ids(policy.generation_config, tokenizer))
    probe(policy, tokenizer, name)
    return policy.to(device), tokenizer


@torch.no_grad()
def probe(policy, tokenizer, name):
    """Refuse a model that rollout.py would serve wrongly: state-space, not causal, ...

    Three ways to the same log-probs must agree (fp32, on the CPU): the sampler, the shared-prompt
    pass, and a plain forward of each row, without padding or cache. Prompts are ragged, and lie on
    both sides of each length up to 1,024 that the config names, such as a window.
    """
    config = policy.config.get_text_config()
    named = {4, getattr(config, "sliding_window", 4), getattr(config, "attention_chunk_size", 4)}
    context = min(1024, getattr(config, "max_position_embeddings", 1024) - 5)
    try:
        for n in [n for n in named if n and n <= context]:
            prompts = [[7 * i % config.vocab_size for i in range(P)] for P in (n + 2, n - 1)]
            batch = sample(policy, tokenizer, prompts, 2, 3, 0.7, torch.Generator().manual_seed(0))
            shared, plain = token_logprobs(policy, batch, torch.arange(4), 0.7), 0 * batch.mask
            for i, row in enumerate(plain_logprobs(policy, batch, 0.7)):
                plain[i, : len(row)] = row
            gap = max((plain - other).abs().max().item() for other in (batch.logprobs, shared))
            if not gap < 1e-3:
                raise ValueError(f"cached and plain log-probs differ by {gap:.1g} at {n} tokens")
    except Exception as error:  # whatever a foreign architecture says to our cache
        fail(f"--model {name}: {policy.config.model_type} does not work with our sampler "
             f"({error!r:.300}); use a causal decoder that keeps a key/value cache")


def plain_logprobs(policy, batch, temperature):
    """The definition, for checks: each row alone, no padding, no cache -> N tensors (L_i,)."""
    rows = []
    for owner, ids, mask in zip(batch.owner.tolist(), batch.completions, batch.mask.bool()):
        prompt = torch.tensor(batch.prompts[owner], device=ids.device)
        logits = policy(input_ids=torch.cat([prompt, ids[mask]])[None]).logits[0]
        rows.append(pick(logits[len(prompt) - 1 : -1], ids[mask], temperature))
    return rows
