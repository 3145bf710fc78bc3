"""
Reward model (Bradley and Terry, 1952; Ouyang et al., arXiv 2203.02155). The data are pairs of
completions of a prompt x, of which one was preferred. A network learns a score s(x, y) that is
higher for the preferred completion. Scripts that need a score for every completion can then use it:
python ppo.py --reward FOLDER, where FOLDER is this script's run folder.

    P(chosen is preferred) = sigmoid(s(x, chosen) - s(x, rejected))        Bradley-Terry model
    loss = -mean log P                                                     mean over the pairs

The loss depends only on differences between scores of the same prompt. If a constant is added
to all scores of a prompt, the loss stays the same. So the pairs do not say how the scores of two
prompts compare.

The network is a copy of the model that --model names, or of the toy's policy, with a new head that
turns the hidden state of the last token into one number. The head starts at 0, so at first all
scores are 0 and the loss is ln 2.

Compared with dpo.py:
  - the score is the output of a new head; in DPO it is beta * log(pi / pi_ref), from the policy;
  - no reference policy is needed.

    python reward_model.py                                      the toy, no network: half a minute
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --data trl-lib/ultrafeedback_binarized

What to expect of the toy, where each pair is a right and a wrong answer of the toy's policy: in 0.9
of the held-out pairs the right one has the higher score.
"""
import copy
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForSequenceClassification

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, RunConfig, check, fail
from plumbing.model import load_policy, remove_dropout
from plumbing.offline import for_all_completions, held_out_stats, make_batch, preference_stats
from plumbing.parallel import sum_gradients
from plumbing.rollout import micro_batches
from plumbing.run import Run
from plumbing.scorer import REWARD, all_scores, sequence_scores


@dataclass
class Config(RunConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    steps: Optional[int] = HfArg(default=None, help="training steps; None: --epochs decides")
    lr: float = HfArg(default=1e-5, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="pairs per optimizer step")
    micro_batch_size: int = HfArg(default=4, help="pairs per pass; changes no result")
    max_new_tokens: int = HfArg(default=512, help="longest completion, in tokens")
    epochs: int = HfArg(default=1, help="passes over the data, unless --steps is given")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(lr=1e-3, micro_batch_size=64, max_new_tokens=32, eval_prompts=512)


def bradley_terry_loss(chosen_scores, rejected_scores):
    """-log sigmoid(s(chosen) - s(rejected)): (B,), (B,) -> (B,). arXiv 2203.02155, eq. 1, K = 2."""
    return -F.logsigmoid(chosen_scores - rejected_scores)  # log(sigmoid(x)) could round to log(0)


def make_scorer(policy, tokenizer, name):
    """The policy's network with a head that gives one number, at first 0."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        scorer.base_model.load_state_dict(policy.base_model.state_dict())
        torch.nn.init.zeros_(scorer.score.weight)
    except (ValueError, AttributeError, RuntimeError):  # no such class, head, or backbone
        fail(f"--model {name}: transformers has no sequence classifier for {config.model_type} "
             "with a head called score; choose another model")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    scorer.config.pad_token_id = None if pad == eos else pad  # transformers reads the last non-pad
    return remove_dropout(scorer).to(policy.device)


def train(cfg):
    cfg = check(cfg)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer, "pair")
    K = 2  # chosen, rejected
    steps = cfg.steps or math.ceil(cfg.epochs * len(problems.train) / cfg.minibatch_size)
    scorer = make_scorer(policy, tokenizer, cfg.model)
    del policy  # the scorer has a copy of its weights
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)

    def measure(problems):  # of held-out pairs, by their scores (B, K), without gradient
        return held_out_stats(for_all_completions(lambda batch: all_scores(
            scorer, batch, cfg.micro_batch_size), problems, cfg))
    run = Run(cfg, "reward_model", scorer, tokenizer, problems, measure=measure,
              optimizer=optimizer)
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
            scores = sequence_scores(scorer, batch, rows).view(-1, K)              # (n / K, K)
            losses = bradley_terry_loss(*scores.T)  # column 0 is chosen, column 1 rejected
            loss = losses.sum() / len(step_problems)  # a mean over the pairs of the step
            loss.backward()
            run.count(loss=loss, **preference_stats(scores, len(step_problems)))
        sum_gradients(scorer)  # over the processes of torchrun
        grad_norm = clip_grad_norm_(scorer.parameters(), cfg.max_grad_norm)
        optimizer.step()
        run.end_minibatch(grad_norm=grad_norm)

        # 3. Log. The loss starts at ln 2 = 0.693.
        run.log(step)  # also saves when due

    run.close()  # saves the model, and tests it on the test problems
    (run.folder / "reward.py").write_text(REWARD)  # now the folder is a reward


if __name__ == "__main__":
    main(Config, TOY, train)
