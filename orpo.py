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

    python orpo.py                                      the toy, offline: 2 minutes
    python orpo.py --model Qwen/Qwen2.5-0.5B --data trl-lib/ultrafeedback_binarized

What to expect of the toy, whose pairs are a right and a wrong answer of the toy's policy: from
0.6 of the held-out answers right to 0.8. The log's chosen and rejected are mean log-probs.
"""
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F

from common import (HfArg, Means, RunConfig, fill, learning_rate, main, mini_batches,
                    require_finite, step_generator)
from data import draw_problems
from evaluation import evaluate, preference_stats, report, validate
from model import save_policy
from preferences import for_all_completions, load_preferences
from rollout import all_logprobs, load_policy, make_batch, micro_batches, token_logprobs
from run import Run


@dataclass
class Config(RunConfig):
    minibatch_size: Optional[int] = HfArg(default=None, help="rows of data per optimizer step")
    micro_batch_size: Optional[int] = HfArg(default=None, help="rows of data per pass: memory only")
    epochs: int = HfArg(default=1, help="passes over the data, where --steps are not given")
    prompts: Optional[int] = HfArg(default=None, help="toy, words: prompts to make preferences of")
    beta: float = HfArg(default=0.1, help="weight of the odds ratio, lambda in the paper")


# Defaults: TOY; HUB: --model on a GPU; CPU: --model without.
TOY = dict(lr=3e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32, eval_prompts=512,
           prompts=1920)
HUB = dict(lr=5e-6, minibatch_size=64, micro_batch_size=4, max_new_tokens=512, eval_prompts=256,
           prompts=1024)
CPU = dict(HUB, lr=1e-5, minibatch_size=8, max_new_tokens=48, eval_prompts=32, prompts=32)


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
    fill(cfg, TOY, HUB, CPU)
    run = Run(cfg, "orpo")
    problems, validation, test = load_preferences(cfg)
    K = 2  # chosen, rejected
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(problems) / cfg.minibatch_size)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    run.open(policy, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = run.load(policy=policy, optimizer=optimizer)  # {}, or the checkpoint with --resume

    def rate(asked):  # (B, K), mean log-probs of the completions in the data
        return for_all_completions(lambda batch: all_logprobs(
            policy, batch, cfg.micro_batch_size, temperature=1.0).sum(1) / batch.mask.sum(1),
            asked, cfg)
    before = state.get("before") or evaluate(policy, tokenizer, test, cfg, rate=rate)

    for step in run.steps():
        # 1. Batch: completions of the data instead of samples, and nothing to score.
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        asked = draw_problems(problems, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in asked],
                           sum((problem["targets"] for problem in asked), []), cfg.device)
        mask = batch.mask                                       # (N, C), K rows of each prompt
        texts = [text for problem in asked for text in problem["completions"]]

        # 2. Update. share: a micro-batch's part of the prompts.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg, cfg.lr)
        for minibatch in mini_batches(len(mask), K * cfg.minibatch_size, group_size=K, epochs=1,
                                      generator=generator):
            optimizer.zero_grad()
            for rows, _ in micro_batches(batch, minibatch, K * cfg.micro_batch_size):
                share = len(rows) / len(minibatch)
                logprobs = token_logprobs(policy, batch, rows, temperature=1.0)    # (R, C); 0: pad
                mean_logps = (logprobs.sum(1) / mask[rows].sum(1)).view(-1, K)     # (R / K, K)
                nll = -logprobs[::K].sum() / mask[minibatch][::K].sum()  # this part of the mean
                loss = nll / share + cfg.beta * odds_ratio_loss(*mean_logps.T).mean()
                require_finite(loss, "loss", step, texts, rows, logprobs)
                (loss * share).backward()
                stats.add(share, loss=loss, **preference_stats(mean_logps))
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.add(1, grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. Like SFT's, the loss falls.
        run.log(step, **stats())
        validate(run, step, policy, tokenizer, validation, cfg, rate=rate)
        run.save(step, policy=policy, optimizer=optimizer, before=before)

    save_policy(policy, tokenizer, run.folder)
    report(before, evaluate(policy, tokenizer, test, cfg, rate=rate), run.folder)


if __name__ == "__main__":
    main(Config, train)
