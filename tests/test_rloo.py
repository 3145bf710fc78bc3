"""rloo.py: its advantages, and the gradient that they give."""
import pytest
import torch
from exact_world import KL, KL_COEF, OLD_LOGPROBS, SCORES, check_unbiased
from oracle_cases import TRL, T, cases, same, same_gradient, trl_step

import common
import rloo
from plumbing.rollout import token_logprobs


@pytest.mark.parametrize("x, y", cases("rloo"))
def test_leave_one_out_advantages(x, y):
    """And the gradient on policy, as a mean over completions of sums over tokens."""
    mask, old_logprobs, K = T(x["mask"]), T(x["logprobs_old"]), x["group_size"]
    kl = common.kl_estimate(old_logprobs, T(x["ref_logprobs"])) * mask
    rewards = T(x["scores"]) - x["beta"] * kl.sum(1)
    A = rloo.leave_one_out_advantages(rewards, K)
    same(A, y["advantages"])
    means = rewards.view(-1, K).mean(1).repeat_interleave(K)
    same((K - 1) / K * A, rewards - means)  # a mean with the completion itself in it
    logprobs = old_logprobs.clone().requires_grad_()
    losses, _ = common.ppo_clip_loss(logprobs, old_logprobs, A[:, None])
    (losses * mask / len(mask)).sum().backward()
    same(logprobs.grad, y["on_policy_grad_wrt_logprobs"], mask)


def test_groups_that_agree_are_exactly_no_signal():
    for K in range(2, 31):
        for value in torch.linspace(0.1, 3, 30):
            rewards = torch.cat([value.expand(K), torch.arange(K)])
            assert (rloo.leave_one_out_advantages(rewards, K)[:K] == 0).all()


@pytest.mark.parametrize("K", [2, 3])
def test_unbiased(K):
    """The batch is one group. The baseline depends on it, but not on the completion itself."""
    def losses_of(logprobs, rows):
        A = rloo.leave_one_out_advantages((SCORES - KL_COEF * KL.sum(1))[rows], K)
        return common.ppo_clip_loss(logprobs, OLD_LOGPROBS[rows], A[:, None])[0]
    check_unbiased(losses_of, K)


def test_trl(tmp_path):
    """Of the policy that sampled: TRL has a ratio for each completion, and here both are 1."""
    theirs, gradient, policy, batch, ref_logprobs, scores = trl_step(tmp_path, "RLOO", move=False)
    A = rloo.leave_one_out_advantages(
        scores - TRL["beta"] * (batch.logprobs - ref_logprobs).sum(1), TRL["num_generations"])
    torch.testing.assert_close(A, theirs["advantages"], rtol=1e-5, atol=1e-5)
    logprobs = token_logprobs(policy, batch, torch.arange(len(A)), TRL["temperature"])
    losses, _ = common.ppo_clip_loss(logprobs, batch.logprobs, A[:, None])
    (losses * batch.mask).sum().div(len(A)).backward()  # a sum over tokens, as in TRL
    same_gradient(policy, gradient)
