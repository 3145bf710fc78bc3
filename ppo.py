"""
PPO (Schulman et al., arXiv 1707.06347) as it is used on language models: REINFORCE++ with a critic.
Against reinforce_pp.py: a second network, the critic V, predicts before each token what is still to
come, and is the baseline; lam sets how far ahead A looks; the scores are not z-scored:

    r_t  = score (last token only) - kl_coef * kl_t           reward; kl_t = log(pi_old / pi_ref)
    A_t  = delta_t + gamma * lam * A_{t+1}                    advantage (GAE); z-scored for the loss
           delta_t = r_t + gamma * V_{t+1} - V_t              what came minus what V expected
    R_t  = A_t + V_t                                          return, A not z-scored: V's target
    loss = -mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)     ratio_t = pi / pi_old
    value_loss = mean_t max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2    c: value_clip

With lam = 1, A trusts only what came; with lam = 0, V: less noise, but all of the critic's errors.
The critic starts as a copy of the policy whose new head gives one number, at first 0. It has its
own learning rate, and costs as much memory and time as the policy (less so on the toy).

    python ppo.py                                      the toy, no network: a minute
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.95 and nearly all.
"""
import copy
from dataclasses import dataclass

import torch

from common import learning_rate, mini_batches
from common import kl_estimate, masked_mean, ppo_clip_loss, returns_to_go, token_rewards, whiten
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig, fail
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import (all_logprobs, all_values, micro_batches, sample, step_generator,
                              token_logprobs, token_values)
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=256, help="prompts per rollout batch")
    group_size: int = HfArg(default=1, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over each rollout batch")
    kl_coef: float = HfArg(default=0.01, help="weight of the KL (beta in most papers)")
    clip_eps: float = HfArg(default=0.2, help="clip range of the ratio")
    gamma: float = HfArg(default=1.0, help="discount per token")
    lam: float = HfArg(default=0.95, help="lambda of GAE")
    value_clip: float = HfArg(default=0.2, help="clip range of V, in units of the score")
    critic_lr: float = HfArg(default=2e-3, help="AdamW learning rate of the critic")
    critic_warmup: int = HfArg(default=0, help="first steps, in which only the critic learns")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=1e-6, minibatch_size=128, micro_batch_size=8, max_new_tokens=256,
            kl_coef=0.001, eval_prompts=256, critic_lr=1e-5)


def make_critic(policy):
    """V(x, y_<t): a copy of the policy whose head gives one number, at first 0, not the logits."""
    critic, width = copy.deepcopy(policy), policy.get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(width, 1, device=policy.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    critic.set_output_embeddings(head)
    return critic


def gae(rewards, values, mask, gamma, lam):
    """A_t = delta_t + gamma * lam * A_{t+1}, all (N, C) -> (advantages, returns), (N, C) each.

    delta_t = r_t + gamma * V_{t+1} - V_t, with V = 0 after the last token, even if the completion
    was cut short there; returns = A + V. GAE, arXiv 1506.02438, eq. 16 (the notes once omit lam).
    lam = 1: A = (sum of the rewards from t on, discounted) - V; lam = 0: A = delta.
    """
    rewards, values = (torch.where(mask.bool(), x, 0) for x in (rewards, values))
    advantages, future, next_value = torch.zeros_like(rewards), 0, 0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = future = delta + gamma * lam * future
        next_value = values[:, t]
    return advantages, advantages + values


def value_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error of V, all (N, C) -> (loss, clip_frac), scalars; means over tokens.

    Of the errors of V and of V clipped to old V +- value_clip, the larger counts: as with the
    ratio, there is no gradient once V has moved by value_clip towards its target. (The notes have
    the one-step error delta for a loss, without the square.)
    """
    values, old_values, returns = (torch.where(mask.bool(), x, 0)
                                   for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), mask)
    return loss, masked_mean((clipped_error > error).to(loss.dtype), mask)


def explained_variance(values, returns, mask):
    """1 - Var(returns - V) / Var(returns), over valid tokens: (N, C) -> scalar.

    `returns` as they came, returns_to_go, not GAE's, which have V in them. 1: V knew them; 0: it is
    no better than a constant, or there was nothing to know; negative: worse.
    """
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    known = 1 - variance(returns - values) / variance(returns)
    return torch.where(variance(returns) > 1e-8, known, 0)


def train(cfg):
    if cfg.critic_warmup >= cfg.steps:
        fail(f"--critic_warmup {cfg.critic_warmup} leaves the policy none of --steps {cfg.steps}")
    run = Run(cfg, "ppo")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    critic = make_critic(policy)
    optimizer.add_param_group(dict(params=critic.parameters()))  # its group 1
    run.open(policy, tokenizer, validation, test, rewards, optimizer=optimizer, critic=critic)

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
        old_values = all_values(critic, batch, cfg.micro_batch_size)             # (N, C)
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Advantages: how much better than usual did it go? No gradient flows through them.
        shaped = token_rewards(scores, kl, mask, cfg.kl_coef)                    # (N, C)
        advantages, returns = gae(shaped, old_values, mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask)  # only now: V learns the raw returns
        foreseen = explained_variance(old_values, returns_to_go(shaped, mask, cfg.gamma), mask)

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        if step < cfg.critic_warmup:  # at first only V learns
            optimizer.param_groups[0]["lr"] = 0.0
        optimizer.param_groups[1]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps,
                                                        cfg.critic_lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, minibatch, cfg.micro_batch_size):
                old, A, m = old_logprobs[rows], advantages[rows], mask[rows]     # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss, clip_frac = ppo_clip_loss(logprobs, old, A, m, cfg.clip_eps)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=clip_frac)
                (loss * by_token).backward()
                stats.add_parts(by_token, loss=loss)
                V = token_values(critic, batch, rows)                            # (R, C)
                error, clipped = value_loss(V, old_values[rows], returns[rows], m, cfg.value_clip)
                (error * by_token).backward()  # second, when the policy's activations are free
                stats.add_parts(by_token, value_loss=error, value_clip_frac=clipped)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.max_grad_norm,
                                           error_if_nonfinite=True)
            optimizer.step()
            stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is no measure of quality: what matters is its gradient.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats(),
                explained_var=foreseen)
        run.show(step, asked, texts, scores)
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
