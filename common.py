"""
The mathematics that the scripts share: functions of tensors and numbers. Any of them can be pasted
elsewhere; some need masked_mean() beside them.

Letters: B prompts, K completions of each prompt, N = B * K completions, C completion tokens; n rows
of a micro-batch, which is the part of a mini-batch that is forwarded at once. The K completions of
a prompt are neighbouring rows. Log-probs and the KL are in nats.

`mask` (N, C) is 1 on the tokens of a completion, its EOS included, and 0 on the padding to their
right. A function that takes the mask may be given anything on padding, even nan, and its results
are 0 there. A function that takes no mask needs finite values; those of the scripts are 0 there.

A loss is an equation per token. `share` (N, C) is the weight of each token in the loss of a
mini-batch, 0 on padding. It sums to 1, so that (losses * share).sum() is a mean:

    mask / mask[minibatch].sum()                            each token counts the same
    mask / mask.sum(dim=1, keepdim=True) / len(minibatch)   each completion counts the same

The share is known before a mini-batch is split, so that the gradients of its micro-batches add up.
"""
import math

import torch


def masked_mean(values, mask):
    """Mean of `values` (N, C) over all valid tokens -> scalar; 0 if there are none."""
    # torch.where and not a product with the mask, because 0 * nan is nan.
    return torch.where(mask.bool(), values, 0).sum() / mask.sum().clamp(min=1)


def whiten(values, mask):
    """(x - mean) / sqrt(var + 1e-8), mean and var over all valid tokens: (N, C) -> (N, C).

    The variance divides by the number of tokens, as in OpenRLHF; verl divides by one less.
    """
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(var + 1e-8), 0)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """KL(pi || pi_ref) per token, estimated from tokens drawn from pi: (N, C), (N, C) -> (N, C).

    With r = pi_ref / pi (Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html):
      k1 = -log r         is unbiased and can be negative. It belongs in the reward. As a loss it
                          only adds noise, because its expected gradient is 0.
      k2 = (log r)^2 / 2  is biased. As a loss, its expected gradient is that of KL(pi || pi_ref).
      k3 = r - 1 - log r  is unbiased and never negative. As a loss, its expected gradient is that
                          of the other KL, KL(pi_ref || pi).
    A state is the prompt and the tokens so far. The gradients of k2 and k3 treat each state alone.
    They ignore that a token also decides which states come next. k1 in the reward takes this into
    account; docs/gradients.md says how far apart the gradients are. All of this is exact while pi
    is the policy that drew the tokens, and approximate after an update.
    """
    log_r = ref_logprobs - logprobs
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r**2 / 2
    if kind == "k3":
        return torch.expm1(log_r) - log_r  # expm1, because r - 1 loses its digits where r is near 1
    raise ValueError(f"kind must be k1, k2 or k3, not {kind!r}")


def normalize_rewards(scores, clip):
    """(score - mean) / std over the batch, clipped to [-clip, clip]: (N,) -> (N,).

    The std divides by N - 1, and 1e-8 is added to it. Equal scores give exactly 0.
    """
    if scores.max() == scores.min():  # or else their std may be a rounding error, and not 0
        return torch.zeros_like(scores)
    return ((scores - scores.mean()) / (scores.std() + 1e-8)).clamp(-clip, clip)


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = [t is the last token] * score - kl_coef * kl_t: (N,), (N, C), (N, C) -> (N, C).

    The last token is the EOS. In a completion that was cut off it is the last one that was drawn.
    """
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)  # true on padding too, where r_t is set to 0
    return torch.where(mask.bool(), last * scores[:, None] - kl_coef * kl, 0)


def returns_to_go(rewards, mask, gamma=1.0):
    """G_t = r_t + gamma * G_{t+1}: (N, C) -> (N, C)."""
    rewards = torch.where(mask.bool(), rewards, 0)
    returns, future = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        returns[:, t] = future = rewards[:, t] + gamma * future
    return torch.where(mask.bool(), returns, 0)


def ppo_clip_loss(logprobs, old_logprobs, advantages, clip_eps=0.2):
    """-min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) per token -> losses, is_clipped, (N, C).

    PPO's objective (arXiv 1707.06347, eq. 7), negated, because optimizers minimise. Log-probs are
    (N, C), advantages (N, C) or (N, 1). Where the clipped value is taken, is_clipped is true and
    the loss has no gradient. While a ratio is 1, the loss is -A, which shows no progress.
    """
    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(unclipped, clipped), clipped > unclipped  # -min(a, b) = max(-a, -b)


def learning_rate(step, steps, warmup_steps, peak):
    """Rises linearly to the peak over `warmup_steps`, then falls linearly to a tenth of it."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * (1 - 0.9 * (step - warmup_steps) / max(steps - 1 - warmup_steps, 1))


def mini_batches(n, minibatch_size, group_size, epochs, generator):
    """Shuffles the groups of a step's n completions, `epochs` times -> yields row indices.

    A mini-batch has whole groups, of at most minibatch_size rows together, or one larger group.
    """
    if n == 0:
        return
    groups = n // group_size
    parts = math.ceil(groups / max(1, minibatch_size // group_size))
    for _ in range(epochs):
        order = torch.randperm(groups, generator=generator)
        for part in order.tensor_split(parts):  # into `parts` pieces of nearly the same size
            yield (part[:, None] * group_size + torch.arange(group_size)).flatten()
