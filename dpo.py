"""
DPO, direct preference optimization (Rafailov et al., arXiv 2305.18290). The data are pairs of
completions of a prompt x, of which one was preferred. The policy pi is trained on them directly,
without a reward model and without sampling. pi_ref is the policy before the training.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t)               over the tokens of y, EOS included
    h(x, y) = beta * (log pi(y | x) - log pi_ref(y | x))      implicit reward of y
    loss = -log sigmoid(h(x, chosen) - h(x, rejected))        mean over the pairs (eq. 7)

Why: let r(x, y) be a reward, and P = sigmoid(r(x, chosen) - r(x, rejected)) the probability that
chosen is preferred (Bradley-Terry model). The policy that maximises the mean of r(x, y) under pi,
minus beta * KL(pi || pi_ref), is

    pi(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x)
    Z(x)      = sum_y pi_ref(y | x) exp(r(x, y) / beta)       sum over all completions y of x

Solved for r, this is r(x, y) = h(x, y) + beta log Z(x). When this is put into P, the term with Z(x)
cancels, because it is the same for both completions, and -log P is the loss. So the loss has no
term for the KL: pi_ref and beta in h do its work. With a larger beta, the same P is reached closer
to pi_ref.

At the start pi = pi_ref, so every h is 0 and the loss is ln 2. The derivatives of a pair's loss
with respect to log pi(chosen) and log pi(rejected) are then -beta / 2 and +beta / 2. During the
training both h may fall, for instance because the two completions are alike: pushing rejected down
can lower chosen by more than pushing chosen up raises it. Watch the margin, h(chosen) -
h(rejected), on held-out pairs.

--loss plackett_luce learns from rankings y_1, ..., y_K, best first (appendix A.3). The probability
of a ranking is that of drawing y_1 of all, then y_2 of the rest, and so on, where each is drawn
with a probability proportional to exp h:

    loss = -sum_k log(exp h(x, y_k) / sum_{j >= k} exp h(x, y_j))             mean over the rankings

Compared with sft.py:
  - each prompt has a better and a worse completion, and the loss compares them;
  - the loss has log-probs relative to those of pi_ref. These are computed once, before the
    training, so no second model is kept.

    python dpo.py                                      the toy, no network: half a minute
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/ultrafeedback_binarized

What to expect of the toy, where each pair is a right and a wrong answer of the toy's policy: before
the training 0.6 of its sampled answers to held-out problems are right, after it 0.9.
"""
import math
from dataclasses import dataclass
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, RunConfig, check, fail
from plumbing.model import load_policy
from plumbing.offline import for_all_completions, held_out_stats, make_batch, preference_stats
from plumbing.parallel import sum_gradients
from plumbing.rollout import all_logprobs, micro_batches, token_logprobs
from plumbing.run import Run


@dataclass
class Config(RunConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    steps: Optional[int] = HfArg(default=None, help="training steps; None: --epochs decides")
    lr: float = HfArg(default=1e-6, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="pairs per optimizer step")
    micro_batch_size: int = HfArg(default=4, help="pairs per pass; changes no result")
    max_new_tokens: int = HfArg(default=512, help="longest completion, in tokens")
    epochs: int = HfArg(default=1, help="passes over the data, unless --steps is given")
    beta: float = HfArg(default=0.1, help="the larger, the closer to the reference policy")
    loss: Literal["bradley_terry", "plackett_luce"] = HfArg(
        default="bradley_terry", help="for pairs, or for rankings (column completions)")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(lr=4e-4, micro_batch_size=64, max_new_tokens=32, eval_prompts=512, beta=0.5)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta):
    """Four log pi(y | x), each (B,) -> losses, h(chosen), h(rejected), each (B,). DPO, eq. 7."""
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()  # these h are for the log


def plackett_luce_loss(policy_logps, ref_logps, beta):
    """log pi(y | x) of K completions, best first: (B, K), (B, K) -> losses (B,). DPO, eq. 20."""
    rewards = beta * (policy_logps - ref_logps)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)  # (B, K), log sum_{j >= k} exp h_j
    return (rest - rewards).sum(1)


def train(cfg):
    cfg = check(cfg)
    if cfg.beta == 0:
        fail("--beta 0: then all completions have the implicit reward 0; take 0.1, say")
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(
        cfg, policy, tokenizer, "ranking" if cfg.loss == "plackett_luce" else "pair")
    K = len(problems.train[0]["targets"])  # completions, best first; in a pair there are two
    steps = cfg.steps or math.ceil(cfg.epochs * len(problems.train) / cfg.minibatch_size)

    def data_logps(problems):  # (B, K), log pi(y | x) of their completions, without gradient
        return for_all_completions(lambda batch: all_logprobs(
            policy, batch, cfg.micro_batch_size, temperature=1.0).sum(1), problems, cfg)

    # A step 0 of this size has the problems of all steps below: they draw from the same order.
    n = min(steps * cfg.minibatch_size, len(problems.train))
    seen = draw_problems(problems.train, 0, n, cfg.seed)
    seen += [problem for problem in problems.validation + problems.test if problem["targets"]]
    for problem, ref_logps in zip(seen, data_logps(seen).tolist()):
        problem["ref_logps"] = ref_logps  # before Run(), which may load other weights
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)

    def measure(problems):  # of held-out pairs, by h, the implicit rewards (B, K)
        ref_logps = torch.tensor([problem["ref_logps"] for problem in problems]).to(cfg.device)
        return held_out_stats(cfg.beta * (data_logps(problems) - ref_logps))
    run = Run(cfg, "dpo", policy, tokenizer, problems, measure=measure, optimizer=optimizer)
    cfg.steps = steps  # only now: a run is resumed with its --epochs, or others

    for step in run.steps():
        # 1. Batch: the completions of this step, from the data. Nothing is sampled.
        step_problems = draw_problems(problems.train, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in step_problems],
                           sum((problem["targets"] for problem in step_problems), []), cfg.device)
        mask = batch.mask  # (N, C); rows i K to i K + K - 1 are the completions of prompt i
        ref_logps = torch.tensor([problem["ref_logps"] for problem in step_problems]).to(cfg.device)

        # 2. Update.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        for rows in micro_batches(batch, torch.arange(len(mask)), K * cfg.micro_batch_size):
            logprobs = token_logprobs(policy, batch, rows, temperature=1.0)  # (n, C), 0 on padding
            logps = logprobs.sum(dim=1).view(-1, K)                                # (n / K, K)
            ref = ref_logps[batch.owner[rows[::K]]]  # owner: the prompt of a row    (n / K, K)
            if cfg.loss == "plackett_luce":
                losses, rewards = plackett_luce_loss(logps, ref, cfg.beta), cfg.beta * (logps - ref)
            else:  # column 0 is chosen, column 1 rejected
                losses, *rewards = dpo_loss(*logps.T, *ref.T, cfg.beta)
                rewards = torch.stack(rewards, dim=1)
            loss = losses.sum() / len(step_problems)  # a mean over the pairs of the step
            loss.backward()
            run.count(loss=loss, **preference_stats(rewards, len(step_problems)))
        sum_gradients(policy)  # over the processes of torchrun
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        optimizer.step()
        run.end_minibatch(grad_norm=grad_norm)

        # 3. Log. The loss starts at ln 2 = 0.693 for pairs, and at ln K! for rankings.
        run.log(step)  # also saves when due

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
