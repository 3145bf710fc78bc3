"""
GRPO (DeepSeekMath, arXiv 2402.03300): the K answers to a prompt are judged relative to each other.
Against rloo.py: the mean is over all K, the advantage is divided by their std, the KL moves from
the reward to the loss, as k3, and each answer counts the same in the loss, however long:

    A_i  = (score_i - mean) / std                             over the K answers to its prompt
    loss = mean_i mean_t [-min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i) + kl_coef * k3_t]
           ratio_t = pi / pi_old,   k3_t = r - 1 - log r,   r = pi_ref / pi

k3 estimates KL(pi || pi_ref), but as a loss it descends KL(pi_ref || pi). Because of the divisions
by std and by length, the gradient is not that of the mean score; Dr. GRPO (arXiv 2503.20783) has
neither: --aggregation dr_grpo. --aggregation token: the mean over all tokens, as in DAPO and TRL.
--process: each reasoning step has a reward, z-scored over all steps of the group; A_t is their sum
from t's step on. The last step's reward is the score; otherwise, stopping early would pay.

    python grpo.py                                      the toy, offline: 2 minutes
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass
from typing import Literal, Optional

import torch

from common import (HfArg, Means, RunConfig, fill, learning_rate, main, mini_batches,
                    require_finite, step_generator)
from common import fail, kl_estimate, masked_mean
from data import draw_problems, load_problems
from evaluation import batch_stats, check_first_step, evaluate, ratio_stats, report, validate
from model import save_policy
from rewards import load_rewards, score, score_steps
from rollout import all_logprobs, load_policy, micro_batches, sample, token_logprobs
from run import Run


@dataclass
class Config(RunConfig):  # the rest is in common.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: Optional[int] = HfArg(default=None, help="prompts per rollout batch")
    group_size: Optional[int] = HfArg(default=None, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: Optional[float] = HfArg(default=None, help="weight of the KL (beta in most papers)")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    process: bool = HfArg(default=False, help="a reward of 0 or 1 per step too (toy only)")
    aggregation: Literal["response", "token", "dr_grpo"] = HfArg(
        default="response", help="loss averaged by response, over all tokens, or as in Dr. GRPO")


# Defaults: TOY; HUB: --model on a GPU; CPU: --model without. completions = prompts * group_size.
TOY = dict(steps=60, lr=2e-4, completions=256, minibatch_size=64, micro_batch_size=64,
           max_new_tokens=32, kl_coef=0.01, eval_prompts=512)
HUB = dict(steps=200, lr=1e-6, completions=256, minibatch_size=128, micro_batch_size=8,
           max_new_tokens=256, kl_coef=0.04, eval_prompts=256)
CPU = dict(HUB, steps=15, lr=1e-5, completions=32, minibatch_size=16, max_new_tokens=48,
           eval_prompts=64)


def group_advantages(scores, group_size):
    """(score - mean) / (std + 1e-4), both of its group: (N,) -> (N,). DeepSeekMath, section 4.1.2.

    std divides by K - 1, as in TRL. If all scores are equal, A is exactly 0, not a rounding error.
    """
    groups = scores.view(-1, group_size)
    mean, std = groups.mean(dim=1, keepdim=True), groups.std(dim=1, keepdim=True)
    constant = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return torch.where(constant, 0, (groups - mean) / (std + 1e-4)).flatten()


def dr_grpo_advantages(scores, group_size):
    """score - mean of its group: (N,) -> (N,). A std would favour groups with one odd answer."""
    groups = scores.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes nothing, but makes equal scores exactly 0
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def process_advantages(step_rewards, step_ends, mask, group_size):
    """A_t = sum of the standardised rewards of all steps that end at or after t -> (N, C).

    step_rewards, step_ends: N lists, of each step its reward and its last token's 0-based index.
    Mean and std are those of all steps of the group. DeepSeekMath, section 4.1.3.
    """
    advantages = 0.0 * mask                                       # (N, C)
    for first in range(0, len(mask), group_size):
        group = range(first, first + group_size)
        pool = torch.tensor([r for i in group for r in step_rewards[i]], dtype=advantages.dtype)
        pool = iter(group_advantages(pool, len(pool)).tolist() if len(pool) else [])
        for i in group:
            for end in step_ends[i]:  # (the notes compare t, a token, with j, a step)
                advantages[i, : end + 1] += next(pool)  # same order as in `pool` above
    return torch.where(mask.bool(), advantages, 0)


def response_mean(values, mask):
    """Mean over each response's tokens, then over responses: (N, C) -> scalar. DeepSeekMath, eq. 3.

    All responses count the same, so that a token of a long wrong answer is punished less.
    """
    values = torch.where(mask.bool(), values, 0)
    return (values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def constant_mean(values, mask, length):
    """Sum / (N * length), the same `length` always: (N, C) -> scalar. Dr. GRPO: no length bias."""
    return torch.where(mask.bool(), values, 0).sum() / (len(mask) * length)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_eps, kl_coef,
              aggregate=response_mean):
    """The clipped loss + kl_coef * k3, all (N, C), advantages also (N,) -> (loss, clip_frac)."""
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).exp()
    unclipped, clipped = -A * ratio, -A * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    log_r = torch.where(mask.bool(), ref_logprobs - logprobs, 0)
    k3 = torch.expm1(log_r) - log_r
    loss = aggregate(torch.maximum(unclipped, clipped) + kl_coef * k3, mask)
    return loss, masked_mean((clipped > unclipped).to(loss.dtype), mask)


def train(cfg):
    fill(cfg, TOY, HUB, CPU, group_size=4)
    if cfg.group_size < 2:
        fail("--group_size 1: completions of a prompt are compared with each other; take 4, say")
    if cfg.process and (cfg.data != "toy" or cfg.aggregation == "dr_grpo"):
        fail("--process: only --data toy has a checker of steps; and it divides by a std, which "
             "--aggregation dr_grpo forbids: leave one out")
    aggregate = dict(response=response_mean, token=masked_mean,
                     dr_grpo=lambda v, m: constant_mean(v, m, cfg.max_new_tokens))[cfg.aggregation]
    run = Run(cfg, "grpo")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    run.open(policy, tokenizer)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = run.load(policy=policy, optimizer=optimizer)  # {}, or the checkpoint with --resume
    before = state.get("before") or evaluate(policy, tokenizer, test, cfg, rewards)

    for step in run.steps():
        # 1. Sample: K completions of each prompt of this step, from softmax(logits / temperature).
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in asked], cfg.group_size,
                       cfg.max_new_tokens, cfg.temperature, generator)
        old_logprobs, mask = batch.logprobs, batch.mask  # N completions, C tokens; mask 0: padding
        run.lap("sample")

        # 2. Score: what each completion earned, and how far from the reference each token is.
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(      # (N, C)
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # only for the log
        check_first_step(step, policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        if cfg.process:
            steps = score_steps(asked, batch, texts, scores, tokenizer)
            advantages = process_advantages(*steps, mask, cfg.group_size)
        elif cfg.aggregation == "dr_grpo":
            advantages = dr_grpo_advantages(scores, cfg.group_size)
        else:
            advantages = group_advantages(scores, cfg.group_size)

        # 4. Update, once per mini-batch. share: a micro-batch's part of the mini-batch's tokens.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, share in micro_batches(batch, minibatch, cfg.micro_batch_size,
                                             None if cfg.kl_coef else advantages):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss, clip_frac = grpo_loss(logprobs, old, ref_logprobs[rows], A, m, cfg.clip_eps,
                                            cfg.kl_coef, aggregate)
                stats.add(share, **ratio_stats(logprobs, old, m), clip_frac=clip_frac)
                share = len(rows) / len(minibatch) if cfg.aggregation != "token" else share
                require_finite(loss, "loss", step, texts, rows, logprobs)
                (loss * share).backward()
                stats.add(share, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.add(1, grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats())
        run.show(step, asked, texts, scores)
        validate(run, step, policy, tokenizer, validation, cfg, rewards)
        run.save(step, policy=policy, optimizer=optimizer, before=before)

    save_policy(policy, tokenizer, run.folder)
    report(before, evaluate(policy, tokenizer, test, cfg, rewards), run.folder)


if __name__ == "__main__":
    main(Config, train)
