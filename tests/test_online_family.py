"""The equations of reinforce, ppo, remax, rloo and grpo: oracles, loops, identities, padding."""
import math

import pytest
import torch

import common
import grpo
import ppo
import reinforce
import remax
import rloo
from dr_grpo import constant_mean, dr_grpo_advantages
from test_mathematics import T, cases, check_padding, random_batch, same

# --------------------------------------------------------------- oracles: reference implementations


@pytest.mark.parametrize("x, y", cases("reinforce_baseline"))
def test_moving_baselines(x, y):
    batches, ema, (mean, count) = [T(batch) for batch in x["reward_batches"]], None, (0.0, 0)
    for i, scores in enumerate(batches):
        assert float(ema or 0) == pytest.approx(y["ema_first_batch_init"]["baseline_used"][i])
        assert float(mean) == pytest.approx(y["running_mean"]["baseline_used"][i])
        ema = reinforce.ema_baseline(ema, scores, x["decay"])
        mean, count = reinforce.running_mean_baseline(mean, count, scores)
    assert float(ema) == pytest.approx(y["ema_first_batch_init"]["final"])
    assert float(mean) == pytest.approx(torch.cat(batches).mean().item())
    assert count == sum(map(len, batches))


@pytest.mark.parametrize("x, y", cases("gae"))
def test_gae(x, y):
    ours = ppo.gae(T(x["token_rewards"]), T(x["values"]), T(x["mask"]), x["gamma"], x["lam"])
    for mine, key in zip(ours, ("advantages", "returns")):
        same(mine, y[key], x["mask"])


@pytest.mark.parametrize("x, y", cases("value_loss"))
def test_value_loss(x, y):
    values = T(x["values"]).requires_grad_()
    loss, clip_frac = ppo.value_loss(values, T(x["old_values"]), T(x["returns"]), T(x["mask"]),
                                     x["clip"])
    loss.backward()
    same(loss.detach(), y["loss"])
    same(clip_frac, y["clip_fraction"])
    same(values.grad, y["grad_wrt_values"], x["mask"])


@pytest.mark.parametrize("x, y", cases("remax"))
def test_remax_advantages(x, y):
    kl = common.kl_estimate(T(x["logprobs"]), T(x["ref_logprobs"]))
    ours = remax.remax_advantages(T(x["scores"]), T(x["greedy_scores"]), kl, T(x["mask"]),
                                  x["beta"])
    same(ours, y["advantages_gamma1"], x["mask"])


@pytest.mark.parametrize("x, y", cases("rloo"))
def test_leave_one_out_advantages_and_the_sequence_ratio(x, y):
    mask = T(x["mask"])
    kl = common.kl_estimate(T(x["logprobs_old"]), T(x["ref_logprobs"])) * mask
    ours = rloo.leave_one_out_advantages(T(x["scores"]) - x["beta"] * kl.sum(1), x["group_size"])
    same(ours, y["advantages"])
    logprobs = T(x["logprobs_new"]).requires_grad_()
    loss, _ = rloo.sequence_ratio_loss(logprobs, T(x["logprobs_old"]), ours, mask, x["clip_eps"])
    loss.backward()
    same(loss.detach(), y["trl_sequence_ratio_loss"]["loss"])
    same(logprobs.grad, y["trl_sequence_ratio_loss"]["grad_wrt_logprobs"], x["mask"])


@pytest.mark.parametrize("x, y", cases("grpo_advantages"))
def test_group_advantages(x, y):
    same(grpo.group_advantages(T(x["scores"]), x["group_size"]), y["with_std_trl_eps1e_4"])
    same(dr_grpo_advantages(T(x["scores"]), x["group_size"]), y["without_std"])


@pytest.mark.parametrize("x, y", cases("grpo_process_advantages"))
def test_process_advantages(x, y):
    ours = grpo.process_advantages(x["step_rewards"], x["step_end_index"], T(x["mask"]),
                                   x["group_size"])
    same(ours, y["ddof1_eps1e_4"], x["mask"])


@pytest.mark.parametrize("x, y", cases("grpo_loss"))
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo"])
def test_grpo_loss(x, y, name):
    def constant(values, mask):
        return constant_mean(values, mask, x["max_completion_length"])
    aggregate = dict(grpo=grpo.response_mean, bnpo=common.masked_mean, dr_grpo=constant)[name]
    for advantages in (T(x["advantages"]), T(x["advantages"])[:, None].expand_as(T(x["mask"]))):
        logprobs = T(x["logprobs"]).requires_grad_()
        loss, clip_frac = grpo.grpo_loss(logprobs, T(x["old_logprobs"]), T(x["ref_logprobs"]),
                                         advantages, T(x["mask"]), x["clip_eps_low"], x["beta"],
                                         aggregate)
        loss.backward()
        same(loss.detach(), y[name]["loss"])
        same(clip_frac, y["clip_fraction"])
        same(logprobs.grad, y[name]["grad_wrt_logprobs"], x["mask"])


@pytest.mark.parametrize("x, y", cases("loss_aggregation"))
def test_aggregations(x, y):
    values, mask = T(x["loss_per_token"]), T(x["mask"])
    same(grpo.response_mean(values, mask), y["seq_mean_token_mean"])
    same(constant_mean(values, mask, 1), y["seq_mean_token_sum"])
    # reinforce_loss is the mean over sequences of the sum over tokens of -A * logprobs
    same(-reinforce.reinforce_loss(values, torch.ones(len(mask)).double(), mask),
         y["seq_mean_token_sum"])


# ---------------------------------------------------------------- definitions, written out in loops

def test_loops():
    mask, kl, values, rewards = random_batch()
    L, scores, kl_coef = mask.sum(1).int().tolist(), torch.randn(6).double(), 0.3
    total = [scores[i].item() - kl_coef * sum(kl[i, t].item() for t in range(L[i]))
             for i in range(6)]
    loo = [total[i] - sum(total[j] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i) / 2
           for i in range(6)]
    same(rloo.leave_one_out_advantages(scores - kl_coef * (kl * mask).sum(1), 3), loo)
    gamma, lam, A, greedy = 0.9, 0.7, torch.zeros(6, 7).double(), torch.randn(6).double()
    max_ = torch.zeros(6, 7).double()
    for i in range(6):
        V = [values[i, t].item() for t in range(L[i])] + [0.0]
        for t in range(L[i]):  # GAE as the sum that it is: sum_k (gamma lam)^k delta_{t+k}
            A[i, t] = sum((gamma * lam) ** (j - t) * (rewards[i, j] + gamma * V[j + 1] - V[j])
                          for j in range(t, L[i]))
            max_[i, t] = scores[i] - greedy[i] - kl_coef * sum(kl[i, j] for j in range(t, L[i]))
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    same(advantages, A)
    same(returns, (A + values) * mask)
    same(remax.remax_advantages(scores, greedy, kl, mask, kl_coef), max_)
    group = [x.item() for x in scores[:3]]
    std = math.sqrt(sum((x - sum(group) / 3) ** 2 for x in group) / 2)
    same(grpo.group_advantages(scores, 3)[:3], [(x - sum(group) / 3) / (std + 1e-4) for x in group])
    ratio = [math.exp(sum((values - kl)[i, t].item() for t in range(L[i]))) for i in range(6)]
    losses = [max(-a * r, -a * min(max(r, 0.8), 1.2)) for a, r in zip(loo, ratio)]
    clipped = sum(L[i] for i in range(6) if losses[i] > -loo[i] * ratio[i])
    loss, clip_frac = rloo.sequence_ratio_loss(values, kl, T(loo), mask, 0.2)
    same(loss, sum(losses) / 6)
    same(clip_frac, clipped / sum(L))


def test_process_advantages_by_hand():
    """Two groups of two; steps end mid-way; one completion without steps; one step past the end."""
    step_rewards, step_ends = [[1.0, 0.0], [1.0], [], [0.5, 0.5]], [[1, 3], [0], [], [0, 2]]
    mask = T([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    mean, std = 2 / 3, math.sqrt(1 / 3) + 1e-4
    up, down = (1 - mean) / std, (0 - mean) / std
    same(grpo.process_advantages(step_rewards, step_ends, mask, 2),
         [[up + down, up + down, down, down, 0], [up, 0, 0, 0, 0], [0] * 5, [0] * 5])


def test_explained_variance_is_that_of_a_regression():
    mask, values, returns, _ = random_batch()
    x, y = values[mask.bool()], returns[mask.bool()]
    expected = 1 - (y - x).var(correction=0) / y.var(correction=0)
    same(ppo.explained_variance(values, returns, mask), expected.item())
    assert ppo.explained_variance(returns + 3, returns, mask).item() == pytest.approx(1)
    assert ppo.explained_variance(0 * returns, returns, mask).item() == pytest.approx(0)


@pytest.mark.parametrize("moved, moves_on", [(0.5, True), (0.1, True), (-0.1, True), (-0.5, False)])
def test_the_value_clip_ends_the_gradient_of_what_moved_far_enough(moved, moves_on):
    """The return lies below the old value: up is the wrong way and always free to turn back."""
    values = T([[moved]]).requires_grad_()
    ppo.value_loss(values, T([[0.0]]), T([[-2.0]]), T([[1.0]]), 0.2)[0].backward()
    assert (values.grad.item() != 0) == moves_on


# --------------------------------------------------------------------------------------- identities

def test_gae_between_its_ends():
    mask, rewards, values, _ = random_batch()
    returns = common.returns_to_go(rewards, mask, 0.9)
    advantages, targets = ppo.gae(rewards, values, mask, 0.9, 1.0)
    same(advantages + values * mask, returns)
    same(targets, returns)
    following = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    same(ppo.gae(rewards, values, mask, 0.9, 0.0)[0], (rewards + 0.9 * following - values) * mask)


def test_ppo_without_a_critic_is_reinforce():
    """V = 0, lam = gamma = 1, no whitening: the gradient of reinforce.py, with the KL from t on."""
    mask, logprobs, kl, _ = random_batch()
    scores = torch.randn(6).double()
    gradients = []
    for kl_coef in (0.0, 0.3):
        rewards = common.token_rewards(scores, kl, mask, kl_coef)
        advantages, _ = ppo.gae(rewards, 0 * kl, mask, 1.0, 1.0)
        one, two = (logprobs.clone().requires_grad_() for _ in range(2))
        loss, _ = common.ppo_clip_loss(one, one.detach(), advantages, mask)
        (loss * mask.sum() / len(mask)).backward()
        reinforce.reinforce_loss(two, scores - kl_coef * (kl * mask).sum(1), mask).backward()
        gradients.append((one.grad, two.grad))
    same(*gradients[0])
    past = (kl * mask).cumsum(1) - kl * mask  # what reinforce.py has in addition: the KL before t
    same(gradients[1][0], gradients[1][1] - 0.3 * past * mask / 6)


def test_rloo_is_k_over_k_minus_1_of_dr_grpo():
    scores = torch.randn(12).double()
    for K in (2, 3, 4):
        same(rloo.leave_one_out_advantages(scores, K),
             K / (K - 1) * dr_grpo_advantages(scores, K))


def test_one_step_per_answer_is_outcome_supervision():
    mask, *_ = random_batch()
    scores, ends = torch.randn(6).double(), [4, 0, 1, 2, 1, 6]
    ours = grpo.process_advantages([[s] for s in scores.tolist()], [[e] for e in ends], mask, 3)
    until = (torch.arange(7) <= torch.tensor(ends)[:, None]) * mask
    same(ours, grpo.group_advantages(scores, 3)[:, None] * until)


def test_without_kl_and_clip_dr_grpo_is_reinforce():
    mask, logprobs, *_ = random_batch()
    advantages = torch.randn(6).double()
    one, two = (logprobs.clone().requires_grad_() for _ in range(2))
    grpo.grpo_loss(one, one.detach(), one.detach(), advantages, mask, 0.2, 0.0,
                   lambda v, m: constant_mean(v, m, 5))[0].backward()
    reinforce.reinforce_loss(two, advantages, mask).backward()
    same(5 * one.grad, two.grad)


# ---------------------------------------------------------------- padding, ties, groups, long texts

def every_function(mask, a, b, c):
    scores, greedy = torch.arange(6).to(a.dtype), torch.ones(6).to(a.dtype)
    steps = [[1.0, 0.0], [1.0], [0.5], [0.0, 1.0], [1.0, 1.0], [0.0]]
    ends = [[1, 4], [0], [2], [0, 3], [0, 1], [6]]
    return [*ppo.gae(a, b, mask, 0.9, 0.8), *ppo.value_loss(a, b, c, mask, 0.2),
            ppo.explained_variance(a, b, mask), reinforce.reinforce_loss(a, scores, mask),
            remax.remax_advantages(scores, greedy, a, mask, 0.1),
            *rloo.sequence_ratio_loss(a, b, scores, mask, 0.2), grpo.response_mean(a, mask),
            constant_mean(a, mask, 9), *grpo.grpo_loss(a, b, c, scores, mask, 0.2, 0.1),
            *grpo.grpo_loss(a, b, c, c, mask, 0.2, 0.1, common.masked_mean),
            grpo.process_advantages(steps, ends, mask, 2)]


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_and_garbage_change_nothing(garbage):
    check_padding(every_function, garbage)


@pytest.mark.parametrize("loss", [
    lambda a, b, c, mask: ppo.value_loss(a, b, c, mask, 0.2)[0],
    lambda a, b, c, mask: reinforce.reinforce_loss(a, torch.arange(6.0).double(), mask),
    lambda a, b, c, mask: rloo.sequence_ratio_loss(a, b, torch.arange(6.0).double(), mask, 0.2)[0],
    lambda a, b, c, mask: grpo.grpo_loss(a, b, c, c, mask, 0.2, 0.1)[0]])
def test_garbage_gets_no_gradient(loss):
    mask, *values = random_batch()
    dirty = [torch.where(mask.bool(), v, math.nan).requires_grad_() for v in values]
    loss(*dirty, mask).backward()
    assert dirty[0].grad.isfinite().all() and (dirty[0].grad[mask == 0] == 0).all()
    assert (dirty[0].grad[mask == 1] != 0).any()


def test_constant_groups_are_exactly_no_signal():
    """900 groups in float32, among them those where a small eps gave advantages of 0.9."""
    for n in range(1, 31):
        for value in torch.linspace(0.1, 3, 30):
            scores = torch.cat([value.expand(n), torch.randn(n)])
            assert (grpo.group_advantages(scores, n)[:n] == 0).all()
            steps = [[value.item()] * 2] * n
            A = grpo.process_advantages(steps, [[0, 1]] * n, torch.ones(n, 2), n)
            assert (A == 0).all()


def test_whole_groups_can_be_permuted():
    mask, *_ = random_batch()
    scores, order = torch.randn(6).double(), torch.tensor([4, 5, 0, 1, 2, 3])
    for function in (rloo.leave_one_out_advantages, grpo.group_advantages, dr_grpo_advantages):
        torch.testing.assert_close(function(scores, 2)[order], function(scores[order], 2))
    steps, ends = [[s, 1.0] for s in scores.tolist()], [[0, i] for i in (4, 0, 2, 3, 1, 6)]
    ours = grpo.process_advantages(steps, ends, mask, 2)
    moved = grpo.process_advantages([steps[i] for i in order], [ends[i] for i in order],
                                    mask[order], 2)
    torch.testing.assert_close(ours[order], moved)


def test_the_sequence_ratio_explodes_with_the_length():
    """.005 nats per token are a factor of 1.005 for a token, and of 148 for 1000 of them."""
    mask = torch.ones(1, 1000)
    logprobs, old = -1.0 * mask, -1.005 * mask
    loss, _ = rloo.sequence_ratio_loss(logprobs, old, -torch.ones(1), mask, 0.2)
    assert loss.item() == pytest.approx(math.exp(5), rel=1e-3)
    loss, clip_frac = common.ppo_clip_loss(logprobs, old, -torch.ones(1, 1000), mask, 0.2)
    assert loss.item() == pytest.approx(1.005, rel=1e-3) and clip_frac == 0
