"""
REINFORCE++ (Jian Hu et al., arXiv 2501.03262): REINFORCE with the clipped loss of PPO, and without
PPO's critic, a second network. The policy pi answers prompts with completions, and each completion
gets a score. A token becomes more likely if the return from this token on is above the mean return
of the batch's tokens, and less likely if it is below. pi_ref is a copy of the policy from before
the training; the KL keeps the policy near it.

    s    = clip((score - mean) / std, -c, c)                  over the N completions; c: reward_clip
    kl_t = log(pi_old / pi_ref)                               of token t; pi_old sampled the batch
    r_t  = [t is the last token] * s - kl_coef * kl_t         reward of token t
    G_t  = r_t + gamma * G_{t+1}                              return: all reward from token t on
    A_t  = (G_t - mean) / std                                 advantage; over all the batch's tokens
    ratio_t = pi / pi_old                                     of token t
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     over the mini-batch

Why a ratio, a clip and a min? After the first update, the completions are those of an older policy.
For one token, E_old[ratio * f] = E[f], so the ratio corrects for this; the tokens before it remain
those that pi_old chose. But a large ratio makes the estimate noisy. So a token gets no further push
once its ratio has passed 1 + eps (if A_t > 0) or 1 - eps (if A_t < 0): there the clipped value is
the smaller one, and it is constant. A ratio beyond the other limit has moved the wrong way, because
of other tokens. There the min takes the value without the clip, whose gradient brings it back.

The scores are normalised so that their size, compared with the KL, does not depend on the reward.
The paper's first version does this; later ones take raw scores, here --reward_clip 0. The returns
are normalised to subtract the baseline, which is their mean, and to fix the size of the advantages.
The mean is subtracted from G_t and not from r_t: a constant subtracted from each r_t would
enter G_t many times for an early token and only a few times for a late one. A completion of 30
tokens counts ten times as much as one of 3 in this mean, in this std and in the loss.

The scores are divided by their std, the KL is not. If 95 % of 0/1 scores are 1, their std is 0.22,
and kl_coef weighs 4.6 times less than with raw scores. If all scores are equal, s is 0. Then A_t is
made of the KL from t on alone, and its differences, even small ones, get a std of 1: that step
pulls towards pi_ref at full strength. If pi still equals pi_ref, the computed KL is only rounding
errors, and AdamW can take a full step on them. docs/gradients.md has an example.

The paper has a second variant, REINFORCE++ with baseline, here --group_baseline. It needs K > 1
completions of each prompt, such as --group_size 4. --reward_clip and --gamma are not used.

    d_i  = score_i - mean score of the K completions of the prompt
    A_i  = (d_i - mean) / std                                 over all the batch's tokens
    loss = the loss above + kl_coef * mean_t k2_t             k2 = log(pi / pi_ref)^2 / 2

By default, a step samples 256 completions, one for each prompt, and makes 2 updates, or 4 on the
toy. The reward last_number gives 0 to a completion that is cut off.

Compared with reinforce.py:
  - the return of a token has the KL of this token and the later ones, not of the whole completion;
  - the baseline is the mean return of this batch, not a mean of past scores;
  - scores and returns are divided by their std;
  - the ratio corrects for updates since the sampling, so several updates per batch are possible;
  - the loss is a mean over tokens, not over completions.

    python reinforce_pp.py                                      the toy, no network: half a minute
    python reinforce_pp.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.97 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common import (kl_estimate, learning_rate, mini_batches, normalize_rewards, ppo_clip_loss,
                    returns_to_go, token_rewards, whiten)
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import approx_kl
from plumbing.flags import HfArg, OnlineConfig, check
from plumbing.model import load_policy
from plumbing.parallel import sum_gradients
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Run


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --lr, are in plumbing/flags.py
    prompts_per_step: int = HfArg(default=256, help="prompts of a step")
    group_size: int = HfArg(default=1, help="completions of each prompt, K")
    epochs: int = HfArg(default=1, help="passes over the completions of a step")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the reference (beta in papers)")
    clip_eps: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")
    reward_clip: float = HfArg(default=5.0, help="clip normalised scores to +- this; 0: raw scores")
    gamma: float = HfArg(default=1.0, help="discount per token")
    group_baseline: bool = HfArg(default=False, help="variant: baseline is the prompt's mean score")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32,
           kl_coef=0.01, eval_prompts=512)


def reinforce_pp_advantages(scores, kl, mask, kl_coef, gamma=1.0):
    """A_t = (G_t - mean) / std over the batch's tokens: (N,), (N, C), (N, C) -> (N, C)."""
    rewards = token_rewards(scores, kl, mask, kl_coef)
    return whiten(returns_to_go(rewards, mask, gamma), mask)


def reinforce_pp_baseline_advantages(scores, mask, group_size):
    """A = (d - mean) / std over the batch's tokens, d = score - mean of its group -> (N, C)."""
    groups = scores.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes no difference; equal scores become exactly 0
    centred = (groups - groups.mean(dim=1, keepdim=True)).flatten()              # (N,), d
    return whiten(centred[:, None].expand_as(mask), mask)


def train(cfg):
    cfg = check(cfg, min_group=2 if cfg.group_baseline else 1)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, "reinforce_pp", policy, tokenizer, problems, rewards, optimizer=optimizer)

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
        if cfg.group_baseline:
            advantages = reinforce_pp_baseline_advantages(scores, mask, cfg.group_size)
        else:
            normalized = normalize_rewards(scores, cfg.reward_clip) if cfg.reward_clip else scores
            advantages = reinforce_pp_advantages(normalized, kl, mask, cfg.kl_coef, cfg.gamma)

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. At first each ratio is 1. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            share = mask / mask[minibatch].sum()  # a mean over the tokens of the mini-batch
            for rows in micro_batches(batch, minibatch, cfg.micro_batch_size):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (n, C)
                losses, is_clipped = ppo_clip_loss(logprobs, old_logprobs[rows], advantages[rows],
                                                   cfg.clip_eps)                 # (n, C) each
                if cfg.group_baseline:
                    k2 = kl_estimate(logprobs, ref_logprobs[rows], "k2")
                    losses = losses + cfg.kl_coef * k2
                loss = (losses * share[rows]).sum()
                loss.backward()
                run.count(loss=loss, clip_frac=(is_clipped * share[rows]).sum(),
                          approx_kl=approx_kl(logprobs, old_logprobs[rows], share[rows]))
            sum_gradients(policy)  # over the processes of torchrun
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
            run.end_minibatch(grad_norm=grad_norm)

        # 5. Log, and save when due. The score shows progress. The loss is there for its gradient.
        run.log(step, step_problems, texts, scores, kl, batch, **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
