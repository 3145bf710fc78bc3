"""tools/credit.py: the pushes that the picture shows, and the picture."""
import re
import sys

import pytest
import torch

from conftest import ROOT
from tools import credit

LONG, SHORT = 15, 3  # tokens of the completions, with the EOS


@pytest.fixture(scope="module")
def made():
    return credit.make_toy_batch(steps=1)


def test_the_four_completions_are_a_group_of_the_batch(made):
    b, q, process = made
    assert b.mask.shape[0] == 256 and b.mask[:4].sum(1).tolist() == [LONG, LONG, SHORT, SHORT]
    assert b.scores[:4].tolist() == [1, 0, 1, 0] and 0.5 < b.mean_score < 0.9
    assert b.is_best[:4].tolist() == [1, 0, 0, 0] and (b.old_logprobs[:4].sum(1) < 0).all()
    assert q.abs().max() < 1  # the reward model has made one step


def test_what_each_algorithm_does_with_the_four(made):
    """Signs and sizes by hand, of what does not depend on a trained network."""
    pushes = {name: [row[: int(n)] for row, n in zip(rows, made[0].mask.sum(1))]
              for name, rows in credit.all_pushes(*made).items()}
    for name in ("REINFORCE", "REINFORCE++", "RLOO", "GRPO", "ReMax", "DPO, two pairs"):
        for row in pushes[name]:
            assert torch.allclose(row, row[:1].expand_as(row)), name  # the same for each token
    first = {name: [row[0].item() for row in rows] for name, rows in pushes.items()}
    tokens, mean = made[0].mask.sum().item(), made[0].mean_score.item()
    for found, expected in (
            # A / N; A by hand / tokens; A / (4 completions of the group, 15 or 3 tokens) / N
            (first["REINFORCE"], [(s - mean) / 256 for s in (1, 0, 1, 0)]),
            (first["RLOO"], [s * 2 / 3 / tokens for s in (1, -1, 1, -1)]),
            (first["GRPO"], [s * 0.5 / (0.57735 + 1e-4) / n / 256
                             for s, n in zip((1, -1, 1, -1), (LONG, LONG, SHORT, SHORT))]),
            (first["ReMax"], [0, -1 / tokens, 0, -1 / tokens]),  # the greedy answer is right
            (first["DPO, two pairs"], [s * 0.5 * 0.5 / 2 for s in (1, -1, 1, -1)])):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert all(row.min() > 0 for row in pushes["SFT on all four"])
    assert first["RAFT"][0] > 0 and first["RAFT"][1:] == [0, 0, 0]
    assert first["ORPO, two pairs"][0] > 0 > first["ORPO, two pairs"][1]
    assert first["GRPO --process"][0] > pushes["GRPO --process"][0][-1] > 0  # the first line pays
    # with the critic at 0 but for one step, lambda 1 blames every token of a wrong answer
    assert all(row.max() < 0 for row in pushes["PPO, lambda 1"][1::2])


def test_the_picture_has_a_row_for_each_and_a_cell_for_each_token(made, monkeypatch, tmp_path):
    monkeypatch.setattr(credit, "make_toy_batch", lambda steps: made)
    monkeypatch.setattr(sys, "argv", ["credit.py", "--out", str(tmp_path / "credit.svg")])
    credit.main()
    drawn = (tmp_path / "credit.svg").read_text(), (ROOT / "docs" / "credit.svg").read_text()
    names = list(credit.all_pushes(*made))
    for picture in drawn:
        assert all(f">{name}</text>" in picture for name in names)
        assert len(re.findall("<rect", picture)) == 1 + len(names) * 2 * (LONG + SHORT)
    assert credit.colour(0) == "#ffffff" and credit.colour(1) != credit.colour(-1)
