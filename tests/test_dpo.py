"""DPO and its ranking loss: oracles, identities, saturation, TRL; held-out pairs."""
import copy
import math
from itertools import permutations

import pytest
import torch
from conftest import make_model, seeded, write_jsonl
from offline_cases import short_run, target_logprobs, trl_step
from oracle_cases import T, cases, nudge, same, same_gradient

import dpo
from dpo import dpo_loss, plackett_luce_loss
from plumbing.model import load_policy
from plumbing.rollout import token_logprobs


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


@pytest.mark.parametrize("x, y", cases("dpo_pl_loss"))
def test_plackett_luce_loss(x, y):
    logps = T(x["policy_logps"]).requires_grad_()
    losses = plackett_luce_loss(logps, T(x["ref_logps"]), x["beta"])
    losses.mean().backward()
    same(losses.detach(), y["losses"])
    same(logps.grad, y["grad_policy_logps"])


def test_plackett_luce_is_the_probability_of_an_order():
    """Drawn one after the other, best first: all orders of 4 have it in all 24 ways, summing to 1;
    and the probability that one comes before another is Bradley-Terry's."""
    logps, ref_logps = 20 * torch.randn(2, 4, generator=seeded()).double()
    orders = list(permutations(range(4)))
    index = torch.tensor(orders)
    p = (-plackett_luce_loss(logps[index], ref_logps[index], 0.1)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    weights = (0.1 * (logps - ref_logps)).exp().tolist()
    for order, one in zip(orders, p.tolist()):
        drawn = [weights[y] / sum(weights[z] for z in order[k:]) for k, y in enumerate(order)]
        assert one == pytest.approx(math.prod(drawn), rel=1e-9)
    before = sum(one for order, one in zip(orders, p.tolist()) if order.index(2) < order.index(1))
    bradley_terry = dpo_loss(logps[2], logps[1], ref_logps[2], ref_logps[1], 0.1)[0]
    assert before == pytest.approx(math.exp(-bradley_terry.item()), rel=1e-9)


def test_nothing_overflows_when_a_preference_is_sure():
    h = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    losses = plackett_luce_loss(h, 0 * h.detach(), 1.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, 3e4]) and h.grad.isfinite().all()
    assert dpo_loss(h[:, 0], h[:, 2], *torch.zeros(2, 2), 1.0)[0].tolist() == [0, 2e4]


@pytest.mark.parametrize("loss, wanted", [("bradley_terry", "pair"), ("plackett_luce", "ranking")])
def test_held_out_margins_are_those_of_implicit_rewards(folders, tmp_path, few_problems, loss,
                                                        wanted):
    """And at first, where pi is the reference, the loss is ln K!: all orders are as likely."""
    log, test, found = short_run(dpo, tmp_path, folders("llama"), wanted, loss=loss, beta=0.7)
    K, margins = len(test[0]["targets"]), []
    assert log["loss"] == pytest.approx(math.log(math.factorial(K)), abs=1e-5)
    assert log["margin"] == pytest.approx(0, abs=1e-5)
    for new, ref in zip(*(target_logprobs(load_policy(model, "cpu")[0], test)
                          for model in (tmp_path / "run", folders("llama")))):
        best, *others = [0.7 * (a.sum() - b.sum()).item() for a, b in zip(new, ref)]
        margins.append(best - sum(others) / len(others))
    assert found["margin"][0] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert abs(found["margin"][0]) > 0.1


def test_trl_has_the_same_loss_and_gradient(tokenizer, tmp_path):
    policy = make_model("llama", scale=0.1).eval()
    ref_model = copy.deepcopy(policy).requires_grad_(False)
    nudge(policy)
    batch, loss, gradient = trl_step("DPO", copy.deepcopy(policy), tokenizer, tmp_path,
                                     ref_model=copy.deepcopy(ref_model))  # its beta is 0.1
    logps, ref_logps = (token_logprobs(model, batch, torch.arange(6), 1.0).sum(1).view(-1, 2)
                        for model in (policy, ref_model))
    ours = dpo_loss(*logps.T, *ref_logps.T, 0.1)[0].mean()
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-5) and abs(loss - math.log(2)) > 0.003
    same_gradient(policy, gradient)


def test_held_out_prompts_need_no_pair(folders, tmp_path):
    """They are answered. No pair is held out, so nothing else is measured."""
    rows = [dict(prompt=f"{i}+1=") for i in range(4)]
    write_jsonl(tmp_path / "train.jsonl", [dict(row, chosen="3", rejected="4") for row in rows])
    write_jsonl(tmp_path / "test.jsonl", rows)
    *_, found = short_run(dpo, tmp_path, folders("llama"), "pair", data=str(tmp_path))
    assert found["n"] == 4 and "length" in found and "margin" not in found
