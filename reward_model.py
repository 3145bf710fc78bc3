"""
Reward model (Bradley and Terry, 1952; Ouyang et al., arXiv 2203.02155): from pairs of completions,
of which one was preferred, learn a score s(x, y) that the preferred one gets more of. Stage 2 of
the notes; with it, the online scripts can learn from preferences: python ppo.py --reward FOLDER.
Differs from dpo.py: the score is a network's own output, and not a policy's log-probs.

    P(chosen preferred) = sigmoid(s(chosen) - s(rejected))
    loss = -log sigmoid(s(chosen) - s(rejected))

(The notes have a line -E[1 / log(1 + exp(s_l - s_w))]; it is E[log(1 + exp(s_l - s_w))].) Only
differences within a prompt are learned: scores of two prompts cannot be compared.

    python reward_model.py                                      the toy, offline: 2 minutes
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/ultrafeedback_binarized

What to expect of the toy, whose pairs are a right and a wrong answer of the toy's policy: 0.9
of the held-out pairs in the right order.
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
from rollout import load_policy, make_batch, micro_batches
from run import Run
from scorer import all_scores, make_scorer, sequence_scores


@dataclass
class Config(RunConfig):
    minibatch_size: Optional[int] = HfArg(default=None, help="rows of data per optimizer step")
    micro_batch_size: Optional[int] = HfArg(default=None, help="rows of data per pass: memory only")
    epochs: int = HfArg(default=1, help="passes over the data, where --steps are not given")
    prompts: Optional[int] = HfArg(default=None, help="toy, words: prompts to make preferences of")


# Defaults: TOY; HUB: --model on a GPU; CPU: --model without.
TOY = dict(lr=1e-3, minibatch_size=64, micro_batch_size=64, max_new_tokens=32, eval_prompts=512,
           prompts=1920)
HUB = dict(lr=1e-5, minibatch_size=64, micro_batch_size=4, max_new_tokens=512, eval_prompts=256,
           prompts=1024)
CPU = dict(HUB, lr=1e-4, minibatch_size=8, max_new_tokens=48, eval_prompts=32, prompts=32)


def bradley_terry_loss(chosen_scores, rejected_scores):
    """-log sigmoid(s(chosen) - s(rejected)): (B,), (B,) -> (B,). arXiv 2203.02155, eq. 1, K = 2."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # log(sigmoid()) would end in log(0)


def train(cfg):
    fill(cfg, TOY, HUB, CPU)
    run = Run(cfg, "reward_model")
    problems, validation, test = load_preferences(cfg)
    K = 2  # chosen, rejected
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(problems) / cfg.minibatch_size)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    scorer = make_scorer(policy, tokenizer, cfg.model)
    del policy  # only its backbone was wanted
    run.open(scorer, tokenizer)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = run.load(policy=scorer, optimizer=optimizer)  # {}, or the checkpoint with --resume

    def rate(asked):  # (B, K), scores of the completions in the data
        return for_all_completions(lambda batch: all_scores(
            scorer, batch, cfg.micro_batch_size), asked, cfg)
    before = state.get("before") or evaluate(scorer, tokenizer, test, cfg, rate=rate)

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
                scores = sequence_scores(scorer, batch, rows).view(-1, K)          # (R / K, K)
                loss = bradley_terry_loss(*scores.T).mean()
                require_finite(loss, "loss", step, texts, rows, scores.flatten())
                (loss * share).backward()
                stats.add(share, loss=loss, **preference_stats(scores))
            grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.add(1, grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. The loss begins at ln 2 = 0.693, the log of a coin.
        run.log(step, **stats())
        validate(run, step, scorer, tokenizer, validation, cfg, rate=rate)
        run.save(step, policy=scorer, optimizer=optimizer, before=before)

    save_policy(scorer, tokenizer, run.folder)
    report(before, evaluate(scorer, tokenizer, test, cfg, rate=rate), run.folder)


if __name__ == "__main__":
    main(Config, train)
