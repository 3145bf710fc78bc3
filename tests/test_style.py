"""The shape of the house: widths, the length of train(), and which file may know which."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["common", "toy", "model", "rollout", "data_file", "data", "reward_file", "rewards",
          "evaluation", "run", "flags"]  # upwards
FILES = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_lines_are_narrow_and_the_story_is_short(name):
    source = (ROOT / name).read_text()
    wide = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 100]
    assert not wide, f"{name}: lines {wide} are wider than 100"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{name}: train() has {length} lines"


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way_and_start_nothing(name):
    tree, layer = ast.parse((ROOT / name).read_text()), name.removesuffix(".py")
    ours = {path.removesuffix(".py") for path in FILES}
    allowed = set(LAYERS[: LAYERS.index(layer)]) if layer in LAYERS else ours
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not (set(names) & ours) - allowed, f"{name} imports {names}"
    for node in tree.body:  # imports, definitions, constants, docstring, `if __name__ == ...`
        harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr,
                    ast.If)
        assert isinstance(node, harmless), f"{name}:{node.lineno} runs at import"


def test_every_flag_is_read_and_has_help():
    sources = "".join((ROOT / name).read_text() for name in FILES)
    flags = re.findall(r"^    (\w+): [\w\[\]]+ = HfArg\(default=[^,]+, (help=)?", sources, re.M)
    assert len(flags) > 25
    for flag, text in flags:
        assert text, f"--{flag} has no help"
        assert f"cfg.{flag}" in sources, f"--{flag} is parsed and never read"


def test_dependencies_are_the_agreed_ones():
    known = {"torch", "transformers", "datasets", "tqdm", "tokenizers",
             "huggingface_hub", *(f[:-3] for f in FILES)}
    import sys
    for name in set(FILES) - {"plot.py", "bench.py"}:  # matplotlib, TRL: requirements-dev.txt
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.split(".")[0]
                assert top in known | set(sys.stdlib_module_names), f"{name} imports {module}"
