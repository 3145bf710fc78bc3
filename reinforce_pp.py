"""
REINFORCE++ (Jian Hu, arXiv 2501.03262): the oldest policy gradient, steadied by the tricks of PPO,
without PPO's critic. The policy writes completions, a reward scores them, and the tokens of those
that did better than usual become more likely, the others less:

    r_t   = [t is the last token] * score - kl_coef * kl_t   token reward; kl_t = log(pi / pi_ref)
    G_t   = r_t + r_{t+1} + ... + r_T                        return: all that comes from it on
    A_t   = (G_t - mean) / std                               advantage; over all tokens of the batch
    loss  = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - clip_eps, 1 + clip_eps) A_t)
    ratio = pi / pi_old                                      pi_old is the policy that sampled

The KL in the reward keeps the policy near the SFT model it started from, pi_ref. The z-score says
what "usual" is, for which PPO trains a critic. The clip lets one batch serve several updates: a
token whose probability has already moved by clip_eps is left alone.

This is version 1 of the paper (Jan 2025), the one in the notes; it z-scores and clips the scores
too (--reward_clip). Later versions add "REINFORCE++ with baseline", here --group_baseline: several
completions per prompt, A = score - their mean, z-scored over the batch; and the KL leaves the
reward for the loss, as k2, whose gradient is that of KL(pi || pi_ref).

    python reinforce_pp.py                                      the toy, without network: 2 minutes
    python reinforce_pp.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

Expect of the toy: exact match on held-out problems (sampled) from about 0.6 to above 0.9, because
answers that show their work go from half of all to nearly all. Watch the score, not the loss.
"""
import copy
from dataclasses import dataclass
from typing import Optional

import torch

import toy
from common import (HfArg, Means, RunConfig, fail, fill, kl_estimate, learning_rate, main,
                    masked_mean, normalize_rewards, ppo_clip_loss, ratio_stats, require_finite,
                    returns_to_go, seed_everything, token_rewards, whiten)
from data import (batch_stats, check_first_step, decode, draw_problems, evaluate, load_reward,
                  report, score, validate)
from rollout import (all_logprobs, load_policy, micro_batches, mini_batches, sample, token_logprobs)
from run import Run, check_saving, save_policy
from sft import warm_start


@dataclass
class Config(RunConfig):
    reward: str = HfArg(default="last_number", help="reward function")
    prompts_per_step: Optional[int] = HfArg(default=None, help="prompts per rollout batch")
    group_size: Optional[int] = HfArg(default=None, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: Optional[float] = HfArg(default=None, help="weight of the KL, beta in the paper")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    reward_clip: float = HfArg(default=5.0, help="clip z-scored rewards to this; 0: raw rewards")
    gamma: float = HfArg(default=1.0, help="discount per token")
    group_baseline: bool = HfArg(default=False, help="the paper's later variant")


# The defaults of two worlds. HUB follows the paper's experiments on mathematics.
TOY = dict(steps=60, lr=2e-4, prompts_per_step=256, group_size=1, minibatch_size=64,
           micro_batch_size=64, max_new_tokens=32, kl_coef=0.01, eval_prompts=512)
HUB = dict(steps=200, lr=1e-6, prompts_per_step=256, group_size=1, minibatch_size=128,
           micro_batch_size=8, max_new_tokens=256, kl_coef=0.001, eval_prompts=256)
HUB_ON_CPU = dict(HUB, steps=10, prompts_per_step=16, minibatch_size=16, max_new_tokens=64,
                  eval_prompts=32)


def reinforce_pp_advantages(scores, kl, mask, kl_coef, gamma=1.0):
    """z-score of score - kl_coef * sum_{i>=t} kl_i: (N,), (N, C), (N, C) -> (N, C). Notes, 2.5."""
    rewards = token_rewards(scores, kl, mask, kl_coef)
    return whiten(returns_to_go(rewards, mask, gamma), mask)


def reinforce_pp_baseline_advantages(scores, mask, group_size):
    """z-score of the score minus its group's mean (itself included): (N,), (N, C) -> (N, C).

    The std is the batch's, not the group's as in GRPO: a group that nearly agrees stays quiet.
    """
    groups = scores.view(-1, group_size)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    return whiten(advantages[:, None].expand_as(mask), mask)


def train(cfg):
    defaults = TOY, HUB, HUB_ON_CPU
    if cfg.group_baseline:  # as many completions, but four to a prompt
        defaults = [{**row, "group_size": 4, "prompts_per_step": row["prompts_per_step"] // 4}
                    for row in defaults]
    fill(cfg, *defaults)
    if cfg.group_baseline and cfg.group_size < 2:
        fail("--group_size 1 leaves --group_baseline nothing to compare with; take 4 or more")
    run = Run(cfg, "reinforce_pp")
    start = cfg.model or warm_start(cfg.seed, cfg.device)
    policy, tokenizer = load_policy(start, cfg.device)
    check_saving(policy, tokenizer, run.folder)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    reward = load_reward(cfg.reward)
    problems, validation, test = toy.load_problems(cfg, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    seed_everything(cfg.seed)
    state = run.load(policy=policy, optimizer=optimizer)
    before = state.get("before") or evaluate(policy, tokenizer, test, cfg)

    for step in run.steps():
        # 1. Sample: K completions of each prompt of this step, from softmax(logits / temperature).
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in asked], cfg.group_size,
                       cfg.max_new_tokens, cfg.temperature)
        old_logprobs, mask = batch.logprobs, batch.mask                            # (N, C)
        run.lap("sample")

        # 2. Score: what each completion earned, and how far from the reference each token is.
        texts = decode(tokenizer, batch)
        scores = score(reward, asked, texts, batch, step)                          # (N,)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(        # (N, C)
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs)                               # (N, C)
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)
        run.lap("score")

        # 3. Advantages: how much better than usual was each token? Constants from here on.
        if cfg.group_baseline:
            advantages = reinforce_pp_baseline_advantages(scores, mask, cfg.group_size)
        else:
            shaped = normalize_rewards(scores, cfg.reward_clip) if cfg.reward_clip else scores
            advantages = reinforce_pp_advantages(shaped, kl, mask, cfg.kl_coef, cfg.gamma)

        # 4. Update: mini-batches of whole groups; micro-batches only add up to one of them.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        for minibatch in mini_batches(batch, cfg.minibatch_size, cfg.group_size, cfg.epochs):
            optimizer.zero_grad()
            for rows, share in micro_batches(batch, minibatch, cfg.micro_batch_size):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)    # (R, C)
                loss, clip_frac = ppo_clip_loss(logprobs, old_logprobs[rows], advantages[rows],
                                                mask[rows], cfg.clip_eps)
                if cfg.group_baseline:
                    k2 = kl_estimate(logprobs, ref_logprobs[rows], "k2")
                    loss = loss + cfg.kl_coef * masked_mean(k2, mask[rows])
                require_finite(loss, "loss", step, texts, rows, logprobs)
                (loss * share).backward()
                stats.add(share, **ratio_stats(logprobs, old_logprobs[rows], mask[rows]),
                          clip_frac=clip_frac, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
        run.lap("update")

        # 5. Log. The loss comes last: A has mean 0, so it is near 0 when all is well.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), grad_norm=grad_norm,
                lr=learning_rate(step, cfg), **stats())
        run.show(step, asked, texts, scores)
        validate(run, step, policy, tokenizer, validation, cfg)
        run.save(step, policy=policy, optimizer=optimizer, before=before)

    save_policy(policy, tokenizer, run.folder)
    report(before, evaluate(policy, tokenizer, test, cfg), run.folder)


if __name__ == "__main__":
    main(Config, train)
