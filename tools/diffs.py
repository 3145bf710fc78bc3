"""
The differences between neighbouring scripts, which are the lesson: docs/diffs.md.

    python -m tools.diffs              writes docs/diffs.md anew; a test fails while it is stale
    python -m tools.diffs rloo grpo    prints one of them

Which scripts are neighbours, and what sets them apart, stands in README's section "Reading order".
Docstrings and imports are left out: what differs is what runs.
"""
import ast
import difflib
import re
import sys
from pathlib import Path

from plumbing.flags import fail

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "diffs.md"
NEIGHBOURS = re.compile(r"^diff (\w+)\.py (\w+)\.py +# (.+)$", re.M)
TOP = """# What is the difference?

The scripts tell the same story in the same words, so the difference between two of them is the
algorithm. This page shows the differences in the reading order of
[README](../README.md#reading-order). A line with `-` is in the first script alone, and a line with
`+` in the second alone. Imports are left out, and so are docstrings, which have the equations.
`python -m tools.diffs` wrote this page; `diff rloo.py grpo.py` shows everything.
"""


def code(script):
    """The lines of a script without docstrings and imports."""
    source = (ROOT / f"{script}.py").read_text()
    hidden = set()
    for node in ast.walk(ast.parse(source)):
        has_text = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if has_text and ast.get_docstring(node):
            node = node.body[0]
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        hidden |= set(range(node.lineno, node.end_lineno + 1))
    lines = [line for at, line in enumerate(source.splitlines(), 1) if at not in hidden]
    return [line for at, line in enumerate(lines) if line or (at and lines[at - 1])]


def difference(first, second):
    """What `diff -u1` would say of the two, without its header -> lines."""
    return list(difflib.unified_diff(code(first), code(second), n=1, lineterm=""))[2:]


def page():
    parts = [TOP]
    for first, second, sentence in NEIGHBOURS.findall((ROOT / "README.md").read_text()):
        lines = [line if line[0] != "@" else "@@" for line in difference(first, second)]
        counts = [sum(line[0] == sign for line in lines) for sign in "-+"]
        sentence = sentence[0].upper() + sentence[1:]
        parts.append(f"## {first}.py to {second}.py\n\n{sentence}. "
                     f"{counts[0]} lines go, {counts[1]} come.\n\n"
                     "```diff\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def main():
    names = sys.argv[1:]
    if not names:
        PAGE.write_text(page())
    elif len(names) == 2 and all((ROOT / f"{name}.py").exists() for name in names):
        print("\n".join(difference(*names)))
    else:
        fail(f"{' '.join(names)}: name two scripts, without .py, or none for the whole page")


if __name__ == "__main__":
    main()
