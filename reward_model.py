"""
Reward model (Bradley and Terry, 1952; Ouyang et al., arXiv 2203.02155): from pairs of completions,
of which one was preferred, learn a score s(x, y) that the preferred one gets more of. Stage 2 of
the notes; with it, the online scripts can learn from preferences: python ppo.py --reward FOLDER.
Differs from dpo.py: the score is a network's own output, and not a policy's log-probs.

    P(chosen preferred) = sigmoid(s(chosen) - s(rejected))
    loss = -log sigmoid(s(chosen) - s(rejected))

(The notes have a line -E[1 / log(1 + exp(s_l - s_w))]; it is E[log(1 + exp(s_l - s_w))].) Only
differences within a prompt are learned: scores of two prompts cannot be compared.

    python reward_model.py                                      the toy, no network: half a minute
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/ultrafeedback_binarized

What to expect of the toy, whose pairs are a right and a wrong answer of the toy's policy: 0.9
of the held-out pairs in the right order.
"""
import copy
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems
from plumbing.evaluation import preference_stats
from plumbing.flags import HfArg, RunConfig, fail
from plumbing.model import load_policy, remove_dropout
from plumbing.preferences import for_all_completions, load_preferences
from plumbing.rollout import all_scores, make_batch, micro_batches, sequence_scores
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --max_new_tokens, --seed, ...
    steps: Optional[int] = HfArg(default=None, help="training steps; None: what --epochs take")
    lr: float = HfArg(default=1e-3, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="rows of data per optimizer step")
    micro_batch_size: int = HfArg(default=64, help="rows of data per pass: memory, not results")
    epochs: int = HfArg(default=1, help="passes over the data, where --steps are not given")
    prompts: int = HfArg(default=1920, help="toy, words: prompts to make preferences of")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(lr=1e-5, micro_batch_size=4, max_new_tokens=512, eval_prompts=256, prompts=1024)


def bradley_terry_loss(chosen_scores, rejected_scores):
    """-log sigmoid(s(chosen) - s(rejected)): (B,), (B,) -> (B,). arXiv 2203.02155, eq. 1, K = 2."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # log(sigmoid()) would end in log(0)


def make_scorer(policy, tokenizer, name):
    """The policy's backbone with a new head. It starts at 0: no opinion yet."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        scorer.base_model.load_state_dict(policy.base_model.state_dict())
        torch.nn.init.zeros_(scorer.score.weight)
    except (ValueError, AttributeError, RuntimeError):  # no such class, head, or backbone
        fail(f"--model {name}: transformers has no sequence classifier for {config.model_type} "
             "with a head called score; choose another model")
    if scorer.config.pad_token_id is None:  # for transformers' own forward, which we do not use
        scorer.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return remove_dropout(scorer).to(policy.device)


def train(cfg):
    run = Run(cfg, "reward_model")
    problems, validation, test = load_preferences(cfg)
    K = 2  # chosen, rejected
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(problems) / cfg.minibatch_size)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    scorer = make_scorer(policy, tokenizer, cfg.model)
    del policy  # only its backbone was wanted
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)

    def rate(asked):  # (B, K), scores of the completions in the data
        return for_all_completions(lambda batch: all_scores(
            scorer, batch, cfg.micro_batch_size), asked, cfg)
    run.open(scorer, tokenizer, validation, test, rate=rate, optimizer=optimizer)

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
            scores = sequence_scores(scorer, batch, rows).view(-1, K)              # (R / K, K)
            loss = bradley_terry_loss(*scores.T).mean()
            (loss * by_row).backward()
            stats.add_parts(by_row, loss=loss, **preference_stats(scores))
        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), cfg.max_grad_norm,
                                                   error_if_nonfinite=True)
        optimizer.step()
        stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. The loss begins at ln 2 = 0.693, the log of a coin.
        run.log(step, **stats())
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
