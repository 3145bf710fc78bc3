"""tools/compare.py: what it runs, what it does not repeat, and the tables that it makes of it."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import compare


def leave(folder):
    """What a run leaves behind in its folder, NAME-seedN; seed 1 is the fastest."""
    config = dict(prompts_per_step=64, group_size=4, kl_coef=0.01, data="toy", eval_prompts=100)
    if folder.name[:3] in ("dpo", "orp"):
        config = dict(data="toy", eval_prompts=100)
    if folder.name[:4] in ("raft", "prim"):
        del config["kl_coef"]
    row = dict(time_step=3 + int(folder.name[-1]), **dict(kl=0.5) if "group_size" in config else {})
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

    def solve(folder, data, n):  # of 8 draws, four are right, plus the seed's
        drawn.append(folder.name)
        right = 4 + int(folder.name[-1])
        return dict(sampled=[[1] * right + [0] * (8 - right)] * n)

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
        compare.main()
        return capsys.readouterr().out.splitlines()
    monkeypatch.setattr(compare.subprocess, "run", train)
    monkeypatch.setattr(compare, "solve", solve)
    main.commands, main.drawn = commands, drawn
    return main


def test_every_script_on_every_seed_from_one_start(compared):
    printed, n = compared("--seeds", "1", "2", "--steps", "7"), len(compare.SCRIPTS)
    assert len(compared.commands) == len(compared.drawn) == 2 * n
    assert [Path(words[0]).stem for words in compared.commands] == 2 * list(compare.SCRIPTS)
    assert all(words[1:5:2] == ["--steps", "--seed"] for words in compared.commands)
    table = {line.split()[1]: line for line in printed[2 : 2 + n]}
    assert ("| ppo.py | 1,536 | 0.600 | **0.688** (0.625, 0.750) | -0.107-1.482 | 0.980 | 0.50 "
            "| 19.5 | 24 |") == table["ppo.py"]
    assert "| 1,920 |" in table["remax.py"]  # and the greedy ones
    assert "| 0.980 | 0.50 |" in table["prime.py"]  # it has a reference, for another purpose
    assert "| 15,360 |" in table["dpo.py"] and "| 0.980 |  | 19.5 |" in table["dpo.py"]
    assert f"{n * (n - 1) // 2} comparisons" in printed[3 + n] and "+0" in printed[-1]


def test_half_a_comparison_goes_on_where_it_was_stopped(compared):
    flags = "--scripts", "rloo", "grpo", "--seeds", "1", "2"
    printed = compared(*flags)
    assert compared(*flags) == printed and len(compared.commands) == 4
    new, stopped = (Path(compared.commands[i][-1]) for i in (0, 1))
    shutil.rmtree(new)
    (stopped / "test.json").unlink()
    assert compared(*flags) == printed
    assert compared.commands[4] == compared.commands[0]
    assert compared.commands[5][1:] == ["--resume", str(stopped)]
    assert len(compared.commands) == 6
    compared(*flags, "--lr", "1e-3")  # other flags, other runs
    assert len(compared.commands) == 10 and compared.commands[-1][1:3] == ["--lr", "1e-3"]


@pytest.mark.parametrize("flags, words", [
    ("--kl-coef=0.1", "--kl-coef=0.1: prime.py"), ("--what 1", "--what: "),
    ("--seed 2", "--seeds"), ("--out_dir x", "--out_dir"), ("--seeds 1", "--seeds"),
    ("--scripts gspo", "tools.recipe"), ("--data rows.jsonl", "number"),
    ("--scripts trpo --lr 1e-4", "--lr: trpo.py")])
def test_what_cannot_be_compared_is_said_at_once(compared, capsys, flags, words):
    Path("rows.jsonl").write_text('{"prompt": "1+1=", "answer": "two"}')
    with pytest.raises(SystemExit) as stop:
        compared(*flags.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err and not compared.commands


def test_quantiles_of_students_distribution_are_those_of_its_tables():
    for degrees, level, t in ((1, 0.95, 12.7062), (2, 0.95, 4.3027), (4, 0.95, 2.7764),
                              (4, 0.99, 4.6041), (9, 0.999, 4.7809), (100, 0.95, 1.9840)):
        assert compare.t_quantile(level, degrees) == pytest.approx(t, abs=2e-4)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("between, within", [(0.0, 0.0), (0.0, 1.0), (0.2, 0.5), (0.6, 0.5)])
def test_of_equal_scripts_one_comparison_in_twenty_has_a_star(seeds, between, within):
    """Whether the runs of a script agree (between = 0) or spread: simulated runs of two scripts
    that are equal by construction. Standard errors are at most 0.006."""
    generator, n = torch.Generator().manual_seed(0), 1500

    def normal(*shape):
        return torch.randn(shape, generator=generator)
    logits = 3.5 + 2 * normal(n, 1, 1, 100) + between * normal(n, 2, seeds, 1)
    probabilities = (logits + within * normal(n, 2, seeds, 100)).sigmoid().expand(8, -1, -1, -1, -1)
    shares = torch.bernoulli(probabilities, generator=generator).double().mean((0, -1))
    apart = shares[:, 0] - shares[:, 1]  # (n, seeds)
    t = compare.t_quantile(0.95, seeds - 1)
    stars = (apart.mean(1).abs() > t * apart.std(1) / seeds**0.5).double().mean()
    assert 0.033 < stars < 0.067
    low, high = compare.interval(apart[0])  # what is simulated is this interval
    mean, margin = apart[0].mean().item(), t * apart[0].std().item() / seeds**0.5
    assert (low, high) == pytest.approx((mean - margin, mean + margin))


def test_the_stars_of_a_difference(capsys):
    """Nothing, 95 % alone, and also with the number of comparisons: 3, so 98.3 %."""
    noise = torch.tensor([-1, -0.5, 0.0, 0.5, 1], dtype=torch.float64) * 0.01  # of the mean: .0035
    shares = torch.tensor([[0.5], [0.512], [0.45]]).double() + noise * torch.tensor([[0], [1], [0]])
    compare.pairs(["b", "a", "c"], shares)
    rows = capsys.readouterr().out.splitlines()[-4:]
    # 12 thousandths are 3.4 standard errors: above 2.78 and below 3.97, Student's for 4
    assert rows[0] == "| | b | c |" and rows[2:] == ["| a | +12* | +62** |", "| b |  | +50** |"]
