"""
What every script shares: 1. the mathematics   2. flags, errors, small change.

Letters: B prompts, K completions of each, N = B K completions, M of them in a mini-batch, R in a
micro-batch; P prompt tokens, C completion tokens, V vocabulary.
`mask` (N, C) is 1 on completion tokens, EOS included, and 0 on the padding to their right. Padding
may hold garbage, even nan: it influences nothing, and per-token results are 0 there. Unit: nats.
"""
import math
import random
import sys
from dataclasses import dataclass, field
from typing import Optional

import torch
import transformers
from transformers.hf_argparser import HfArg

# --------------------------------------------------------------------------------------------------
# 1. The mathematics. Tensors and floats in, tensors out; paste any of it, at most with masked_mean.


def masked_mean(values, mask):
    """Mean of `values` (N, C) over all valid tokens -> scalar; 0 if there are none."""
    # where, and not a product with the mask: 0 * nan is nan.
    return torch.where(mask.bool(), values, 0).sum() / mask.sum().clamp(min=1)


def whiten(values, mask):
    """z-score over all valid tokens of the batch: (N, C) -> (N, C).

    Population variance as in OpenRLHF; 1e-8 added under the root as in TRL and verl.
    """
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(var + 1e-8), 0)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """KL(pi || pi_ref) per token, estimated from tokens drawn from pi: (N, C), (N, C) -> (N, C).

    With r = pi_ref / pi (Schulman, "Approximating KL divergence"; the notes have r upside down):
      k1 = -log r         unbiased, can be negative. Belongs in the reward: as a loss it does
                          nothing, its gradient is 0 on average.
      k2 = (log r)^2 / 2  biased, but as a loss its expected gradient is that of KL(pi || pi_ref).
      k3 = r - 1 - log r  unbiased and >= 0; as a loss it descends the other KL, KL(pi_ref || pi).
    It takes no mask: padding comes out as whatever went in.
    """
    log_r = ref_logprobs - logprobs
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r**2 / 2
    if kind == "k3":
        return torch.expm1(log_r) - log_r  # expm1, because r - 1 cancels where r is near 1
    raise ValueError(f"kind must be k1, k2 or k3, not {kind!r}")


def normalize_rewards(scores, clip):
    """z-score over the batch, clipped to [-clip, clip]: (N,) -> (N,). Equal scores give exact 0."""
    if scores.max() == scores.min():  # else a std of rounding errors would blow rounding errors up
        return torch.zeros_like(scores)
    return ((scores - scores.mean()) / (scores.std() + 1e-8)).clamp(-clip, clip)


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = [t is last] * score - kl_coef * kl_t: (N,), (N, C), (N, C) -> (N, C). Notes, eq. 1.

    The notes say [s_t = EOS]; the last valid token also pays a completion that was cut short.
    """
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)
    return torch.where(mask.bool(), last * scores[:, None] - kl_coef * kl, 0)


def returns_to_go(rewards, mask, gamma=1.0):
    """G_t = r_t + gamma * G_{t+1}: (N, C) -> (N, C)."""
    rewards = torch.where(mask.bool(), rewards, 0)
    returns, future = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        returns[:, t] = future = rewards[:, t] + gamma * future
    return torch.where(mask.bool(), returns, 0)


def ppo_clip_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2):
    """-min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), all (N, C) -> (loss, clip_frac), scalars.

    Mean over valid tokens (PPO, arXiv 1707.06347, eq. 7; negative, because optimizers minimise).
    clip_frac: the share of tokens whose clipped branch is active, which means no gradient for them.
    """
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).to(loss.dtype), mask)


# --------------------------------------------------------------------------------------------------
# 2. Flags, errors, small change. Nothing below knows an algorithm.


@dataclass
class RunConfig:
    """The flags of every script, with the toy's defaults. A real model's: REAL in each script."""

    model: Optional[str] = HfArg(default=None, help="model folder, run folder or hub name; None: "
                                                    "the toy's")
    data: str = HfArg(default="toy", help="toy, words, a .jsonl file, a folder, or a hub "
                                          "name[:configuration]")
    steps: int = HfArg(default=60, help="training steps")
    lr: float = HfArg(default=2e-4, help="AdamW learning rate at its peak")
    warmup_steps: int = HfArg(default=0, help="steps in which the learning rate rises to its peak")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    minibatch_size: int = HfArg(default=64, help="completions per optimizer step")
    micro_batch_size: int = HfArg(default=64, help="completions per pass: memory, not results")
    gradient_checkpointing: bool = HfArg(default=False, help="save memory: recompute activations")
    max_new_tokens: int = HfArg(default=32, help="longest completion, in tokens")
    compile: bool = HfArg(default=False, help="sample with torch.compile, for a GPU")
    log_every: int = HfArg(default=5, help="print a line of metrics every so many steps")
    eval_every: int = HfArg(default=0, help="steps between looks at validation prompts; 0: never")
    eval_prompts: int = HfArg(default=512, help="held-out prompts per evaluation")
    save_every: int = HfArg(default=20, help="write the checkpoint every so many steps")
    seed: int = HfArg(default=1, help="seed of everything random")
    device: Optional[str] = HfArg(default=None, help="cpu or cuda; None: cuda if present")
    out_dir: Optional[str] = HfArg(default=None, help="run folder; None: runs/SCRIPT, numbered "
                                                      "if it is taken")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in the run folder")
    data_checksum: Optional[int] = field(default=None, init=False)  # no flag: load_problems sets it


class Failure(SystemExit):
    """Raised by fail(), which has printed the reason."""


def fail(message, code=2):
    """Stop with one sentence, no traceback. Code 2: wrong input; 1: it happened on the way."""
    print("stopped:" if code == 130 else "error:", *str(message).splitlines(), file=sys.stderr)
    raise Failure(code)


# A number must be above 0, except where 0 has a meaning; and some have an upper end.
ZERO_IS_FINE = set("lr critic_lr prm_lr warmup_steps critic_warmup weight_decay eval_every seed "
                   "kl_coef reward_clip gamma lam decay beta damping accuracy_filter".split())
AT_MOST = dict(gamma=1, lam=1, decay=1, backtrack=1, fisher_fraction=1, accuracy_filter=0.5) | \
    dict.fromkeys(("max_grad_norm", "clip_eps", "value_clip", "reward_clip"), math.inf)


def check_ranges(cfg):
    """Every number among the flags."""
    for key, value in vars(cfg).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not (value > 0 or value == 0 and key in ZERO_IS_FINE):  # `not`: nan is no number either
            fail(f"--{key} {value}: it must be {'at least' if key in ZERO_IS_FINE else 'above'} 0")
        if value > (highest := AT_MOST.get(key, 2**63 - 1)):
            fail(f"--{key} {value}: it must be at most {highest}")
    if not hasattr(cfg, "group_size"):
        return
    K, batch = cfg.group_size, cfg.prompts_per_step * cfg.group_size
    if K == 1 and (type(cfg)().group_size > 1 or getattr(cfg, "group_baseline", False)):
        fail("--group_size 1: completions of a prompt are compared with each other; take 4, say")
    if cfg.minibatch_size and not K <= cfg.minibatch_size <= batch:
        fail(f"--minibatch_size {cfg.minibatch_size}: it must be at least a group of --group_size "
             f"{K}, and at most the {batch} completions of a step (--prompts_per_step groups)")


def find_device(name):
    """--device, checked; None: a GPU if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or number and not (kind == "cuda" and number.isdigit()):
        fail(f"--device {name}: choose cpu or cuda")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: torch sees {torch.cuda.device_count() or 'no'} GPU on this "
             "machine; use --device cpu")
    return name


def use_bf16(device):
    """Passes run in bf16 on a GPU that has it in hardware; weights and log-probs stay fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def step_generator(seed, step):
    """For the random numbers of a step, a function of seed and step alone -> torch.Generator.

    step: its number, or a name where the numbers are for something else. The generator is on the
    CPU, so that a GPU uses the same random numbers. It uses 32 bits of its seed. They are a hash of
    seed and step, because with their sum, seed 2 would repeat seed 1, one step earlier. The global
    generators (random, numpy, torch, CUDA) are seeded too, for rewards that draw from them.
    """
    number = random.Random(f"{seed} {step}").getrandbits(32)
    transformers.set_seed(number)
    return torch.Generator().manual_seed(number)


def learning_rate(step, cfg, peak):
    """Linear rise to the peak over cfg.warmup_steps, then linear decay to a tenth of it."""
    if step < cfg.warmup_steps:
        return peak * (step + 1) / (cfg.warmup_steps + 1)
    return peak * (1 - 0.9 * (step - cfg.warmup_steps) / max(cfg.steps - 1 - cfg.warmup_steps, 1))


def mini_batches(n, minibatch_size, group_size, epochs, generator):
    """Shuffled whole groups, all n completions `epochs` times over -> yields row indices (M,)."""
    parts = math.ceil(n // group_size / max(1, minibatch_size // group_size))
    for _ in range(epochs if n else 0):
        order = torch.randperm(n // group_size, generator=generator)
        for groups in order.tensor_split(parts):  # of nearly one size
            yield (groups[:, None] * group_size + torch.arange(group_size)).flatten()


class Means:
    """What the log says of a step: numbers of its micro-batches and mini-batches, put together."""

    def __init__(self):
        self.sums, self.weights, self.parts, self.minibatches = {}, {}, {}, 0

    def add(self, weight, **scalars):
        """Of a micro-batch: means over what was forwarded; maxima for names that end in _max."""
        for name, value in scalars.items():
            value = torch.as_tensor(value).detach()
            old, self.weights[name] = self.sums.get(name, 0), self.weights.get(name, 0) + weight
            self.sums[name] = max(old, value) if name.endswith("_max") else old + weight * value

    def add_parts(self, weight, **scalars):
        """Of a micro-batch: its part of a mini-batch's mean, to which what is not forwarded adds 0.
        """
        for name, value in scalars.items():
            self.parts[name] = self.parts.get(name, 0) + weight * torch.as_tensor(value).detach()

    def end_minibatch(self, **scalars):
        """Of a mini-batch."""
        self.minibatches += 1
        self.add(1, **scalars)

    def __call__(self):
        means = {name: total if name.endswith("_max") else total / self.weights[name]
                 for name, total in self.sums.items()}
        return means | {name: total / self.minibatches for name, total in self.parts.items()}
