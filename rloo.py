"""
RLOO (Ahmadian et al., arXiv 2402.14740): REINFORCE; the other answers to a prompt are the baseline.
Against reinforce_pp.py: K completions of each prompt, no z-score, no discount; the KL is summed
over the completion into its reward, so that all its tokens have one advantage:

    R_i  = score_i - kl_coef * sum_t kl_t                     reward; kl_t = log(pi_old / pi_ref)
    A_i  = R_i - mean of the R_j, j != i, of its prompt       advantage: leave one out
    loss = -mean_t min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i)     ratio_t = pi / pi_old

The other answers do not depend on this one, which leaves the gradient unbiased (but for the token
mean: its denominator is random); a mean with R_i in it would shrink it to (K - 1) / K. The notes
call R_i minus that mean the baseline, but it is A; and they average A over the group, which is 0.

The paper's single update per batch needs no ratio. For several, each token has one of its own, as
in verl and OpenRLHF; with --sequence_ratio each completion has one, as in TRL.

    python rloo.py                                      the toy, without network: 2 minutes
    python rloo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: it starts with 0.6 of the held-out problems right and half of all answers
showing their work, and ends at 0.95 and nearly all. Watch the score, not the loss.
"""
import copy
from dataclasses import dataclass
from typing import Optional

import torch

from common import (HfArg, Means, RunConfig, fail, fill, kl_estimate, learning_rate, main,
                    masked_mean, mini_batches, ppo_clip_loss, require_finite)
from data import draw_problems, load_problems
from evaluation import batch_stats, check_first_step, evaluate, ratio_stats, report, validate
from model import save_policy
from rewards import load_rewards, score
from rollout import all_logprobs, load_policy, micro_batches, sample, token_logprobs
from run import Run
from sft import warm_start


@dataclass
class Config(RunConfig):
    reward: str = HfArg(default="last_number", help="name or file.py:function; a,b: their sum")
    prompts_per_step: Optional[int] = HfArg(default=None, help="prompts per rollout batch")
    group_size: Optional[int] = HfArg(default=None, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: Optional[float] = HfArg(default=None, help="weight of the KL, beta in the paper")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    sequence_ratio: bool = HfArg(default=False, help="one ratio per completion, as TRL has it")


# completions = prompts * group_size. HUB: usual for mathematics; CPU: moves within minutes.
TOY = dict(steps=60, lr=2e-4, completions=256, minibatch_size=64, micro_batch_size=64,
           max_new_tokens=32, kl_coef=0.01, eval_prompts=512)
HUB = dict(steps=200, lr=1e-6, completions=256, minibatch_size=128, micro_batch_size=8,
           max_new_tokens=256, kl_coef=0.001, eval_prompts=256)
CPU = dict(HUB, steps=15, lr=1e-5, completions=32, minibatch_size=16, max_new_tokens=48,
           eval_prompts=64)


def leave_one_out_advantages(rewards, group_size):
    """R_i - the mean of the other rewards of its group: (N,) -> (N,). Kool et al., 2019."""
    groups = rewards.view(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def sequence_ratio_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's loss with one ratio per completion, as in TRL; advantages (N,) -> (loss, clip_frac).

    That ratio is the product of its tokens' and explodes with the length: 0.005 nats per token make
    148 after 1000 tokens. Long completions are clipped at once, and teach nothing any more.
    """
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).sum(dim=1).exp()     # (N,)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    active = (clipped > unclipped)[:, None].expand_as(mask).to(ratio.dtype)
    return torch.maximum(unclipped, clipped).mean(), masked_mean(active, mask)


def train(cfg):
    fill(cfg, TOY, HUB, CPU, group_size=4)
    if cfg.group_size < 2:
        fail("--group_size 1 leaves RLOO nothing to compare with: take 4, say")
    run = Run(cfg, "rloo")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model or warm_start(cfg.seed, cfg.device), cfg.device)
    run.open(policy, tokenizer)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = run.load(policy=policy, optimizer=optimizer)  # {}, or the checkpoint with --resume
    before = state.get("before") or evaluate(policy, tokenizer, test, cfg, rewards)

    for step in run.steps():
        # 1. Sample: K completions of each prompt of this step, from softmax(logits / temperature).
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in asked], cfg.group_size,
                       cfg.max_new_tokens, cfg.temperature)
        old_logprobs, mask = batch.logprobs, batch.mask       # (N, C): completions, their tokens
        if cfg.sequence_ratio:  # the sampler's bf16 rounding would add up over a whole completion
            old_logprobs = all_logprobs(policy, batch, cfg.micro_batch_size, cfg.temperature)
        run.lap("sample")

        # 2. Score: what each completion earned, and how far from the reference each token is.
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(      # (N, C)
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # (N, C)
        check_first_step(step, policy, batch, scores, kl, cfg)
        run.lap("score")

        # 3. Advantages: how much better than usual was it? Constants from here on.
        advantages = leave_one_out_advantages(scores - cfg.kl_coef * kl.sum(dim=1), cfg.group_size)

        # 4. Update, once per mini-batch. share: the fraction of its tokens in a micro-batch.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs):
            optimizer.zero_grad()
            for rows, share in micro_batches(batch, minibatch, cfg.micro_batch_size):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                if cfg.sequence_ratio:
                    loss, clip_frac = sequence_ratio_loss(logprobs, old, A, m, cfg.clip_eps)
                else:
                    loss, clip_frac = ppo_clip_loss(logprobs, old, A[:, None], m, cfg.clip_eps)
                stats.add(share, **ratio_stats(logprobs, old, m), clip_frac=clip_frac)
                share = len(rows) / len(minibatch) if cfg.sequence_ratio else share
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
