"""tools/gradients.py: what it averages, against loops over ordered batches and formulas by hand."""
import itertools

import pytest
import torch

from common import normalize_rewards, ppo_clip_loss
from grpo import group_advantages, grpo_loss
from reinforce_pp import reinforce_pp_advantages
from rloo import leave_one_out_advantages
from tools import gradients


def logprobs_by_hand(logits):
    """(2, 7, 3) -> (30, 3), one token at a time."""
    policy = logits.log_softmax(-1)
    rows = []
    for prompt, y in itertools.product(range(2), gradients.SEQUENCES):
        tokens = [policy[prompt, gradients.PREFIXES.index(y[:t]), y[t]] for t in range(len(y))]
        rows.append(torch.stack(tokens + [logits.new_zeros(())] * (3 - len(y))))
    return torch.stack(rows)


def reinforce_pp(new, old, ref, scores, mask):
    A = reinforce_pp_advantages(normalize_rewards(scores, 5.0), old - ref, mask, 0.1)
    return ppo_clip_loss(new, old, A, mask, 0.2)[0]


def rloo(new, old, ref, scores, mask):
    A = leave_one_out_advantages(scores - 0.1 * (old - ref).sum(1), len(scores))
    return ppo_clip_loss(new, old, A[:, None], mask, 0.2)[0]


def grpo(new, old, ref, scores, mask):
    return grpo_loss(new, old, ref, group_advantages(scores, len(scores)), mask, 0.2, 0.1)[0]


def group_baseline(new, old, ref, scores, mask):
    """Its z-score and k2 by hand: every token of a completion has the same advantage."""
    centred = scores - scores.mean()
    each = torch.cat([centred[i].expand(int(mask[i].sum())) for i in range(len(mask))])
    A = (centred - each.mean()) / (each.var(correction=0) + 1e-8).sqrt()
    k2 = ((ref - new) ** 2 * mask).sum() / mask.sum() / 2
    return -((new - old).exp() * A[:, None] * mask).sum() / mask.sum() + 0.1 * k2


def remax(new, old, ref, scores, mask, greedy):
    kl = old - ref
    A = scores[:, None] - 0.1 * kl.flip(1).cumsum(1).flip(1) - greedy[:, None]
    return -((new - old).exp() * A * mask).sum() / mask.sum()


def prime(new, old, ref, scores, mask):
    A = torch.stack([scores[i] - scores[1 - i] for i in range(2)])
    return -((new - old).exp() * A[:, None] * mask).sum() / mask.sum()


def raft(new, old, ref, scores, mask):
    if scores.max() == scores.min():
        return 0 * new.sum()
    best = scores.tolist().index(scores.max())  # the first one
    return -new[best].sum() / mask[best].sum()


def greedy_score(world, prompt):
    prefix = ()
    while len(prefix) < 3 and prefix[-1:] != (0,):
        prefix += (world.logits[prompt, gradients.PREFIXES.index(prefix)].argmax().item(),)
    return world.scores[15 * prompt + gradients.SEQUENCES.index(prefix)]


@pytest.mark.parametrize("kind", ["binary", "normal"])
@pytest.mark.parametrize("n, K, ours, loss", [
    (2, 1, gradients.reinforce_pp, reinforce_pp), (2, 2, gradients.rloo, rloo),
    (2, 2, gradients.grpo, grpo), (2, 2, gradients.raft, raft), (3, 3, gradients.raft, raft),
    (2, 2, gradients.group_baseline, group_baseline), (2, 2, gradients.prime, prime),
    (2, 1, gradients.remax, remax)],
    ids=lambda x: getattr(x, "__name__", x))
def test_all_batches(kind, n, K, ours, loss):
    """As a loop over all ordered batches of n completions; of one prompt, if they are a group."""
    world = gradients.make_world(kind)
    logits = world.logits.clone().requires_grad_()
    new, ref = logprobs_by_hand(logits), logprobs_by_hand(world.ref_logits)
    mask = torch.tensor([[float(t < len(y)) for t in range(3)] for y in gradients.SEQUENCES] * 2)
    old, expected = new.detach(), 0
    draws = 2**n if K == 1 else 2  # so many series of prompts are equally likely
    for batch in itertools.product(range(30), repeat=n):
        if K == n and len({row // 15 for row in batch}) > 1:
            continue
        i = torch.tensor(batch)
        probability = old[i].sum().exp() / draws
        given = [new[i], old[i], ref[i], world.scores[i], mask[i].double()]
        if loss is remax:  # the greedy completion of each prompt, symbol by symbol
            given.append(torch.stack([greedy_score(world, row // 15) for row in batch]))
        expected = expected + probability * loss(*given)
    exact = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(gradients.expected_gradients(world, n, K, [ours])[0, 0], exact,
                               rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["binary", "normal"])
@pytest.mark.parametrize("n, K", [(2, 1), (4, 1), (4, 2)])
def test_the_probabilities_sum_to_1(kind, n, K):
    indices, probabilities = gradients.all_batches(gradients.make_world(kind), n, K)
    assert indices.shape == (len(probabilities), n)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("kind", ["binary", "normal"])
def test_reinforce_follows_the_objective(kind):
    world = gradients.make_world(kind)
    parts = gradients.expected_gradients(world, 2, 1, [gradients.reinforce])[:, 0]
    found, errors = gradients.compare(parts, -gradients.objective_gradient(world, 0.1))
    assert found.tolist() == pytest.approx([1, 1], abs=1e-10) and errors.tolist() == [0, 0]


def test_values_and_greedy_scores_by_hand():
    """V by recursion over the next symbol, from the last prefix to the first."""
    world = gradients.make_world("normal")
    batch, _ = gradients.all_completions(world)

    def value(prompt, prefix):
        if len(prefix) == 3 or prefix[-1:] == (0,):
            return world.scores[15 * prompt + gradients.SEQUENCES.index(prefix)].item()
        state = gradients.PREFIXES.index(prefix)
        new, ref = (x[prompt, state].log_softmax(0) for x in (world.logits, world.ref_logits))
        return sum(new[s].exp().item() * (value(prompt, prefix + (s,))
                                          - 0.1 * (new[s] - ref[s]).item()) for s in range(3))
    for row, (prompt, y) in enumerate(itertools.product(range(2), gradients.SEQUENCES)):
        ours = [value(prompt, y[:t]) for t in range(len(y))]
        assert batch.values[row, :len(y)].tolist() == pytest.approx(ours, abs=1e-10)
        assert batch.greedy_scores[row] == greedy_score(world, prompt)


def test_random_batches_agree_with_all_batches():
    """Batches of 4 in pairs, within 5 standard errors; these are small and not 0."""
    world = gradients.make_world("binary")
    exact = -gradients.objective_gradient(world, 0.1)
    truth, drawn = (gradients.compare(gradients.expected_gradients(
        world, 4, 2, [gradients.grpo], count)[:, 0], exact) for count in (None, 4000))
    assert ((drawn[1] > 1e-4) & (drawn[1] < 0.03)).all()
    assert ((drawn[0] - truth[0]).abs() < 5 * drawn[1]).all()


def test_the_standard_error_is_that_of_a_mean():
    """The length of a gradient in one dimension is a mean, whose standard error is known."""
    parts = torch.rand(20, dtype=torch.float64) / 20 + 1
    (cosine, length), errors = gradients.compare(parts[:, None], torch.tensor([1.0]).double())
    assert cosine == 1 and length.item() == pytest.approx(parts.sum().item())
    assert errors[1].item() == pytest.approx((20 * parts).std().item() / 20**0.5)


def test_kl_in_reward_and_in_loss():
    """k1 in the reward descends the KL. k2 in the loss: the KL of each state, visits held fixed."""
    world = gradients.make_world("binary")
    logits = world.logits.clone().requires_grad_()
    policy, ref = logits.log_softmax(-1), world.ref_logits.log_softmax(-1)
    logps = logprobs_by_hand(logits).sum(1)
    exact = (logps.exp() * (logps - logprobs_by_hand(world.ref_logits).sum(1))).sum() / 2
    visits = torch.stack([  # (2, 7): how likely pi comes by a prefix
        policy[p, [gradients.PREFIXES.index(prefix[:t]) for t in range(len(prefix))],
               list(prefix)].sum().exp().detach()
        for p in range(2) for prefix in gradients.PREFIXES]).view(2, 7)
    reverse, forward = (policy.exp() * (policy - ref)).sum(-1), (ref.exp() * (ref - policy)).sum(-1)
    of_states = [(visits * kl).sum() / 2 for kl in (reverse, forward)]
    wanted = [torch.autograd.grad(x, logits, retain_graph=True)[0]
              for x in (exact, 0 * exact, *of_states)]
    losses = [loss for _, loss in gradients.KL_ROWS]
    ours = gradients.expected_gradients(world, 1, 1, losses)[0]
    torch.testing.assert_close(ours, torch.stack(wanted), rtol=0, atol=1e-10)


def test_the_weight_of_the_kl():
    """At 95 % right answers it is 1 / 4.59. Without the clip it is the std of the raw scores."""
    scores, _ = gradients.right_and_wrong(50, n=1000)
    assert gradients.kl_weight(scores, 5.0).item() == pytest.approx(1 / 4.59, rel=0.002)
    scores, _ = gradients.right_and_wrong(1)
    assert gradients.kl_weight(scores, 1e9).item() == pytest.approx(scores.std().item())
    assert gradients.kl_weight(scores, 5.0).item() == pytest.approx(1 / (5 + 0.0625))


def test_the_part_of_the_kl():
    """It is all of the advantage if all answers are right, and nearly nothing if 13 are wrong."""
    scores, kl = gradients.right_and_wrong(0)
    assert gradients.kl_part(scores, kl).item() == pytest.approx(1, abs=0.002)
    scores, kl = gradients.right_and_wrong(13)
    returns = 0.01 * kl.flip(1).cumsum(1)  # the z-scores have variance 1, and the KL adds little
    assert gradients.kl_part(scores, kl).item() == pytest.approx(returns.std().item(), rel=0.01)
    assert gradients.kl_part(scores, kl).item() < 0.1


def test_the_command_line(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["gradients", "--out", str(tmp_path / "kl.svg")])
    gradients.main()
    assert "<svg" in (tmp_path / "kl.svg").read_text()
    table = gradients.kl_table()
    assert "| k1 in the reward | 1.0000 / 1.000 | 1.0000 / 1.000 | 1.0000 / 1.000 |" in table
    assert "no direction" in table
    monkeypatch.setattr("sys.argv", ["gradients", "--batches", "399"])
    with pytest.raises(SystemExit):
        gradients.main()
