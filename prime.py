"""
PRIME (Cui et al., arXiv 2502.01456): a reward for every token, learned from outcomes alone.
Against rloo.py: no KL, but a second network, the implicit reward model prm. It starts as a copy of
the reference and learns to tell right answers from wrong ones. What it then finds likelier than the
reference does is rewarded, token by token, though nobody has labelled a step:

    q_t  = beta * log(prm / ref)                              implicit reward of a token
    p_i  = sigmoid(sum_t q_t)                                 is i right? s_i: its score, 0 to 1
    prm_loss = -mean_i [s_i log p_i + (1 - s_i) log(1 - p_i)]
    A_t  = sum_{u >= t} gamma^(u - t) (q_u - mean of the others' mean q)  +  s_i - mean of others' s
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     ratio_t = pi / pi_old

Why single tokens, if only sums are trained? q summed up to a token is beta * log E[exp(Q / beta)],
a soft mean of the final sum Q, were the reference to write the rest (arXiv 2412.01981): so q_t is
what token t changes in it. The others' mean q is subtracted at every token: if > 0, answers shrink.

    python prime.py                                      the toy, no network: a minute
    python prime.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass

import torch

from common import learning_rate, mini_batches
from common import kl_estimate, ppo_clip_loss, returns_to_go
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig, fail
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Means, Run
from plumbing.toy import score_steps
from rloo import leave_one_out_advantages


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=64, help="prompts per rollout batch")
    group_size: int = HfArg(default=4, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    gamma: float = HfArg(default=1.0, help="discount per token of the implicit rewards")
    beta: float = HfArg(default=0.05, help="of the implicit reward, beta * log(prm / ref)")
    prm_lr: float = HfArg(default=1e-3, help="AdamW learning rate of the reward model")
    accuracy_filter: float = HfArg(default=0.0, help="drop mean scores < this or > 1 - this")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=5e-7, minibatch_size=128, micro_batch_size=8, max_new_tokens=256,
            eval_prompts=256, prm_lr=1e-6)


def implicit_rewards(prm_logprobs, ref_logprobs, beta):
    """q_t = beta * log(prm / ref): (N, C), (N, C) -> (N, C); 0 where both are. PRIME, eq. 3."""
    return beta * (prm_logprobs - ref_logprobs)


def implicit_reward_loss(prm_logprobs, ref_logprobs, mask, labels, beta):
    """Cross-entropy of sigmoid(sum_t q_t): three (N, C), labels (N,) from 0 to 1 -> scalar. Eq. 4.

    From the sums themselves: a sigmoid that has been rounded to 0 has no logarithm.
    """
    q = torch.where(mask.bool(), implicit_rewards(prm_logprobs, ref_logprobs, beta), 0)
    return torch.nn.functional.binary_cross_entropy_with_logits(q.sum(dim=1), labels.to(q))


def prime_advantages(process_rewards, scores, mask, group_size, gamma=1.0):
    """A_t, leaving one out in both parts: q (N, C), (N,), (N, C) -> (N, C). PRIME, eq. 5.

    The authors' code has (q_t - mean of all K mean q) K / (K - 1): the same for scores; but it
    stretches the differences within an answer. It also discounts the outcome, and whitens A.
    """
    q = torch.where(mask.bool(), process_rewards, 0)
    means = q.sum(dim=1) / mask.sum(dim=1).clamp(min=1)                           # (N,)
    others = means - leave_one_out_advantages(means, group_size)                  # their mean
    process = returns_to_go(q - others[:, None], mask, gamma)
    outcome = leave_one_out_advantages(scores, group_size)
    return torch.where(mask.bool(), process + outcome[:, None], 0)


def filter_by_accuracy(scores, group_size, margin):
    """Completions (M,) of prompts with a mean score from margin to 1 - margin: (N,) -> indices."""
    means = scores.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)
    return ((means >= margin) & (means <= 1 - margin)).nonzero().flatten()


def prm_stats(q, scores, step_rewards=(), step_ends=()):
    """For the log: q (N, C), scores (N,), what score_steps found, if anything -> dict of scalars.

    Of wrong answers of several steps: how often has the first wrong step the lowest sum of q?
    """
    found, chance = [], []
    for sums, right, ends in zip(q.cumsum(dim=1), step_rewards, step_ends):
        if len(right) > 1 and right[-1] == 0:
            lowest = sums[ends].diff(prepend=sums.new_zeros(1)).argmin()
            found.append(float(lowest == right.index(0)))
            chance.append(1 / len(right))
    n, stats = len(found), dict(prm_accuracy=((q.sum(dim=1) > 0) == (scores > 0.5)).float().mean())
    if found:
        stats.update(wrong_answers=n, step_found=sum(found) / n, step_chance=sum(chance) / n)
    return stats


def spell(batch, q, tokenizer, i):
    """Completion i as a list of [token, its implicit reward]: for samples.jsonl."""
    m = batch.mask[i].bool()
    tokens = [tokenizer.decode([token]) for token in batch.completions[i][m].tolist()]
    return list(zip(tokens, q[i][m].tolist()))


def train(cfg):
    run = Run(cfg, "prime")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    ref_model, prm = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    optimizer.add_param_group(dict(params=prm.parameters()))  # its group 1
    run.open(policy, tokenizer, validation, test, rewards, optimizer=optimizer, prm=prm)

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
        if scores.min() < 0 or scores.max() > 1:
            fail(f"--reward {cfg.reward}: PRIME takes scores from 0 to 1; scale it, or use rloo.py")
        ref_logprobs, prm_logprobs = (all_logprobs(                              # (N, C)
            model, batch, cfg.micro_batch_size, cfg.temperature) for model in (ref_model, prm))
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")                       # only for the log
        q = implicit_rewards(prm_logprobs, ref_logprobs, cfg.beta)               # (N, C)
        steps = score_steps(asked, batch, texts, scores, tokenizer) if cfg.data == "toy" else ()
        each.update(prm_stats(q, scores, *steps))
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        advantages = prime_advantages(q, scores, mask, cfg.group_size, cfg.gamma)
        kept = filter_by_accuracy(scores, cfg.group_size, cfg.accuracy_filter).cpu()

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        optimizer.param_groups[1]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps,
                                                        cfg.prm_lr)
        for minibatch in mini_batches(len(kept), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, kept[minibatch],
                                                        cfg.micro_batch_size):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss, clip_frac = ppo_clip_loss(logprobs, old, A, m, cfg.clip_eps)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=clip_frac)
                (loss * by_token).backward()  # now, to free the policy's activations
                stats.add_parts(by_token, loss=loss)
                new = token_logprobs(prm, batch, rows, cfg.temperature)          # (R, C)
                error = implicit_reward_loss(new, ref_logprobs[rows], m, scores[rows], cfg.beta)
                (error * by_row).backward()  # this loss is a mean over completions
                stats.add_parts(by_row, prm_loss=error)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            torch.nn.utils.clip_grad_norm_(prm.parameters(), cfg.max_grad_norm,
                                           error_if_nonfinite=True)
            optimizer.step()
            stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each,
                **{"loss": 0.0, **stats()})
        run.show(step, asked, texts, scores, token_rewards=lambda i: spell(batch, q, tokenizer, i))
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
