"""raft.py: which completions it learns from."""
import pytest
import torch
from conftest import moved
from oracle_cases import T, cases, run_script

import raft
from plumbing.rollout import token_logprobs
from plumbing.toy import POLICY
from raft import best_of_k


@pytest.mark.parametrize("x, y", cases("best_of_k"))
def test_best_of_k(x, y):
    assert best_of_k(T(x["scores"]), x["group_size"]).tolist() == y["flat_index"]


def test_the_best_of_k_is_the_first_on_ties():
    scores = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0)).double()
    for K in (1, 2, 3, 5):
        loop = [max(range(i, i + K), key=lambda j: (scores[j].item(), -j))
                for i in range(0, 60, K)]
        assert best_of_k(scores, K).tolist() == loop


def test_raft_learns_from_the_best_of_each_group_alone(monkeypatch, tmp_path, few_problems):
    """Of four groups, the first and the third agree: they have no best completion."""
    def reward(completions, **columns):
        return [float(i // 4 % 2 * (i % 4 in (2, 3))) for i in range(len(completions))]

    def spy(policy, batch, rows, temperature):
        seen.extend(rows.tolist())
        return token_logprobs(policy, batch, rows, temperature)

    seen = []
    monkeypatch.setattr(raft, "token_logprobs", spy)
    (row,) = run_script(raft, monkeypatch, tmp_path / "run", reward, prompts_per_step=4, epochs=2)
    assert sorted(seen) == [6, 6, 14, 14] and row["frac_zero_std"] == 0.5


def test_raft_makes_no_step_where_no_group_has_a_best(monkeypatch, tmp_path, few_problems):
    (row,) = run_script(raft, monkeypatch, tmp_path / "run",
                        lambda completions, **columns: [1.0] * len(completions))
    assert row["loss"] == 0 and moved(POLICY, tmp_path / "run") == 0
