"""
SFT, supervised fine-tuning: make the demonstrated completions likely. Stage 1 of the notes. Without
a --model it trains the toy's from random weights. The policy in plumbing/toy_policy/, from which
all other scripts start, was made in this way.

    loss = -mean_t log pi(y_t | x, y_<t)        over completion tokens, the EOS included

Prompt tokens are no targets, and neither is padding (the notes label them 0, which is a real token;
here they are not scored at all). The EOS is one, or the model would not learn to stop.

    python sft.py                                 the toy model, from nothing: one minute
    python sft.py --model Qwen/Qwen2.5-0.5B       a real model, on one CUDA GPU

What to expect of the toy: about 0.6 of the held-out problems right sampled, 0.9 greedy. Half of
the demonstrations show their work and half just name the result; so does the trained policy.
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
class Config(RunConfig):  # the rest is in plumbing/flags.py: --max_new_tokens, --seed, ...
    steps: int = HfArg(default=1200, help="training steps")
    lr: float = HfArg(default=4e-3, help="AdamW learning rate at its peak")
    warmup_steps: int = HfArg(default=20, help="steps in which the learning rate rises to its peak")
    micro_batch_size: int = HfArg(default=32, help="completions per pass: memory, not results")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=1e-5, warmup_steps=0, micro_batch_size=8, max_new_tokens=256,
            eval_prompts=256)


def train(cfg):
    run = Run(cfg, "sft")
    problems, validation, test = load_problems(cfg, "completion")
    if cfg.model:
        policy, tokenizer = load_policy(cfg.model, cfg.device)
    else:
        policy, tokenizer = toy.make_model(cfg.seed).to(cfg.device), toy.make_tokenizer()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    run.open(policy, tokenizer, validation, test, optimizer=optimizer)

    for step in run.steps():
        # 1. Batch: demonstrations instead of samples, and nothing to score.
        asked = draw_problems(problems, step, cfg.minibatch_size, cfg.seed)
        batch = make_batch([problem["ids"] for problem in asked],
                           [problem["targets"][0] for problem in asked], cfg.device)
        mask = batch.mask                                                          # (N, C)

        # 2. Update.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.zero_grad()
        for rows, by_token, _ in micro_batches(batch, torch.arange(len(mask)),
                                               cfg.micro_batch_size):
            logprobs = token_logprobs(policy, batch, rows, temperature=1.0)        # (R, C)
            loss = -masked_mean(logprobs, mask[rows])
            (loss * by_token).backward()
            stats.add_parts(by_token, loss=loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                   error_if_nonfinite=True)
        optimizer.step()
        stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 3. Log. Here the loss does say something: nats per token, and it falls.
        run.log(step, **stats())
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
