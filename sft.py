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
from torch.nn.utils import clip_grad_norm_

from common import learning_rate
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import interval
from plumbing.flags import HfArg, RunConfig, check
from plumbing.model import load_policy
from plumbing.offline import make_batch
from plumbing.parallel import sum_gradients
from plumbing.rollout import all_logprobs, micro_batches, token_logprobs
from plumbing.run import Run
from plumbing.toy_model import make_model, make_tokenizer


@dataclass
class Config(RunConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    lr: float = HfArg(default=1e-5, help="AdamW learning rate at its peak")
    minibatch_size: int = HfArg(default=64, help="demonstrations per optimizer step")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=1200, lr=4e-3, warmup_steps=20, micro_batch_size=32, max_new_tokens=32,
           eval_prompts=512)


def train(cfg):
    cfg = check(cfg)
    if cfg.model:
        policy, tokenizer = load_policy(cfg.model, cfg.device)
    else:
        policy, tokenizer = make_model(cfg.seed).to(cfg.device), make_tokenizer()
    problems = load_problems(cfg, policy, tokenizer, "demonstration")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.98),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)

    def measure(problems):  # of held-out demonstrations, the nats that the policy needs for each
        batch = make_batch([problem["ids"] for problem in problems],
                           [problem["targets"][0] for problem in problems], cfg.device)
        logprobs = all_logprobs(policy, batch, cfg.micro_batch_size, temperature=1.0)
        return dict(nats=interval((-logprobs.sum(dim=1)).tolist()))
    run = Run(cfg, "sft", policy, tokenizer, problems, measure=measure, optimizer=optimizer)

    for step in run.steps():
        # 1. Batch: the demonstrations of this step. Nothing is sampled or scored.
        step_problems = draw_problems(problems.train, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in step_problems],
                           [problem["targets"][0] for problem in step_problems], cfg.device)
        mask = batch.mask                                                          # (N, C)

        # 2. Update. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        share = mask / mask.sum()  # a mean over the tokens of the batch
        for rows in micro_batches(batch, torch.arange(len(mask)), cfg.micro_batch_size):
            losses = -token_logprobs(policy, batch, rows, temperature=1.0)         # (n, C)
            loss = (losses * share[rows]).sum()
            loss.backward()
            run.count(loss=loss)
        sum_gradients(policy)  # over the processes of torchrun
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        optimizer.step()
        run.end_minibatch(grad_norm=grad_norm)

        # 3. Log. The loss shows progress: nats per token of the demonstrations.
        run.log(step)  # also saves when due

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
