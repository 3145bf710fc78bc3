"""compare.py: what it runs, what it does not repeat, and the table that it makes of it."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    rows = [dict(kl=kl, time_sample=1, time_score=2, time_update=3)] * 6
    rows = [dict(time_update=3)] * 6 if offline else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_script_on_every_seed_from_one_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []

    def train(command, **kwargs):
        calls.append(list(map(str, command)))
        leave(Path(calls[-1][-1]), 0.9 + 0.01 * int(calls[-1][-3]), 0.5)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", train)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "1", "2", "--steps", "7"])
    compare.main()
    assert len(calls) == 2 * len(compare.SCRIPTS)
    for call in calls:
        assert call[2:4] == ["--steps", "7"] and "--model" not in call
    n = len(compare.SCRIPTS)
    assert [Path(call[1]).stem for call in calls[:n]] == list(compare.SCRIPTS)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + n and len({row.count("|") for row in table}) == 1
    assert ("| ppo.py | 1,536 | 0.600 | **0.915** (0.910, 0.920) | 0.895-0.935 | 0.980 | 0.50 "
            "| 19.5 | 6 |") in table[2 + compare.SCRIPTS.index("ppo")]
    remax, prime = (table[2 + compare.SCRIPTS.index(name)] for name in ("remax", "prime"))
    assert remax.startswith("| remax.py | 1,920 |")  # and the greedy ones
    assert "| 0.980 | 0.50 |" in prime  # it has a reference, for another purpose
    assert "| 0.980 |  | 19.5 | 0 | 0 | 18 |" in table[2 + n - 2]  # dpo.py: no KL, no sampling
    assert table[2 + n - 2].startswith("| dpo.py | 8,192 |")

    compare.main()  # nothing is repeated, and the table is the same
    assert len(calls) == 2 * n and capsys.readouterr().out.splitlines() == table
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
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit) as stop:
        compare.run("rloo", 1, [])
    assert "rloo.py failed" in str(stop.value)


def test_a_flag_that_one_of_them_lacks_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(compare, "run", lambda script, seed, flags: calls.append(script) or dict(
        completions=1, before=0, after=0, low=0, high=0, greedy=0, length=0, kl=None,
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
