"""tools/compare.py: what it runs, what it does not repeat, and the tables that it makes of it."""
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rloo
from tools import compare


def leave(folder):
    """What a run leaves behind in its folder, NAME-seedN; seed 1 is the fastest."""
    config = dict(prompts_per_step=64, group_size=4, kl_coef=0.01)
    if folder.name[:3] in ("dpo", "orp"):
        config = {}
    if folder.name[:4] in ("raft", "prim"):
        del config["kl_coef"]
    row = dict(time_step=3 + int(folder.name[-1]), **dict(kl=0.5) if config else {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "test.json").write_text(json.dumps(dict(
        before=dict(sampled=[0.6, 0, 1]), after=dict(greedy=[0.98, 0, 1], length=[19.5, 0, 0]))))
    (folder / "metrics.jsonl").write_text(6 * (json.dumps(row) + "\n"))


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """A function (flags) -> the printed lines; runs are faked, and their commands recorded."""
    monkeypatch.chdir(tmp_path)
    commands, drawn = [], []

    def train(command, **settings):
        commands.append(list(map(str, command[1:])))
        leave(Path(commands[-1][-1]))
        return SimpleNamespace(returncode=0)

    def draw(script, folder):  # of 8 draws, four are right, plus the seed's
        drawn.append(folder.name)
        right = 4 + int(folder.name[-1])
        return [[1] * right + [0] * (8 - right)] * 100

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
        compare.main()
        return capsys.readouterr().out.splitlines()
    monkeypatch.setattr(compare.subprocess, "run", train)
    monkeypatch.setattr(compare, "draw", draw)
    monkeypatch.setattr(compare, "RESAMPLES", 500)
    main.commands, main.drawn = commands, drawn
    return main


def test_every_script_on_every_seed_from_one_start(compared):
    printed, n = compared("--seeds", "1", "2", "--steps", "7"), len(compare.SCRIPTS)
    assert len(compared.commands) == len(compared.drawn) == 2 * n
    assert [Path(words[0]).stem for words in compared.commands] == 2 * list(compare.SCRIPTS)
    assert all(words[1:5:2] == ["--steps", "--seed"] for words in compared.commands)
    table = {line.split()[1]: line for line in printed[2 : 2 + n]}
    assert ("| ppo.py | 1,536 | 0.600 | **0.688** (0.625, 0.750) | 0.625-0.750 | 0.980 | 0.50 "
            "| 19.5 | 24 |") == table["ppo.py"]
    assert "| 1,920 |" in table["remax.py"]  # and the greedy ones
    assert "| 0.980 | 0.50 |" in table["prime.py"]  # it has a reference, for another purpose
    assert "| 15,360 |" in table["dpo.py"] and "| 0.980 |  | 19.5 |" in table["dpo.py"]
    assert f"{n * (n - 1) // 2} comparisons" in printed[3 + n] and "+0" in printed[-1]


def test_half_a_comparison_goes_on_where_it_was_stopped(compared):
    flags = "--scripts", "rloo", "grpo", "--seeds", "1", "2"
    printed = compared(*flags)
    assert compared(*flags) == printed and len(compared.commands) == len(compared.drawn) == 4
    new, stopped, undrawn = (Path(compared.commands[i][-1]) for i in (0, 1, 2))
    shutil.rmtree(new)
    (stopped / "test.json").unlink()
    (stopped / "solved.json").unlink()
    (undrawn / "solved.json").unlink()
    assert compared(*flags) == printed
    assert compared.commands[4] == compared.commands[0]
    assert compared.commands[5][1:] == ["--resume", str(stopped)]
    assert len(compared.commands) == 6 and len(compared.drawn) == 7
    compared(*flags, "--lr", "1e-3")  # other flags, other runs
    assert len(compared.commands) == 10 and compared.commands[-1][1:3] == ["--lr", "1e-3"]


@pytest.mark.parametrize("flags, words", [
    ("--kl-coef=0.1", "--kl-coef=0.1: prime.py"), ("--what 1", "--what: "),
    ("--scripts trpo --lr 1e-4", "--lr: trpo.py")])
def test_a_flag_that_a_script_lacks_is_said_at_once(compared, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        compared(*flags.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err and not compared.commands


def test_the_model_of_the_run_answers_every_problem(tmp_path, monkeypatch):
    """That of a run which learned nothing, so that it is the toy's, right in 0.6 of its answers."""
    monkeypatch.chdir(tmp_path)
    rloo.train(rloo.Config(**{**rloo.TOY, "steps": 1, "prompts_per_step": 1, "eval_prompts": 64,
                              "device": "cpu", "out_dir": "run", "lr": 0.0}))
    solved = torch.tensor(compare.draw("rloo", Path("run"))).double()
    assert solved.shape == (64, compare.DRAWS) and set(solved.unique().tolist()) == {0.0, 1.0}
    easy = solved.mean(1)
    assert abs(easy.mean() - 0.6) < 0.15
    assert ((easy == 0) | (easy == 1)).any() and ((easy > 0) & (easy < 1)).any()


def test_the_bootstrap_draws_seeds_and_problems_for_all_scripts_alike(monkeypatch):
    """Against a loop over all resamples of 2 seeds and 3 problems, which are equally likely."""
    monkeypatch.setattr(compare, "RESAMPLES", 20_000)
    solved = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    exact = torch.stack([
        torch.stack([sum(script[s, p] for s in seeds for p in problems) / 6 for script in solved])
        for seeds in itertools.product(range(2), repeat=2)
        for problems in itertools.product(range(3), repeat=3)])
    found = compare.bootstrap(solved)
    assert found.shape == (20_000, 2)
    torch.testing.assert_close(found.mean(0), exact.mean(0), rtol=0, atol=0.005)
    torch.testing.assert_close(found.T.cov(), exact.T.cov(correction=0), rtol=0.05, atol=2e-4)


def test_the_stars_of_a_difference(capsys):
    """Nothing, 95 % alone, and also with the number of comparisons: 3, so 98.3 %."""
    normal = torch.distributions.Normal(0.0, 1.0)
    noise = normal.icdf((torch.arange(10_000) + 0.5) / 10_000).double()
    means = torch.tensor([0.30, 0.52, 0.10], dtype=torch.float64)
    resampled = means + 0.1 * noise[:, None] * torch.tensor([0.0, 1.0, 0.0])
    compare.pairs(["b", "a", "c"], means, resampled)
    rows = capsys.readouterr().out.splitlines()[-4:]
    # a - b is 0.22 with a standard error of 0.1: 2.2 errors, above 1.96 and below 2.39
    assert rows[0] == "| | b | c |" and rows[2:] == ["| a | +220* | +420** |", "| b |  | +200** |"]
