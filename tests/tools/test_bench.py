"""tools/bench.py: it measures what it says, and says what it could not measure."""
import importlib.util
import re
import sys

import pytest
import torch
import transformers

from tools import bench

SMALL = ["--prompts", "2", "--group_size", "2", "--prompt_tokens", "8", "--new_tokens", "6",
         "--rounds", "1", "--steps", "1"]
TRL = importlib.util.find_spec("trl")


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


def test_every_row_of_ours_and_one_of_each_other(run, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", {  # one row of TRL is enough
        row: (name, flags, trainer if row == "GRPO" else None, settings)
        for row, (name, flags, trainer, settings) in bench.ROWS.items()})
    text = run()
    table = cells(text)
    assert set(table) == {*((row, "ours") for row in bench.ROWS), ("rollout", "generate"),
                          ("GRPO", "TRL")}
    for (row, who), values in table.items():
        if who == "TRL" and not TRL:
            assert "not installed" in values[0]
            continue
        ms, rate, sampling, logprobs, update, generated, theirs = values
        assert float(ms) > 0 and float(rate) > 0
        assert float(sampling) + float(logprobs) + float(update) == pytest.approx(float(ms), abs=2)
        assert (float(logprobs) > 0) == (row in ("GRPO, KL", "RLOO", "REINFORCE++", "PPO"))
        assert float(update) > 0 or row == "rollout"
        assert (theirs != "-") == (bool(TRL) and (row, who) == ("GRPO", "ours"))
        assert (generated == "-") == (row == bench.NATURAL)
        assert (row, who) != ("rollout", "generate") or generated == "1.00 (1.00-1.00)"
    assert re.search(r"PPO takes \d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\) times as long", text)


@pytest.mark.parametrize("flags", ["--rounds 0", "--size 7B", "--what", "--micro_batch_size 3"])
def test_wrong_input_is_one_sentence(run, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run(*flags.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and flags.split()[-1] in error
