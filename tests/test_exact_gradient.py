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
from dr_grpo import constant_mean, dr_grpo_advantages
from grpo import group_advantages, grpo_loss, masked_mean, response_mean
from ppo import gae
from reinforce import ema_baseline, reinforce_loss, running_mean_baseline
from remax import remax_advantages
from rloo import leave_one_out_advantages
from trpo import surrogate

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
    return clip_loss(logprobs, advantages, mask)


def clip_loss(logprobs, advantages, mask):
    """As in the scripts, and then the token mean turned back into a sum per sequence."""
    loss, _ = ppo_clip_loss(logprobs, logprobs.detach(), advantages, mask)
    return loss * mask.sum() / len(mask)


def kl_of(logprobs, rows):
    return kl_estimate(logprobs.detach(), REF_LOGPROBS[rows]) * MASK[rows]


def reinforce(logprobs, rows, baseline=0.0):
    advantages = SCORES[rows] - KL_COEF * kl_of(logprobs, rows).sum(1) - baseline
    return reinforce_loss(logprobs, advantages, MASK[rows])


def ppo(logprobs, rows, values=0.0, lam=1.0):
    """The critic may say what it likes of a prefix, as long as it does not know what comes."""
    mask = MASK[rows]
    rewards = token_rewards(SCORES[rows], kl_of(logprobs, rows), mask, KL_COEF)
    advantages, _ = gae(rewards, values + 0 * rewards, mask, 1.0, lam)
    return clip_loss(logprobs, advantages, mask)


def trpo(logprobs, rows):
    """The direction before F^-1; TRPO maximises. Token mean turned back into a sum, no z-score."""
    kl, mask = kl_of(logprobs, rows), MASK[rows]
    advantages = returns_to_go(token_rewards(SCORES[rows], kl, mask, KL_COEF), mask)
    return -surrogate(logprobs, logprobs.detach(), advantages, mask) * mask.sum() / len(mask)


def remax(logprobs, rows):
    greedy = SCORES[GREEDY].expand(len(rows))
    kl = kl_of(logprobs, rows)
    return clip_loss(logprobs, remax_advantages(SCORES[rows], greedy, kl, MASK[rows], KL_COEF),
                     MASK[rows])


def rloo(logprobs, rows):
    """The batch is one group."""
    rewards = SCORES[rows] - KL_COEF * kl_of(logprobs, rows).sum(1)
    return clip_loss(logprobs, leave_one_out_advantages(rewards, len(rows))[:, None], MASK[rows])


def mean_baseline(logprobs, rows):
    rewards = SCORES[rows] - KL_COEF * kl_of(logprobs, rows).sum(1)
    return clip_loss(logprobs, dr_grpo_advantages(rewards, len(rows))[:, None], MASK[rows])


def grpo(logprobs, rows, advantages_of=dr_grpo_advantages, aggregate=None, kl_coef=0.0):
    """The batch is one group. Without the std, and over a constant length, unless asked for."""
    def constant(values, mask):
        return constant_mean(values, mask, 1)
    A = advantages_of(SCORES[rows], len(rows))
    return grpo_loss(logprobs, logprobs.detach(), REF_LOGPROBS[rows], A, MASK[rows], 0.2, kl_coef,
                     aggregate or constant)[0]


def greedy_sequence():
    prefix = ()
    while len(prefix) < 3 and prefix[-1:] != (0,):
        prefix += (THETA[PREFIXES.index(prefix)].argmax().item(),)
    return SEQUENCES.index(prefix)


GREEDY = greedy_sequence()
EMA = ema_baseline(ema_baseline(None, SCORES[:4], 0.9), SCORES[4:8], 0.9)  # of two past batches
RUNNING = running_mean_baseline(*running_mean_baseline(0.0, 0, SCORES[:4]), SCORES[4:8])[0]
PER_PREFIX = torch.randn(len(PREFIXES), dtype=torch.float64)
VALUES = torch.tensor([[PER_PREFIX[PREFIXES.index(y[:t])] if t < len(y) else 9.0 for t in range(3)]
                       for y in SEQUENCES]).double()
UNBIASED = {
    "REINFORCE, the first batch": (reinforce, 1),
    "REINFORCE, exponential moving average": (lambda *args: reinforce(*args, baseline=EMA), 1),
    "REINFORCE, running mean": (lambda *args: reinforce(*args, baseline=RUNNING), 2),
    "REINFORCE++": (reinforce_pp, 1),
    "REINFORCE++, constant baseline": (lambda *args: reinforce_pp(*args, baseline=0.7), 1),
    "REINFORCE++, batches of two": (reinforce_pp, 2),
    "PPO, lam 1, no critic": (ppo, 1),
    "PPO, lam 1, any critic": (lambda logprobs, rows: ppo(logprobs, rows, VALUES[rows]), 2),
    "TRPO, its surrogate": (trpo, 1),
    "TRPO, batches of two": (trpo, 2),
    "ReMax": (remax, 1),
    "ReMax, batches of two": (remax, 2),
    "RLOO, pairs": (rloo, 2),
    "RLOO, three": (rloo, 3),
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


@pytest.mark.parametrize("K", [2, 3])
def test_the_mean_baseline_shrinks_the_gradient(K):
    """A mean that includes the sample itself: exactly (K - 1) / K of RLOO's, and of the truth."""
    torch.testing.assert_close(expected_gradient(mean_baseline, K),
                               -(K - 1) / K * objective_gradient(KL_COEF), rtol=0, atol=1e-10)
    torch.testing.assert_close(expected_gradient(mean_baseline, K),
                               (K - 1) / K * expected_gradient(rloo, K), rtol=0, atol=1e-10)


def test_k3_in_the_loss_of_grpo_descends_the_other_kl():
    """Its expected gradient is that of KL(pi_ref || pi) in each state, states as pi visits them."""
    ours = expected_gradient(lambda *args: grpo(*args, kl_coef=1.0), 2) - expected_gradient(grpo, 2)
    theta = THETA.clone().requires_grad_()
    policy = theta.log_softmax(-1)
    visited = [sum(policy[PREFIXES.index(p[:t]), p[t]] for t in range(len(p))) for p in PREFIXES]
    visited = torch.stack([torch.as_tensor(v).double() for v in visited]).exp().detach()
    forward_kl = (visited * (REF.exp() * (REF - policy)).sum(1)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(forward_kl, theta)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("row, truth", [
    (dict(advantages_of=group_advantages), [0.819, 0.869]),
    (dict(aggregate=response_mean), [0.867, 0.867]),
    (dict(aggregate=masked_mean), [0.969, 0.987]),
    (dict(advantages_of=group_advantages, aggregate=response_mean), [0.744, 0.782])])
def test_what_grpo_divides_by_is_biased(row, truth):
    """Groups of 2 and of 3, no KL. Cosine of the expected gradient with that of the score:

                        K = 2    K = 3
        std             0.819    0.869    a group that nearly agrees counts as much as any other
        response mean   0.867    0.867    a token of a long sequence counts less
        token mean      0.969    0.987    so does a token of a group that is long on the whole
        std, response   0.744    0.782    GRPO as it is

    and 1 for dividing by neither, as Dr. GRPO and RLOO do. Not errors: choices, with a price.
    """
    exact = -objective_gradient(0.0)
    assert cosine(expected_gradient(grpo, 2), exact) == pytest.approx(1, abs=1e-10)
    ours = [cosine(expected_gradient(lambda *args: grpo(*args, **row), K), exact) for K in (2, 3)]
    assert ours == pytest.approx(truth, abs=0.001)


def cosine(one, two):
    return torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_gae_is_unbiased_only_at_lam_1(lam):
    """With a critic that is wrong, lam < 1 lets its errors in."""
    ours = expected_gradient(lambda logprobs, rows: ppo(logprobs, rows, VALUES[rows], lam))
    assert (ours + objective_gradient(KL_COEF)).abs().max() > 0.01


def test_the_token_mean_is_biased():
    """Without undoing the token mean, a batch is divided by its length: short ones count more.

    On this table, with one sequence per batch, its cosine with the gradient of J is 0.86. A choice
    that PPO and REINFORCE++ make, not an error; in large batches the lengths average out.
    """
    def loss(logprobs, rows):
        return reinforce_pp(logprobs, rows) / MASK[rows].sum()
    assert cosine(expected_gradient(loss), -objective_gradient(KL_COEF)) == pytest.approx(
        0.862, abs=0.001)


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
