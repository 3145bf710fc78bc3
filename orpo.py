"""
ORPO, odds ratio preference optimization (Hong et al., arXiv 2403.07691). The data are pairs of
completions of a prompt x, of which one was preferred: chosen and rejected. The policy pi is trained
on chosen as in SFT, and a second term pushes the odds of chosen above those of rejected. There is
no reference policy, and SFT and preference learning are one stage.

    p(y)    = exp(mean_t log pi(y_t | x, y_<t))               mean over y's tokens, EOS included
    odds(y) = p(y) / (1 - p(y))
    OR      = odds(chosen) / odds(rejected)                   odds ratio
    loss    = SFT's loss of chosen - beta * mean log sigmoid(log OR)
              mean over the pairs; eq. 6 and 7, where beta is called lambda

SFT's loss is minus the mean of log pi(y_t) over the tokens of all chosen completions, so a long one
counts more. The tokens of the prompt are not targets, as in the paper's text; the authors' code and
TRL include them. log p is a mean and not a sum, because the probability of a whole long text is
nearly 0. Then 1 - p would be nearly 1, and the odds would nearly be the probability.

The derivatives of the second term with respect to log p(chosen) and log p(rejected) are
-beta / (1 + OR) / (1 - p(chosen)) and beta / (1 + OR) / (1 - p(rejected)). The factor 1 / (1 + OR)
becomes small once chosen is well ahead.

Compared with dpo.py:
  - the loss has odds in place of log-probs relative to pi_ref, so no pi_ref is needed;
  - SFT's loss is a part of the loss.

    python orpo.py                                      the toy, no network: half a minute
    python orpo.py --model Qwen/Qwen2.5-0.5B --data trl-lib/ultrafeedback_binarized

What to expect of the toy, where each pair is a right and a wrong answer of the toy's policy: before
the training 0.6 of its sampled answers to held-out problems are right, after it 0.8. The logged
values chosen and rejected are means of log p.
"""
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, RunConfig, check
from plumbing.model import load_policy
from plumbing.offline import for_all_completions, held_out_stats, make_batch, preference_stats
from plumbing.parallel import sum_gradients
from plumbing.rollout import all_logprobs, micro_batches, token_logprobs
from plumbing.run import Run


@dataclass
class Config(RunConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    steps: Optional[int] = HfArg(default=None, help="training steps; None: --epochs decides")
    lr: float = HfArg(default=5e-6, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="pairs per optimizer step")
    micro_batch_size: int = HfArg(default=4, help="pairs per pass; changes no result")
    max_new_tokens: int = HfArg(default=512, help="longest completion, in tokens")
    epochs: int = HfArg(default=1, help="passes over the data, unless --steps is given")
    beta: float = HfArg(default=0.1, help="weight of the odds ratio term, lambda in the paper")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(lr=3e-4, micro_batch_size=64, max_new_tokens=32, eval_prompts=512)


def odds_ratio_loss(chosen_mean_logps, rejected_mean_logps):
    """log p of chosen and of rejected, (B,) each -> -log sigmoid(log OR), (B,). ORPO, eq. 7.

    log(1 - p) is computed as log(-expm1(log p)), which keeps its digits where p is near 1. At p = 1
    it would be -inf, so p is kept at least one rounding step below 1.
    """
    def log_odds(logps):
        logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
        return logps - torch.log(-torch.expm1(logps))
    return -F.logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def train(cfg):
    cfg = check(cfg)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer, "pair")
    K = 2  # chosen, rejected
    steps = cfg.steps or math.ceil(cfg.epochs * len(problems.train) / cfg.minibatch_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)

    def measure(problems):  # of held-out pairs, by log p (B, K), without gradient
        return held_out_stats(for_all_completions(lambda batch: all_logprobs(
            policy, batch, cfg.micro_batch_size, temperature=1.0).sum(1) / batch.mask.sum(1),
            problems, cfg))
    run = Run(cfg, "orpo", policy, tokenizer, problems, measure=measure, optimizer=optimizer)
    cfg.steps = steps  # only now: a run is resumed with its --epochs, or others

    for step in run.steps():
        # 1. Batch: the completions of this step, from the data. Nothing is sampled.
        step_problems = draw_problems(problems.train, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in step_problems],
                           sum((problem["targets"] for problem in step_problems), []), cfg.device)
        mask = batch.mask  # (N, C); rows i K to i K + K - 1 are the completions of prompt i

        # 2. Update.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        for rows in micro_batches(batch, torch.arange(len(mask)), K * cfg.micro_batch_size):
            logprobs = token_logprobs(policy, batch, rows, temperature=1.0)  # (n, C), 0 on padding
            mean_logps = (logprobs.sum(dim=1) / mask[rows].sum(dim=1)).view(-1, K)  # (n / K, K)
            # Both terms are divided by what the whole batch has, so that micro-batches add up.
            nll = -logprobs[::K].sum() / mask[::K].sum()  # a mean over the tokens of chosen
            odds_ratio = odds_ratio_loss(*mean_logps.T).sum() / len(step_problems)
            loss = nll + cfg.beta * odds_ratio
            loss.backward()
            run.count(loss=loss, **preference_stats(mean_logps, len(step_problems)))
        sum_gradients(policy)  # over the processes of torchrun
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        optimizer.step()
        run.end_minibatch(grad_norm=grad_norm)

        # 3. Log. The loss shows progress: it should fall.
        run.log(step)  # also saves when due

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
