"""grpo.py: its advantages, its loss, the gradient that they give, and the weights of the tokens."""
import math
import types

import exact_world as w
import pytest
import torch
from conftest import ROOT, by_text
from oracle_cases import TRL, T, cases, run_script, same, same_gradient, trl_step

import grpo
from plumbing.model import load_policy, plain_logprobs
from plumbing.rollout import micro_batches, token_logprobs


@pytest.mark.parametrize("x, y", cases("grpo_advantages"))
def test_group_advantages(x, y):
    same(grpo.group_advantages(T(x["scores"]), x["group_size"]), y["with_std_trl_eps1e_4"])


@pytest.mark.parametrize("x, y", cases("grpo_process_advantages"))
def test_process_advantages(x, y):
    ours = grpo.process_advantages(x["step_rewards"], x["step_end_index"], T(x["mask"]),
                                   x["group_size"])
    same(ours, y["ddof1_eps1e_4"], x["mask"])


def test_process_advantages_by_hand():
    """Two groups of two; steps end mid-way; one completion without steps; one step past the end."""
    step_rewards, step_ends = [[1.0, 0.0], [1.0], [], [0.5, 0.5]], [[1, 3], [0], [], [0, 2]]
    mask = T([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    mean, std = 2 / 3, math.sqrt(1 / 3) + 1e-4
    up, down = (1 - mean) / std, (0 - mean) / std
    same(grpo.process_advantages(step_rewards, step_ends, mask, 2),
         [[up + down, up + down, down, down, 0], [up, 0, 0, 0, 0], [0] * 5, [0] * 5])


def test_groups_that_agree_are_exactly_no_signal():
    """Also where the mean of K equal scores is not quite the score, so that their std is not 0."""
    for K in range(2, 31):
        for value in torch.linspace(0.1, 3, 30):
            scores = torch.cat([value.expand(K), torch.arange(K)])
            assert (grpo.group_advantages(scores, K)[:K] == 0).all()
            steps = [[value.item()] * 2] * K
            A = grpo.process_advantages(steps, [[0, 1]] * K, torch.ones(K, 2), K)
            assert (A == 0).all()


@pytest.mark.parametrize("x, y", cases("grpo_loss"))
def test_grpo_loss(x, y):
    """As a mean over completions of means over tokens; and over tokens, as in DAPO."""
    mask = T(x["mask"])
    for name, share in (("grpo", mask / mask.sum(1, keepdim=True) / len(mask)),
                        ("dapo", mask / mask.sum())):
        for A in (T(x["advantages"]), T(x["advantages"])[:, None].expand_as(mask)):
            logprobs = T(x["logprobs"]).requires_grad_()
            losses, is_clipped = grpo.grpo_loss(logprobs, T(x["old_logprobs"]),
                                                T(x["ref_logprobs"]), A, x["clip_eps_low"],
                                                x["beta"])
            loss = (losses * share).sum()
            loss.backward()
            same(loss.detach(), y[name]["loss"])
            same((is_clipped * mask).sum() / mask.sum(), y["clip_fraction"])
            same(logprobs.grad, y[name]["grad_wrt_logprobs"], mask)


def test_trl(tmp_path):
    """TRL multiplies k3 by the ratio by default, as DeepSeek-V3.2 does; this is switched off."""
    theirs, gradient, policy, batch, ref_logprobs, scores = trl_step(
        tmp_path, "GRPO", loss_type="grpo", use_bias_correction_kl=False)
    A, mask = grpo.group_advantages(scores, TRL["num_generations"]), batch.mask
    torch.testing.assert_close(A, theirs["advantages"], rtol=1e-5, atol=1e-5)
    logprobs = token_logprobs(policy, batch, torch.arange(len(A)), TRL["temperature"])
    losses, is_clipped = grpo.grpo_loss(logprobs, batch.logprobs, ref_logprobs, A, 0.2, TRL["beta"])
    (losses * mask / mask.sum(1, keepdim=True)).sum().div(len(A)).backward()
    assert 0 < (is_clipped * mask).sum() < mask.sum()
    same_gradient(policy, gradient)


def without_std(scores, K):
    """The advantages of Dr. GRPO."""
    return (scores.view(-1, K) - scores.view(-1, K).mean(dim=1, keepdim=True)).flatten()


@pytest.mark.parametrize("advantages_of, share_of, cosines", [
    (without_std, w.sum_of_tokens, [1, 1]), (without_std, w.mean_of_tokens, [0.969, 0.987]),
    (without_std, w.mean_of_means, [0.867, 0.867]),
    (grpo.group_advantages, w.sum_of_tokens, [0.819, 0.869]),
    (grpo.group_advantages, w.mean_of_means, [0.744, 0.782])])
def test_what_grpo_divides_by_is_biased(advantages_of, share_of, cosines):
    """Cosine of the expected gradient with that of the score, for groups of 2 and of 3, no KL.

    Without both divisions, as in Dr. GRPO, it is 1. With the std, a group that nearly agrees counts
    as much as any other; with a mean over the tokens of a completion, a token of a long completion
    counts less. Both are choices and not errors. The last row is GRPO as it is.
    """
    for K, expected in zip((2, 3), cosines):
        def losses_of(logprobs, rows):  # the batch is one group
            return grpo.grpo_loss(logprobs, w.OLD_LOGPROBS[rows], w.REF_LOGPROBS[rows],
                                  advantages_of(w.SCORES[rows], K), 0.2, 0.0)[0]
        ours = w.expected_gradient(losses_of, K, share_of)
        assert w.cosine(ours, -w.objective_gradient(0.0)) == pytest.approx(expected, abs=0.001)


SHARE = "share = mask / mask.sum(dim=1, keepdim=True) / len(minibatch)"


@pytest.mark.parametrize("share", [SHARE, "share = mask / mask[minibatch].sum()"],
                         ids=["GRPO", "DAPO"])
def test_micro_batches_do_not_change_the_gradient(share, folders, few_problems, tmp_path,
                                                  monkeypatch):
    """The gradients of two mini-batches are those of whole-batch means over completions and tokens.

    Groups that agree are not forwarded, and count in the means.
    """
    def reward(completions, prompts, **columns):
        return [0.5 if i // 4 % 2 else x for i, x in enumerate(by_text(prompts, completions))]

    def spy(batch, rows, size, advantages):
        minibatches.append((batch, rows, advantages))
        return micro_batches(batch, rows, size, advantages)

    def step(optimizer):  # and the policy stays where it is
        (group,) = optimizer.param_groups
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in group["params"]]))

    source, script = (ROOT / "grpo.py").read_text(), types.ModuleType("a_copy")
    assert source.count(SHARE) == 1
    exec(source.replace(SHARE, share), vars(script))
    monkeypatch.setattr(script, "micro_batches", spy)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model = folders("llama", hostile=True)  # two EOS ids: completions of all lengths
    for size in (4, 64):
        gradients, minibatches = [], []
        run_script(script, monkeypatch, tmp_path / str(size), reward, model=model,
                   max_grad_norm=1e9, prompts_per_step=6, minibatch_size=12, micro_batch_size=size,
                   max_new_tokens=12)
        for gradient, (batch, rows, A) in zip(gradients, minibatches, strict=True):
            policy, _ = load_policy(model, "cpu")
            logprobs = plain_logprobs(policy, batch, 1.0)
            lengths = [len(logprobs[i]) for i in rows]
            assert min(lengths) < max(lengths) and (A[rows] == 0).any() and (A[rows] != 0).any()
            if share == SHARE:
                loss = -sum(A[i] * logprobs[i].mean() for i in rows) / len(rows)
            else:
                loss = -sum(A[i] * logprobs[i].sum() for i in rows) / sum(lengths)
            exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])
            assert (gradient - exact).abs().max() < 1e-4 * exact.abs().max()
