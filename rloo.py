"""
RLOO, REINFORCE leave one out (Ahmadian et al., arXiv 2402.14740). The policy pi answers each prompt
K times, and each completion gets a score. A completion is pushed up, to be more likely, if its
reward, the score minus a KL penalty, is above the mean reward of the prompt's other K - 1
completions, and pushed down if it is below. pi_ref is a copy of the policy from before the
training.

    kl_t = log(pi_old / pi_ref)                               of token t; pi_old sampled the batch
    R_i  = score_i - kl_coef * sum_t kl_t                     reward of completion i
    A_i  = R_i - mean of R_j over the other K - 1             advantage of completion i's tokens
    ratio_t = pi / pi_old                                     of token t
    loss = -mean_t min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i)     over the mini-batch

reinforce.py derives the policy gradient. The baseline b = mean of R_j leaves it unbiased: the K
completions are sampled independently, so with the others fixed, b is a constant, and

    E[b * grad log pi(y)] = b * sum_y pi(y) grad log pi(y) = b * grad sum_y pi(y) = b * grad 1 = 0

where y is the completion i. If R_i itself were in the mean, A would be (K - 1) / K times as large.
This proof leaves out two things: the mean over tokens divides by their number, which depends on y,
and after the first update the ratio and the clip act.

After the first update, the completions are those of an older policy. The ratio corrects for this in
part, token by token. A large ratio makes the estimate noisy, so the clip ends the push of a token
once its ratio has passed 1 + eps (if A_i > 0) or 1 - eps (if A_i < 0). A token may also have moved
the wrong way, beyond the other limit. There a clip alone would leave it without a gradient; the min
takes the value without the clip, which pushes it back. The paper makes one update per batch and has
no ratio. Here each token has its own, as in verl and OpenRLHF. In TRL each completion has one.

By default, a step samples 256 completions, 4 for each prompt, and makes 2 updates, or 4 on the toy.
The reward last_number gives 0 to a completion that is cut off.

Compared with reinforce_pp.py:
  - each prompt is answered K times, and the mean reward of the others is the baseline;
  - the KL of the whole completion is in its one reward, so all its tokens have the same advantage;
  - nothing is divided by a std.

    python rloo.py                                      the toy, no network: half a minute
    python rloo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.96 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common import kl_estimate, learning_rate, mini_batches, ppo_clip_loss
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
    epochs: int = HfArg(default=1, help="passes over the completions of a step")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the reference (beta in papers)")
    clip_eps: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32,
           kl_coef=0.01, eval_prompts=512)


def leave_one_out_advantages(rewards, group_size):
    """R_i - mean of the other K - 1 rewards of its group: (N,) -> (N,). Kool et al., 2019."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes no difference; equal rewards become exactly 0
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def train(cfg):
    cfg = check(cfg, min_group=2)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, "rloo", policy, tokenizer, problems, rewards, optimizer=optimizer)

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
        R = scores - cfg.kl_coef * kl.sum(dim=1)                                 # (N,)
        advantages = leave_one_out_advantages(R, cfg.group_size)[:, None]        # (N, 1)

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. At first each ratio is 1. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            share = mask / mask[minibatch].sum()  # a mean over the tokens of the mini-batch
            # micro_batches() skips rows where A is 0: they have no gradient.
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
        run.log(step, step_problems, texts, scores, kl, batch, **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
