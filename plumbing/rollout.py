"""
From prompts to completions and their log-probs: sample(), token_logprobs(), micro_batches(). The
only file that knows padding, positions and key/value caches. Three facts shape it:
- The distribution that is sampled must be the one that is differentiated: softmax(logits / T), and
  nothing else, whatever top_k or repetition_penalty the checkpoint's generation_config asks for.
- Each prompt is forwarded once per group, in the sampler and in every log-prob pass (with gradient
  too): its keys and values are copied to its completions.
- Prompts are padded on the left to P columns, and completions follow in columns P, P+1, ..., so
  that all rows write the same column at the same time. Positions count real tokens only.
"""
import contextlib
import functools
import inspect
import random
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.masking_utils import sdpa_mask

from plumbing.parallel import add_up, rank, world


@dataclass
class Batch:
    """N completions of B prompts. All tensors lie on the policy's device."""

    prompts: list                             # B lists of token ids
    owner: torch.Tensor                       # (N,) the prompt that each completion continues
    completions: torch.Tensor                 # (N, C) token ids; anything on padding
    mask: torch.Tensor                        # (N, C) 1 on completion tokens, EOS included
    logprobs: Optional[torch.Tensor] = None   # (N, C) the sampler's own, at its temperature
    finished: Optional[torch.Tensor] = None   # (N,) bool: ended by an EOS, not by max_new_tokens


def use_bf16(device):
    """Passes run in bf16 on a GPU that has it in hardware; weights and log-probs stay fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device, keep_casts=True):
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device),
                          cache_enabled=keep_casts)


def padding_sees_all(*args, **kwargs):
    """transformers' mask, but padding sees everything: of nothing, a softmax may be nan."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})  # else a GPU would wait
    return mask | ~mask.any(-1, keepdim=True)


AttentionInterface.register("padded_sdpa", AttentionInterface()["sdpa"])
AttentionMaskInterface.register("padded_sdpa", padding_sees_all)


def forward(policy, ids, valid, cache=None, keep=0, at=None):
    """Logits (n, q or keep, V) of ids (n, q), the columns `at` (None: the last) of valid (n, W)."""
    named_cache = {cache_argument(type(policy.base_model)): cache}
    return policy(**inputs(ids, valid, at), **named_cache, use_cache=cache is not None,
                  logits_to_keep=keep).logits


def inputs(ids, valid, at=None):
    """What a model takes. Padding has no position of its own: GPT-2 would notice."""
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    positions = positions[:, -ids.shape[1]:] if at is None else positions.index_select(1, at)
    return dict(input_ids=ids, attention_mask=valid.long(), position_ids=positions)


@functools.cache
def cache_argument(model_class):
    """What forward() calls the cache: transformers 5.24 renamed `past_key_values` to `cache`."""
    parameters = inspect.signature(model_class.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def pad_left(prompts, device, multiple=1):
    """B lists of token ids -> ids (B, P), valid (B, P); P is a multiple of `multiple`."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    valid = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids.to(device), valid.to(device)


def pick(logits, tokens, temperature):
    """log softmax(logits / temperature) at `tokens`: (..., V), (...) -> (...), always fp32."""
    logits = logits.float() / temperature
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def pick_in_chunks(logits, tokens, temperature):
    """pick(), but backward recomputes the fp32 copy of the logits, and no pass keeps it."""
    chunks = zip(logits.flatten(0, 1).split(1024), tokens.flatten().split(1024))
    return torch.cat([checkpoint(pick, *chunk, temperature, use_reentrant=False,
                                 preserve_rng_state=False) for chunk in chunks]).view(tokens.shape)


def recomputes(policy):
    """Gradient checkpointing? Then no cache: the recomputation would write into it once more."""
    return torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in policy.modules())


def per_token(model, batch, rows, read, fp32=False):
    """read(outputs, tokens) for the tokens of completions `rows` -> (n, C, ...), 0 on padding.

    The outputs of a column are about the token after it: the only shift by one in this suite. A
    prompt that rows share is forwarded once, and its keys and values are copied to them.
    """
    model.train(recomputes(model))  # transformers recomputes in train mode only; no dropout here
    width = int(batch.mask[rows].sum(1).max())
    mask = batch.mask[rows, :width].bool()
    ids = torch.where(mask, batch.completions[rows, :width], 0)
    prompts, owner = batch.owner[rows].unique(return_inverse=True)
    prompt_ids, valid = pad_left([batch.prompts[i] for i in prompts.tolist()], ids.device)
    everything = torch.cat([valid[owner], mask[:, :-1]], 1)
    with contextlib.nullcontext() if fp32 else precision(ids.device):
        if model.training or len(prompts) == len(rows):  # prompt and completion in one forward
            ids_in = torch.cat([prompt_ids[owner], ids[:, :-1]], 1)
            result = read(forward(model, ids_in, everything, keep=width), ids)
        else:
            cache = DynamicCache()
            first = forward(model, prompt_ids, valid, cache, keep=1).index_select(0, owner)
            result = read(first, ids[:, :1])
            if width > 1:
                cache.reorder_cache(owner)  # an index_select of all keys and values
                rest = forward(model, ids[:, :-1], everything, cache)
                result = torch.cat([result, read(rest, ids[:, 1:])], 1)
    model.eval()
    result = torch.where(mask.view(*mask.shape, *[1] * (result.dim() - 2)), result, 0)
    return F.pad(result, [0, 0] * (result.dim() - 2) + [0, batch.mask.shape[1] - width])


def token_logprobs(policy, batch, rows, temperature):
    """log pi(y_t | x, y_<t) for completions `rows` (n,) -> (n, C); fp32, with gradient."""
    return per_token(policy, batch, rows,
                     lambda logits, tokens: pick_in_chunks(logits, tokens, temperature))


@torch.no_grad()
def all_logprobs(policy, batch, micro_batch_size, temperature):
    """log pi(y_t | x, y_<t) of all completions, without gradient -> (N, C)."""
    result = torch.zeros_like(batch.mask)
    for rows in micro_batches(batch, torch.arange(len(result)), micro_batch_size):
        result[rows] = token_logprobs(policy, batch, rows, temperature)
    add_up(result)
    return result


def draw(logits, temperature, uniform):
    """One token per row of (n, V) from softmax(logits / temperature) -> tokens (n,), logprobs (n,).

    Inverts the cumulative distribution at `uniform` (n,); in float64, or its tail would be lost.
    """
    logits = logits.float() / temperature
    logits = logits - logits.amax(-1, keepdim=True)
    cumulative = logits.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # right=True: the first token whose sum exceeds the number, which is none of probability 0
    tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # only nan logits get here
    return tokens.squeeze(-1), (logits.gather(-1, tokens) - total.log()).float().squeeze(-1)


class FixedLayer(StaticLayer):
    """A layer's cache of fixed shape and dtype: under autocast, keys are fp32 and values bf16."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(self.keys.dtype), values.to(self.values.dtype))


def fixed_cache(policy, cache, owner, width):
    """The prompts' cache copied to the completions, in memory that is the same for each shape."""
    fixed = policy.fixed_caches.setdefault(
        (len(owner), width), Cache(layers=[FixedLayer(width) for _ in cache.layers]))
    for layer, new in zip(cache.layers, fixed.layers):
        values = layer.values.index_select(0, owner)
        keys = layer.keys.index_select(0, owner).to(values.dtype)
        if not new.is_initialized:
            new.lazy_initialization(keys, values)
        new.cumulative_length.zero_()
        new.update(keys, values)
    return fixed


def compile_decoding(policy):
    """--compile: from now on sample() decodes with torch.compile, and keeps rows that have ended.

    It compiles once for each shape, so prompts are padded to multiples of 64 columns. On a GPU, it
    records a CUDA graph, which wants its memory at the same place each time.
    """
    mode = "reduce-overhead" if policy.device.type == "cuda" else None
    policy.fixed_caches = {}
    compiled = torch.compile(forward, mode=mode, dynamic=False)
    policy.compiled_forward = torch._dynamo.config.patch(recompile_limit=64)(compiled)


def step_generator(seed, step):
    """For the random numbers of a step, a function of seed and step alone -> torch.Generator.

    On the CPU, so that a GPU uses the same numbers. The seed is a hash: with a sum, seed 2 would
    repeat seed 1. The global generators are seeded too, for rewards that draw from them.
    """
    number = random.Random(f"{seed} {step}").getrandbits(32)
    transformers.set_seed(number)
    return torch.Generator().manual_seed(number)


def eos_ids(generation_config, tokenizer):
    """The ids that end a completion: the tokenizer's EOS, and those of generation_config."""
    ids = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None})


def sample(policy, tokenizer, prompts, group_size, max_new_tokens, temperature, generator):
    """K = group_size completions of each of B prompts (lists of token ids) -> Batch of N = B * K.

    Completion i belongs to prompt i // K. All tokens get their random numbers first, on the CPU, so
    that neither the device nor other rows change a row. Temperature 0 takes the likeliest token.
    """
    device = policy.device
    stop = torch.tensor(eos_ids(policy.generation_config, tokenizer), device=device)
    owner = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    ids = torch.zeros(len(owner), max_new_tokens, dtype=torch.long, device=device)
    mask, logprobs = torch.zeros(ids.shape, device=device), torch.zeros(ids.shape, device=device)
    finished = torch.zeros(len(owner), dtype=torch.bool, device=device)
    ours = prompts[rank() :: world()]  # the prompts that this process answers
    # The rows of their completions, as long as these are still forwarded.
    rows = torch.arange(len(owner), device=device).view(-1, group_size)[rank() :: world()].flatten()
    if temperature > 0:
        uniform = torch.rand(ids.shape, dtype=torch.float64, generator=generator).to(device)
    compiled = getattr(policy, "compiled_forward", None)
    # Inference mode saves a tenth on a CPU. On a GPU, autocast would cast all weights every time.
    no_grad = torch.inference_mode() if device.type == "cpu" else torch.no_grad()
    with no_grad, precision(device, keep_casts=not compiled):
        prompt_ids, valid = pad_left(ours or prompts[:1], device, 64 if compiled else 1)
        cache, copies = DynamicCache(), owner[rows] // world()  # of the prompts in `ours`
        logits = forward(policy, prompt_ids, valid, cache, keep=1)[copies, -1]
        # All completion columns count as real: those after a row's EOS are never read.
        P, valid = valid.shape[1], F.pad(valid[copies], (0, max_new_tokens), value=True)
        if compiled:
            cache = fixed_cache(policy, cache, copies, valid.shape[1])
            columns = torch.arange(valid.shape[1], device=device)
        else:
            cache.reorder_cache(copies)  # a copy of its prompt's keys and values for each row
        for t in range(max_new_tokens if ours else 0):
            # The mask is what the sampler knows. It can't be read off the ids: pad may equal EOS.
            mask[rows, t] = (~finished[rows]).float()
            if temperature > 0:
                tokens, chosen = draw(logits, temperature, uniform[rows, t])
            else:
                tokens = logits.argmax(-1)
                chosen = pick(logits, tokens, 1.0)
            ids[rows, t], logprobs[rows, t] = tokens, chosen
            finished[rows] |= torch.isin(tokens, stop)
            if device.type == "cpu" or t % 16 == 15:  # asking a GPU makes it wait: ask seldom
                alive = (~finished[rows]).nonzero().flatten()
                if len(alive) == 0:
                    break
                if len(alive) <= 0.75 * len(rows) and not compiled:  # copying the cache must pay
                    cache.reorder_cache(alive)
                    rows, valid = rows[alive], valid[alive]
            if t + 1 == max_new_tokens:
                break
            if compiled:
                at = columns[P + t, None]
                logits = compiled(policy, ids[rows, t, None], valid, cache, at=at)[:, -1]
            else:
                logits = forward(policy, ids[rows, t, None], valid[:, : P + t + 1], cache)[:, -1]
    add_up(ids, mask, logprobs, ended := finished.int())
    logprobs, C = torch.where(mask.bool(), logprobs, 0), int(mask.sum(1).max())
    return Batch(prompts, owner, ids[:, :C], mask[:, :C], logprobs[:, :C], ended.bool())


def to_texts(tokenizer, batch):
    """The N completions as text, without padding and without the EOS that ended them.

    To the letter: special tokens are written out, and nothing is tidied.
    """
    lengths = (batch.mask.sum(1).long() - batch.finished.long()).tolist()
    return [tokenizer.decode(ids[:length], skip_special_tokens=False,
                             clean_up_tokenization_spaces=False)
            for ids, length in zip(batch.completions.tolist(), lengths)]


def micro_batches(batch, rows, size, advantages=None):
    """Split this process's rows of a mini-batch into parts of `size`, each forwarded at once.

    The completions of a prompt stay together, and prompts with short ones come first. Rows where
    `advantages`, (N,) or (N, C), are 0 are left out: for losses that are a product with them.
    """
    lengths, owner = batch.mask[rows].sum(1).long().cpu(), batch.owner[rows].cpu()
    longest = torch.zeros(len(batch.prompts), dtype=torch.long)
    longest = longest.scatter_reduce(0, owner, lengths, "amax")[owner]
    order = (longest * len(batch.prompts) + owner).argsort(stable=True)
    if advantages is not None:
        forwarded = advantages[rows].reshape(len(rows), -1).ne(0).any(1).cpu()
        forwarded[0] = True  # for AdamW: a gradient of 0 moves a parameter, none at all does not
        order = order[forwarded[order]]
    places = owner[order].unique_consecutive(return_inverse=True)[1]  # prompts take turns
    order = order[places % world() == rank()]
    for part in order.split(size) if len(order) else ():
        yield rows[part].to(batch.mask.device)  # once, and not for each tensor that they index
