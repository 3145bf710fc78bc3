"""A world that is small enough for exact expectations.

A tabular softmax policy over 3 symbols (0 is EOS) and at most 3 tokens has 15 completions, so every
expectation is a finite sum. The objective is J = E[score] - kl_coef * KL(pi || pi_ref).
"""
import itertools

import torch

from common import ppo_clip_loss

KL_COEF = 0.3
PREFIXES = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
SEQUENCES = [p + (0,) for p in PREFIXES] + list(itertools.product((1, 2), repeat=3))
MASK = torch.tensor([[float(t < len(y)) for t in range(3)] for y in SEQUENCES]).double()
GENERATOR = torch.Generator().manual_seed(0)
THETA, REF, SCORES, VALUES = (  # logits of policy and reference, scores, a value of each prefix
    torch.randn(shape, dtype=torch.float64, generator=GENERATOR) for shape in
    ((7, 3), (7, 3), (15,), (7,)))


def logprobs_of(logits):
    """Logits (7, 3) of each prefix -> log-probs (15, 3) of all completions' tokens."""
    table = logits.log_softmax(-1)
    rows = [[table[PREFIXES.index(y[:t]), y[t]] if t < len(y) else table.new_zeros(())
             for t in range(3)] for y in SEQUENCES]
    return torch.stack([torch.stack(row) for row in rows])


OLD_LOGPROBS, REF_LOGPROBS = logprobs_of(THETA), logprobs_of(REF)  # pi = pi_old, that sampled
KL = OLD_LOGPROBS - REF_LOGPROBS                                   # k1 per token


def objective_gradient(kl_coef=KL_COEF):
    """The gradient of J with respect to THETA, (7, 3)."""
    theta = THETA.clone().requires_grad_()
    logps, ref_logps = logprobs_of(theta).sum(1), REF_LOGPROBS.sum(1)
    J = (logps.exp() * (SCORES - kl_coef * (logps - ref_logps))).sum()
    return torch.autograd.grad(J, theta)[0]


def sum_of_tokens(mask):
    return mask / mask.shape[1]


def mean_of_tokens(mask):
    return mask / mask.sum((1, 2), keepdim=True)


def mean_of_means(mask):
    return mask / mask.sum(2, keepdim=True) / mask.shape[1]


def expected_gradient(losses_of, n=1, share_of=sum_of_tokens):
    """The expected gradient of a loss, (7, 3), over batches of n independent completions.

    All 15^n batches lie below each other, n rows each. losses_of(logprobs, rows) gives the losses
    of all their tokens: two (n 15^n, 3) -> (n 15^n, 3). share_of(mask) gives the weights of the
    tokens in the loss of their batch: (15^n, n, 3) -> (15^n, n, 3).
    """
    theta = THETA.clone().requires_grad_()
    logprobs = logprobs_of(theta)
    batches = torch.tensor(list(itertools.product(range(15), repeat=n)))
    probabilities = logprobs.sum(1).exp().detach()[batches].prod(1)                  # (15^n,)
    losses = losses_of(logprobs[batches.flatten()], batches.flatten()).view(-1, n, 3)
    expected = (probabilities * (losses * share_of(MASK[batches])).sum((1, 2))).sum()
    return torch.autograd.grad(expected, theta)[0]


def clip_losses(advantages):
    """PPO's loss, for expected_gradient(), of advantages (15, 3) that do not depend on a batch."""
    return lambda logprobs, rows: ppo_clip_loss(logprobs, OLD_LOGPROBS[rows], advantages[rows])[0]


def cosine(one, two):
    return torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()


def check_unbiased(losses_of, n=1, kl_coef=KL_COEF):
    """A loss that is a sum over tokens, and a mean over completions, has minus J's gradient."""
    torch.testing.assert_close(expected_gradient(losses_of, n), -objective_gradient(kl_coef),
                               rtol=0, atol=1e-10)
