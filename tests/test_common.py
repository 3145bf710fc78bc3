"""common.py's functions against reference implementations, loops and exact expectations."""
import pytest
import torch
from conftest import seeded
from exact_world import REF, THETA
from oracle_cases import T, cases, check_padding, same

import common


@pytest.mark.parametrize("x, y", cases("kl_estimators"))
def test_kl_estimators(x, y):
    for kind in ("k1", "k2", "k3"):
        same(common.kl_estimate(T(x["logprobs"]), T(x["ref_logprobs"]), kind), y["trl"][kind])


@pytest.mark.parametrize("x, y", cases("kl_shaped_rewards"))
def test_token_rewards(x, y):
    kl = common.kl_estimate(T(x["logprobs"]), T(x["ref_logprobs"]))
    ours = common.token_rewards(T(x["scores"]), kl, T(x["mask"]), x["beta"])
    same(ours, y["token_rewards"], x["mask"])


@pytest.mark.parametrize("x, y", cases("cumulative_returns"))
def test_returns_to_go(x, y):
    ours = common.returns_to_go(T(x["token_rewards"]), T(x["mask"]), x["gamma"])
    same(ours, y["returns"], x["mask"])


@pytest.mark.parametrize("x, y", cases("masked_whiten"))
def test_whiten(x, y):
    values, mask = T(x["values"]), T(x["mask"])
    same(common.whiten(values, mask), y["openrlhf_ddof0"], mask)
    same(common.masked_mean(values, mask), values[mask.bool()].mean())


@pytest.mark.parametrize("x, y", cases("reward_zscore_clip"))
def test_normalize_rewards(x, y):
    same(common.normalize_rewards(T(x["scores"]), x["clip"]), y["scores"])


@pytest.mark.parametrize("x, y", cases("ppo_clip_loss"))
def test_ppo_clip_loss(x, y):
    share = T(x["mask"]) / T(x["mask"]).sum()
    logprobs = T(x["logprobs"]).requires_grad_()
    losses, is_clipped = common.ppo_clip_loss(logprobs, T(x["old_logprobs"]), T(x["advantages"]),
                                              x["clip_eps"])
    loss = (losses * share).sum()
    loss.backward()
    same(loss.detach(), y["loss_token_mean"])
    same((is_clipped * share).sum(), y["clip_fraction"])
    same(logprobs.grad, y["grad_wrt_logprobs"], x["mask"])


def test_clipping_by_sign_and_side():
    """The loss stops at a token that has moved too far in the direction of its advantage."""
    for sign, expected in ((1.0, [False, False, True]), (-1.0, [True, False, False])):
        logprobs = T([[0.5, 1, 2]]).log().requires_grad_()
        losses, is_clipped = common.ppo_clip_loss(logprobs, T([[0, 0, 0]]), T([[sign]]))
        losses.sum().backward()
        assert is_clipped.tolist() == [expected] == (logprobs.grad == 0).tolist()
        assert (logprobs.grad * sign <= 0).all()  # minimising: good tokens up, bad tokens down


def test_padding_changes_nothing():
    scores = torch.arange(6).double()
    check_padding(lambda mask, a, b, c: [
        common.masked_mean(a, mask), common.whiten(a, mask), common.returns_to_go(a, mask, 0.9),
        common.token_rewards(scores, a, mask, 0.1)])


def test_equal_scores_are_exactly_no_signal():
    """Also where the mean of n equal scores is not quite the score, so that their std is not 0."""
    for n in range(2, 32):
        for value in torch.linspace(0.1, 3, 30):
            assert (common.normalize_rewards(value.expand(n), 5.0) == 0).all()
    one = torch.ones(1, 1)
    assert common.whiten(one, one).item() == 0 and common.whiten(one * 0, one * 0).isfinite().all()


def test_what_a_kl_estimate_does_as_a_loss():
    """Its expected gradient, for one token of 3 symbols: none, or that of one of the two KLs."""
    logits, ref = THETA[1].clone().requires_grad_(), REF[2].log_softmax(0)
    logprobs = logits.log_softmax(0)
    pi, gap = logprobs.exp(), logprobs - ref
    exact = dict(k1=0 * pi.sum(), k2=(pi * gap).sum(), k3=-(ref.exp() * gap).sum())
    for kind, kl in exact.items():
        loss = (pi.detach() * common.kl_estimate(logprobs, ref, kind)).sum()
        ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, kl))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_kl_estimates_as_values():
    """E_pi[k1] = E_pi[k3] = KL(pi || ref); E_pi[k2] is close, not equal."""
    pi, ref = torch.distributions.Categorical(logits=THETA[1]), REF[2].log_softmax(0)
    exact = torch.distributions.kl_divergence(pi, torch.distributions.Categorical(logits=ref))
    k1, k2, k3 = ((pi.probs * common.kl_estimate(pi.logits, ref, kind)).sum()
                  for kind in ("k1", "k2", "k3"))
    assert [k1.item(), k3.item()] == pytest.approx([exact.item()] * 2, abs=1e-12)
    assert abs(k2 - exact) > 1e-3
    near = torch.tensor([1e-4])  # in float32, r - 1 would have lost its digits
    assert common.kl_estimate(0 * near, near, "k3").item() == pytest.approx(5e-9, rel=1e-3)


def test_learning_rate():
    rates = [common.learning_rate(step, 11, 4, 1.0) for step in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[7] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1)


@pytest.mark.parametrize("n, size, K", [(24, 8, 4), (254, 64, 2), (7, 4, 1), (12, 2, 4), (6, 9, 2)])
def test_mini_batches_are_whole_groups_and_have_nearly_equal_sizes(n, size, K):
    """A tiny rest would make a full step of the optimizer from a group or two."""
    batches = list(common.mini_batches(n, size, K, 2, seeded()))
    epochs = torch.cat(batches).view(2, n)
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(n))
        assert (rows.view(-1, K) == rows.view(-1, K)[:, :1] + torch.arange(K)).all()
    assert not torch.equal(*epochs)
    sizes = [len(rows) for rows in batches]
    assert max(sizes) <= max(min(size, n), K) and max(sizes) - min(sizes) <= K
    assert list(common.mini_batches(0, size, K, 2, seeded())) == []
