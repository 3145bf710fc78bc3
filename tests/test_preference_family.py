"""The equations of reward_model, dpo, orpo and raft: oracles, loops, identities, saturation."""
import math
from itertools import permutations

import pytest
import torch

import common
from dpo import dpo_loss, plackett_luce_loss
from orpo import odds_ratio_loss
from plumbing.evaluation import preference_stats
from plumbing.rollout import pick
from raft import best_of_k
from reward_model import bradley_terry_loss
from test_mathematics import T, cases, same

# --------------------------------------------------------------- oracles: reference implementations


@pytest.mark.parametrize("x, y", cases("dpo_loss"))
def test_dpo_loss(x, y):
    names = [f"{who}_{what}_logps" for who in ("policy", "ref") for what in ("chosen", "rejected")]
    inputs = [T(x[name]).requires_grad_(name[0] == "p") for name in names]
    losses, chosen, rejected = dpo_loss(*inputs, x["beta"])
    same(chosen, y["chosen_rewards"])
    same(rejected, y["rejected_rewards"])
    assert not chosen.requires_grad and not rejected.requires_grad
    if x["label_smoothing"] == 0:  # a variant, cDPO, which is not here
        same(losses.detach(), y["losses"])
        losses.mean().backward()
        same(inputs[0].grad, y["grad_policy_chosen"])
        same(inputs[1].grad, y["grad_policy_rejected"])


def completion_logprobs(logits, ids, mask):
    """(N, T, V), (N, T), (N, T) with 1 on completion tokens -> (N, T - 1), 0 elsewhere."""
    ids, mask = torch.as_tensor(ids)[:, 1:], torch.as_tensor(mask)[:, 1:]
    return pick(T(logits)[:, :-1], ids, 1.0).double() * mask, mask


@pytest.mark.parametrize("x, y", cases("dpo_end_to_end"))
def test_dpo_from_logits(x, y):
    logps, ref_logps = (completion_logprobs(x[f"{who}_logits"], x["input_ids"],
                                            x["completion_mask"])[0].sum(1)
                        for who in ("policy", "ref"))
    same(logps, y["policy_logps"], rtol=1e-5)
    chosen, rejected, ref_chosen, ref_rejected = *logps.view(2, -1), *ref_logps.view(2, -1)
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, x["beta"])[0]
    same(losses.mean(), y["loss"], rtol=1e-5)


@pytest.mark.parametrize("x, y", cases("dpo_pl_loss"))
def test_plackett_luce_loss(x, y):
    logps = T(x["policy_logps"]).requires_grad_()
    losses = plackett_luce_loss(logps, T(x["ref_logps"]), x["beta"])
    losses.mean().backward()
    same(losses.detach(), y["losses"])
    same(logps.grad, y["grad_policy_logps"])


@pytest.mark.parametrize("x, y", cases("orpo_or_loss"))
def test_odds_ratio_loss(x, y):
    chosen, rejected = (T(x[f"{name}_avg_logps"]).requires_grad_()
                        for name in ("chosen", "rejected"))
    losses = odds_ratio_loss(chosen, rejected)
    (x["lam"] * losses.mean()).backward()
    same(losses.detach(), y["or_loss_per_pair"])
    same(chosen.grad, y["grad_chosen_avg_logps"])
    same(rejected.grad, y["grad_rejected_avg_logps"])


@pytest.mark.parametrize("x, y", cases("orpo_end_to_end"))
def test_orpo_from_logits(x, y):
    labels = torch.tensor(x["labels"])
    logprobs, mask = completion_logprobs(x["logits"], x["input_ids"], (labels != -100).int())
    mean_logps = logprobs.sum(1) / mask.sum(1)
    same(mean_logps, y["avg_logps"], rtol=1e-5)
    half = len(mask) // 2
    nll = -common.masked_mean(logprobs[:half], mask[:half])
    same(nll, y["nll_response_only"], rtol=1e-5)
    loss = nll + x["lam"] * odds_ratio_loss(*mean_logps.view(2, -1)).mean()
    same(loss, y["HAND_loss_nll_on_response_only"], rtol=1e-5)


@pytest.mark.parametrize("x, y", cases("reward_model_loss"))
def test_bradley_terry_loss(x, y):
    chosen, rejected = (T(x[name]).requires_grad_() for name in ("chosen", "rejected"))
    loss = bradley_terry_loss(chosen, rejected).mean()
    loss.backward()
    same(loss.detach(), y["loss"])
    same(chosen.grad, y["grad_chosen"])
    same(rejected.grad, y["grad_rejected"])
    found = preference_stats(torch.stack([chosen, rejected], 1))
    same(found["accuracy"].double(), y["accuracy"])


@pytest.mark.parametrize("x, y", cases("best_of_k"))
def test_best_of_k(x, y):
    assert best_of_k(T(x["scores"]), x["group_size"]).tolist() == y["flat_index"]


# ---------------------------------------------------------------------- definitions, and identities

def test_at_the_reference_dpo_is_a_coin():
    logps = -50 * torch.rand(2, 4)
    losses, chosen, rejected = dpo_loss(*logps, *logps, 0.1)
    assert losses.sub(math.log(2)).abs().max() < 1e-6 and (chosen == 0).all()
    assert (chosen - rejected == 0).all()
    losses = plackett_luce_loss(*(-50 * torch.rand(1, 4, 5)).expand(2, 4, 5), 0.1)
    assert losses.sub(math.log(120)).abs().max() < 1e-5


def test_plackett_luce_is_the_probability_of_an_order():
    """Drawn one after the other, best first: all orders of 4 have it in all 24 ways, summing to 1;
    and the probability that one comes before another is Bradley-Terry's."""
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = 20 * torch.randn(2, 4, dtype=torch.float64, generator=generator)
    orders = list(permutations(range(4)))
    index = torch.tensor(orders)
    p = (-plackett_luce_loss(logps[index], ref_logps[index], 0.1)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    h = (0.1 * (logps - ref_logps)).tolist()
    for order, one in zip(orders, p.tolist()):
        rest, product = list(order), 1.0
        for y in order:
            product *= math.exp(h[y]) / sum(math.exp(h[z]) for z in rest)
            rest.remove(y)
        assert one == pytest.approx(product, rel=1e-9)
    before = sum(one for order, one in zip(orders, p.tolist()) if order.index(2) < order.index(1))
    bt, *_ = dpo_loss(logps[2], logps[1], ref_logps[2], ref_logps[1], 0.1)
    assert before == pytest.approx(math.exp(-bt.item()), rel=1e-9)


def test_a_ranking_of_two_is_a_pair():
    logps, ref_logps = 30 * torch.randn(2, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(plackett_luce_loss(logps, ref_logps, 0.3),
                               dpo_loss(*logps.T, *ref_logps.T, 0.3)[0])


def test_only_differences_of_implicit_rewards_count():
    """A shift of all completions of a prompt is the part that the paper's Z(x) would be."""
    logps, ref_logps = 30 * torch.randn(2, 6, 4, dtype=torch.float64)
    moved = logps + 100 * torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(plackett_luce_loss(moved, ref_logps, 0.1),
                               plackett_luce_loss(logps, ref_logps, 0.1))
    for one, two in ((moved, ref_logps), (logps, ref_logps)):
        logps_grad = one[:, :2].clone().requires_grad_()
        losses = dpo_loss(*logps_grad.T, *two[:, :2].T, 0.1)[0]
        losses.sum().backward()
        values = losses.detach(), logps_grad.grad
        if one is moved:
            first = values
    for one, two in zip(first, values):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("loss, inputs", [
    (lambda a, b, c, d: dpo_loss(a, b, c, d, 0.2)[0], 4), (bradley_terry_loss, 2),
    (lambda a, b: odds_ratio_loss(-a.exp(), -b.exp()), 2),
    (lambda *columns: plackett_luce_loss(torch.stack(columns, 1), torch.zeros(5, 4), 0.3), 4)])
def test_gradients_are_finite_differences(loss, inputs):
    values = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(inputs)]
    assert torch.autograd.gradcheck(loss, values)


def test_the_better_one_is_pushed_up_and_the_worse_one_down():
    for loss in (bradley_terry_loss, odds_ratio_loss,
                 lambda a, b: dpo_loss(a, b, a.detach(), b.detach(), 0.1)[0]):
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-1.5, -1.0))
        loss(chosen, rejected).sum().backward()
        assert chosen.grad < 0 < rejected.grad


def test_the_odds_ratio_by_hand():
    """With p = .8 against .4 the odds are 4 and 2/3, their ratio 6. The weight of the gradient is
    1 / (1 + 6), and not 1 + 1/6."""
    chosen, rejected = (T([math.log(p)]).requires_grad_() for p in (0.8, 0.4))
    loss = odds_ratio_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(1 + 1 / 6))
    assert chosen.grad.item() == pytest.approx(-1 / 7 / (1 - 0.8))
    assert rejected.grad.item() == pytest.approx(1 / 7 / (1 - 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-8, -1e-3, -5.0, -50.0])
@pytest.mark.parametrize("other", [0.0, -1e-8, -1.0, -50.0])
def test_the_odds_stay_finite(dtype, logp, other):
    for values in ((logp, other), (other, logp)):
        chosen, rejected = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in values)
        losses = odds_ratio_loss(chosen, rejected)
        losses.sum().backward()
        for tensor in (losses, chosen.grad, rejected.grad):
            assert tensor.isfinite().all()
    assert losses >= 0


def test_the_odds_keep_their_digits_near_one():
    """log(p / (1 - p)) at p = exp(-1e-9), in float64: 1 - p is 1e-9 to the last digit."""
    loss = odds_ratio_loss(T([-1e-9]), T([math.log(0.5)]))
    assert loss.item() == pytest.approx(math.log1p(1e-9), rel=1e-6)
    loss = odds_ratio_loss(T([math.log(0.5)]), T([-1e-9]))
    assert loss.item() == pytest.approx(math.log1p(1e9), rel=1e-9)


def test_nothing_overflows_when_a_preference_is_sure():
    for big in (50.0, 1e4):
        chosen, rejected = torch.tensor([big, -big], requires_grad=True), torch.tensor([-big, big])
        losses = bradley_terry_loss(chosen, rejected)
        losses.sum().backward()
        assert losses.tolist() == pytest.approx([0, 2 * big]) and chosen.grad.isfinite().all()
    h = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]])
    assert plackett_luce_loss(h, 0 * h, 1.0).tolist() == pytest.approx([0, 3e4])


def test_the_best_of_k_is_the_first_on_ties():
    scores = torch.tensor([0.0, 1, 1, 0, 5, 5, 5, 5, -3, -2, -9, -2])
    assert best_of_k(scores, 4).tolist() == [1, 4, 9]
    for _ in range(20):
        scores = torch.randint(0, 3, (60,)).double()
        for K in (1, 2, 3, 5):
            loop = [max(range(i, i + K), key=lambda j: (scores[j].item(), -j))
                    for i in range(0, 60, K)]
            assert best_of_k(scores, K).tolist() == loop


def test_preference_stats_by_hand():
    found = preference_stats(T([[3.0, 1, 5], [2, 2, -4]]))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        dict(chosen=2.5, rejected=1.0, margin=1.5, accuracy=(1 + 0 + 0.5 + 1) / 4))
