"""Is the expected gradient of the loss the gradient of the objective? Checked by enumeration.

A tabular softmax policy over 3 symbols (0 is EOS) and at most 3 steps has 15 complete sequences, so
that every expectation is a finite sum. The objective is J = E[score] - kl_coef * KL(pi || pi_ref).

A row is a function of a batch of n sequences, its loss, composed as the script composes it;
expected_gradient averages its gradient over all such batches. To add an algorithm, add a row.
"""
import itertools

import pytest
import torch

from common import kl_estimate, ppo_clip_loss, returns_to_go, token_rewards

torch.manual_seed(0)
PREFIXES = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
SEQUENCES = [p + (0,) for p in PREFIXES] + list(itertools.product((1, 2), repeat=3))
THETA = torch.randn(len(PREFIXES), 3, dtype=torch.float64)
REF = torch.randn(len(PREFIXES), 3, dtype=torch.float64).log_softmax(-1)
SCORES = torch.randn(len(SEQUENCES), dtype=torch.float64)
MASK = torch.tensor([[1.0 if t < len(y) else 0.0 for t in range(3)] for y in SEQUENCES]).double()
KL_COEF = 0.3


def logprobs_of(table):
    """(7, 3) log-probs per prefix -> (15, 3) log-probs per token of all sequences."""
    rows = [[table[PREFIXES.index(y[:t]), y[t]] if t < len(y) else table.new_zeros(())
             for t in range(3)] for y in SEQUENCES]
    return torch.stack([torch.stack(row) for row in rows])


REF_LOGPROBS = logprobs_of(REF)


def objective_gradient(kl_coef):
    theta = THETA.clone().requires_grad_()
    logprobs = logprobs_of(theta.log_softmax(-1))
    logps = (logprobs * MASK).sum(1)
    ref_logps = (REF_LOGPROBS * MASK).sum(1)
    J = (logps.exp() * (SCORES - kl_coef * (logps - ref_logps))).sum()
    return torch.autograd.grad(J, theta)[0]


def expected_gradient(loss_of, n=1):
    """E over all batches of n independent sequences of d loss / d theta."""
    theta = THETA.clone().requires_grad_()
    logprobs = logprobs_of(theta.log_softmax(-1))
    probabilities = (logprobs * MASK).sum(1).exp().detach()
    expected = 0
    for batch in itertools.product(range(len(SEQUENCES)), repeat=n):
        rows = torch.tensor(batch)
        expected = expected + probabilities[rows].prod() * loss_of(logprobs[rows], rows)
    return torch.autograd.grad(expected, theta)[0]


def reinforce_pp(logprobs, rows, baseline=0.0):
    """As in reinforce_pp.py, but without the z-score, which is a shift and a scale of the whole."""
    mask, old = MASK[rows], logprobs.detach()
    kl = kl_estimate(old, REF_LOGPROBS[rows])
    advantages = returns_to_go(token_rewards(SCORES[rows], kl, mask, KL_COEF), mask) - baseline
    loss, _ = ppo_clip_loss(logprobs, old, advantages, mask)
    return loss * mask.sum() / len(rows)  # the token mean, turned back into a sum per sequence


UNBIASED = {
    "REINFORCE++": (reinforce_pp, 1),
    "REINFORCE++, constant baseline": (lambda *args: reinforce_pp(*args, baseline=0.7), 1),
    "REINFORCE++, batches of two": (reinforce_pp, 2),
}


def test_there_are_15_sequences():
    assert len(SEQUENCES) == 15
    total = (logprobs_of(THETA.log_softmax(-1)) * MASK).sum(1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name):
    loss, n = UNBIASED[name]
    torch.testing.assert_close(expected_gradient(loss, n), -objective_gradient(KL_COEF),
                               rtol=0, atol=1e-10)


def test_the_token_mean_is_biased():
    """Without undoing the token mean, a batch is divided by its length: short ones count more.

    On this table, with one sequence per batch, its cosine with the gradient of J is 0.86. A choice
    that PPO and REINFORCE++ make, not an error; in large batches the lengths average out.
    """
    def loss(logprobs, rows):
        return reinforce_pp(logprobs, rows) / MASK[rows].sum()
    ours, exact = expected_gradient(loss).flatten(), -objective_gradient(KL_COEF).flatten()
    cosine = torch.nn.functional.cosine_similarity(ours, exact, dim=0).item()
    assert cosine == pytest.approx(0.862, abs=0.001)


@pytest.mark.parametrize("kind, direction", [("k1", None), ("k2", "reverse"), ("k3", "forward")])
def test_what_a_kl_estimate_does_as_a_loss(kind, direction):
    """One step, 5 symbols: k1 does nothing, k2 descends KL(pi || ref), k3 the reverse one."""
    theta = torch.randn(5, dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logprobs = theta.log_softmax(0)
    weights = logprobs.exp().detach()
    ours = torch.autograd.grad((weights * kl_estimate(logprobs, ref, kind)).sum(), theta,
                               retain_graph=True)[0]
    exact = {None: 0 * theta.sum(), "reverse": (logprobs.exp() * (logprobs - ref)).sum(),
             "forward": (ref.exp() * (ref - logprobs)).sum()}[direction]
    torch.testing.assert_close(ours, torch.autograd.grad(exact, theta)[0], rtol=0, atol=1e-10)


def test_kl_estimates_as_values():
    """E_pi[k1] = E_pi[k3] = KL(pi || ref); E_pi[k2] is close, not equal."""
    logprobs, ref = THETA[1].log_softmax(0), REF[2]
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    k1, k2, k3 = ((logprobs.exp() * kl_estimate(logprobs, ref, kind)).sum()
                  for kind in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(k3, exact, rtol=0, atol=1e-12)
    assert abs(k2 - exact) > 1e-3
