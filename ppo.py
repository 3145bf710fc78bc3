"""
PPO (Schulman et al., arXiv 1707.06347) as it is used on language models. The policy pi answers
prompts x with completions y, and each completion gets a score. A second network, the critic V,
predicts before each token how much reward is still to come. The advantage of a token is the reward
that comes from it on, minus what V predicted. Tokens with an advantage above the batch's mean
become more likely, the others less likely. pi_ref is a copy of the policy from before the training.

    kl_t = log(pi_old / pi_ref)                               of token t; pi_old sampled the batch
    r_t  = [t is the last token] * score - kl_coef * kl_t     reward; the score is not normalised
    delta_t = r_t + gamma * V_old_{t+1} - V_old_t             V_old is 0 after the last token
    A_t  = delta_t + gamma * lam * A_{t+1}                    advantage by GAE
    R_t  = A_t + V_old_t                                      return, which V learns to predict
    A'_t = (A_t - mean) / std                                 over all tokens of the batch
    ratio_t = pi / pi_old                                     of token t
    loss = -mean_t min(ratio_t A'_t, clip(ratio_t, 1 - eps, 1 + eps) A'_t)   over the mini-batch
    V'_t = clip(V_t, V_old_t - v, V_old_t + v)                v: value_clip
    value_loss = mean_t max((V_t - R_t)^2, (V'_t - R_t)^2) / 2

pi_old, V_old, A and R are computed once per step; pi and V change with every mini-batch.

V_t is read where the policy chooses y_t. So it depends on x and y_<t and not on y_t, and therefore
subtracting it does not bias the gradient. With lam = 1, A_t is the (discounted) sum of the rewards
from t on, minus V_old_t: it is right on average, but noisy. With lam = 0, A_t is delta_t: it is
less noisy, but biased where V is wrong.

The critic is a copy of the policy with a new head, which gives one number, at first 0. It shares no
weights with the policy. It has its own learning rate, and costs as much again as the policy in
memory and in the time of an update. Clipping the values is not in the paper, but in its authors'
code.

By default, a step samples 256 completions, one for each prompt, and makes 2 updates, or 4 on the
toy. The reward last_number gives 0 to a completion that is cut off.

Compared with reinforce_pp.py:
  - the critic is the baseline, instead of the mean return of the batch;
  - lam sets how far ahead A_t looks;
  - the scores are not normalised, because V learns their size.

    python ppo.py                                      the toy, no network: a minute
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.97 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common import (kl_estimate, learning_rate, masked_mean, mini_batches, ppo_clip_loss,
                    returns_to_go, token_rewards, whiten)
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import approx_kl
from plumbing.flags import HfArg, OnlineConfig, check, fail
from plumbing.model import load_policy
from plumbing.parallel import add_up, sum_gradients
from plumbing.rewards import load_rewards, score
from plumbing.rollout import (all_logprobs, micro_batches, per_token, sample, step_generator,
                              token_logprobs)
from plumbing.run import Run


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --lr, are in plumbing/flags.py
    prompts_per_step: int = HfArg(default=256, help="prompts of a step")
    group_size: int = HfArg(default=1, help="completions of each prompt, K")
    epochs: int = HfArg(default=1, help="passes over the completions of a step")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the reference (beta in papers)")
    clip_eps: float = HfArg(default=0.2, help="the ratio is clipped to 1 +- this")
    gamma: float = HfArg(default=1.0, help="discount per token")
    lam: float = HfArg(default=0.95, help="lambda of GAE: 1 relies on rewards, 0 on the critic")
    value_clip: float = HfArg(default=0.2, help="the critic may move a value by this (unit: score)")
    critic_lr: float = HfArg(default=1e-5, help="AdamW learning rate of the critic at its peak")
    critic_warmup: int = HfArg(default=0, help="first steps, of the critic alone; --lr still falls")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32,
           kl_coef=0.01, eval_prompts=512, critic_lr=2e-3)


def make_critic(policy):
    """V(x, y_<t): a copy of the policy whose head gives one number, at first 0, and not logits."""
    critic, width = copy.deepcopy(policy), policy.get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(width, 1, device=policy.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    critic.set_output_embeddings(head)
    return critic


def token_values(critic, batch, rows):
    """V(x, y_<t), the value of where y_t was chosen, of completions `rows` (n,) -> (n, C)."""
    return per_token(critic, batch, rows, lambda outputs, tokens: outputs.float().squeeze(-1))


@torch.no_grad()
def all_values(critic, batch, micro_batch_size):
    """V(x, y_<t) of all completions, without gradient -> (N, C)."""
    result = torch.zeros_like(batch.mask)
    for rows in micro_batches(batch, torch.arange(len(result)), micro_batch_size):
        result[rows] = token_values(critic, batch, rows)
    add_up(result)  # each process has some of the rows
    return result


def gae(rewards, values, mask, gamma, lam):
    """A_t = delta_t + gamma * lam * A_{t+1}, all (N, C) -> (advantages, returns), (N, C) each.

    delta_t = r_t + gamma * V_{t+1} - V_t, and V = 0 after the last token, also where the completion
    was cut off. The returns are A + V. GAE, arXiv 1506.02438, eq. 16.
    """
    rewards, values = (torch.where(mask.bool(), x, 0) for x in (rewards, values))
    advantages, future, next_value = torch.zeros_like(rewards), 0, 0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = future = delta + gamma * lam * future
        next_value = values[:, t]
    return advantages, advantages + values


def value_loss(values, old_values, returns, value_clip):
    """Half the squared error of V per token -> losses, is_clipped, (N, C) each, from (N, C) each.

    The larger of two errors counts, that of V and that of V clipped to its old value +- value_clip.
    Where V has moved more than value_clip and is nearer to its target than the clipped V, that is
    the second. It is a constant there, so V has no gradient, and is_clipped is true.
    """
    clipped = values.clamp(old_values - value_clip, old_values + value_clip)
    errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(errors, clipped_errors), clipped_errors > errors


def explained_variance(values, returns, mask):
    """1 - Var(returns - V) / Var(returns), over valid tokens: (N, C) -> scalar.

    Take returns_to_go() and not GAE's returns, which have V in them. 1: V predicted them, up to a
    constant; 0: V is no better than a constant, or all returns are equal; below 0: V is worse.
    """
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    explained = 1 - variance(returns - values) / variance(returns)
    return torch.where(variance(returns) > 1e-8, explained, 0)


def train(cfg):
    if cfg.critic_warmup >= cfg.steps:
        fail(f"--critic_warmup {cfg.critic_warmup} leaves the policy none of --steps {cfg.steps}")
    cfg = check(cfg)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    critic = make_critic(policy)
    optimizer.add_param_group(dict(params=critic.parameters()))  # param_groups[1]
    run = Run(cfg, "ppo", policy, tokenizer, problems, rewards, optimizer=optimizer, critic=critic)

    for step in run.steps():
        # 1. Sample K completions of each prompt of this step from softmax(logits / temperature).
        # The completions of a prompt are neighbouring rows: prompt i has rows i K to i K + K - 1.
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        step_problems = draw_problems(problems.train, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in step_problems],
                       cfg.group_size, cfg.max_new_tokens, cfg.temperature, generator)
        old_logprobs, mask = batch.logprobs, batch.mask  # (N, C) each; both are 0 on padding

        # 2. Score the completions, and measure how far each token is from the reference policy.
        # score() returns texts, scores (N,) and, if there are several rewards, their means.
        texts, scores, reward_means = score(rewards, step_problems, batch, tokenizer)
        ref_logprobs = old_logprobs if ref_model is None else all_logprobs(
            ref_model, batch, cfg.micro_batch_size, cfg.temperature)  # without a reference, kl is 0
        kl = kl_estimate(old_logprobs, ref_logprobs, "k1")  # (N, C); 0 on padding
        old_values = all_values(critic, batch, cfg.micro_batch_size)             # (N, C)

        # 3. Advantages: how much better than the baseline? No gradient flows through them.
        shaped = token_rewards(scores, kl, mask, cfg.kl_coef)                    # (N, C)
        advantages, returns = gae(shaped, old_values, mask, cfg.gamma, cfg.lam)
        advantages = whiten(advantages, mask)  # only now, because the returns are A + V_old
        explained = explained_variance(old_values, returns_to_go(shaped, mask, cfg.gamma), mask)

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. At first each ratio is 1. share (N, C) is the weight of each token in the loss.
        peak = cfg.lr if step >= cfg.critic_warmup else 0.0  # at first, only the critic learns
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, peak)
        optimizer.param_groups[1]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps,
                                                        cfg.critic_lr)
        for minibatch in mini_batches(len(scores), cfg.minibatch_size, cfg.group_size, cfg.epochs,
                                      generator):
            optimizer.zero_grad()
            share = mask / mask[minibatch].sum()  # a mean over the tokens of the mini-batch
            for rows in micro_batches(batch, minibatch, cfg.micro_batch_size):
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (n, C)
                losses, is_clipped = ppo_clip_loss(logprobs, old_logprobs[rows], advantages[rows],
                                                   cfg.clip_eps)                 # (n, C) each
                loss = (losses * share[rows]).sum()
                loss.backward()
                run.count(loss=loss, clip_frac=(is_clipped * share[rows]).sum(),
                          approx_kl=approx_kl(logprobs, old_logprobs[rows], share[rows]))
                errors, is_stuck = value_loss(token_values(critic, batch, rows), old_values[rows],
                                              returns[rows], cfg.value_clip)     # (n, C) each
                error = (errors * share[rows]).sum()
                error.backward()  # the policy's backward has freed its activations
                run.count(value_loss=error, value_clip_frac=(is_stuck * share[rows]).sum())
            sum_gradients(policy, critic)  # over the processes of torchrun
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            critic_grad_norm = clip_grad_norm_(critic.parameters(), cfg.max_grad_norm)
            optimizer.step()
            run.end_minibatch(grad_norm=grad_norm, critic_grad_norm=critic_grad_norm)

        # 5. Log, and save when due. The score shows progress. The loss is there for its gradient.
        run.log(step, step_problems, texts, scores, kl, batch, explained_var=explained,
                **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
