"""
PRIME (Cui et al., arXiv 2502.01456): a reward for every token, learned from the scores of whole
completions. The policy pi answers each prompt K times, and each completion gets a score from 0
(wrong) to 1 (right). A second network, the process reward model prm, starts as a copy of the
reference pi_ref, the policy before the training. It is trained to give right completions a higher
probability than pi_ref does, and wrong ones a lower one. The reward of a token is beta times the
difference of the two log-probs.

    q_t  = beta * log(prm / pi_ref)                           implicit reward of token t
    p_i  = sigmoid(sum_t q_t)                                 read as the chance that i is right
    prm_loss = -mean_i [score_i log p_i + (1 - score_i) log(1 - p_i)]        over the mini-batch
    Q_j  = mean_t q_t                                         over the tokens of completion j
    A_t  = score_i - mean of score_j over the prompt's other K - 1
           + sum_{u >= t} gamma^(u - t) (q_u - mean of Q_j over the prompt's other K - 1)
    ratio_t = pi / pi_old                                     of token t; pi_old sampled the batch
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     over the mini-batch

In A_t, q is that of prm before its updates in this step, so it is 0 in the first step. The terms
q_u - mean of Q_j are summed, not averaged, so a longer completion has more of them: its A is lower
where they are mostly negative, and higher where they are mostly positive.

Only the sum of q is trained, but a single q_t has a meaning too (arXiv 2412.01981):

    q_1 + ... + q_t = beta * log E[exp((q_1 + ... + q_T) / beta)]            T: the last token

where E is over completions that begin with these t tokens and are finished by pi_ref. It holds
because, after any beginning, the mean of prm / pi_ref of the remaining tokens is 1 under pi_ref.
The right side is a soft mean: it lies between the mean and the largest of the final sums. So q_t is
the change that token t made in this soft mean. For a whole prompt the left side is 0. So where all
answers are right, their p_i cannot all be above 1/2: q compares the answers to one prompt.

Eq. 5 of the paper, as printed, subtracts sums of q. Its text and the authors' code subtract means,
as here. docs/sources.md lists what else their code does in another way. rloo.py says why there are
a ratio, a clip and a min.

By default, a step samples 256 completions, 4 for each prompt, and makes 2 updates, or 4 on the toy.
The reward last_number gives 0 to a completion that is cut off.

Compared with rloo.py:
  - every token has a reward of its own, from prm, in addition to the score;
  - there is no KL penalty; pi_ref is needed for q.

    python prime.py                                      the toy, no network: a minute
    python prime.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.96 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import kl_estimate, learning_rate, mini_batches, ppo_clip_loss, returns_to_go
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
from rloo import leave_one_out_advantages


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    lr: float = HfArg(default=5e-7, help="AdamW learning rate at its peak")
    epochs: int = HfArg(default=1, help="passes over the completions of a step")
    clip_eps: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")
    gamma: float = HfArg(default=1.0, help="discount per token of the implicit rewards")
    beta: float = HfArg(default=0.05, help="factor of the implicit reward log(prm / reference)")
    prm_lr: float = HfArg(default=1e-6, help="AdamW learning rate of the reward model at its peak")
    accuracy_filter: float = HfArg(default=0.0, help="drop prompts of mean score < x or > 1 - x")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32,
           eval_prompts=512, prm_lr=1e-3)


def implicit_rewards(prm_logprobs, ref_logprobs, beta):
    """q_t = beta * log(prm / pi_ref): (N, C), (N, C) -> (N, C). PRIME, eq. 3."""
    return beta * (prm_logprobs - ref_logprobs)


def implicit_reward_loss(prm_logprobs, ref_logprobs, labels, beta):
    """Cross-entropy of sigmoid(sum_t q_t) and labels (N,) from 0 to 1 -> (N,). Algorithm 1, line 8.

    It is computed from the sums, because the sigmoid of a large sum is rounded to 0 or 1.
    """
    sums = implicit_rewards(prm_logprobs, ref_logprobs, beta).sum(dim=1)
    return F.binary_cross_entropy_with_logits(sums, labels.to(sums), reduction="none")


def prime_advantages(process_rewards, scores, mask, group_size, gamma=1.0):
    """A_t, of q (N, C), scores (N,), mask (N, C) -> (N, C). Eq. 5, with means."""
    q = torch.where(mask.bool(), process_rewards, 0)
    means = q.sum(dim=1) / mask.sum(dim=1).clamp(min=1)                           # (N,), Q
    # leave_one_out_advantages(x) is x - the mean of the others' x.
    others_mean = means - leave_one_out_advantages(means, group_size)             # (N,)
    process = returns_to_go(q - others_mean[:, None], mask, gamma)
    outcome = leave_one_out_advantages(scores, group_size)
    return torch.where(mask.bool(), process + outcome[:, None], 0)


def filter_by_accuracy(scores, group_size, margin):
    """Rows of the prompts whose mean score lies in [margin, 1 - margin]: (N,) -> row indices."""
    means = scores.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)
    return ((means >= margin) & (means <= 1 - margin)).nonzero().flatten()


def prm_stats(q, scores, step_rewards=(), step_ends=()):
    """For the log: q (N, C), scores (N,), two lists of N lists by score_steps() -> dict of scalars.

    step_rewards[i] and step_ends[i] have one entry for each reasoning step of completion i: 1 if it
    is right, else 0; and the index of its last token. step_found: among wrong answers of several
    steps, the fraction in which the step with the lowest sum of q is the first wrong one.
    step_chance: what a random guess would reach.
    """
    found, chance = [], []
    for sums, right, ends in zip(q.cumsum(dim=1), step_rewards, step_ends):
        if len(right) > 1 and right[-1] == 0:
            lowest = sums[ends].diff(prepend=sums.new_zeros(1)).argmin()
            found.append(float(lowest == right.index(0)))
            chance.append(1 / len(right))
    right = ((q.sum(dim=1) > 0) == (scores > 0.5)).float()
    right = torch.where(q.sum(dim=1).abs() < 1e-5, 0.5, right)  # q is 0 up to rounding
    n, stats = len(found), dict(prm_accuracy=right.mean())
    if found:
        stats.update(wrong_answers=n, step_found=sum(found) / n, step_chance=sum(chance) / n)
    return stats


def train(cfg):
    cfg = check(cfg, min_group=2)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    knows_steps = cfg.data == "toy" and is_toy(cfg.model)
    ref_model, prm = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    optimizer.add_param_group(dict(params=prm.parameters()))  # param_groups[1]
    run = Run(cfg, "prime", policy, tokenizer, problems, rewards, optimizer=optimizer, prm=prm)

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
        if scores.min() < 0 or scores.max() > 1:
            fail(f"--reward {cfg.reward}: PRIME takes scores from 0 to 1; scale it, or use rloo.py")
        ref_logprobs = all_logprobs(ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        prm_logprobs = all_logprobs(prm, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")  # (N, C); 0 on padding
        q = implicit_rewards(prm_logprobs, ref_logprobs, cfg.beta)  # (N, C); 0 on padding
        step_labels = () if not knows_steps else score_steps(  # only for the log: not trained on
            step_problems, batch, texts, scores)
        reward_means.update(prm_stats(q, scores, *step_labels))

        # 3. Advantages: how much better than the baseline? No gradient flows through them.
        advantages = prime_advantages(q, scores, mask, cfg.group_size, cfg.gamma)
        kept = filter_by_accuracy(scores, cfg.group_size, cfg.accuracy_filter).cpu()

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. At first each ratio is 1. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.param_groups[1]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps,
                                                        cfg.prm_lr)
        for minibatch in mini_batches(len(kept), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            share = mask / mask[kept[minibatch]].sum()  # a mean over the tokens of the mini-batch
            for rows in micro_batches(batch, kept[minibatch], cfg.micro_batch_size):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (n, C)
                losses, is_clipped = ppo_clip_loss(logprobs, old_logprobs[rows], advantages[rows],
                                                   cfg.clip_eps)                 # (n, C) each
                loss = (losses * share[rows]).sum()
                loss.backward()  # now, because this frees the policy's activations
                run.count(loss=loss, clip_frac=(is_clipped * share[rows]).sum(),
                          approx_kl=approx_kl(logprobs, old_logprobs[rows], share[rows]))
                errors = implicit_reward_loss(token_logprobs(prm, batch, rows, cfg.temperature),
                                              ref_logprobs[rows], scores[rows], cfg.beta)  # (n,)
                error = errors.sum() / len(minibatch)  # a mean over completions
                error.backward()
                run.count(prm_loss=error)
            sum_gradients(policy, prm)  # over the processes of torchrun
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            prm_grad_norm = clip_grad_norm_(prm.parameters(), cfg.max_grad_norm)
            optimizer.step()
            run.end_minibatch(grad_norm=grad_norm, prm_grad_norm=prm_grad_norm)

        # 5. Log, and save when due. The score shows progress. The loss is there for its gradient.
        run.log(step, step_problems, texts, scores, kl, batch, **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
