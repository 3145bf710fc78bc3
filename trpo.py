"""
TRPO (Schulman et al., arXiv 1502.05477). The policy pi answers prompts with completions, and each
completion gets a score. One update per batch raises the objective L about as far as possible while
the KL to pi_old, the policy that sampled the batch, is at most delta.

    s    = clip((score - mean) / std, -c, c)                  over the N completions; c: reward_clip
    kl_t = log(pi_old / pi_ref)                               of token t; pi_ref: the first policy
    G_t  = s - kl_coef * (kl_t + kl_{t+1} + ... )             return: all reward from token t on
    A_t  = (G_t - mean) / std                                 advantage; over all the batch's tokens
    L    = mean_t ratio_t A_t                                 ratio_t = pi / pi_old, of token t
    KL   = mean_t KL(pi_old || pi)                            exact, over the whole vocabulary
    g    = gradient of L at pi = pi_old                       over the batch
    F    = Hessian of KL at pi = pi_old                       over a fisher_fraction of the batch
    x    = (F + damping * I)^-1 g                             approximate, by conjugate gradients
    full = x * sqrt(2 delta / (x^T (F + damping * I) x))      the full step of the parameters
    step = the first of full, backtrack * full, backtrack^2 * full, ... for which KL <= delta and L
           has grown, both over the whole batch; if max_tries of them fail, there is no step

Why: let d be a small change of the parameters. L grows by about g . d. KL and its gradient are 0 at
pi_old, so d makes KL about d^T F d / 2. Of all d with d^T (F + damping * I) d / 2 = delta, `full`
nearly gains most. The damping uses up a part of delta, so the KL of `full` tends to be below delta.

F has a row and a column for each parameter, and is never built. Conjugate gradients only need
products F v, and F v is the gradient of the number (gradient of KL) . v. F is the Fisher matrix: as
a function of pi, KL(pi_old || pi) is -E_old[log pi] plus a constant. The Hessian of -log pi is
grad log pi (grad log pi)^T - (Hessian of pi) / pi, and at pi_old the mean of the second term is the
Hessian of sum pi = 1, which is 0. So v^T F v >= 0 for every v, and the root in `full` exists.

The price of the second derivatives: attention that is not fused; fp32 in all passes of the update;
at most 11 products F v, 10 for x and one for `full`, each with two backward passes over a part of
the batch; and 59 bytes of memory per parameter (docs/memory.md).

By default, a step samples 256 completions, one for each prompt, or 512 on the toy, and makes one
update. The reward last_number gives 0 to a completion that is cut off.

Compared with reinforce_pp.py:
  - there is one update per batch, with no AdamW and no learning rate;
  - its length is limited by the KL to pi_old, not by a clip of the ratio.

    python trpo.py                                      the toy, no network: a minute
    python trpo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.94 of all are right, and nearly all show the work.
"""
import copy
from dataclasses import dataclass, field

import torch

from common import kl_estimate, normalize_rewards
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, OnlineConfig, check, fail
from plumbing.model import load_policy
from plumbing.parallel import add_up, world
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, per_token, pick, sample, step_generator
from plumbing.run import Run
from reinforce_pp import reinforce_pp_advantages


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --seed, are in plumbing/flags.py
    micro_batch_size: int = HfArg(default=4, help="completions per pass; changes no result")
    lr: None = field(default=None, init=False)  # init=False: these five are no flags of TRPO
    warmup_steps: None = field(default=None, init=False)
    weight_decay: None = field(default=None, init=False)
    max_grad_norm: None = field(default=None, init=False)
    minibatch_size: None = field(default=None, init=False)
    prompts_per_step: int = HfArg(default=256, help="prompts of a step")
    group_size: int = HfArg(default=1, help="completions of each prompt, K")
    kl_coef: float = HfArg(default=0.001, help="weight of the KL to the reference (beta in papers)")
    reward_clip: float = HfArg(default=5.0, help="clip normalised scores to +- this; 0: raw scores")
    delta: float = HfArg(default=0.001, help="largest KL of a step, in nats per token")
    damping: float = HfArg(default=0.1, help="added to the diagonal of the Fisher matrix F")
    fisher_fraction: float = HfArg(default=0.125, help="fraction of the completions that make F")
    cg_iterations: int = HfArg(default=10, help="iterations of conjugate gradients, at most")
    backtrack: float = HfArg(default=0.8, help="a step that fails is made shorter by this factor")
    max_tries: int = HfArg(default=10, help="step lengths that are tried before none is made")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=30, prompts_per_step=512, micro_batch_size=64, max_new_tokens=32,
           kl_coef=0.01, eval_prompts=512, delta=0.005, damping=1.0, fisher_fraction=0.0625)


def token_logits(policy, batch, rows, temperature):
    """logits / temperature of all tokens that could be y_t -> (n, C, vocabulary); always fp32."""
    return per_token(policy, batch, rows, lambda logits, tokens: logits / temperature, fp32=True)


def surrogate(logprobs, old_logprobs, advantages):
    """L per token, ratio_t A_t, to be maximised: all (N, C) -> (N, C). TRPO, eq. 14."""
    return (logprobs - old_logprobs).exp() * advantages


def mean_kl(old_logits, logits, share):
    """sum_t share_t KL_t(pi_old || pi), exactly. TRPO, eq. 12.

    Two (N, C, vocabulary), and the weight of each token (N, C), 0 on padding -> scalar.
    """
    old, new = old_logits.log_softmax(-1), logits.log_softmax(-1)
    return ((old.exp() * (old - new)).sum(-1) * share).sum()


def fisher_vector_product(kl, parameters, vector):
    """F v: scalar with graph, list of tensors, (D,) -> (D,). TRPO, appendix C.

    F is the Hessian of kl with respect to the D parameters. kl may be used again: its graph stays.
    """
    gradient = torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True)
    slope = torch.cat([g.flatten() for g in gradient]).dot(vector)
    product = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([p.flatten() for p in product])


def conjugate_gradient(matvec, b, iterations=10, tolerance=1e-10):
    """x with A x = b, for a symmetric, positive definite A given as matvec(v) = A v: (D,) -> (D,).

    Any two of its directions d and d' have d^T A d' = 0, so none undoes what another has reached.
    It stops early when |b - A x|^2 < tolerance, because going on could divide 0 by 0.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    for _ in range(iterations):
        square = residual.dot(residual)
        if square < tolerance:
            break
        product = matvec(direction)
        length = square / direction.dot(product)
        x, residual = x + length * direction, residual - length * product
        direction = residual + residual.dot(residual) / square * direction
    return x


@torch.no_grad()
def measure_step(policy, old_policy, batch, advantages, share, cfg):
    """For the line search and the log, on the whole batch: the KL of a step, and the gain in L."""
    everything, sums = torch.arange(len(advantages)), share.new_zeros(2)
    for rows in micro_batches(batch, everything, cfg.micro_batch_size):
        old_logits, logits = (token_logits(model, batch, rows, cfg.temperature)
                              for model in (old_policy, policy))
        old_logprobs, logprobs = (pick(x, batch.completions[rows], 1.0)  # 1.0: already divided
                                  for x in (old_logits, logits))
        kl_step = mean_kl(old_logits, logits, share[rows])
        L = surrogate(logprobs, old_logprobs, advantages[rows])                  # (n, C)
        real_gain = ((L - advantages[rows]) * share[rows]).sum()  # L before the step is A
        sums += torch.stack([kl_step, real_gain])
    add_up(sums)
    return dict(kl_step=sums[0], real_gain=sums[1])


def train(cfg):
    cfg = check(cfg)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    policy.set_attn_implementation("eager")  # fused attention cannot be differentiated twice
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    old_policy, parameters = copy.deepcopy(policy), list(policy.parameters())
    sizes = [p.numel() for p in parameters]
    run = Run(cfg, "trpo", policy, tokenizer, problems, rewards)

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

        # 3. Advantages: how much better than the baseline? No gradient flows through them.
        normalized = normalize_rewards(scores, cfg.reward_clip) if cfg.reward_clip else scores
        advantages = reinforce_pp_advantages(normalized, kl, mask, cfg.kl_coef)

        # 4. Update, once for the whole batch. share (N, C) is the weight of each token.
        everything, gradient = torch.arange(len(scores)), mask.new_zeros(sum(sizes))
        share = mask / mask.sum()
        for rows in micro_batches(batch, everything, cfg.micro_batch_size):
            logits = token_logits(policy, batch, rows, cfg.temperature)  # divided by temperature
            logprobs = pick(logits, batch.completions[rows], 1.0)                # (n, C)
            # Here pi_old is pi, so its log-probs are taken from logprobs: the ratio is exactly 1.
            L = surrogate(logprobs, logprobs.detach(), advantages[rows])         # (n, C)
            parts = torch.autograd.grad((L * share[rows]).sum(), parameters, materialize_grads=True)
            gradient += torch.cat([part.flatten() for part in parts])            # (D,), uphill
        add_up(gradient)  # over the processes of torchrun

        def matvec(vector):  # (F + damping) v, from the first completions
            part = everything[: max(1, int(cfg.fisher_fraction * len(scores)))]
            share, product = mask / mask[part].sum(), cfg.damping * vector / world()
            for rows in micro_batches(batch, part, cfg.micro_batch_size):
                logits = token_logits(policy, batch, rows, cfg.temperature)
                kl_0 = mean_kl(logits.detach(), logits, share[rows])  # it is 0; its Hessian is not
                product = product + fisher_vector_product(kl_0, parameters, vector)
            add_up(product)
            return product

        x = conjugate_gradient(matvec, gradient, cfg.cg_iterations)
        full = x * (2 * cfg.delta / x.dot(matvec(x)).clamp(min=1e-8)).sqrt()  # not 0 / 0
        if not full.isfinite().all():
            fail(f"in step {step + 1}, the step is not finite; take a larger --damping", code=1)
        old_policy.load_state_dict(policy.state_dict())
        tries = []
        for scale in [cfg.backtrack**i for i in range(cfg.max_tries)] + [0]:  # 0: back to pi_old
            for p, old, part in zip(parameters, old_policy.parameters(), full.split(sizes)):
                p.data.copy_(old + scale * part.view_as(p))
            tries.append(measure_step(policy, old_policy, batch, advantages, share, cfg))
            if tries[-1]["kl_step"] <= cfg.delta and tries[-1]["real_gain"] > 0:
                break
        stats = dict(tries[-1], tries=min(len(tries), cfg.max_tries),
                     kl_full_step=tries[0]["kl_step"], predicted_gain=scale * gradient.dot(full),
                     grad_norm=gradient.norm(), loss=-tries[-1]["real_gain"])

        # 5. Log, and save when due. The loss is minus what L has gained by the step.
        run.log(step, step_problems, texts, scores, kl, batch, **reward_means, **stats)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
