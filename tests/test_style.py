"""The shape of the house: the length of train(), who may import whom, and which words."""
import ast
import functools
import importlib
import re
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPTS

FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
         for folder in (".", "plumbing", "tools") for path in sorted((ROOT / folder).glob("*.py"))
         if folder != "." or path.stem in ("common", "sample", *SCRIPTS)}
LONGEST = {"trpo": 80, "rloo": 55, "grpo": 61, "ppo": 71}  # lines of train(), where it is not 70
each_file = pytest.mark.parametrize("name", FILES)


@functools.cache
def imported(name):
    """-> the modules that a file imports, those of its functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= members or {node.module}
    return found


def closure(name):
    """-> a file, and the files of ours that an import of it may lead to."""
    found, left = set(), {name}
    while left:
        name = left.pop()
        found.add(name)
        packages = {f"{other.partition('.')[0]}.__init__" for other in imported(name)}
        left |= ((imported(name) | packages) & FILES.keys()) - found
    return found


def storey(name):
    """common <- plumbing <- scripts <- tools"""
    folder = name.rpartition(".")[0]
    return 0 if name == "common" else {"plumbing": 1, "": 2, "tools": 3}[folder]


def test_the_story_is_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name in SCRIPTS
               for node in ast.parse(FILES[name].read_text()).body
               if isinstance(node, ast.FunctionDef) and node.name == "train"}
    assert lengths.keys() == set(SCRIPTS)
    assert all(length <= LONGEST.get(name, 70) for name, length in lengths.items()), lengths


def test_a_reader_of_grpo_reads_few_lines():
    """It has 1,775 lines at most, with all that it imports of ours."""
    lines = {name: len(FILES[name].read_text().splitlines()) for name in closure("grpo")}
    assert len(lines) > 10 and sum(lines.values()) <= 1775, lines


@each_file
def test_imports_run_one_way_and_need_the_agreed_packages(name):
    """In no circle, not even by way of an import inside a function. common.py needs torch alone."""
    known = {"torch", *sys.stdlib_module_names}
    if name != "common":
        known |= {"transformers", "datasets", "tqdm", "tokenizers"}
    if name in ("tools.plot", "tools.bench", "tools.gradients"):
        known |= {"matplotlib", "trl"}  # requirements-dev.txt
    for other in imported(name):
        if other in FILES:
            assert storey(other) <= storey(name) and name not in closure(other), f"{name}: {other}"
        else:
            assert other.split(".")[0] in known, f"{name} imports {other}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_has_help(name):
    """By the script, or by the plumbing."""
    sources = "".join(FILES[other].read_text() for other in closure(name) - set(SCRIPTS) | {name})
    for flag in filter(lambda field: field.init, fields(importlib.import_module(name).Config)):
        assert flag.metadata["help"], f"--{flag.name} has no help"
        assert re.search(rf"cfg\.{flag.name}\b", sources), f"--{flag.name} is never read"


def test_every_word_is_english():
    """And no path leads to a folder of somebody's machine."""
    german = "und nicht oder eine einen einer wird werden auf mit ist dass noch aber wenn"
    words = re.compile(rf"[äöüßÄÖÜ]|/work/|/tmp/|\b({german.replace(' ', '|')})\b")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *FILES.values()]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not words.search(line), f"{path.relative_to(ROOT)}:{number}: {line}"
