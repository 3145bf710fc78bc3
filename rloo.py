"""
RLOO (Ahmadian et al., arXiv 2402.14740): REINFORCE; a prompt's other completions are the baseline.
Against reinforce_pp.py: K completions of each prompt, no z-score, no discount; the KL of the whole
completion is part of its one reward, so that all its tokens have the same advantage:

    R_i  = score_i - kl_coef * sum_t kl_t                     reward; kl_t = log(pi_old / pi_ref)
    A_i  = R_i - mean of the R_j, j != i, of its prompt       advantage: leave one out
    loss = -mean_t min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i)     ratio_t = pi / pi_old

The other completions do not depend on this one, so the gradient stays unbiased (apart from the mean
over tokens, whose number is random). With R_i in the mean, A would be (K - 1) / K of what it is.

The paper makes one update per batch, so it needs no ratio. For several, each token has its own, as
in the libraries verl and OpenRLHF; with --sequence_ratio each completion has one, as in TRL.

    python rloo.py                                      the toy, no network: half a minute
    python rloo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass

import torch

from common import learning_rate, mini_batches
from common import kl_estimate, masked_mean, ppo_clip_loss
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=64, help="prompts per rollout batch")
    group_size: int = HfArg(default=4, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: float = HfArg(default=0.01, help="weight of the KL (beta in most papers)")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    sequence_ratio: bool = HfArg(default=False, help="one ratio per completion, as TRL has it")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=1e-6, minibatch_size=128, micro_batch_size=8, max_new_tokens=256,
            kl_coef=0.001, eval_prompts=256)


def leave_one_out_advantages(rewards, group_size):
    """R_i - the mean of the other rewards of its group: (N,) -> (N,). Kool et al., 2019."""
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes nothing, but makes equal rewards exactly 0
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()  # the notes call this the baseline, and average it: 0


def sequence_ratio_loss(logprobs, old_logprobs, advantages, mask, clip_eps):
    """PPO's loss with one ratio per completion, as in TRL; advantages (N,) -> (loss, clip_frac).

    It is the product of the tokens' ratios: 1.005 per token make 147 after 1000 tokens. So a long
    completion is soon clipped and teaches nothing; or, if A < 0, is not, and counts 147 times.
    """
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).sum(dim=1).exp()     # (N,)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    active = (clipped > unclipped)[:, None].expand_as(mask).to(ratio.dtype)
    return torch.maximum(unclipped, clipped).mean(), masked_mean(active, mask)


def train(cfg):
    run = Run(cfg, "rloo")
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
        if cfg.sequence_ratio:  # the sampler's bf16 rounding errors would add up over the tokens
            old_logprobs = all_logprobs(policy, batch, cfg.micro_batch_size, cfg.temperature)
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(      # (N, C)
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # (N, C) old - ref
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        advantages = leave_one_out_advantages(scores - cfg.kl_coef * kl.sum(dim=1), cfg.group_size)

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, minibatch, cfg.micro_batch_size,
                                                        advantages):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                if cfg.sequence_ratio:
                    loss, clip_frac = sequence_ratio_loss(logprobs, old, A, m, cfg.clip_eps)
                else:
                    loss, clip_frac = ppo_clip_loss(logprobs, old, A[:, None], m, cfg.clip_eps)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=clip_frac)
                weight = by_row if cfg.sequence_ratio else by_token  # a mean over which of them?
                (loss * weight).backward()
                stats.add_parts(weight, loss=loss)
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
