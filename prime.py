"""
PRIME (Cui et al., arXiv 2502.01456): a reward for every token, learned from outcomes alone.
Against rloo.py: a second network, the implicit reward model prm, starts as the reference and learns
to tell right answers from wrong ones. How much likelier than the reference it finds a token is then
that token's reward, a process reward for which nobody has labelled a single step:

    q_t  = beta * log(prm / ref)                              implicit reward of a token
    prm_loss = -mean_i s_i log p_i + (1 - s_i) log(1 - p_i)   p_i = sigmoid(sum_t q_t): is i right?
    R_i  = s_i - kl_coef * sum_t kl_t                         outcome; s_i is its score, from 0 to 1
    A_t  = sum_{u >= t} gamma^(u - t) (q_u - mean of mean_t q_j) + R_i - mean of R_j
           means over the other answers j to the same prompt: leave one out, for each part apart
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     ratio_t = pi / pi_old

Why would it find the wrong step? sum_{u <= t} q_u is the model's opinion of the answer so far, as
log-odds of its being right (with beta = 1; arXiv 2412.01981), and a token's reward is what it adds.
The mean of the others' q is no pure baseline: each token pays it, so that it prefers short answers
if it is positive, and long ones if not.

    python prime.py                                      the toy, offline: 3 minutes
    python prime.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F

from common import HfArg, Means, RunConfig, fill, learning_rate, main, mini_batches, require_finite
from common import fail, kl_estimate, masked_mean, ppo_clip_loss, returns_to_go
from data import draw_problems, load_problems
from evaluation import batch_stats, check_first_step, evaluate, ratio_stats, report, validate
from model import save_policy
from rewards import load_rewards, score, score_steps
from rloo import leave_one_out_advantages
from rollout import all_logprobs, load_policy, micro_batches, sample, token_logprobs
from run import Run
from sft import warm_start


@dataclass
class Config(RunConfig):  # the rest is in common.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: Optional[int] = HfArg(default=None, help="prompts per rollout batch")
    group_size: Optional[int] = HfArg(default=None, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: Optional[float] = HfArg(default=None, help="weight of the KL (beta in most papers)")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    gamma: float = HfArg(default=1.0, help="discount per token of the implicit rewards")
    beta: float = HfArg(default=0.05, help="of the implicit reward, beta * log(prm / ref)")
    prm_lr: Optional[float] = HfArg(default=None, help="AdamW learning rate of the reward model")
    accuracy_filter: bool = HfArg(default=False, help="only prompts answered right at times")


# Defaults: TOY; HUB: --model on a GPU; CPU: --model without. completions = prompts * group_size.
TOY = dict(steps=60, lr=2e-4, completions=256, minibatch_size=64, micro_batch_size=64,
           max_new_tokens=32, kl_coef=0.01, eval_prompts=512, prm_lr=1e-3)
HUB = dict(steps=200, lr=5e-7, completions=256, minibatch_size=128, micro_batch_size=8,
           max_new_tokens=256, kl_coef=0.0, eval_prompts=256, prm_lr=1e-6)
CPU = dict(HUB, steps=15, lr=1e-5, completions=32, minibatch_size=16, max_new_tokens=48,
           eval_prompts=64, prm_lr=1e-5)


def implicit_rewards(prm_logprobs, ref_logprobs, beta):
    """q_t = beta * log(prm / ref): (N, C), (N, C) -> (N, C); on padding whatever. PRIME, eq. 3."""
    return beta * (prm_logprobs - ref_logprobs)


def implicit_reward_loss(prm_logprobs, ref_logprobs, mask, labels, beta):
    """Cross-entropy of sigmoid(sum_t q_t) and labels (N,), 0 to 1; the others (N, C) -> scalar.

    PRIME, eq. 4; mean over completions. From the logits, because a sigmoid of 1 has no logarithm.
    """
    rewards = implicit_rewards(prm_logprobs, ref_logprobs, beta)
    logits = torch.where(mask.bool(), rewards, 0).sum(dim=1)                  # (N,)
    return F.binary_cross_entropy_with_logits(logits, labels)


def prime_advantages(process_rewards, scores, mask, group_size, gamma=1.0):
    """Leave one out, for both parts: q (N, C), scores (N,), mask (N, C) -> (N, C). PRIME, eq. 5.

    The authors' code multiplies q_t by K / (K - 1) and subtracts the mean of all K, itself included;
    that is the same for the scores, but it stretches the differences between the tokens of one
    answer. It also discounts the outcome, and whitens the sum; the paper does neither.
    """
    q = torch.where(mask.bool(), process_rewards, 0)
    means = q.sum(dim=1) / mask.sum(dim=1).clamp(min=1)                       # (N,)
    others = means - leave_one_out_advantages(means, group_size)              # their means' mean
    process = returns_to_go(q - others[:, None], mask, gamma)
    outcome = leave_one_out_advantages(scores, group_size)
    return torch.where(mask.bool(), process + outcome[:, None], 0)


def solved_at_times(scores, group_size, low=0.2, high=0.8):
    """Indices (M,) of the completions of prompts with a mean score from low to high: (N,) -> (M,)."""
    accuracy = scores.view(-1, group_size).mean(dim=1, keepdim=True).expand(-1, group_size)
    return ((accuracy >= low) & (accuracy <= high)).flatten().nonzero().flatten()


def find_wrong_steps(process_rewards, step_rewards, step_ends):
    """Is the step of the lowest reward the first wrong one? Of answers with 2 steps and a wrong one.

    -> (share, what chance would give, their number) 
    """
    found, chance = [], []
    for q, right, ends in zip(process_rewards.cumsum(1), step_rewards, step_ends):
        if len(right) > 1 and 0 in right:
            sums = q[ends].diff(prepend=q.new_zeros(1))
            found.append(float(sums.argmin() == right.index(0)))
            chance.append(1 / len(right))
    return found, chance


def train(cfg):
    fill(cfg, TOY, HUB, CPU, group_size=4)
    if cfg.group_size < 2:
        fail("--group_size 1: completions of a prompt are compared with each other; take 4, say")
    run = Run(cfg, "prime")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model or warm_start(cfg.seed, cfg.device), cfg.device)
    run.open(policy, tokenizer, networks=2)  # two to save: is there room on the disk?
    ref_model = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    prm = copy.deepcopy(policy)
    optimizer.add_param_group(dict(params=prm.parameters()))  # its group 1
    state = run.load(policy=policy, optimizer=optimizer, prm=prm)  # {}, or the checkpoint
    before = state.get("before") or evaluate(policy, tokenizer, test, cfg, rewards)

    for step in run.steps():
        # 1. Sample: K completions of each prompt of this step, from softmax(logits / temperature).
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in asked], cfg.group_size,
                       cfg.max_new_tokens, cfg.temperature)
        old_logprobs, mask = batch.logprobs, batch.mask  # N completions, C tokens; mask 0: padding
        run.lap("sample")

        # 2. Score: what each completion earned, and how far from the reference each token is.
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        ref_logprobs, prm_logprobs = (                                           # (N, C)
            all_logprobs(model, batch, cfg.micro_batch_size, cfg.temperature)
            for model in (ref_model, prm))
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # (N, C) old - ref
        q = implicit_rewards(prm_logprobs, ref_logprobs, cfg.beta)               # (N, C)
        check_first_step(step, policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        outcomes = scores - cfg.kl_coef * kl.sum(dim=1)                          # (N,)
        advantages = prime_advantages(q, outcomes, mask, cfg.group_size, cfg.gamma)
        kept = solved_at_times(scores, cfg.group_size).cpu() if cfg.accuracy_filter else torch.arange(len(scores))
        if cfg.data == "toy":
            steps = score_steps(asked, batch, texts, scores, tokenizer)
            found, chance = find_wrong_steps(q, *steps)
            if found:
                each.update(wrong_steps=len(found), wrong_step_found=sum(found)/len(found), chance=sum(chance)/len(chance))
        right = (q.sum(1) > 0) == (scores > .5)
        each.update(prm_accuracy=right.float().mean(), q_std=masked_mean(q**2, mask)**.5, auc=((q.sum(1)[scores>.5][:,None] > q.sum(1)[scores<.5][None]).float().mean()))

        # 4. Update, once per mini-batch. share: a micro-batch's part of the mini-batch's tokens.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg, cfg.lr)
        optimizer.param_groups[1]["lr"] = learning_rate(step, cfg, cfg.prm_lr)
        for minibatch in mini_batches(len(kept), cfg.minibatch_size, cfg.group_size, cfg.epochs):
            optimizer.zero_grad()
            for rows, share in micro_batches(batch, kept[minibatch], cfg.micro_batch_size):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss, clip_frac = ppo_clip_loss(logprobs, old, A, m, cfg.clip_eps)
                stats.add(share, **ratio_stats(logprobs, old, m), clip_frac=clip_frac)
                require_finite(loss, "loss", step, texts, rows, logprobs)
                (loss * share).backward()
                stats.add(share, loss=loss)
                share = len(rows) / len(minibatch)
                prm_logprobs = token_logprobs(prm, batch, rows, cfg.temperature)
                error = implicit_reward_loss(prm_logprobs, ref_logprobs[rows], m, scores[rows], cfg.beta)
                require_finite(error, "loss of the reward model", step, texts, rows, prm_logprobs)
                (error * share).backward()
                stats.add(share, prm_loss=error)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            torch.nn.utils.clip_grad_norm_(prm.parameters(), cfg.max_grad_norm,
                                           error_if_nonfinite=True)
            optimizer.step()
            stats.add(1, grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats())
        run.show(step, asked, texts, scores)
        validate(run, step, policy, tokenizer, validation, cfg, rewards)
        run.save(step, policy=policy, optimizer=optimizer, before=before, prm=prm)

    save_policy(policy, tokenizer, run.folder)
    report(before, evaluate(policy, tokenizer, test, cfg, rewards), run.folder)


if __name__ == "__main__":
    main(Config, train)
