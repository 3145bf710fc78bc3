"""
REINFORCE++: REINFORCE with the tricks of PPO, and without its critic (Hu, arXiv 2501.03262).
"""
from dataclasses import dataclass
from typing import Optional

import torch

import toy
from common import (HfArg, Means, RunConfig, fail, fill, kl_estimate, learning_rate, main,
                    masked_mean, normalize_rewards, ppo_clip_loss, ratio_stats, require_finite,
                    returns_to_go, seed_everything, token_rewards, whiten)
from data import (batch_stats, check_first_step, decode, draw_problems, encode, evaluate,
                  load_reward, report, score)
from rollout import (all_logprobs, load_policy, micro_batches, mini_batches, sample, save_policy,
                     token_logprobs)
from run import Run
from sft import warm_start


@dataclass
class Config(RunConfig):
    reward: str = HfArg(default="last_number", help="reward function")
    prompts_per_step: Optional[int] = HfArg(default=None, help="prompts per rollout batch")
    group_size: Optional[int] = HfArg(default=None, help="completions per prompt")
    temperature: float = HfArg(default=1.0, help="sampling temperature, also of all log-probs")
    kl_coef: Optional[float] = HfArg(default=None, help="weight of the KL, beta in the paper")
    clip_eps: float = HfArg(default=0.2, help="PPO clip range of the ratio")
    reward_clip: float = HfArg(default=5.0, help="z-score the rewards and clip them to this; 0: don't")
    gamma: float = HfArg(default=1.0, help="discount per token")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    group_baseline: bool = HfArg(default=False, help="the paper's later variant")


TOY = dict(steps=60, lr=2e-4, prompts_per_step=256, group_size=1, minibatch_size=64, micro_batch_size=64,
           max_new_tokens=32, kl_coef=0.01, eval_prompts=512)
HUB = dict(steps=200, lr=1e-6, prompts_per_step=256, group_size=1, minibatch_size=128, micro_batch_size=8,
           max_new_tokens=256, kl_coef=0.001, eval_prompts=256)
HUB_ON_CPU = dict(HUB, steps=10, prompts_per_step=8, minibatch_size=8, max_new_tokens=64, eval_prompts=16)


def reinforce_pp_advantages(scores, kl, mask, kl_coef, gamma=1.0):
    return whiten(returns_to_go(token_rewards(scores, kl, mask, kl_coef), mask, gamma), mask)


def reinforce_pp_baseline_advantages(scores, mask, group_size):
    groups = scores.view(-1, group_size)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    return whiten(advantages[:, None].expand_as(mask), mask)


def train(cfg):
    fill(cfg, TOY, HUB, HUB_ON_CPU)
    run = Run(cfg, "reinforce_pp")
    source = cfg.model or warm_start(cfg.seed)
    policy, tokenizer = load_policy(source, cfg.device)
    ref_model, _ = load_policy(source, cfg.device)
    ref_model.requires_grad_(False)
    reward = load_reward(cfg.reward)
    problems = encode(toy.problems(cfg.data, "train", 16384), tokenizer)
    held_out = encode(toy.problems(cfg.data, "test", cfg.eval_prompts), tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    seed_everything(cfg.seed)
    state = run.load(policy=policy, optimizer=optimizer)
    N = cfg.prompts_per_step * cfg.group_size
    before = state.get("before") or evaluate(policy, tokenizer, held_out, cfg.max_new_tokens, N)

    for step in run.steps():
        # 1. sample
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [p["ids"] for p in asked], cfg.group_size, cfg.max_new_tokens, cfg.temperature)
        run.lap("sample")
        # 2. score
        texts = decode(tokenizer, batch)
        scores = score(reward, asked, texts, batch, step)
        ref_logprobs = all_logprobs(ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(batch.logprobs, ref_logprobs)
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg.temperature, cfg.micro_batch_size)
        run.lap("score")
        # 3. advantages
        if cfg.group_baseline:
            advantages = reinforce_pp_baseline_advantages(scores, batch.mask, cfg.group_size)
        else:
            rewards = normalize_rewards(scores, cfg.reward_clip) if cfg.reward_clip else scores
            advantages = reinforce_pp_advantages(rewards, kl, batch.mask, cfg.kl_coef, cfg.gamma)
        # 4. update
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        for mini in mini_batches(N, cfg.minibatch_size, cfg.group_size, cfg.epochs):
            optimizer.zero_grad()
            for rows, share in micro_batches(mini, batch.mask, cfg.micro_batch_size):
                old, mask = batch.logprobs[rows], batch.mask[rows]
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)
                loss, clip_frac = ppo_clip_loss(logprobs, old, advantages[rows], mask, cfg.clip_eps)
                if cfg.group_baseline:
                    loss = loss + cfg.kl_coef * masked_mean(kl_estimate(logprobs, ref_logprobs[rows], "k2"), mask)
                (loss * share).backward()
                stats.add(share, **ratio_stats(logprobs, old, mask), clip_frac=clip_frac, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
        run.lap("update")
        # 5. log
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), grad_norm=grad_norm, lr=learning_rate(step, cfg), **stats())
        run.save(step, policy=policy, optimizer=optimizer, before=before)

    save_policy(policy, tokenizer, run.folder)
    report(before, evaluate(policy, tokenizer, held_out, cfg.max_new_tokens, N), len(held_out))


if __name__ == "__main__":
    main(Config, train)
