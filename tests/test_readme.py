"""README says what is: its functions, flags, files and snippets are looked up and run."""
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys

import reinforce_pp
import sft
from conftest import ROOT, save_folder

README = (ROOT / "README.md").read_text()


def test_functions_have_the_arguments_that_readme_gives():
    table = re.findall(r"`(common|reinforce_pp|rollout)\.(\w+)\(([^)]*)\)`", README)
    assert len(table) >= 10
    for module, name, arguments in table:
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        assert list(signature.parameters) == arguments.split(", "), name


def test_flags_and_files_exist():
    flags = {field.name for config in (reinforce_pp.Config, sft.Config)
             for field in dataclasses.fields(config)} | {"keys", "out", "help"}
    for flag in re.findall(r"--([a-z_]+)", README):
        assert flag in flags, f"README speaks of --{flag}"
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_snippet_that_loads_a_model_runs(tmp_path):
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model")
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert snippet.count("\n") == 3
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "8+9-5=" in done.stdout, done.stderr


def test_every_log_key_is_explained():
    for key in ("score score_std kl entropy length truncated frac_zero_std approx_kl clip_frac "
                "ratio_max grad_norm lr loss steps_per_s").split():
        assert f"`{key}`" in README, key
