"""
REINFORCE (Williams, 1992): a policy pi samples completions y of prompts x. The tokens of those that
scored better than past ones become more likely, the others less. All other scripts build on it:

    A_i  = score_i - kl_coef * sum_t kl_t - b                 kl_t = log(pi / pi_ref)
    loss = -mean_i A_i * sum_t log pi(y_t | x, y_<t)

On average, -loss has the gradient of mean score - kl_coef * KL(pi || pi_ref), where pi_ref is the
policy before training. So it is for every b that ignores the batch; a good b, the baseline, makes
the gradient less noisy. b is 0 for the first batch, and after each batch one of these:

    ema             b <- decay * b + (1 - decay) * mean score of the batch; the first: its mean
    running_mean    b <- mean of all scores so far

One update per batch: the loss needs completions of the very policy that is differentiated. After
an update they would need a correction, the ratio in reinforce_pp.py and ppo.py. With so few
updates, the learning rate is larger than theirs.

    python reinforce.py                                      the toy, no network: half a minute
    python reinforce.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.96 and nearly all.
"""
import copy
from dataclasses import dataclass, field
from typing import Literal

import torch

from common import learning_rate, mini_batches
from common import kl_estimate
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --max_new_tokens, ...
    lr: float = HfArg(default=5e-4, help="AdamW learning rate at its peak")
    minibatch_size: None = field(default=None, init=False)  # no flag: one update per batch
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=256, help="prompts per rollout batch")
    group_size: int = HfArg(default=1, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    kl_coef: float = HfArg(default=0.01, help="weight of the KL (beta in most papers)")
    baseline: Literal["ema", "running_mean"] = HfArg(default="ema", help="mean of past scores")
    decay: float = HfArg(default=0.9, help="of the exponential moving average, ema")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=2e-6, micro_batch_size=8, max_new_tokens=256, kl_coef=0.001,
            eval_prompts=256)


def ema_baseline(baseline, scores, decay):
    """decay * baseline + (1 - decay) * mean: scalar or None (nothing seen yet), (N,) -> scalar."""
    return scores.mean() if baseline is None else decay * baseline + (1 - decay) * scores.mean()


def running_mean_baseline(mean, count, scores):
    """Mean of all scores so far (the notes call it an EMA too): old ones, (N,) -> (mean, count)."""
    total = mean * count + scores.sum()
    return total / (count + len(scores)), count + len(scores)


def reinforce_loss(logprobs, advantages, mask):
    """-mean_i A_i * sum_t log pi(y_t): (N, C), (N,), (N, C) -> scalar. Williams, 1992."""
    logps = torch.where(mask.bool(), logprobs, 0).sum(dim=1)      # (N,)
    return -(advantages * logps).mean()


def train(cfg):
    run = Run(cfg, "reinforce")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = run.open(policy, tokenizer, validation, test, rewards, optimizer=optimizer)
    baseline, count = state.get("baseline"), state.get("count", 0)

    for step in run.steps():
        # 1. Sample: K completions of each prompt of this step, from softmax(logits / temperature).
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in asked], cfg.group_size,
                       cfg.max_new_tokens, cfg.temperature, generator)
        old_logprobs, mask = batch.logprobs, batch.mask  # N completions, C tokens; mask 0: padding
        run.lap("sample")

        # 2. Score: what each completion earned, and how far from the reference each token is.
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(      # (N, C)
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # (N, C) old - ref
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        advantages = scores - cfg.kl_coef * kl.sum(dim=1) - (baseline or 0)      # (N,)
        if cfg.baseline == "ema":
            baseline = ema_baseline(baseline, scores, cfg.decay)
        else:
            baseline, count = running_mean_baseline(baseline or 0, count, scores)

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), len(scores), cfg.group_size, 1,
                                      generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, minibatch, cfg.micro_batch_size):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss = reinforce_loss(logprobs, A, m)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=0.0)  # nothing is clipped
                (loss * by_row).backward()  # this loss is a mean over completions
                stats.add_parts(by_row, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats())
        run.show(step, asked, texts, scores)
        run.end_step(step, baseline=baseline, count=count)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
