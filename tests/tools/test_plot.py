"""tools/plot.py: the curves of runs, told apart by their folders."""
import sys
from pathlib import Path

import pytest

from tools import plot

matplotlib = pytest.importorskip("matplotlib", reason="requirements-dev.txt")


RUNS = "one/_run", "two/_run"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Two run folders with the same last name, which are still being written."""
    monkeypatch.chdir(tmp_path)
    for folder in map(Path, RUNS):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            '{"step": 1, "score": 0.5}\n\0\0\0\n{"step": 2, "score": 0.75}\n{"step": 3, "sco')


def test_lines_that_a_crash_has_torn_are_left_out():
    found = plot.read(RUNS[0], "metrics.jsonl")
    assert found == [dict(step=1, score=0.5), dict(step=2, score=0.75)]


def test_runs_of_the_same_last_name_are_told_apart(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    monkeypatch.setattr(sys, "argv", ["plot.py", *RUNS, "--keys", "score", "--out", "out.svg"])
    plot.main()
    picture = Path("out.svg").read_text()
    assert all(f"{run}</text>" in picture for run in RUNS) and ">score</text>" in picture


def test_held_out_problems_with_their_intervals(monkeypatch):
    Path(RUNS[0], "validation.jsonl").write_text(
        '{"step": 0, "n": 4, "sampled": [0.5, 0.25, 0.75]}\n'
        '{"step": 5, "n": 4, "sampled": [0.75, 0.5, 1.0]}\n')
    drawn = []
    for name in ("plot", "fill_between"):
        monkeypatch.setattr(matplotlib.axes.Axes, name, lambda _, *xy, **more: drawn.append(xy))
    monkeypatch.setattr(sys, "argv", ["plot.py", RUNS[0], "--validation", "--keys", "sampled"])
    plot.main()
    assert drawn == [([0, 5], (0.25, 0.5), (0.75, 1.0)), ([0, 5], (0.5, 0.75))]
    monkeypatch.setattr(sys, "argv", ["plot.py", RUNS[1], "--validation", "--keys", "sampled"])
    with pytest.raises(SystemExit):
        plot.main()


@pytest.mark.parametrize("words, word", [(["nowhere"], "nowhere"),
                                         (["one/_run", "--keys", "kl"], "step, score"),
                                         (["new"], "nothing yet")])
def test_what_is_not_there_is_said(monkeypatch, capsys, words, word):
    Path("new").mkdir()
    Path("new/metrics.jsonl").write_text('{"step": 1')
    monkeypatch.setattr(sys, "argv", ["plot.py", *words])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert stop.value.code == 2 and word in capsys.readouterr().err
