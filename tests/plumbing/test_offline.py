"""Batches of completions in the data, and what is measured of them."""
from types import SimpleNamespace

import pytest
import torch

from plumbing.offline import for_all_completions, held_out_stats, make_batch, preference_stats


def test_a_batch_of_texts_that_are_given():
    batch = make_batch([[5], [6, 7]], [[8, 2], [2], [9, 9, 2], [8, 9, 9]], "cpu")
    assert batch.prompts == [[5], [6, 7]] and batch.owner.tolist() == [0, 0, 1, 1]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]  # EOS: a target
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch.completions, batch.mask)]
    assert ids == [[8, 2], [2], [9, 9, 2], [8, 9, 9]]
    assert (batch.mask.dtype, batch.completions.dtype) == (torch.float32, torch.int64)


def compared(rewards):
    """The definition, by loops: the best with each of the others, then a mean over prompts."""
    rows = []
    for best, *others in rewards:
        k = len(others)
        rows.append(dict(
            chosen=best, rejected=sum(others) / k, margin=sum(best - other for other in others) / k,
            accuracy=sum(1 if best > other else 0.5 if best == other else 0
                         for other in others) / k))
    return rows


@pytest.mark.parametrize("K", [2, 4])
def test_preferences_are_means_over_prompts_and_those_of_micro_batches_add_up(K):
    """Ties count half; parts of a step are divided by its n prompts, not by theirs."""
    rewards = torch.randint(-2, 3, (9, K), generator=torch.Generator().manual_seed(0)).float()
    rewards.requires_grad_()
    rows = compared(rewards.tolist())
    parts = [preference_stats(part, 9) for part in (rewards[:2], rewards[2:3], rewards[3:])]
    wanted = {name: pytest.approx(sum(row[name] for row in rows) / 9) for name in rows[0]}
    assert {name: sum(part[name].item() for part in parts) for name in wanted} == wanted
    assert not any(value.requires_grad for value in parts[0].values())
    equal = torch.full((9, K), 0.3) + 1e-7 * rewards.detach()  # up to rounding
    assert preference_stats(equal, 9)["accuracy"] == 0.5
    held_out = {name: value for name, (value, low, high) in held_out_stats(rewards).items()}
    assert held_out == {name: wanted[name] for name in ("accuracy", "margin")}


@pytest.mark.parametrize("n, K", [(1, 1), (70, 2), (128, 3)])
def test_all_completions_are_measured_in_their_order(n, K):
    """Whatever prompts share a pass. Here the number of a completion names it and its prompt."""
    problems = [dict(ids=[i + 1], targets=[[k + 1] * (1 + i % 3) for k in range(K)])
                for i in range(n)]

    def measure(batch):
        owners = [batch.prompts[owner][0] for owner in batch.owner.tolist()]
        return torch.tensor([1000.0 * owner + ids[0] + 10 * mask.sum() for owner, ids, mask in
                             zip(owners, batch.completions, batch.mask)])

    found = for_all_completions(measure, problems, SimpleNamespace(device="cpu"))
    assert found.tolist() == [[1000 * (i + 1) + k + 1 + 10 * (1 + i % 3) for k in range(K)]
                              for i in range(n)]
