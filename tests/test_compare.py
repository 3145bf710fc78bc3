"""compare.py: what it runs, what it does not repeat, and the tables that it makes of it."""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rloo
from plumbing.model import load_policy, save_policy
from tools import compare


def leave(folder, after, kl):
    folder.mkdir(parents=True)
    offline = folder.name[:3] in ("dpo", "orp")
    config = dict(prompts=1024) if offline else dict(prompts_per_step=64, group_size=4)
    config.update({} if offline or folder.name[:4] in ("raft", "prim") else dict(kl_coef=0.01))
    (folder / "config.json").write_text(json.dumps(config))
    interval = [after, after - 0.02, after + 0.02]
    test = dict(before=dict(sampled=[0.6, 0.5, 0.7]), after=dict(
        sampled=interval, greedy=[0.98, 0, 1], length=[19.5, 0, 0]), peak_memory=500e6)
    (folder / "test.json").write_text(json.dumps(test))
    seed = int(folder.name[-1])  # seed 1 is the fastest
    rows = [dict(kl=kl, time_sample=seed, time_score=2, time_update=3)] * 6
    rows = [dict(time_update=3)] * 6 if offline else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_script_on_every_seed_from_one_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []

    def train(command, **kwargs):
        calls.append(list(map(str, command)))
        leave(Path(calls[-1][-1]), 0.9 + 0.01 * int(calls[-1][-3]), 0.5)
        return SimpleNamespace(returncode=0)

    def draw(script, folder):  # 100 problems, half of the draws of each are right, plus the seed's
        drawn.append(folder.name)
        right = 4 + int(folder.name[-1])
        return [[1] * right + [0] * (8 - right)] * 100

    drawn = []
    monkeypatch.setattr(compare.subprocess, "run", train)
    monkeypatch.setattr(compare, "draw", draw)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "1", "2", "--steps", "7"])
    compare.main()
    assert len(calls) == 2 * len(compare.SCRIPTS)
    for call in calls:
        assert call[2:4] == ["--steps", "7"] and "--model" not in call
    n = len(compare.SCRIPTS)
    assert [Path(call[1]).stem for call in calls[:n]] == list(compare.SCRIPTS)
    printed = capsys.readouterr().out.splitlines()
    table = printed[: 2 + n]
    assert len({row.count("|") for row in table}) == 1 and printed[2 + n] == ""
    assert ("| ppo.py | 1,536 | 0.600 | **0.688** (0.625, 0.750) | 0.625-0.750 | 0.980 | 0.50 "
            "| 19.5 | 6 | 12 | 18 | 500 |") in table[2 + compare.SCRIPTS.index("ppo")]
    assert f"{n * (n - 1) // 2} comparisons" in printed[3 + n] and "+0" in printed[-1]
    remax, prime = (table[2 + compare.SCRIPTS.index(name)] for name in ("remax", "prime"))
    assert remax.startswith("| remax.py | 1,920 |")  # and the greedy ones
    assert "| 0.980 | 0.50 |" in prime  # it has a reference, for another purpose
    assert "| 0.980 |  | 19.5 | 0 | 0 | 18 |" in table[2 + n - 2]  # dpo.py: no KL, no sampling
    assert len(drawn) == 2 * n
    assert table[2 + n - 2].startswith("| dpo.py | 8,192 |")

    compare.main()  # nothing is repeated, and the table is the same
    assert len(calls) == len(drawn) == 2 * n
    assert capsys.readouterr().out.splitlines() == printed
    rloo = Path(calls[n + compare.SCRIPTS.index("rloo")][-1])
    (rloo / "test.json").unlink()  # killed before its first checkpoint: begun anew
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "1", "2", "--steps", "7"])
    compare.main()
    assert len(calls) == 2 * n + 1 and calls[-1][-1] == str(rloo)
    capsys.readouterr()
    for flags in (["--steps", "8"], ["--steps", "7", "--model=mine", "--data", "words"]):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "1", *flags])
        before = len(calls)
        compare.main()
        assert len(calls) == before + n  # other flags, other runs
    assert calls[-1][2:7] == ["--steps", "7", "--model=mine", "--data", "words"]


def test_a_run_that_fails_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: SimpleNamespace(
        returncode=2, stderr="error: no such thing"))
    with pytest.raises(SystemExit) as stop:
        compare.run("rloo", 1, [])
    assert "rloo.py failed: error: no such thing" in str(stop.value)


def test_the_model_of_the_run_answers_every_problem(tmp_path, monkeypatch, capsys):
    """The toy's policy, which is right in 0.63 of its answers, and a model that knows nothing."""
    monkeypatch.chdir(tmp_path)
    rloo.train(rloo.Config(steps=1, eval_prompts=96, device="cpu", out_dir="run", lr=0.0))
    solved = torch.tensor(compare.draw("rloo", tmp_path / "run")).double()
    assert solved.shape == (96, compare.DRAWS) and set(solved.unique().tolist()) == {0.0, 1.0}
    assert abs(solved.mean() - 0.627) < 0.15
    easy = solved.mean(1)
    assert ((easy == 0) | (easy == 1)).any() and ((easy > 0) & (easy < 1)).any()

    policy, tokenizer = load_policy("run", "cpu")
    torch.nn.init.zeros_(policy.lm_head.weight)
    save_policy(policy, tokenizer, tmp_path / "run")
    assert torch.tensor(compare.draw("rloo", tmp_path / "run")).double().mean() < 0.1


def test_the_bootstrap_is_paired(monkeypatch):
    """Two scripts that solve the same problems, but for a constant: no spread at all. And for
    independent problems and seeds, the variance of a mean over both."""
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(4, 200, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(compare, "RESAMPLES", 2000)
    means = compare.bootstrap(torch.stack([one, one - 0.1]))
    apart = means[:, 0] - means[:, 1]
    assert means.shape == (2000, 2) and (apart - 0.1).abs().max() < 1e-12
    low, high = compare.interval(means[:, 0], 0.95)
    assert low < one.mean() < high
    # problems alone: seeds are all the same
    same = one[:1].expand(4, 200)
    spread = compare.bootstrap(same[None])[:, 0].std()
    assert spread.item() == pytest.approx(one[0].std().item() / math.sqrt(200), rel=0.1)
    # seeds alone: problems are all the same
    level = torch.tensor([0.1, 0.2, 0.4, 0.7], dtype=torch.float64)[:, None].expand(4, 200)
    spread = compare.bootstrap(level[None])[:, 0].std()
    expected = level[:, 0].std(correction=0).item() / math.sqrt(4)
    assert spread.item() == pytest.approx(expected, rel=0.1)


def test_the_stars_of_a_difference(capsys):
    """Nothing, 95 % alone, and also with the number of comparisons: 3, so 98.3 %."""
    normal = torch.distributions.Normal(0.0, 1.0)
    noise = normal.icdf((torch.arange(10_000) + 0.5) / 10_000).double()
    means = torch.tensor([0.30, 0.52, 0.10], dtype=torch.float64)
    resampled = torch.stack([0.30 + 0 * noise, 0.52 + 0.1 * noise, 0.10 + 0 * noise], dim=1)
    compare.pairs(["b", "a", "c"], means, resampled)
    rows = capsys.readouterr().out.splitlines()[-4:]
    # a - b is 0.22 with a standard error of 0.1: 2.2 errors, above 1.96 and below 2.39
    assert rows[0] == "| | b | c |" and rows[2:] == ["| a | +220* | +420** |", "| b |  | +200** |"]


def test_a_flag_that_one_of_them_lacks_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(compare, "run", lambda script, seed, flags: calls.append(script) or dict(
        completions=1, before=0, solved=[[0, 1]] * 5, greedy=0, length=0, kl=None,
        seconds=[0] * 3, memory=0))
    flags = ["compare.py", "--seeds", "1", "--kl-coef=0.1"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit) as stop:
        compare.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--kl-coef=0.1: prime.py" in error and not calls
    monkeypatch.setattr(sys, "argv", [*flags, "--scripts", "rloo", "grpo"])
    compare.main()
    assert calls == ["rloo", "grpo"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--scripts", "trpo", "--lr", "1e-4"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--lr: trpo.py has no such flag" in capsys.readouterr().err
