"""
GRPO, group relative policy optimization (DeepSeekMath, arXiv 2402.03300). The policy pi answers
each prompt K times, and each completion gets a score. The advantage of a completion says by how
many standard deviations its score is above the mean of the prompt's K scores. A completion with an
advantage above 0 becomes more likely, one below 0 less likely. pi_ref is a copy of the policy from
before the training; the KL keeps the policy near it.

    A_i  = (score_i - mean) / (std + 1e-4)                    over the K completions of the prompt
    ratio_t = pi / pi_old                                     of token t; pi_old sampled the batch
    k3_t = r_t - 1 - log r_t,  r_t = pi_ref / pi              an estimate of KL(pi || pi_ref)
    loss = mean_i mean_t [-min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i) + kl_coef * k3_t]
           mean_t: over the tokens of a completion, then mean_i: over the mini-batch's completions

Because of the std, a prompt whose K scores nearly agree counts about as much as any other. Because
of mean_t, a token of a long completion counts less than one of a short completion: it is pushed up
less if A > 0, and down less if A < 0. docs/gradients.md measures how far these two divisions turn
the gradient. The expected gradient of k3 is that of KL(pi_ref || pi): see kl_estimate().

--process, process supervision: each reasoning step of a completion has a reward, 0 or 1. These are
normalised over all reasoning steps of the prompt's K completions, and A_t is the sum of the
normalised rewards of the reasoning step of token t and of later ones. The reward of the last step
is the score of the completion. If a last step got 1 for being right in itself, a completion could
stop after one right step, without an answer, and all its rewards would be 1.

By default, a step samples 256 completions, 4 for each prompt, and makes 2 updates, or 4 on the toy.
The reward last_number gives 0 to a completion that is cut off.

Compared with rloo.py:
  - the baseline is the mean of all K, the completion itself included;
  - the advantage is divided by the std of the K scores;
  - the KL is in the loss, as k3, and not in the reward;
  - each completion counts the same in the loss, however long it is.

    python grpo.py                                      the toy, no network: half a minute
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.95 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common import kl_estimate, learning_rate, mini_batches
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import approx_kl
from plumbing.flags import HfArg, OnlineConfig, check, fail
from plumbing.model import load_policy
from plumbing.parallel import sum_gradients
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Run
from plumbing.toy import is_toy, score_steps


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --lr, are in plumbing/flags.py
    epochs: int = HfArg(default=1, help="passes over the completions of a step")
    kl_coef: float = HfArg(default=0.04, help="weight of the KL to the reference (beta in papers)")
    clip_eps: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")
    process: bool = HfArg(default=False, help="rewards for reasoning steps (only --data toy)")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32,
           kl_coef=0.01, eval_prompts=512)


def group_advantages(scores, group_size):
    """(score - mean) / (std + 1e-4) of its group: (N,) -> (N,). DeepSeekMath, section 4.1.2.

    The std divides by K - 1, and 1e-4 is added to it, both as in TRL; the paper does not say the
    first and has not the second. If all scores of a group are equal, the result is exactly 0.
    """
    groups = scores.view(-1, group_size)
    mean, std = groups.mean(dim=1, keepdim=True), groups.std(dim=1, keepdim=True)
    all_equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return torch.where(all_equal, 0, (groups - mean) / (std + 1e-4)).flatten()


def process_advantages(step_rewards, step_ends, mask, group_size):
    """A_t = sum of the normalised rewards of all reasoning steps that end at or after t -> (N, C).

    step_rewards, step_ends: N lists; for each reasoning step its reward, and the 0-based index of
    its last token. Mean and std run over all reasoning steps of the group. DeepSeekMath, 4.1.3.
    """
    advantages = 0.0 * mask                                       # (N, C), in floats
    for first in range(0, len(mask), group_size):
        steps = [(i, end, reward) for i in range(first, first + group_size)
                 for end, reward in zip(step_ends[i], step_rewards[i])]
        rewards = torch.tensor([reward for _, _, reward in steps], dtype=advantages.dtype)
        normalized = group_advantages(rewards, max(len(steps), 1)).tolist()
        for (i, end, _), reward in zip(steps, normalized):
            advantages[i, : end + 1] += reward
    return torch.where(mask.bool(), advantages, 0)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip_eps, kl_coef):
    """The loss above of each token -> losses, is_clipped, (N, C) each. DeepSeekMath, eq. 3.

    Log-probs are (N, C), advantages (N,) or (N, C). is_clipped is as in ppo_clip_loss().
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    ratio = (logprobs - old_logprobs).exp()
    unclipped, clipped = -A * ratio, -A * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    policy_losses = torch.maximum(unclipped, clipped)  # -min(a, b) = max(-a, -b)
    k3 = kl_estimate(logprobs, ref_logprobs, "k3")
    return policy_losses + kl_coef * k3, clipped > unclipped


def train(cfg):
    cfg = check(cfg, min_group=2)
    if cfg.process and not (cfg.data == "toy" and is_toy(cfg.model)):
        fail("--process: only for the toy is it known which steps are right; leave it out")
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, "grpo", policy, tokenizer, problems, rewards, optimizer=optimizer)

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
        if cfg.process:
            step_rewards, step_ends = score_steps(step_problems, batch, texts, scores)
            advantages = process_advantages(step_rewards, step_ends, mask, cfg.group_size)
        else:
            advantages = group_advantages(scores, cfg.group_size)

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. At first each ratio is 1. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            share = mask / mask.sum(dim=1, keepdim=True) / len(minibatch)  # mean_t, then mean_i
            # micro_batches() skips rows where A is 0, if there is no KL: they have no gradient.
            for rows in micro_batches(batch, minibatch, cfg.micro_batch_size,
                                      None if cfg.kl_coef else advantages):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (n, C)
                losses, is_clipped = grpo_loss(logprobs, old_logprobs[rows], ref_logprobs[rows],
                                               advantages[rows], cfg.clip_eps, cfg.kl_coef)
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
