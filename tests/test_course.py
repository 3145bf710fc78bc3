"""docs/course.ipynb: it runs, and the outputs in it are those of its cells."""
import re

import nbclient
import nbformat
import pytest
from conftest import ROOT

PATH = ROOT / "docs" / "course.ipynb"


def outputs(cell):
    """The text of a cell, and how many pictures; of a training, the words without the numbers."""
    text = "".join(out.get("text", "") for out in cell.outputs)
    pictures = sum("image/png" in out.get("data", {}) for out in cell.outputs)
    if "training" in cell.metadata.get("tags", []):
        text = re.sub(r"[-+=.,\d]+", "#", re.sub(" +", " ", text))
    return text, pictures


def test_every_cell_runs_and_prints_what_the_page_shows(monkeypatch):
    """With few steps of training. If this fails: jupyter execute --inplace docs/course.ipynb"""
    monkeypatch.setenv("QUICK", "1")
    shown, again = nbformat.read(PATH, 4), nbformat.read(PATH, 4)
    nbclient.NotebookClient(again, timeout=600, kernel_name="python3",
                            resources=dict(metadata=dict(path=PATH.parent))).execute()
    cells = [pair for pair in zip(shown.cells, again.cells) if pair[0].cell_type == "code"]
    assert len(cells) >= 12
    for number, (ours, new) in enumerate(cells, 1):
        assert outputs(ours) == outputs(new), f"code cell {number}"
        assert ours.execution_count == number, "run all cells, in order"
    assert sum(outputs(ours)[1] for ours, _ in cells) == 4  # pictures


def test_a_stale_output_is_found():
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text="1.0 a")])
    other = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text="2.0 a")])
    assert outputs(cell) != outputs(other)
    cell.metadata["tags"] = other.metadata["tags"] = ["training"]
    assert outputs(cell) == outputs(other) == ("# a", 0)


@pytest.mark.parametrize("target", sorted(set(re.findall(
    r"\]\(((?!http)[^)]+)\)", "".join(cell.source for cell in nbformat.read(PATH, 4).cells
                                    if cell.cell_type == "markdown")))))
def test_links_lead_somewhere(target):
    assert (PATH.parent / target).exists()
