"""bench.py: it measures what it says, on the same work, and says what it could not measure."""
import importlib.util
import re
import sys

import pytest
import torch
import transformers

from tools import bench

SMALL = ["--prompts", "2", "--group_size", "2", "--prompt_tokens", "8", "--new_tokens", "6",
         "--rounds", "1", "--steps", "1"]


@pytest.fixture
def run(monkeypatch, capsys):
    """A function (flags) -> what is printed."""
    monkeypatch.setitem(bench.SIZES, "1M", dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=8))
    threads, level = torch.get_num_threads(), transformers.utils.logging.get_verbosity()

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", *SMALL, *flags])
        bench.main()
        return capsys.readouterr().out
    yield run
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(level)


def cells(text):
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row[2:] for row in rows[1:]}


def test_every_row(run):
    pytest.importorskip("trl", reason="an oracle for development: requirements-dev.txt")
    text = run()
    table = cells(text)
    assert {row for row, _ in table} == set(bench.ROWS)
    peers = {row for row, (_, _, trainer, _) in bench.ROWS.items() if trainer}
    assert {row for row, who in table if who == "TRL"} == peers
    for (row, who), values in table.items():
        ms, cpu, rate, rollout, logprobs, update, memory, generated, theirs = values
        assert float(ms) > 0 and float(cpu) > 0 and float(rate) > 0
        parts = float(rollout) + float(logprobs) + float(update)
        assert parts == pytest.approx(float(ms), abs=2)
        assert (theirs != "-") == (who == "ours" and row in peers)
        assert (generated == "-") == (row == bench.NATURAL)
        assert (row, who) != ("rollout", "generate") or generated == "1.00 (1.00-1.00)"
        assert float(update) > 0 or row == "rollout"  # where it is what a busy machine takes
        assert (float(logprobs) > 0) == (
            row in ("GRPO, KL", "RLOO", "RLOO, one ratio", "REINFORCE++", "PPO")
            or (row, who) == ("GRPO, 2 epochs", "TRL"))
    assert re.search(r"PPO takes \d\.\d\d \(\d\.\d\d-\d\.\d\d\) times as long", text)


def test_beside_the_speed_stands_that_it_is_right(run):
    text = run("--rows", "rollout")
    sampler, shared, gradient = map(float, re.findall(r"\d\.\de[+-]\d\d", text))
    assert max(sampler, shared, gradient) < 1e-5
    assert float(re.search(r"chi-square (\d+)", text)[1]) < 120


def test_without_trl_its_rows_say_so(run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl"
                        else real(name, *more))
    text = run("--rows", "GRPO", "rollout")
    assert "| GRPO | TRL | not installed: pip install -r requirements-dev.txt |" in text
    assert len(cells(text)) == 4


def test_trl_gets_the_same_prompts(run, monkeypatch):
    """The names of special tokens must not lie in those of others: "w1" does in "w12"."""
    pytest.importorskip("trl", reason="an oracle for development: requirements-dev.txt")
    shapes, real = [], transformers.LlamaModel.forward

    def forward(self, input_ids, **kwargs):
        if torch.is_grad_enabled():
            shapes.append(tuple(input_ids.shape))
        return real(self, input_ids, **kwargs)
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    monkeypatch.setattr(bench, "correctness", lambda args: None)
    run("--rows", "GRPO")  # ours: prompts, and completions but their last token; TRL: all of both
    assert set(shapes) == {(2, 8), (4, 5), (4, 14)}


def test_unequal_work_is_not_compared(run, monkeypatch):
    real = bench.rollout.sample
    monkeypatch.setattr(bench.rollout, "sample", lambda *args: real(*args[:4], 5, *args[5:]))
    with pytest.raises(AssertionError, match="rollout"):
        run("--rows", "rollout")


@pytest.mark.parametrize("flags, word", [
    (["--rounds", "0"], "--rounds 0"), (["--size", "7B"], "7B"), (["--what"], "--what")])
def test_wrong_input(run, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and word in error
