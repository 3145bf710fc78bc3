"""
The mathematics that the scripts share. Tensors and floats in, tensors out: any function can be
pasted elsewhere, together with at most masked_mean().

Letters: B prompts, K completions of each, N = B K completions, M of them in a mini-batch, R in a
micro-batch; P prompt tokens, C completion tokens, V vocabulary.
`mask` (N, C) is 1 on completion tokens, EOS included, and 0 on the padding to their right. Padding
may hold garbage, even nan: it influences nothing, and per-token results are 0 there. Unit: nats.
"""
import math

import torch


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


def learning_rate(step, steps, warmup_steps, peak):
    """Linear rise to the peak over `warmup_steps`, then linear decay to a tenth of it."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * (1 - 0.9 * (step - warmup_steps) / max(steps - 1 - warmup_steps, 1))


def mini_batches(n, minibatch_size, group_size, epochs, generator):
    """Shuffled whole groups, all n completions `epochs` times over -> yields row indices (M,)."""
    if n == 0:
        return
    groups = n // group_size
    parts = math.ceil(groups / max(1, minibatch_size // group_size))
    for _ in range(epochs):
        order = torch.randperm(groups, generator=generator)
        for part in order.tensor_split(parts):  # of nearly one size
            yield (part[:, None] * group_size + torch.arange(group_size)).flatten()
