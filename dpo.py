"""
DPO, direct preference optimization (Rafailov et al., arXiv 2305.18290): learn from pairs of
completions, of which one was preferred, without a reward model and without sampling.
Differs from sft.py: each prompt has a better and a worse completion, and the loss compares them.

    h(y) = beta * log(pi(y | x) / pi_ref(y | x))         implicit reward; log pi(y | x) is the sum
    loss = -log sigmoid(h(chosen) - h(rejected))         over y's tokens, EOS included    (eq. 7)

Why: if pi is the policy that maximises a reward r under a KL penalty of weight beta, then
r(x, y) = h(y) + beta log Z(x). Z is the same for both completions, and cancels in the Bradley-Terry
model, P(chosen preferred) = sigmoid(r(chosen) - r(rejected)), whose -log is the loss. Of a ranking
y_1, ..., y_K the Plackett-Luce model draws the best of all, then the best of the rest, and so on:

    loss = -sum_k log(exp h(y_k) / sum_{j >= k} exp h(y_j))     --loss plackett_luce (appendix A.3)

pi_ref is the policy before training: its log-probs are computed once, and no second model is kept.

    python dpo.py                                      the toy, no network: half a minute
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/ultrafeedback_binarized

What to expect of the toy, whose pairs are a right and a wrong answer of the toy's policy: from
0.6 of the held-out answers right to 0.9. Both implicit rewards may fall; the margin is what counts.
"""
import math
from dataclasses import dataclass
from typing import Literal, Optional

import torch
import torch.nn.functional as F

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems
from plumbing.evaluation import preference_stats
from plumbing.flags import HfArg, RunConfig, fail
from plumbing.model import load_policy
from plumbing.preferences import for_all_completions, load_preferences
from plumbing.rollout import all_logprobs, make_batch, micro_batches, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --max_new_tokens, --seed, ...
    steps: Optional[int] = HfArg(default=None, help="training steps; None: what --epochs take")
    lr: float = HfArg(default=4e-4, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="rows of data per optimizer step")
    micro_batch_size: int = HfArg(default=64, help="rows of data per pass: memory, not results")
    epochs: int = HfArg(default=1, help="passes over the data, where --steps are not given")
    prompts: int = HfArg(default=1920, help="toy, words: prompts to make preferences of")
    beta: float = HfArg(default=0.5, help="weight of the KL to pi_ref, in h")
    loss: Literal["bradley_terry", "plackett_luce"] = HfArg(
        default="bradley_terry", help="of pairs, or of rankings (column completions, best first)")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(lr=1e-6, micro_batch_size=4, max_new_tokens=512, eval_prompts=256, prompts=1024,
            beta=0.1)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta):
    """Bradley-Terry: sums of log-probs, each (B,) -> losses, chosen_rewards, rejected_rewards.

    Each (B,); the implicit rewards without gradient. arXiv 2305.18290, eq. 7.
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def plackett_luce_loss(policy_logps, ref_logps, beta):
    """Sums of log-probs of K completions, best first: (B, K), (B, K) -> (B,). Ibidem, eq. 20."""
    rewards = beta * (policy_logps - ref_logps)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)  # (B, K) log sum_{j >= k} exp h_j
    return (rest - rewards).sum(1)


def train(cfg):
    if cfg.beta == 0:
        fail("--beta 0: then all completions have the implicit reward 0; take 0.1, say")
    run = Run(cfg, "dpo")
    problems, validation, test = load_preferences(
        cfg, "rankings" if cfg.loss == "plackett_luce" else "pairs")
    K = len(problems[0]["targets"])  # a pair is a ranking of 2
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(problems) / cfg.minibatch_size)
    policy, tokenizer = load_policy(cfg.model, cfg.device)

    def data_logps(asked):  # (B, K), sums over tokens, of the completions in the data
        return for_all_completions(lambda batch: all_logprobs(
            policy, batch, cfg.micro_batch_size, temperature=1.0).sum(1), asked, cfg)

    rated = draw_problems(problems, 0, min(cfg.steps * cfg.minibatch_size, len(problems)), cfg.seed)
    rated += [problem for problem in validation + test if "targets" in problem]
    for problem, ref_logps in zip(rated, data_logps(rated).tolist()):
        problem["ref_logps"] = ref_logps  # (K,), of the initial policy: run.open() may load another
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)

    def rate(asked):  # (B, K), their implicit rewards
        ref_logps = torch.tensor([problem["ref_logps"] for problem in asked], device=cfg.device)
        return cfg.beta * (data_logps(asked) - ref_logps)
    run.open(policy, tokenizer, validation, test, rate=rate, optimizer=optimizer)

    for step in run.steps():
        # 1. Batch: completions of the data instead of samples, and nothing to score.
        asked = draw_problems(problems, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in asked],
                           sum((problem["targets"] for problem in asked), []), cfg.device)
        mask = batch.mask                                       # (N, C), K rows of each prompt
        ref_logps = torch.tensor([problem["ref_logps"] for problem in asked], device=cfg.device)

        # 2. Update. by_row: the weight of a micro-batch, its part of the completions.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        for rows, _, by_row in micro_batches(batch, torch.arange(len(mask)),
                                             K * cfg.micro_batch_size):
            logprobs = token_logprobs(policy, batch, rows, temperature=1.0)        # (R, C)
            logps = logprobs.sum(dim=1).view(-1, K)                                # (R / K, K)
            ref = ref_logps[batch.owner[rows[::K]]]  # of the same prompts           (R / K, K)
            if cfg.loss == "plackett_luce":
                losses, rewards = plackett_luce_loss(logps, ref, cfg.beta), cfg.beta * (logps - ref)
            else:  # column 0 is chosen, column 1 rejected
                losses, *rewards = dpo_loss(*logps.T, *ref.T, cfg.beta)
                rewards = torch.stack(rewards, dim=1)
            loss = losses.mean()
            (loss * by_row).backward()
            stats.add_parts(by_row, loss=loss, **preference_stats(rewards))
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                   error_if_nonfinite=True)
        optimizer.step()
        stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. The loss begins at ln 2 = 0.693 of a pair, ln K! of a ranking: no opinion yet.
        run.log(step, **stats())
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
