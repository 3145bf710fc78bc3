"""common.py's equations and REINFORCE++'s against reference implementations and double loops."""
import json
import math
from pathlib import Path

import pytest
import torch

import common
import reinforce_pp
from plumbing import evaluation
from plumbing.run import Means

T = lambda x: torch.as_tensor(x, dtype=torch.float64)  # noqa: E731


def cases(name):
    path = Path(__file__).parent / "oracles" / f"{name}.json"
    return [pytest.param(c["inputs"], c["expected"], id=f"{name}-{c['name']}")
            for c in json.loads(path.read_text())["cases"]]


def same(ours, theirs, mask=None, rtol=1e-6, atol=1e-7):
    theirs = T(theirs)
    if mask is not None:
        assert (ours[~T(mask).bool()] == 0).all(), "not 0 on padding"
        theirs = theirs * T(mask)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# --------------------------------------------------------------- oracles: reference implementations

@pytest.mark.parametrize("x, y", cases("kl_estimators"))
def test_kl_estimators(x, y):
    for kind in ("k1", "k2", "k3"):
        logprobs = T(x["logprobs"]).requires_grad_()
        kl = common.kl_estimate(logprobs, T(x["ref_logprobs"]), kind)
        same(kl.detach(), y["trl"][kind])
        kl.sum().backward()
        same(logprobs.grad, y["grad_wrt_logprobs"][kind])


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
    same(common.whiten(T(x["values"]), T(x["mask"])), y["openrlhf_ddof0"], x["mask"])


@pytest.mark.parametrize("x, y", cases("ppo_clip_loss"))
def test_ppo_clip_loss(x, y):
    logprobs = T(x["logprobs"]).requires_grad_()
    loss, clip_frac = common.ppo_clip_loss(logprobs, T(x["old_logprobs"]), T(x["advantages"]),
                                           T(x["mask"]), x["clip_eps"])
    loss.backward()
    same(loss.detach(), y["loss_token_mean"])
    same(clip_frac, y["clip_fraction"])
    same(logprobs.grad, y["grad_wrt_logprobs"], x["mask"])


@pytest.mark.parametrize("x, y", cases("reward_zscore_clip"))
def test_normalize_rewards(x, y):
    same(common.normalize_rewards(T(x["scores"]), x["clip"]), y["scores"])


@pytest.mark.parametrize("x, y", cases("reinforce_pp_advantages"))
def test_reinforce_pp_advantages(x, y):
    kl = common.kl_estimate(T(x["logprobs_old"]), T(x["ref_logprobs"]))
    for scores, expected in ((T(x["scores"]).clamp(-x["reward_clip"], x["reward_clip"]),
                              y["openrlhf_ddof0"]),
                             (common.normalize_rewards(T(x["scores"]), 1.0),
                              y["zscored_clip1_then_openrlhf"])):
        ours = reinforce_pp.reinforce_pp_advantages(scores, kl, T(x["mask"]), x["beta"], x["gamma"])
        same(ours, expected["advantages"], x["mask"])


# With a KL in the reward the references differ from each other; ours has it in the loss.
@pytest.mark.parametrize("x, y", [case for case in cases("reinforce_pp_baseline_advantages")
                                  if case.values[0]["beta"] == 0])
def test_reinforce_pp_baseline_advantages(x, y):
    ours = reinforce_pp.reinforce_pp_baseline_advantages(T(x["scores"]), T(x["mask"]),
                                                         x["group_size"])
    same(ours, y["openrlhf_ddof0"]["advantages"], x["mask"])


@pytest.mark.parametrize("x, y", cases("token_logprobs"))
def test_pick(x, y):
    from plumbing.rollout import pick
    ours = pick(T(x["logits"]), torch.tensor(x["token_ids"]), x["temperature"])
    torch.testing.assert_close(ours, T(y["logprobs"]).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x, y", cases("sft_loss"))
def test_sft_loss(x, y):
    from plumbing.rollout import pick
    labels = torch.tensor(x["labels"])[:, 1:]
    mask = (labels != -100).double()
    logprobs = pick(T(x["logits"])[:, :-1], labels.clamp(min=0), 1.0).double()
    loss = -common.masked_mean(logprobs, mask)
    assert loss.item() == pytest.approx(y["loss"], abs=1e-6)


# ---------------------------------------------------------------- definitions, written out in loops

def random_batch(seed=0, N=6, C=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([C, 1, 3, 5, 2, C])[:N]
    mask = (torch.arange(C) < lengths[:, None]).double()
    return mask, *torch.randn(3, N, C, dtype=torch.float64, generator=generator)


def test_loops():
    mask, kl, values, _ = random_batch()
    scores, kl_coef, gamma = torch.arange(6).double(), 0.3, 0.9
    L = mask.sum(1).int().tolist()
    valid = [values[i, t].item() for i in range(6) for t in range(L[i])]
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((v - mean) ** 2 for v in valid) / len(valid) + 1e-8)
    rewards, returns, white = (torch.zeros_like(values) for _ in range(3))
    for i in range(6):
        for t in range(L[i]):
            white[i, t] = (values[i, t] - mean) / std
            rewards[i, t] = -kl_coef * kl[i, t] + (scores[i] if t == L[i] - 1 else 0)
        for t in range(L[i]):
            returns[i, t] = sum(gamma ** (j - t) * rewards[i, j] for j in range(t, L[i]))
    assert common.masked_mean(values, mask).item() == pytest.approx(mean, abs=1e-14)
    torch.testing.assert_close(common.whiten(values, mask), white)
    torch.testing.assert_close(common.token_rewards(scores, kl, mask, kl_coef), rewards)
    torch.testing.assert_close(common.returns_to_go(rewards, mask, gamma), returns)
    # the sum of the token rewards is the KL-penalised score, and A is its z-score when gamma = 1
    total = scores - kl_coef * (kl * mask).sum(1)
    torch.testing.assert_close(common.token_rewards(scores, kl, mask, kl_coef).sum(1), total)
    advantages = reinforce_pp.reinforce_pp_advantages(scores, kl, mask, kl_coef)
    assert common.masked_mean(advantages, mask).abs() < 1e-12
    assert common.masked_mean(advantages**2, mask).item() == pytest.approx(1, abs=1e-6)


def test_group_baseline_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).double()
    centred = torch.tensor([1.0, -1.0, 2.0, -2.0]).double()  # scores 3, 1 | 4, 0 minus 2 | 2
    tokens = torch.tensor([1, 1, 1, -1, 2, 2, -2, -2, -2.0]).double()
    expected = (centred - tokens.mean()) / tokens.std(unbiased=False)
    scores = torch.tensor([3.0, 1, 4, 0]).double()
    ours = reinforce_pp.reinforce_pp_baseline_advantages(scores, mask, 2)
    torch.testing.assert_close(ours, expected[:, None] * mask, rtol=1e-6, atol=1e-8)


def test_clipping_by_sign_and_side():
    """Which tokens still get a gradient? The pessimistic minimum clips only moves already made."""
    ratio = torch.tensor([[0.5, 1.0, 2.0]]).double()
    for sign, expected in ((1.0, [True, True, False]), (-1.0, [False, True, True])):
        logprobs = ratio.log().requires_grad_()
        loss, clip_frac = common.ppo_clip_loss(logprobs, torch.zeros(1, 3).double(),
                                               torch.full((1, 3), sign).double(), torch.ones(1, 3))
        loss.backward()
        assert (logprobs.grad != 0).tolist() == [expected]
        assert (logprobs.grad * sign <= 0).all()  # minimising: good tokens up, bad tokens down
        assert clip_frac.item() == pytest.approx(1 / 3)


def test_k3_near_and_far():
    small = torch.tensor([1e-4], dtype=torch.float32)
    k3 = common.kl_estimate(torch.zeros(1), small, "k3")
    assert k3.item() == pytest.approx(5e-9, rel=0.05)
    assert common.kl_estimate(torch.zeros(1), torch.tensor([-50.0]), "k3").isfinite()
    with pytest.raises(ValueError):
        common.kl_estimate(small, small, "k4")


# ---------------------------------------------------------------- padding, ties, degenerate batches

def every_function(mask, a, b, c):
    scores = torch.arange(len(mask)).to(a.dtype)
    return [common.masked_mean(a, mask), common.whiten(a, mask), common.returns_to_go(a, mask, 0.9),
            common.token_rewards(scores, a, mask, 0.1), *common.ppo_clip_loss(a, b, c, mask),
            reinforce_pp.reinforce_pp_advantages(scores, a, mask, 0.1, 0.9),
            reinforce_pp.reinforce_pp_baseline_advantages(scores, mask, 2)]


def check_padding(every_function, garbage):
    """Results with zeros, with garbage, and with three more columns of it are the same."""
    mask, *values = random_batch()
    clean = [torch.where(mask.bool(), v, 0) for v in values]
    dirty = [torch.where(mask.bool(), v, garbage) for v in values]
    wide = [torch.nn.functional.pad(v, (0, 3), value=garbage) for v in dirty]
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    for one, two, three in zip(every_function(mask, *clean), every_function(mask, *dirty),
                               every_function(wide_mask, *wide)):
        assert torch.equal(one, two)
        if three.dim():
            assert (three[:, 7:] == 0).all() and (one[mask == 0] == 0).all()
            three = three[:, :7]
        torch.testing.assert_close(one, three, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_and_garbage_change_nothing(garbage):
    check_padding(every_function, garbage)


def test_garbage_gets_no_gradient():
    mask, logprobs, old, advantages = random_batch()
    dirty = [torch.where(mask.bool(), v, math.nan).requires_grad_()
             for v in (logprobs, old, advantages)]
    common.ppo_clip_loss(*dirty, mask)[0].backward()
    assert dirty[0].grad.isfinite().all() and (dirty[0].grad[mask == 0] == 0).all()


def test_constant_scores_are_exactly_no_signal():
    """900 constant batches: dividing rounding errors by a rounding-error std gave up to 0.95."""
    for n in range(2, 32):
        for value in torch.linspace(0.1, 3, 30):
            assert (common.normalize_rewards(value.expand(n), 5.0) == 0).all()
    one = torch.ones(1, 1)
    assert common.whiten(one, one).item() == 0 and common.whiten(one * 0, one * 0).isfinite().all()
    assert common.masked_mean(one, one * 0).item() == 0


def test_whole_groups_can_be_permuted():
    mask, *_ = random_batch()
    scores = torch.randn(6).double()
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    ours = reinforce_pp.reinforce_pp_baseline_advantages(scores, mask, 2)
    permuted = reinforce_pp.reinforce_pp_baseline_advantages(scores[order], mask[order], 2)
    torch.testing.assert_close(ours[order], permuted)


def test_ratio_stats_and_means():
    mask, logprobs, old, _ = random_batch()
    stats = evaluation.ratio_stats(logprobs, old, mask)
    gaps = [(logprobs - old)[i, t].item() for i in range(6) for t in range(7) if mask[i, t]]
    assert stats["ratio_max"].item() == pytest.approx(math.exp(max(gaps)))
    expected = sum(math.exp(g) - 1 - g for g in gaps) / len(gaps)
    assert stats["approx_kl"].item() == pytest.approx(expected)
    means = Means()  # two mini-batches, of one of which a quarter is not forwarded
    means.add(0.25, approx_kl=torch.tensor(4.0), ratio_max=torch.tensor(3.0))
    means.add_parts(0.25, loss=torch.tensor(4.0))
    means.add(0.5, approx_kl=torch.tensor(8.0), ratio_max=torch.tensor(2.0))
    means.add_parts(0.5, loss=torch.tensor(8.0))
    means.end_minibatch(lr=0.5)
    means.add(1.0, approx_kl=torch.tensor(1.0), ratio_max=torch.tensor(1.0))
    means.add_parts(1.0, loss=torch.tensor(1.0))
    means.end_minibatch(lr=0.3)
    assert {k: v.item() for k, v in means().items()} == pytest.approx({
        "approx_kl": (1 + 4 + 1) / 1.75, "loss": (1 + 4 + 1) / 2, "ratio_max": 3.0, "lr": 0.4})
