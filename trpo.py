"""
TRPO (Schulman et al., arXiv 1502.05477): as far uphill as a KL of delta from the old policy allows.
Against reinforce_pp.py: instead of clip and AdamW, one step per batch, the approximate solution of

    maximise  L = mean_t ratio_t A_t                          ratio_t = pi / pi_old; A as there
    while     KL = mean_t KL(pi_old || pi) <= delta           of whole vocabularies, at each token
    by        theta = theta_old + sqrt(2 delta / x^T (F + damping) x) x   x = (F + damping)^-1 g

g is the gradient of L, F the Hessian of KL: a small step s gains g . s, at a KL of s^T F s / 2. x
gains most (for KL + damping |s|^2 / 2), and the root makes that delta. F, the Fisher matrix, is
never built: conjugate gradients need products F v alone, each the gradient of (gradient of KL) . v.
The step is then shortened until the true KL is at most delta and L has grown, or not made. The
price: unfused attention, fp32, two dozen backward passes, and 60 bytes per parameter.

    python trpo.py                                      the toy, no network: a minute
    python trpo.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.93 and nearly all.
"""
import copy
from dataclasses import dataclass, field

import torch

from common import kl_estimate, masked_mean, normalize_rewards
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig, fail
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import all_logprobs, micro_batches, pick, sample, step_generator, token_logits
from plumbing.run import Means, Run
from reinforce_pp import reinforce_pp_advantages


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --max_new_tokens, ...
    steps: int = HfArg(default=30, help="training steps")
    lr: None = field(default=None, init=False)  # with init=False it is no flag: there is no AdamW
    warmup_steps: None = field(default=None, init=False)
    weight_decay: None = field(default=None, init=False)
    max_grad_norm: None = field(default=None, init=False)
    minibatch_size: None = field(default=None, init=False)
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=512, help="prompts per rollout batch")
    group_size: int = HfArg(default=1, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    kl_coef: float = HfArg(default=0.01, help="weight of the KL (beta in most papers)")
    reward_clip: float = HfArg(default=5.0, help="clip z-scored scores to this; 0: raw scores")
    delta: float = HfArg(default=0.005, help="largest KL of a step, nats per token")
    damping: float = HfArg(default=1.0, help="added to the diagonal of the matrix F")
    fisher_fraction: float = HfArg(default=0.0625, help="part of the batch that makes F")
    cg_iterations: int = HfArg(default=10, help="products with F to find the step, at most")
    backtrack: float = HfArg(default=0.8, help="factor that shortens a step not accepted")
    max_tries: int = HfArg(default=10, help="steps tried, each shorter, before none is made")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, prompts_per_step=256, micro_batch_size=4, max_new_tokens=256, kl_coef=0.001,
            eval_prompts=256, delta=0.001, damping=0.1, fisher_fraction=0.125)


def surrogate(logprobs, old_logprobs, advantages, mask):
    """L = mean_t ratio_t A_t, to be maximised: all (N, C) -> scalar. TRPO, eq. 14."""
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).exp()
    return masked_mean(ratio * advantages, mask)


def mean_kl(old_logits, logits, mask):
    """mean_t KL(pi_old || pi), exact: (N, C, V), (N, C, V), (N, C) -> scalar. TRPO, eq. 12."""
    old, new = (torch.where(mask[..., None].bool(), x, 0).log_softmax(-1)
                for x in (old_logits, logits))
    return masked_mean((old.exp() * (old - new)).sum(-1), mask)


def fisher_vector_product(kl, parameters, vector, damping):
    """(F + damping) v: scalar with graph, list of tensors, (P,), float -> (P,). TRPO, appendix C.

    F is the Hessian of kl. At pi_old, kl's gradient is 0, but along v it grows by F v. Keeps kl.
    """
    gradient = torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True)
    slope = torch.cat([g.flatten() for g in gradient]).dot(vector)
    product = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([p.flatten() for p in product]) + damping * vector


def conjugate_gradient(matvec, b, iterations=10, tolerance=1e-10):
    """x with A x = b, A symmetric, positive definite and known by matvec(v) = A v: (P,) -> (P,).

    Ends when |b - A x|^2 < tolerance, else there might be 0 / 0; so at once if b is 0.
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
def measure_step(policy, old_policy, batch, advantages, cfg):
    """A step that is tried, measured on the whole batch: its KL, and what L has gained by it."""
    stats = Means()
    everything = torch.arange(len(advantages))
    for rows, by_token, _ in micro_batches(batch, everything, cfg.micro_batch_size):
        A, m = advantages[rows], batch.mask[rows]
        logits = [token_logits(p, batch, rows, cfg.temperature) for p in (old_policy, policy)]
        old, new = (pick(x, batch.completions[rows], 1.0) for x in logits)
        stats.add(by_token, kl_step=mean_kl(*logits, m), **ratio_stats(new, old, m),
                  real_gain=surrogate(new, old, A, m) - masked_mean(A, m))
    return stats()


def train(cfg):
    run = Run(cfg, "trpo")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    policy.set_attn_implementation("eager")  # the default, sdpa, cannot be differentiated twice
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None
    old_policy, parameters = copy.deepcopy(policy), list(policy.parameters())
    run.open(policy, tokenizer, validation, test, rewards)

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
        clipped = normalize_rewards(scores, cfg.reward_clip) if cfg.reward_clip else scores
        advantages = reinforce_pp_advantages(clipped, kl, mask, cfg.kl_coef)

        # 4. Update, once for the batch. by_token weights its micro-batches, for means over tokens.
        everything, gradient = torch.arange(len(scores)), 0
        for rows, by_token, _ in micro_batches(batch, everything, cfg.micro_batch_size):
            logits = token_logits(policy, batch, rows, cfg.temperature)          # (R, C, V)
            logprobs = pick(logits, batch.completions[rows], 1.0)                # (R, C)
            L = surrogate(logprobs, logprobs.detach(), advantages[rows], mask[rows])  # at pi_old
            parts = torch.autograd.grad(L * by_token, parameters, materialize_grads=True)
            gradient += torch.cat([part.flatten() for part in parts])            # (P,), uphill

        def matvec(vector):  # (F + damping) v, from a part of the batch
            product, part = 0, everything[: max(1, int(cfg.fisher_fraction * len(scores)))]
            for rows, by_token, _ in micro_batches(batch, part, cfg.micro_batch_size):
                logits = token_logits(policy, batch, rows, cfg.temperature)
                here = mean_kl(logits.detach(), logits, mask[rows])  # it is 0; its Hessian is not
                product += by_token * fisher_vector_product(here, parameters, vector, cfg.damping)
            return product

        x = conjugate_gradient(matvec, gradient, cfg.cg_iterations)
        full = x * (2 * cfg.delta / x.dot(matvec(x)).clamp(min=1e-8)).sqrt()
        if not full.isfinite().all():
            fail(f"in step {step + 1}, no direction is finite; take a larger --damping", code=1)
        old_policy.load_state_dict(policy.state_dict())
        tries, sizes = [], [p.numel() for p in parameters]
        for scale in [cfg.backtrack**i for i in range(cfg.max_tries)] + [0]:  # 0: no step
            for p, old, part in zip(parameters, old_policy.parameters(), full.split(sizes)):
                p.data.copy_(old + scale * part.view_as(p))
            tries.append(measure_step(policy, old_policy, batch, advantages, cfg))
            if tries[-1]["kl_step"] <= cfg.delta and tries[-1]["real_gain"] > 0:
                break
        stats = dict(tries[-1], tries=min(len(tries), cfg.max_tries),
                     kl_full_step=tries[0]["kl_step"], predicted_gain=scale * gradient.dot(full),
                     grad_norm=gradient.norm(), loss=-tries[-1]["real_gain"])

        # 5. Log. The loss is minus what L has gained, measured after the step.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each, **stats)
        run.show(step, asked, texts, scores)
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
