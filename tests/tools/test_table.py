"""tools/table.py: what a model answered, once, and the row that is made of it."""
import json
import sys
from pathlib import Path

import pytest
import torch

import rloo
from tools import table


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run that learned nothing, so that its model is the toy's: 0.6 are right."""
    monkeypatch.chdir(tmp_path)
    rloo.train(rloo.Config(**{**rloo.TOY, "steps": 1, "prompts_per_step": 1, "eval_prompts": 8,
                              "device": "cpu", "out_dir": "run", "lr": 0.0}))
    return Path("run")


def test_the_model_of_a_run_answers_every_problem_once(run, monkeypatch):
    found = table.solve(run, "toy", 64)
    right = torch.tensor(found["sampled"]).double()
    assert right.shape == (64, table.DRAWS) and set(right.unique().tolist()) == {0.0, 1.0}
    easy = right.mean(1)
    assert abs(easy.mean() - 0.6) < 0.15
    assert ((easy == 0) | (easy == 1)).any() and ((easy > 0) & (easy < 1)).any()
    assert len(found["greedy"]) == 64 and sum(found["greedy"]) / 64 > easy.mean() + 0.05
    assert len(found["texts"]) == len(found["lengths"]) == 64 * table.DRAWS
    # a character is a token, and so is the EOS; an answer that was cut off has none
    assert all(length - 1 <= len(text) for text, length in zip(found["texts"], found["lengths"]))
    monkeypatch.setattr(table, "load_policy", None)  # not asked again ...
    assert table.solve(run, "toy", 64) == found
    with pytest.raises(TypeError):  # ... unless there are other problems
        table.solve(run, "toy", 32)


def test_a_row_says_what_was_answered(tmp_path):
    log = [dict(time_step=2.0, kl=kl) for kl in (9.0, 1, 2, 3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    found = dict(sampled=[[1] * 8, [0] * 8, [1] + [0] * 7, [0] * 8], greedy=[1.0, 0.0, 1.0, 1.0],
                 texts=["1+1=2"] * 8 + ["2"] * 24, lengths=[6] * 8 + [2] * 24)
    first = dict(sampled=[[0] * 8] * 4)
    # shares 1, 0, 1/8, 0: their std (over n) is .4181, the margin 1.96 * .4181 / 2
    assert table.line(tmp_path, found, first) == (
        f"| {tmp_path.name} | **0.281** [-0.128, 0.691] | 0.500 | 0.750 | 0.25 | 3.0 | 3.00 | 12 "
        "| +0.281 [-0.128, +0.691] |")
    (tmp_path / "metrics.jsonl").write_text('{"time_step": 1.0, "kl": 0.0}\n')  # no reference
    assert "| 3.0 |  | 1 |" in table.line(tmp_path, found, None)


def test_runs_stand_below_each_other(run, monkeypatch, capsys):
    def main(*words):
        monkeypatch.setattr(sys, "argv", ["table.py", *words, "--data", "toy"])
        table.main()
        return capsys.readouterr().out.splitlines()
    lines = main("run", "nothing", "run", "--eval_prompts", "8")
    assert len(lines) == 4 and lines[2][:-1] in lines[3] and lines[3].count("0.000") == 3
    with pytest.raises(SystemExit):
        main("nothing")
    assert capsys.readouterr().err.startswith("error: nothing: none of these")
