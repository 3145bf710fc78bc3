"""
ReMax (Li et al., arXiv 2310.10505). The policy pi answers each prompt with a sampled and with a
greedy completion; greedy means the most likely token each time. The sampled completion becomes more
likely if its score, minus a KL penalty, is above the score of the greedy one, and less likely if it
is below. pi_ref is a copy of the policy from before the training.

    kl_t = log(pi_old / pi_ref)                               of token t; pi_old sampled the batch
    r_t  = [t is the last token] * score - kl_coef * kl_t     reward of token t
    G_t  = r_t + G_{t+1}                                      return: all reward from token t on
    A_t  = G_t - score of the greedy completion               the same baseline for all t
    ratio_t = pi / pi_old                                     of token t
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     over the mini-batch

The baseline b, the greedy score, leaves the gradient unbiased. It depends on the prompt and the
weights and not on the sampled y, so that

    E[b * grad log pi(y)] = b * sum_y pi(y) grad log pi(y) = b * grad sum_y pi(y) = b * grad 1 = 0

This proof leaves out two things: the mean over tokens divides by their number, which is random, and
after the first update the ratio and the clip act. If the sample is the greedy completion, they have
the same score, and only the KL is left in A_t. So a policy that is nearly certain learns little
from the scores.

The greedy completion is the baseline and nothing else: it has no KL and no loss. Half of the
generated completions are greedy ones, so the defaults have half as many samples as rloo.py. With
--group_size K > 1, the K samples of a prompt share one greedy completion.

The advantages are those of the library verl. In the authors' code, A_t has only the KL of token t,
the score is discounted, by 0.95 per token unless one says otherwise, and there is one update per
batch, without a ratio. docs/sources.md lists all differences.

By default, a step samples 128 completions, one for each prompt, and as many greedy ones, and makes
2 updates, or 4 on the toy. The reward last_number gives 0 to a completion that is cut off.

Compared with rloo.py:
  - the baseline is the score of the greedy completion, not the mean reward of other samples;
  - the return of a token has the KL of this token and the later ones, not of the whole completion.

    python remax.py                                      the toy, no network: half a minute
    python remax.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.94 of all are right, and most show the work.
"""
import copy
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common import (kl_estimate, learning_rate, mini_batches, ppo_clip_loss, returns_to_go,
                    token_rewards)
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
    minibatch_size: int = HfArg(default=64, help="completions per optimizer step, at most")
    prompts_per_step: int = HfArg(default=128, help="prompts of a step")
    group_size: int = HfArg(default=1, help="completions of each prompt, K")
    epochs: int = HfArg(default=1, help="passes over the completions of a step")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the reference (beta in papers)")
    clip_eps: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=32, micro_batch_size=64, max_new_tokens=32,
           kl_coef=0.01, eval_prompts=512)


def remax_advantages(scores, greedy_scores, kl, mask, kl_coef):
    """A_t = G_t - score of the greedy completion: (N,), (N,), (N, C), (N, C) -> (N, C)."""
    # All t have the same baseline: token t of the sample has no counterpart in the greedy one.
    returns = returns_to_go(token_rewards(scores, kl, mask, kl_coef), mask)
    return torch.where(mask.bool(), returns - greedy_scores[:, None], 0)


def train(cfg):
    cfg = check(cfg)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, "remax", policy, tokenizer, problems, rewards, optimizer=optimizer)

    for step in run.steps():
        # 1. Sample K completions of each prompt of this step from softmax(logits / temperature).
        # The completions of a prompt are neighbouring rows: prompt i has rows i K to i K + K - 1.
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        step_problems = draw_problems(problems.train, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in step_problems],
                       cfg.group_size, cfg.max_new_tokens, cfg.temperature, generator)
        old_logprobs, mask = batch.logprobs, batch.mask  # (N, C) each; both are 0 on padding
        # And one greedy completion of each prompt (temperature 0), which is only scored.
        greedy = sample(policy, tokenizer, batch.prompts, 1, cfg.max_new_tokens, 0, generator)

        # 2. Score the completions, and measure how far each token is from the reference policy.
        # score() returns texts, scores (N,) and, if there are several rewards, their means.
        texts, scores, reward_means = score(rewards, step_problems, batch, tokenizer)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)  # without a reference, kl is 0
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")  # (N, C); 0 on padding
        _, per_prompt, _ = score(rewards, step_problems, greedy, tokenizer)  # (B,)
        greedy_scores = per_prompt.repeat_interleave(cfg.group_size)             # (N,)

        # 3. Advantages: how much better than the baseline? No gradient flows through them.
        advantages = remax_advantages(scores, greedy_scores, kl, mask, cfg.kl_coef)  # (N, C)

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. At first each ratio is 1. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            share = mask / mask[minibatch].sum()  # a mean over the tokens of the mini-batch
            # micro_batches() skips rows where all A are 0: they have no gradient.
            for rows in micro_batches(batch, minibatch, cfg.micro_batch_size, advantages):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (n, C)
                losses, is_clipped = ppo_clip_loss(logprobs, old_logprobs[rows], advantages[rows],
                                                   cfg.clip_eps)                 # (n, C) each
                loss = (losses * share[rows]).sum()
                loss.backward()
                run.count(loss=loss, clip_frac=(is_clipped * share[rows]).sum(),
                          approx_kl=approx_kl(logprobs, old_logprobs[rows], share[rows]))
            sum_gradients(policy)  # over the processes of torchrun
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
            run.end_minibatch(grad_norm=grad_norm)

        # 5. Log, and save when due. The score shows progress. The loss is there for its gradient.
        run.log(step, step_problems, texts, scores, kl, batch, greedy_score=greedy_scores.mean(),
                **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
