"""reinforce_pp.py: both kinds of advantages, and the gradient that they give."""
import exact_world as w
import pytest
import torch
from oracle_cases import T, cases, check_padding, same

import common
import reinforce_pp


@pytest.mark.parametrize("x, y", cases("reinforce_pp_advantages"))
def test_reinforce_pp_advantages(x, y):
    kl = common.kl_estimate(T(x["logprobs_old"]), T(x["ref_logprobs"]))
    for scores, expected in ((T(x["scores"]).clamp(-x["reward_clip"], x["reward_clip"]),
                              y["openrlhf_ddof0"]),
                             (common.normalize_rewards(T(x["scores"]), 1.0),
                              y["zscored_clip1_then_openrlhf"])):
        ours = reinforce_pp.reinforce_pp_advantages(scores, kl, T(x["mask"]), x["beta"], x["gamma"])
        same(ours, expected["advantages"], x["mask"])


# With a w.KL in the reward the references differ from each other; ours has it in the loss.
@pytest.mark.parametrize("x, y", [case for case in cases("reinforce_pp_baseline_advantages")
                                  if case.values[0]["beta"] == 0])
def test_reinforce_pp_baseline_advantages(x, y):
    ours = reinforce_pp.reinforce_pp_baseline_advantages(T(x["scores"]), T(x["mask"]),
                                                         x["group_size"])
    same(ours, y["openrlhf_ddof0"]["advantages"], x["mask"])


def test_padding_changes_nothing():
    scores = torch.arange(6).double()
    check_padding(lambda mask, a, b, c: [
        reinforce_pp.reinforce_pp_advantages(scores, a, mask, 0.1, 0.9),
        reinforce_pp.reinforce_pp_baseline_advantages(scores, mask, 2)])


def test_groups_that_agree_are_exactly_no_signal():
    """Also where the mean of K equal scores is not quite the score."""
    for K in range(2, 31):
        for value in torch.linspace(0.1, 3, 30):
            scores = torch.cat([value.expand(K), torch.ones(K)])
            A = reinforce_pp.reinforce_pp_baseline_advantages(scores, torch.ones(2 * K, 2), K)
            assert (A == 0).all()


def losses_of(baseline):
    """Without the division by the std, and with a baseline that does not depend on the batch."""
    rewards = common.token_rewards(w.SCORES, w.KL, w.MASK, w.KL_COEF)
    return w.clip_losses(common.returns_to_go(rewards, w.MASK) - baseline)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_unbiased(baseline):
    w.check_unbiased(losses_of(baseline))


def test_a_mean_over_tokens_is_biased():
    """A batch is divided by its number of tokens, so that short completions count more.

    With one completion per batch, the cosine with the gradient of J is 0.86 in this world. With
    many, the number of tokens hardly differs from batch to batch, and the cosine is nearer to 1.
    """
    ours = [w.cosine(w.expected_gradient(losses_of(0.0), n, w.mean_of_tokens),
                     -w.objective_gradient()) for n in (1, 2, 3)]
    assert ours[0] == pytest.approx(0.862, abs=0.001) and ours[0] < ours[1] < ours[2] < 1
