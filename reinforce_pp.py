"""
REINFORCE++ (Jian Hu, arXiv 2501.03262): REINFORCE with PPO's ratio and clip, without its critic.
Against reinforce.py: a token answers for the KL from itself on only; the baseline is the mean of
this batch; ratio and clip allow several updates per batch; the loss is a mean over tokens:

    r_t  = score (last token only) - kl_coef * kl_t           reward; kl_t = log(pi_old / pi_ref)
    G_t  = r_t + gamma * G_{t+1}                              return: all that comes from t on
    A_t  = (G_t - mean) / std                                 advantage, over the batch's tokens
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     ratio_t = pi / pi_old

pi_old is the policy that sampled the batch; the ratio corrects for the updates since then. When it
has passed 1 + eps (A_t > 0) or 1 - eps (A_t < 0), the clip ends that token's gradient. The scores
are first z-scored and clipped to +- reward_clip. That is version 1 of the paper. In later ones,
--group_baseline, A is the z-score of (score - mean score of the K completions of its prompt), and
the KL is in the loss, as k2 = log(pi / pi_ref)^2 / 2.

    python reinforce_pp.py                                      the toy, no network: half a minute
    python reinforce_pp.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass

import torch

from common import learning_rate, mini_batches
from common import (kl_estimate, masked_mean, normalize_rewards, ppo_clip_loss, returns_to_go,
                    token_rewards, whiten)
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=256, help="prompts per rollout batch")
    group_size: int = HfArg(default=1, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: float = HfArg(default=0.01, help="weight of the KL (beta in most papers)")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    reward_clip: float = HfArg(default=5.0, help="clip z-scored scores to this; 0: raw scores")
    gamma: float = HfArg(default=1.0, help="discount per token")
    group_baseline: bool = HfArg(default=False, help="later variant: no reward_clip, no gamma")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=1e-6, minibatch_size=128, micro_batch_size=8, max_new_tokens=256,
            kl_coef=0.001, eval_prompts=256)


def reinforce_pp_advantages(scores, kl, mask, kl_coef, gamma=1.0):
    """A_t = z-score of G_t over the batch's tokens: (N,), (N, C), (N, C) -> (N, C)."""
    rewards = token_rewards(scores, kl, mask, kl_coef)
    return whiten(returns_to_go(rewards, mask, gamma), mask)


def reinforce_pp_baseline_advantages(scores, mask, group_size):
    """z-score, over the batch, of (score - mean of its group): (N,), (N, C) -> (N, C)."""
    groups = scores.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes nothing, but makes equal scores exactly 0
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    return whiten(advantages[:, None].expand_as(mask), mask)


def train(cfg):
    run = Run(cfg, "reinforce_pp")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    run.open(policy, tokenizer, validation, test, rewards, optimizer=optimizer)

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
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # (N, C) old - ref
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        if cfg.group_baseline:
            advantages = reinforce_pp_baseline_advantages(scores, mask, cfg.group_size)
        else:
            clipped = normalize_rewards(scores, cfg.reward_clip) if cfg.reward_clip else scores
            advantages = reinforce_pp_advantages(clipped, kl, mask, cfg.kl_coef, cfg.gamma)

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, minibatch, cfg.micro_batch_size):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss, clip_frac = ppo_clip_loss(logprobs, old, A, m, cfg.clip_eps)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=clip_frac)
                if cfg.group_baseline:
                    k2 = kl_estimate(logprobs, ref_logprobs[rows], "k2")
                    loss = loss + cfg.kl_coef * masked_mean(k2, m)
                (loss * by_token).backward()
                stats.add_parts(by_token, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats())
        run.show(step, asked, texts, scores)
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
