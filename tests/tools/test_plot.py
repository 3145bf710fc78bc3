"""tools/plot.py: the curves of runs, told apart by their folders."""
import sys

import pytest

from tools import plot

matplotlib = pytest.importorskip("matplotlib", reason="requirements-dev.txt")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two run folders with the same last name, of which one is still being written."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one/_run", "two/_run"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text(
            '{"step": 1, "score": 0.5}\n{"step": 2, "score": 0.75}\n{"step": 3, "sco')
    return ["one/_run", "two/_run"]


def test_a_line_that_is_half_written_is_left_out(runs):
    assert plot.read(runs[0]) == [dict(step=1, score=0.5), dict(step=2, score=0.75)]


def test_runs_of_the_same_last_name_are_told_apart(runs, monkeypatch, capsys):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    monkeypatch.setattr(sys, "argv", ["plot.py", *runs, "--keys", "score", "--out", "out.svg"])
    plot.main()
    assert capsys.readouterr().out == "wrote out.svg\n"
    picture = open("out.svg").read()
    assert all(f"{run}</text>" in picture for run in runs) and ">score</text>" in picture


@pytest.mark.parametrize("words, word", [(["nowhere"], "nowhere"),
                                         (["one/_run", "--keys", "kl"], "step, score")])
def test_what_is_not_there_is_said(runs, monkeypatch, capsys, words, word):
    monkeypatch.setattr(sys, "argv", ["plot.py", *words])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert stop.value.code == 2 and word in capsys.readouterr().err
