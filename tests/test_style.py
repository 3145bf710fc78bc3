"""The shape of the house: widths, the length of train(), and who may import whom."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
         for folder in (".", "plumbing", "tools") for path in sorted((ROOT / folder).glob("*.py"))}
each_file = pytest.mark.parametrize("name", FILES)


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


def storey(name):
    """common <- plumbing <- scripts <- tools"""
    folder = name.rpartition(".")[0]
    return 0 if name == "common" else {"plumbing": 1, "": 2, "tools": 3}[folder]


@each_file
def test_lines_are_narrow_and_the_story_is_short(name):
    source = FILES[name].read_text()
    wide = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert not wide, f"{name}: lines {wide} are wider than 100"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{name}: train() has {length} lines"


@each_file
def test_imports_run_one_way(name):
    for other in imported(name) & FILES.keys():
        assert storey(other) <= storey(name), f"{name} imports {other}"


def test_imports_run_in_no_circle():
    """Not even by way of an import inside a function."""
    below, left = set(), dict.fromkeys(FILES)
    while left:
        free = {name for name in left if imported(name) & FILES.keys() <= below}
        assert free, f"these import each other: {', '.join(left)}"
        below |= free
        left = {name: None for name in left if name not in free}


@each_file
def test_an_import_starts_nothing(name):
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr,
                ast.If)  # imports, definitions, constants, docstring, `if __name__ == ...`
    for node in ast.parse(FILES[name].read_text()).body:
        assert isinstance(node, harmless), f"{name}:{node.lineno} runs at import"


def test_every_flag_is_read_and_has_help():
    sources = "".join(path.read_text() for path in FILES.values())
    flags = re.findall(r"^    (\w+): [\w\[\]]+ = HfArg\(default=[^,]+, (help=)?", sources, re.M)
    assert len(flags) > 25
    for flag, text in flags:
        assert text, f"--{flag} has no help"
        assert f"cfg.{flag}" in sources, f"--{flag} is parsed and never read"


@each_file
def test_dependencies_are_the_agreed_ones(name):
    known = {"torch", "transformers", "datasets", "tqdm", "tokenizers", "huggingface_hub",
             "plumbing", "tools", *sys.stdlib_module_names, *FILES}
    if name in ("tools.plot", "tools.bench", "tools.gradients"):
        known |= {"matplotlib", "trl"}  # requirements-dev.txt
    for module in imported(name):
        assert module.split(".")[0] in known, f"{name} imports {module}"
