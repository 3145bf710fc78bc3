"""
REINFORCE (Williams, 1992). The policy pi answers prompts x with completions y, and each completion
gets a score. A completion is pushed up, to be more likely, if its score, minus a KL penalty, is
above a baseline, and pushed down if it is below. pi_ref is a copy of the policy from before the
training; the KL penalty keeps pi near it.

    kl_t = log(pi(y_t | x, y_<t) / pi_ref(y_t | x, y_<t))     of each token of the completion
    A_i  = score_i - kl_coef * sum_t kl_t - b                 advantage of completion i; b: baseline
    loss = -mean_i A_i * sum_t log pi(y_t | x, y_<t)          mean over the completions of the batch

Why this loss? The training shall raise the expected score of a prompt's completions y. Nobody can
differentiate a score, but its expectation depends on the weights through pi, which has a gradient:

    E[score]      = sum_y pi(y) score(y)                      over all possible completions
    grad E[score] = sum_y score(y) grad pi(y)
                  = sum_y pi(y) score(y) grad log pi(y)       because grad pi = pi * grad log pi
                  = E[score(y) grad log pi(y)]

The last line is an expectation under pi. So the mean over completions that pi has sampled estimates
it without bias. This is the policy gradient, and the loss is made to have it, with a minus, as its
gradient: one step down the loss is a step up E[score]. The probability of a completion is the
product of those of its tokens, so log pi(y) = sum_t log pi(y_t | x, y_<t).

Any number b, the same for all y, can be subtracted from the scores, because

    E[b * grad log pi(y)] = b * sum_y pi(y) grad log pi(y) = b * grad sum_y pi(y) = b * grad 1 = 0

This does not change the expected gradient, but a good b makes it less noisy: without one, a score
of 1 for each completion would push up all that happened to be sampled. The KL penalty turns
E[score] into

    J    = E[score] - kl_coef * KL(pi || pi_ref)              mean over prompts

because the mean of sum_t kl_t under pi is this KL. The penalty depends on pi itself, which adds
-kl_coef * E[grad log pi(y)] to the gradient. That is 0, as the line above says with b = kl_coef.

No gradient flows through A_i. The first step has b = 0. Each step uses the old b for its A_i and
then updates b, as --baseline says:

    ema             b = decay * b + (1 - decay) * mean score of the batch; first, b = that mean
    running_mean    b = mean of all scores so far

There is one update per batch, because the expectation needs completions of the policy as it is now.
After the update they are those of an older policy. reinforce_pp.py and ppo.py make several
updates, and correct for that in part. This script makes one, with a larger learning rate.

By default, a step samples 256 completions, one for each prompt, and makes one update. The reward
last_number gives 0 to a completion that is cut off.

    python reinforce.py                                      the toy, no network: half a minute
    python reinforce.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.97 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from common import kl_estimate, learning_rate, mini_batches
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, OnlineConfig, check
from plumbing.model import load_policy
from plumbing.parallel import sum_gradients
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Run


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --lr, are in plumbing/flags.py
    lr: float = HfArg(default=2e-6, help="AdamW learning rate at its peak")
    minibatch_size: None = field(default=None, init=False)  # no flag: there is one update per step
    prompts_per_step: int = HfArg(default=256, help="prompts of a step")
    group_size: int = HfArg(default=1, help="completions of each prompt, K")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the reference (beta in papers)")
    baseline: Literal["ema", "running_mean"] = HfArg(default="ema", help="mean of past scores")
    decay: float = HfArg(default=0.9, help="ema: how much of the old baseline stays in the new one")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=5e-4, micro_batch_size=64, max_new_tokens=32, kl_coef=0.01,
           eval_prompts=512)


def ema_baseline(baseline, scores, decay):
    """decay * baseline + (1 - decay) * mean score: scalar or None (first step), (N,) -> scalar."""
    return scores.mean() if baseline is None else decay * baseline + (1 - decay) * scores.mean()


def running_mean_baseline(mean, count, scores):
    """Mean of all scores so far: that of `count` old ones, and new ones (N,) -> (mean, count)."""
    total = mean * count + scores.sum()
    return total / (count + len(scores)), count + len(scores)


def reinforce_loss(logprobs, advantages):
    """-A_i * log pi(y_t) of each token: (N, C), (N,) -> (N, C). Williams, 1992."""
    return -advantages[:, None] * logprobs


def train(cfg):
    cfg = check(cfg)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, "reinforce", policy, tokenizer, problems, rewards, optimizer=optimizer)
    baseline, count = run.kept.get("baseline"), run.kept.get("count", 0)  # as saved, with --resume

    for step in run.steps():
        # 1. Sample K completions of each prompt of this step from softmax(logits / temperature).
        # The completions of a prompt are neighbouring rows: prompt i has rows i K to i K + K - 1.
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        step_problems = draw_problems(problems.train, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in step_problems],
                       cfg.group_size, cfg.max_new_tokens, cfg.temperature, generator)
        old_logprobs, mask = batch.logprobs, batch.mask  # (N, C) each; both are 0 on padding

        # 2. Score the completions, and measure how far each token is from the reference policy.
        # score() returns texts, scores (N,) and, if there are several rewards, their means.
        texts, scores, reward_means = score(rewards, step_problems, batch, tokenizer)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)  # without a reference, kl is 0
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")  # (N, C); 0 on padding

        # 3. Advantages: how much better than the baseline? No gradient flows through them.
        advantages = scores - cfg.kl_coef * kl.sum(dim=1) - (baseline or 0)      # (N,)
        if cfg.baseline == "ema":
            baseline = ema_baseline(baseline, scores, cfg.decay)
        else:
            baseline, count = running_mean_baseline(baseline or 0, count, scores)

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), len(scores), cfg.group_size, 1, generator):
            optimizer.zero_grad()
            share = mask / len(minibatch)  # a sum over tokens, and a mean over completions
            for rows in micro_batches(batch, minibatch, cfg.micro_batch_size):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (n, C)
                losses = reinforce_loss(logprobs, advantages[rows])              # (n, C)
                loss = (losses * share[rows]).sum()
                loss.backward()
                run.count(loss=loss)
            sum_gradients(policy)  # over the processes of torchrun
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
            run.end_minibatch(grad_norm=grad_norm)

        # 5. Log, and save when due. The score shows progress. The loss is there for its gradient.
        run.kept.update(baseline=baseline, count=count)
        run.log(step, step_problems, texts, scores, kl, batch, **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
