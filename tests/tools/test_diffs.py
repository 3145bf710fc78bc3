"""tools/diffs.py: the page is current, and its blocks are what differs between two scripts."""
import ast
import subprocess
import sys

import pytest
from conftest import SCRIPTS

from tools import diffs

PAIRS = diffs.NEIGHBOURS.findall((diffs.ROOT / "README.md").read_text())


def test_the_page_is_current():
    assert diffs.PAGE.read_text() == diffs.page(), "type: python -m tools.diffs"


def test_every_script_is_in_the_reading_order():
    order, known = [(first, second) for first, second, _ in PAIRS], {"sft", "reinforce"}
    for first, second in order:  # each is read by its difference from one that is known
        assert first in known and second not in known
        known.add(second)
    assert known == set(SCRIPTS)


@pytest.mark.parametrize("name", sorted({name for *pair, _ in PAIRS for name in pair}))
def test_what_runs_is_shown(name):
    """The lines that are left are the program, without its docstrings and imports."""
    class Bare(ast.NodeTransformer):
        def drop(self, node):
            self.generic_visit(node)
            node.body = node.body[bool(ast.get_docstring(node)):] or [ast.Pass()]
            return node
        visit_Module = visit_FunctionDef = visit_ClassDef = drop

        def visit_Import(self, node):
            return None
        visit_ImportFrom = visit_Import

    tree = Bare().visit(ast.parse((diffs.ROOT / f"{name}.py").read_text()))
    assert ast.dump(ast.parse("\n".join(diffs.code(name)))) == ast.dump(tree)


@pytest.mark.parametrize("first, second", [pair for *pair, _ in PAIRS])
def test_git_makes_one_script_of_the_other(tmp_path, first, second):
    text = "\n".join(["--- a/script.py", "+++ b/script.py", *diffs.difference(first, second), ""])
    (tmp_path / "script.py").write_text("\n".join([*diffs.code(first), ""]))
    subprocess.run(["git", "apply"], cwd=tmp_path, input=text, text=True, check=True)
    assert (tmp_path / "script.py").read_text().splitlines() == diffs.code(second)


def test_two_scripts_or_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffs.py", "rloo", "grpo"])
    diffs.main()
    assert "\n+            advantages = group_advantages(scores, cfg.group_size)\n" in (
        capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["diffs.py", "rloo"])
    with pytest.raises(SystemExit):
        diffs.main()
    assert capsys.readouterr().err.startswith("error: rloo: name two scripts")
