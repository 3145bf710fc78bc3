"""
RLOO (Ahmadian et al., arXiv 2402.14740): REINFORCE; a prompt's other completions are the baseline.
Against reinforce_pp.py: K completions of each prompt, no z-score, no discount; the KL of the whole
completion is part of its one reward, so that all its tokens have the same advantage:

    R_i  = score_i - kl_coef * sum_t kl_t                     reward; kl_t = log(pi_old / pi_ref)
    A_i  = R_i - mean of the R_j, j != i, of its prompt       advantage: leave one out
    loss = -mean_t min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i)     ratio_t = pi / pi_old

The other completions do not depend on this one, so the gradient stays unbiased (apart from the mean
over tokens, whose number is random). With R_i in the mean, A would be (K - 1) / K of what it is.

The paper makes one update per batch, so it needs no ratio. For several, each token has its own, as
in the libraries verl and OpenRLHF; with --sequence_ratio each completion has one, as in TRL.

    python rloo.py                                      the toy, offline: 2 minutes
    python rloo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass
from typing import Optional

import torch

from common import (HfArg, Means, RunConfig, fill, learning_rate, main, mini_batches,
                    require_finite, step_generator)
from common import fail, kl_estimate, masked_mean, ppo_clip_loss
from data import draw_problems, load_problems
from evaluation import batch_stats, check_first_step, evaluate, ratio_stats, report, validate
from model import save_policy
from rewards import load_rewards, score
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
    sequence_ratio: bool = HfArg(default=False, help="one ratio per completion, as TRL has it")


# Defaults: TOY; HUB: --model on a GPU; CPU: --model without. completions = prompts * group_size.
TOY = dict(steps=60, lr=2e-4, completions=256, minibatch_size=64, micro_batch_size=64,
           max_new_tokens=32, kl_coef=0.01, eval_prompts=512)
HUB = dict(steps=200, lr=1e-6, completions=256, minibatch_size=128, micro_batch_size=8,
           max_new_tokens=256, kl_coef=0.001, eval_prompts=256)
CPU = dict(HUB, steps=15, lr=1e-5, completions=32, minibatch_size=16, max_new_tokens=48,
           eval_prompts=64)


def leave_one_out_advantages(rewards, group_size):
    """R_i - the mean of the other rewards of its group: (N,) -> (N,). Kool et al., 2019."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes nothing, but makes equal rewards exactly 0
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()  # the notes call this the baseline, and average it: 0


def sequence_ratio_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's loss with one ratio per completion, as in TRL; advantages (N,) -> (loss, clip_frac).

    It is the product of the tokens' ratios: 1.005 per token make 147 after 1000 tokens. So a long
    completion is soon clipped and teaches nothing; or, if A < 0, is not, and counts 147 times.
    """
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).sum(dim=1).exp()     # (N,)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    active = (clipped > unclipped)[:, None].expand_as(mask).to(ratio.dtype)
    return torch.maximum(unclipped, clipped).mean(), masked_mean(active, mask)


def train(cfg):
    fill(cfg, TOY, HUB, CPU, group_size=4)
    if cfg.group_size < 2:
        fail("--group_size 1: completions of a prompt are compared with each other; take 4, say")
    run = Run(cfg, "rloo")
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
        if cfg.sequence_ratio:  # the sampler's bf16 rounding errors would add up over the tokens
            old_logprobs = all_logprobs(policy, batch, cfg.micro_batch_size, cfg.temperature)
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(      # (N, C)
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # (N, C) old - ref
        check_first_step(step, policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        advantages = leave_one_out_advantages(scores - cfg.kl_coef * kl.sum(dim=1), cfg.group_size)

        # 4. Update, once per mini-batch. share: a micro-batch's part of the mini-batch's tokens.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, share in micro_batches(batch, minibatch, cfg.micro_batch_size, advantages):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                if cfg.sequence_ratio:
                    loss, clip_frac = sequence_ratio_loss(logprobs, old, A, m, cfg.clip_eps)
                else:
                    loss, clip_frac = ppo_clip_loss(logprobs, old, A[:, None], m, cfg.clip_eps)
                stats.add(share, **ratio_stats(logprobs, old, m), clip_frac=clip_frac)
                share = len(rows) / len(minibatch) if cfg.sequence_ratio else share  # completions
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
