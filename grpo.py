"""
GRPO (DeepSeekMath, arXiv 2402.03300): the K answers to a prompt are judged relative to each other.
Against rloo.py: the mean is over all K, the advantage is divided by their std, the KL moves from
the reward to the loss, as k3, and each answer counts the same in the loss, however long:

    A_i  = (score_i - mean) / std                             over the K answers to its prompt
    loss = mean_i mean_t [-min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i) + kl_coef * k3_t]
           ratio_t = pi / pi_old,   k3_t = r - 1 - log r,   r = pi_ref / pi

k3 estimates KL(pi || pi_ref), but as a loss it descends KL(pi_ref || pi). Because of the divisions
by std and by length, the gradient is not that of the mean score.
--process: each reasoning step has a reward, z-scored over all steps of the group; A_t is their sum
from t's step on. The last step's reward is the score; otherwise, stopping early would pay.

    python grpo.py                                      the toy, no network: half a minute
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass

import torch

from common import learning_rate, mini_batches
from common import kl_estimate, masked_mean
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig, fail
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Means, Run
from plumbing.toy import score_steps


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=64, help="prompts per rollout batch")
    group_size: int = HfArg(default=4, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: float = HfArg(default=0.01, help="weight of the KL (beta in most papers)")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    process: bool = HfArg(default=False, help="a reward of 0 or 1 per step too (toy only)")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=1e-6, minibatch_size=128, micro_batch_size=8, max_new_tokens=256,
            kl_coef=0.04, eval_prompts=256)


def group_advantages(scores, group_size):
    """(score - mean) / (std + 1e-4), both of its group: (N,) -> (N,). DeepSeekMath, section 4.1.2.

    std divides by K - 1, as in TRL. If all scores are equal, A is exactly 0, not a rounding error.
    """
    groups = scores.view(-1, group_size)
    mean, std = groups.mean(dim=1, keepdim=True), groups.std(dim=1, keepdim=True)
    constant = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return torch.where(constant, 0, (groups - mean) / (std + 1e-4)).flatten()


def process_advantages(step_rewards, step_ends, mask, group_size):
    """A_t = sum of the standardised rewards of all steps that end at or after t -> (N, C).

    step_rewards, step_ends: N lists, of each step its reward and its last token's 0-based index.
    Mean and std are those of all steps of the group. DeepSeekMath, section 4.1.3.
    """
    advantages = 0.0 * mask                                       # (N, C)
    for first in range(0, len(mask), group_size):
        group = range(first, first + group_size)
        pool = torch.tensor([r for i in group for r in step_rewards[i]], dtype=advantages.dtype)
        pool = iter(group_advantages(pool, len(pool)).tolist() if len(pool) else [])
        for i in group:
            for end in step_ends[i]:  # (the notes compare t, a token, with j, a step)
                advantages[i, : end + 1] += next(pool)  # same order as in `pool` above
    return torch.where(mask.bool(), advantages, 0)


def response_mean(values, mask):
    """Mean over each response's tokens, then over responses: (N, C) -> scalar. DeepSeekMath, eq. 3.

    All responses count the same, so that a token of a long wrong answer is punished less.
    """
    values = torch.where(mask.bool(), values, 0)
    return (values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_eps, kl_coef,
              aggregate=response_mean):
    """The clipped loss + kl_coef * k3, all (N, C), advantages also (N,) -> (loss, clip_frac).

    aggregate: how the losses of the tokens become one number; with masked_mean, as in DAPO.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    logprobs, old_logprobs, ref_logprobs = (  # first: nan on padding would reach the gradient
        torch.where(mask.bool(), x, 0) for x in (logprobs, old_logprobs, ref_logprobs))
    ratio = (logprobs - old_logprobs).exp()
    unclipped, clipped = -A * ratio, -A * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    k3 = kl_estimate(logprobs, ref_logprobs, "k3")
    loss = aggregate(torch.maximum(unclipped, clipped) + kl_coef * k3, mask)
    return loss, masked_mean((clipped > unclipped).to(loss.dtype), mask)


def train(cfg):
    if cfg.process and cfg.data != "toy":
        fail(f"--process: --data {cfg.data} has no checker of steps, only toy has; leave it out")
    run = Run(cfg, "grpo")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    run.open(policy, tokenizer, validation, test, rewards, optimizer=optimizer)

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
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # only for the log
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        if cfg.process:
            steps = score_steps(asked, batch, texts, scores, tokenizer)
            advantages = process_advantages(*steps, mask, cfg.group_size)
        else:
            advantages = group_advantages(scores, cfg.group_size)

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, minibatch, cfg.micro_batch_size,
                                                        None if cfg.kl_coef else advantages):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss, clip_frac = grpo_loss(logprobs, old, ref_logprobs[rows], A, m, cfg.clip_eps,
                                            cfg.kl_coef)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=clip_frac)
                (loss * by_row).backward()  # this loss is a mean over completions
                stats.add_parts(by_row, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats())
        run.show(step, asked, texts, scores)
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
