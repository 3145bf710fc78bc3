"""
SFT, supervised fine-tuning: the policy pi is trained on demonstrated completions y of prompts x. At
each position it sees the prompt and the demonstration so far, and learns to predict the next token.

    loss = -mean_t log pi(y_t | x, y_<t)        over all completion tokens of a batch, EOS included

The tokens of the prompt and the padding are not targets. The EOS is a target, because the model
would not learn to stop without it.

Without --model, this script trains a small model from random weights on the toy's demonstrations.
plumbing/toy_policy/, from which the other scripts start without --model, was made in this way. With
--model, --data names the demonstrations; without --data they are the toy's problems in English.

    python sft.py                                 the toy model, from random weights: one minute
    python sft.py --model Qwen/Qwen2.5-0.5B       a real model, on one CUDA GPU

What to expect of the toy: 0.6 of its sampled and 0.9 of its greedy answers to held-out problems are
right. Half of the demonstrations show the work, the others give only the result. About half of the
sampled answers show the work too.
"""
from dataclasses import dataclass

import torch

from common import learning_rate
from common import masked_mean
from plumbing import toy
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, RunConfig
from plumbing.model import load_policy
from plumbing.rollout import make_batch, micro_batches, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    steps: int = HfArg(default=1200, help="training steps")
    lr: float = HfArg(default=4e-3, help="AdamW learning rate at its peak")
    warmup_steps: int = HfArg(default=20, help="steps in which the learning rate rises to its peak")
    micro_batch_size: int = HfArg(default=32, help="completions per pass; changes no result")


# The defaults above are for the toy, these for a real model on a GPU; a CPU gets smaller ones.
REAL = dict(steps=200, lr=1e-5, warmup_steps=0, micro_batch_size=8, max_new_tokens=256,
            eval_prompts=256)


def train(cfg):
    run = Run(cfg, "sft")
    problems, validation, test = load_problems(cfg, "completion")
    if cfg.model:
        policy, tokenizer = load_policy(cfg.model, cfg.device)
    else:
        policy, tokenizer = toy.make_model(cfg.seed).to(cfg.device), toy.make_tokenizer()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.98),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run.open(policy, tokenizer, validation, test, optimizer=optimizer)

    for step in run.steps():
        # 1. Batch: the demonstrations of this step. Nothing is sampled or scored.
        step_problems = draw_problems(problems, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in step_problems],
                           [problem["targets"][0] for problem in step_problems], cfg.device)
        mask = batch.mask                                                          # (N, C)

        # 2. Update. by_token is the weight of a micro-batch: its share of the batch's tokens.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        for rows, by_token, _ in micro_batches(batch, torch.arange(len(mask)),
                                               cfg.micro_batch_size):
            logprobs = token_logprobs(policy, batch, rows, temperature=1.0)        # (n, C)
            loss = -masked_mean(logprobs, mask[rows])
            (loss * by_token).backward()
            stats.add_parts(by_token, loss=loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                   error_if_nonfinite=True)
        optimizer.step()
        stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. The loss shows progress: nats per token of the demonstrations.
        run.log(step, **stats())
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
