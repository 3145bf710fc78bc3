"""
ORPO, odds ratio preference optimization (Hong et al., arXiv 2403.07691): SFT on the better
completion of each pair, with a second term that makes the worse one unlikely. No reference model.
Differs from dpo.py: the loss compares odds, which need no reference, and SFT's loss is part of it.

    p(y)      = exp(mean_t log pi(y_t | x, y_<t))            a probability per token: the mean
    odds(y)   = p(y) / (1 - p(y))
    loss      = -log p(chosen) - beta * log sigmoid(log(odds(chosen) / odds(rejected)))

(eq. 6 and 7; beta is lambda in the paper.) The first term is SFT's: its mean is over all the chosen
tokens of a batch, but not those of the prompts (TRL counts them too). The gradient of the second
has the weight 1 / (1 + OR), OR = odds(chosen) / odds(rejected), which fades once chosen is well
ahead (the notes' 1 + 1 / OR does not). Without the mean over tokens, p of a long text would be 0,
and its odds just p.

    python orpo.py                                      the toy, no network: half a minute
    python orpo.py --model Qwen/Qwen2.5-0.5B --data trl-lib/ultrafeedback_binarized

What to expect of the toy, whose pairs are a right and a wrong answer of the toy's policy: from
0.6 of the held-out answers right to 0.8. The log's chosen and rejected are mean log-probs.
"""
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems
from plumbing.evaluation import preference_stats
from plumbing.flags import HfArg, RunConfig
from plumbing.model import load_policy
from plumbing.preferences import for_all_completions, load_preferences
from plumbing.rollout import all_logprobs, make_batch, micro_batches, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --max_new_tokens, --seed, ...
    steps: Optional[int] = HfArg(default=None, help="training steps; None: what --epochs take")
    lr: float = HfArg(default=3e-4, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="rows of data per optimizer step")
    micro_batch_size: int = HfArg(default=64, help="rows of data per pass: memory, not results")
    epochs: int = HfArg(default=1, help="passes over the data, where --steps are not given")
    prompts: int = HfArg(default=1920, help="toy, words: prompts to make preferences of")
    beta: float = HfArg(default=0.1, help="weight of the odds ratio, lambda in the paper")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(lr=5e-6, micro_batch_size=4, max_new_tokens=512, eval_prompts=256, prompts=1024)


def odds_ratio_loss(chosen_mean_logps, rejected_mean_logps):
    """-log sigmoid(log odds ratio) of mean log-probs: (B,), (B,) -> (B,). arXiv 2403.07691, eq. 7.

    log(1 - p) as log(-expm1(log p)), which keeps its digits where p is near 1; at p = 1 itself it
    would be -inf: log p stays a rounding step below 0.
    """
    def log_odds(logps):
        logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
        return logps - torch.log(-torch.expm1(logps))
    return -F.logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def train(cfg):
    run = Run(cfg, "orpo")
    problems, validation, test = load_preferences(cfg)
    K = 2  # chosen, rejected
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(problems) / cfg.minibatch_size)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)

    def rate(asked):  # (B, K), mean log-probs of the completions in the data
        return for_all_completions(lambda batch: all_logprobs(
            policy, batch, cfg.micro_batch_size, temperature=1.0).sum(1) / batch.mask.sum(1),
            asked, cfg)
    run.open(policy, tokenizer, validation, test, rate=rate, optimizer=optimizer)

    for step in run.steps():
        # 1. Batch: completions of the data instead of samples, and nothing to score.
        asked = draw_problems(problems, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in asked],
                           sum((problem["targets"] for problem in asked), []), cfg.device)
        mask = batch.mask                                       # (N, C), K rows of each prompt

        # 2. Update. by_row: the weight of a micro-batch, its part of the completions.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        for rows, _, by_row in micro_batches(batch, torch.arange(len(mask)),
                                             K * cfg.micro_batch_size):
            logprobs = token_logprobs(policy, batch, rows, temperature=1.0)        # (R, C)
            mean_logps = (logprobs.sum(dim=1) / mask[rows].sum(dim=1)).view(-1, K)  # (R / K, K)
            # This micro-batch's parts of the two means: over chosen tokens, and over pairs.
            nll = -logprobs[::K].sum() / mask[::K].sum()
            loss = nll + by_row * cfg.beta * odds_ratio_loss(*mean_logps.T).mean()
            loss.backward()
            stats.add_parts(1, loss=loss)
            stats.add_parts(by_row, **preference_stats(mean_logps))
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                   error_if_nonfinite=True)
        optimizer.step()
        stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. Like SFT's, the loss falls.
        run.log(step, **stats())
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
