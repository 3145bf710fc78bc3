"""ORPO: the odds ratio by oracle and by hand, near p = 1; held-out pairs."""
import math

import pytest
import torch
from offline_cases import short_run, target_logprobs
from oracle_cases import T, cases, same

import orpo
from orpo import odds_ratio_loss
from plumbing.model import load_policy
from plumbing.rollout import pick


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
    """In TRL the SFT term is of the prompt too; here, as in the paper's text, of chosen alone."""
    labels = torch.tensor(x["labels"])[:, 1:]
    mask, half = (labels != -100).double(), len(labels) // 2
    logprobs = pick(T(x["logits"])[:, :-1], labels.clamp(min=0), 1.0) * mask
    mean_logps = logprobs.sum(1) / mask.sum(1)
    same(mean_logps, y["avg_logps"], rtol=1e-5)
    odds_ratio = x["lam"] * odds_ratio_loss(*mean_logps.view(2, -1)).mean()
    same(odds_ratio + y["trl_nll_prompt_and_response"],
         y["trl_loss_nll_on_prompt_and_response"], rtol=1e-5)
    nll = -logprobs[:half].sum() / mask[:half].sum()
    same(odds_ratio + nll, y["HAND_loss_nll_on_response_only"], rtol=1e-5)


def test_the_odds_ratio_by_hand():
    """With p = .8 against .4 the odds are 4 and 2/3, their ratio 6. The weight of the gradient is
    1 / (1 + 6), and not 1 + 1/6."""
    chosen, rejected = (T([math.log(p)]).requires_grad_() for p in (0.8, 0.4))
    loss = odds_ratio_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(1 + 1 / 6))
    assert chosen.grad.item() == pytest.approx(-1 / 7 / (1 - 0.8))
    assert rejected.grad.item() == pytest.approx(1 / 7 / (1 - 0.4))


def test_the_odds_stay_finite():
    """And keep their digits near p = 1, in float32: at p = exp(-1e-6), 1 - p is 1e-6."""
    for dtype in (torch.float32, torch.float64):
        one, two = (x.flatten().requires_grad_() for x in torch.meshgrid(*[torch.tensor(
            [0.0, -1e-12, -1e-8, -1e-3, -5.0, -50.0], dtype=dtype)] * 2, indexing="ij"))
        losses = odds_ratio_loss(one, two)
        losses.sum().backward()
        for tensor in (losses, one.grad, two.grad):
            assert tensor.isfinite().all()
        assert (losses >= 0).all()
    one = torch.tensor([-1e-6, math.log(0.5)])
    assert odds_ratio_loss(one, one.flip(0)).tolist() == pytest.approx(
        [math.log1p(1e-6), math.log1p(1e6)], rel=1e-4)


def test_held_out_margins_are_those_of_mean_log_probs(folders, tmp_path, few_problems):
    _, test, found = short_run(orpo, tmp_path, folders("llama"), "pair")
    trained = load_policy(tmp_path / "run", "cpu")[0]
    margins = [(one.mean() - other.mean()).item() for one, other in target_logprobs(trained, test)]
    assert found["margin"][0] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert found["accuracy"][0] == sum(margin > 0 for margin in margins) / len(margins)
