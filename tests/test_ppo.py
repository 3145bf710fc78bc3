"""ppo.py: GAE, the critic's loss, and the gradient that they give."""
import exact_world as w
import pytest
import torch
from conftest import moved
from oracle_cases import T, cases, check_padding, random_batch, run_script, same

import common
import ppo
from plumbing.rollout import sample
from plumbing.toy import POLICY


@pytest.mark.parametrize("x, y", cases("gae"))
def test_gae(x, y):
    ours = ppo.gae(T(x["token_rewards"]), T(x["values"]), T(x["mask"]), x["gamma"], x["lam"])
    for mine, key in zip(ours, ("advantages", "returns")):
        same(mine, y[key], x["mask"])


@pytest.mark.parametrize("x, y", cases("value_loss"))
def test_value_loss(x, y):
    share, values = T(x["mask"]) / T(x["mask"]).sum(), T(x["values"]).requires_grad_()
    losses, is_clipped = ppo.value_loss(values, T(x["old_values"]), T(x["returns"]), x["clip"])
    loss = (losses * share).sum()
    loss.backward()
    same(loss.detach(), y["loss"])
    same((is_clipped * share).sum(), y["clip_fraction"])
    same(values.grad, y["grad_wrt_values"], x["mask"])


def test_gae_between_its_ends():
    """lam = 1: the returns-to-go, without V; lam = 0: the error of one step."""
    mask, rewards, values, _ = random_batch()
    returns = common.returns_to_go(rewards, mask, 0.9)
    advantages, targets = ppo.gae(rewards, values, mask, 0.9, 1.0)
    same(advantages + values * mask, returns)
    same(targets, returns)
    following = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    same(ppo.gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * following - values, mask)


@pytest.mark.parametrize("moved, has_gradient", [(0.5, True), (0.1, True), (-0.1, True),
                                                 (-0.5, False)])
def test_the_value_clip_stops_a_value_that_has_moved_far_enough(moved, has_gradient):
    """The return lies below the old value, so that a value above it may always turn back."""
    values = T([[moved]]).requires_grad_()
    losses, is_clipped = ppo.value_loss(values, T([[0.0]]), T([[-2.0]]), 0.2)
    losses.sum().backward()
    assert (values.grad.item() != 0) == has_gradient == (not is_clipped.item())


def test_explained_variance_is_that_of_a_regression():
    mask, values, returns, _ = random_batch()
    x, y = values[mask.bool()], returns[mask.bool()]
    expected = 1 - (y - x).var(correction=0) / y.var(correction=0)
    same(ppo.explained_variance(values, returns, mask), expected.item())
    same(ppo.explained_variance(returns + 3, returns, mask), 1.0)
    same(ppo.explained_variance(0 * returns, returns, mask), 0.0)
    same(ppo.explained_variance(returns, 0 * returns + 1, mask), 0.0)


def test_padding_changes_nothing():
    check_padding(lambda mask, a, b, c: [*ppo.gae(a, b, mask, 0.9, 0.8),
                                         ppo.explained_variance(a, b, mask)])


def losses_of(value_of_prefix, lam):
    """With one value per prefix, which may be wrong, but does not know what comes."""
    values = torch.tensor([[value_of_prefix[w.PREFIXES.index(y[:t])] if t < len(y) else 9.0
                            for t in range(3)] for y in w.SEQUENCES]).double()
    rewards = common.token_rewards(w.SCORES, w.KL, w.MASK, w.KL_COEF)
    return w.clip_losses(ppo.gae(rewards, values, w.MASK, 1.0, lam)[0])


@pytest.mark.parametrize("values", [0 * w.VALUES, w.VALUES], ids=["no critic", "any critic"])
def test_unbiased(values):
    """With lam = 1, and without whitening."""
    w.check_unbiased(losses_of(values, 1.0))


def test_a_wrong_critic_biases_the_gradient_if_lam_is_below_1():
    for lam in (0.0, 0.5):
        ours = w.expected_gradient(losses_of(w.VALUES, lam))
        assert (ours + w.objective_gradient()).abs().max() > 0.01


def test_the_critic_learns_alone_during_its_warmup(monkeypatch, tmp_path, few_problems):
    """It starts at 0, and learns to predict a score that depends on the prompt alone."""
    def reward(prompts, **columns):
        return [float(prompt.count("+")) for prompt in prompts]

    def spy(policy, *arguments):
        weights.append(torch.cat([x.detach().flatten() for x in policy.parameters()]))
        return sample(policy, *arguments)

    weights = []
    monkeypatch.setattr(ppo, "sample", spy)
    rows = run_script(ppo, monkeypatch, tmp_path / "run", reward, steps=10, critic_warmup=9,
                      prompts_per_step=32, max_new_tokens=3, lam=1.0, critic_lr=1e-2)
    assert all(torch.equal(weights[0], after) for after in weights)
    assert moved(POLICY, tmp_path / "run") > 0.9  # in the last step
    assert rows[0]["explained_var"] == 0 and rows[0]["lr"] == 0 < rows[-1]["lr"]
    assert sum(row["explained_var"] for row in rows[-3:]) / 3 > 0.4
