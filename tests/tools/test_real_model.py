"""tools/real_model.sh: its commands have flags that exist, and are not repeated."""
import importlib
import os
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

FAKE = """#!/bin/bash
echo "$@" >> commands
while [ $# -gt 0 ]; do
    [ "$1" = --out_dir ] && mkdir -p "$2" && touch "$2/test.json" "$2/config.json"
    shift
done
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A function (*arguments) -> the commands that the file gives to a python that does nothing."""
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def run(*arguments):
        Path("commands").write_text("")
        subprocess.run(["bash", ROOT / "tools" / "real_model.sh", *arguments], check=True,
                       env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return [line.split() for line in Path("commands").read_text().splitlines()]
    return run


def test_every_script_that_samples_runs_from_one_start(call):
    commands = call("a/model")
    for name, *flags in commands:
        module = flags.pop(0) if name == "-m" else name.removesuffix(".py")
        known = {f"--{field.name}" for field in fields(importlib.import_module(module).Config)
                 if field.init}
        assert {flag for flag in flags if flag[:2] == "--"} <= known, flags
    names = [name for name, *_ in commands if name != "-m"]
    assert set(names) == {f"{name}.py" for name in SCRIPTS} and names.count("ppo.py") == 2
    first = {name: flags[flags.index("--model") + 1] for name, *flags in commands}
    assert first.pop("sft.py") == "a/model" and set(first.values()) == {"runs/real/sft"}
    assert [words[:2] for words in commands].count(["-m", "tools.make_pairs"]) == 2


def test_what_is_complete_is_not_repeated_and_what_stopped_goes_on(call):
    assert len(call("a/model", "2", "grpo", "rloo")) == 3
    assert call("a/model", "2", "grpo", "rloo") == []
    Path("runs/real/rloo-seed2/test.json").unlink()
    assert call("a/model", "2", "grpo", "rloo") == [["rloo.py", "--resume", "runs/real/rloo-seed2"]]
    assert [words[0] for words in call("a/model", "3", "grpo")] == ["grpo.py"]
