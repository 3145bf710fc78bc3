"""README and docs/ say what is: functions, flags, files and links are looked up, snippets run."""
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch

import reinforce_pp
import sft
import warm
from conftest import ROOT, TEMPLATE, save_folder
from plumbing import command_line
from test_offline_scripts import SCRIPTS as OFFLINE
from test_scripts import CAPS, SCRIPTS
from tools import flags, memory

PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = {name: path.read_text() for name, path in PAGES.items()}
EVERY = SCRIPTS | OFFLINE | dict(sft=sft)
BLOCKS = re.findall(r"```python\n(.*?)```", "".join(TEXT.values()), re.S)
each_page = pytest.mark.parametrize("name", PAGES)


def block(start):
    (found,) = [text for text in BLOCKS if text.startswith(start)]
    return found


# ----------------------------------------------------------------------------------------- the door

def test_readme_is_read_in_five_minutes():
    assert len(TEXT["README"].splitlines()) <= 160 and len(TEXT["README"].split()) <= 2600


def test_readme_leads_to_every_page():
    for name in set(PAGES) - {"README"}:
        assert f"](docs/{name}.md" in TEXT["README"], name
        assert len(TEXT[name].splitlines()) < 200, name


@each_page
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\((?!https?://)([\w/.]*)#?([\w-]*)\)", TEXT[name]):
        path = (PAGES[name].parent / target).resolve() if target else PAGES[name]
        assert path.exists(), f"{name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in {re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
                              for title in titles}, f"{name}: {target}#{anchor}"


def test_every_script_is_in_the_tables_of_algorithms():
    for name in EVERY:
        assert re.search(rf"^\| \[{name}.py\]\({name}.py\) ", TEXT["README"], re.M), name


def test_the_reading_order_is_that_of_the_tested_diffs():
    order = re.findall(r"^diff (\w+).py (\w+).py", TEXT["README"], re.M)
    assert len(order) == len(set(order)) == len(EVERY) - 2 and set(order) <= set(CAPS)
    assert {two for _, two in order} | {"reinforce", "sft"} == set(EVERY)


def test_the_example_of_readme_prints_what_it_says(tmp_path):
    code = block("import torch\nfrom grpo")
    assert len(code.splitlines()) == 8
    printed = warm.call("-c", code, cwd=tmp_path).strip()
    assert printed in code and printed.startswith("tensor([")


# ---------------------------------------------------------------------------------- what exists

def test_functions_have_the_arguments_that_the_page_gives():
    names = "|".join(["common", "plumbing.rollout", *EVERY])
    table = re.findall(rf"`({names})\.(\w+)\(([^)]*)\)`", TEXT["formulas"])
    assert len(table) >= 35
    for module, name, arguments in table:
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        assert list(signature.parameters) == arguments.split(", "), name


@each_page
def test_flags_exist(name):
    known = {field.name for script in EVERY.values() for field in dataclasses.fields(script.Config)}
    known |= {"help", "normalize"}  # (RLOO's in TRL begins so)
    for tool in (ROOT / "tools").glob("*.py"):
        known |= set(re.findall(r'"--(\w+)"', tool.read_text()))
    known |= {"prompts", "prompt_tokens", "new_tokens", "rounds"}  # of bench.py, too
    if name != "trl_openrlhf_verl":  # which speaks of others' flags
        for flag in re.findall(r"--([a-z_]+)", TEXT[name]):
            assert flag in known, f"{name} speaks of --{flag}"


def test_the_tests_that_the_page_of_errors_names_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = re.findall(r"^\|.*\|$", TEXT["errors_in_the_notes"], re.M)
    named = re.findall(r"`(test_\w+)` \|$", TEXT["errors_in_the_notes"], re.M)
    assert len(named) == len(rows) - 8 > 25  # four tables, with two lines above each
    for name in named:
        assert f"def {name}(" in tests, name


def test_every_log_key_is_explained():
    for key in ("score score_std kl entropy length truncated frac_zero_std approx_kl clip_frac "
                "ratio_max grad_norm lr loss steps_per_s value_loss explained_var chosen rejected "
                "margin accuracy kl_full_step kl_step tries value_clip_frac greedy_score "
                "predicted_gain real_gain prm_loss prm_accuracy step_found step_chance "
                "wrong_answers").split():
        assert f"`{key}`" in TEXT["log"], key


def test_the_table_of_memory_is_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    table = capsys.readouterr().out.split("\n\n")[0]
    assert len(table.splitlines()) == 7 and table in TEXT["memory"]


# ----------------------------------------------------------------------------------------- flags

def test_the_page_of_flags_is_the_one_that_the_tool_writes():
    assert flags.page() == TEXT["flags"], "run python -m tools.flags"


@pytest.mark.parametrize("name", EVERY)
def test_the_page_of_flags_has_the_defaults_that_a_run_gets(name, folders, monkeypatch):
    """Read back from the page, and compared with what the command line chooses."""
    script, real = EVERY[name], folders("llama", text=True)
    configs = [command_line.choose(script.Config, {}, script.REAL)]
    for gpus in (1, 0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        configs.append(command_line.choose(script.Config, dict(model=real), script.REAL))
    help_of = {field.name: field.metadata["help"] for field in dataclasses.fields(script.Config)
               if field.init}
    found = {}
    for flag, meaning, scripts, default in re.findall(
            r"^\| `--(\w+)` \| (.*) \| (.*) \| (.*) \|$", TEXT["flags"], re.M):
        but = scripts.removeprefix("all but ").split(", ")
        has_it = scripts == "all" or (name in but) != scripts.startswith("all but ")
        ours = help_of.get(flag, "no such flag")  # some say the choices, too
        assert has_it == (meaning == ours or meaning.startswith(f"{ours}: ")), (flag, scripts)
        if has_it:
            usual, *others = default.split("; ")
            named = [other.split(": ")[1] for other in others
                     if name in other.split(": ")[0].split(", ")]
            found[flag] = ([*named, usual][0].split(" / ") * 3)[:3]
    assert found.keys() == help_of.keys()
    for flag, texts in found.items():
        values = [getattr(config, flag) for config in configs]
        if flag == "model":
            values = [None] * 3
        for value, text in zip(values, texts):
            if isinstance(value, bool) or value is None or isinstance(value, str):
                assert text == {True: "on", False: "off", None: "none"}.get(value, value), flag
            else:
                assert float(text) == value, flag


# -------------------------------------------------------------------------------------- snippets

def test_the_snippets_that_load_a_model_run(tmp_path):
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model")
    assert "8+9-5=" in warm.call("-c", block("from transformers import AutoModel"), cwd=tmp_path)
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model", template=TEMPLATE)
    assert "'role': 'assistant'" in warm.call(
        "-c", block("from transformers import pipeline"), cwd=tmp_path)


def test_own_data_and_own_reward_as_the_page_shows_them(tmp_path, monkeypatch):
    """The two files written out, and its command, with a tiny model for the real one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(block("# my_rewards.py"))
    subprocess.run([sys.executable, "-c", block("# times.py")], check=True)
    (line,) = re.findall(r"^python reinforce_pp.py (.*my_rewards.*)$", TEXT["data_and_rewards"],
                         re.M)
    arguments = dict(zip(*[iter(line.replace("--", "").split())] * 2))
    arguments["model"] = save_folder(tmp_path / "model", text=True)
    reinforce_pp.train(reinforce_pp.Config(
        **arguments, steps=1, prompts_per_step=4, minibatch_size=4, max_new_tokens=8,
        eval_prompts=4, device="cpu", out_dir="run"))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["score"] == row["reward_last_number"] + row["reward_brief"]
    prompts = {json.loads(text)["prompt"] for text in open("times.jsonl")}
    assert len(prompts) == 121 and "What is 12 times 12?" in prompts


def test_the_snippet_on_the_start_says_when_its_answers_are_right(tmp_path):
    printed = warm.call("-c", block("# right.py"), cwd=tmp_path)
    rights = re.findall(r"(shows its work|names the result): ([\d.]+) of", printed)
    found = {kind: float(right) for kind, right in rights}
    assert 0.95 < found["shows its work"] < 0.99 and 0.22 < found["names the result"] < 0.30


def test_the_snippet_on_token_rewards_takes_means_over_answers(tmp_path):
    (tmp_path / "runs" / "prime").mkdir(parents=True)
    rows = [dict(step_found=1.0, step_chance=0.5, wrong_answers=3), dict(score=1),
            dict(step_found=0.0, step_chance=0.1, wrong_answers=1)]
    (tmp_path / "runs" / "prime" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    assert warm.call("-c", block("# found.py"), cwd=tmp_path).splitlines() == [
        "step_found: 0.75 of 4", "step_chance: 0.40 of 4"]


def test_the_new_algorithm_of_the_page_is_gspo():
    """Its line in the place of GRPO's, and GSPO's loss by a loop."""
    import grpo
    old, new = (line.partition("#")[0].strip() for line in block("ratio = (logprobs").splitlines())
    source = inspect.getsource(grpo.grpo_loss)
    assert source.count(old) == 1
    space = dict(vars(grpo))
    exec(source.replace(old, new), space)
    generator = torch.Generator().manual_seed(0)
    logprobs, before = (-torch.rand(4, 6, generator=generator) for _ in range(2))
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4], [1]])).float()
    A = torch.tensor([1.0, -1.0, 2.0, -0.5])
    loss, _ = space["grpo_loss"](logprobs, before, before, A, mask, 0.2, 0.0)
    expected = 0
    for i in range(4):
        n = int(mask[i].sum())
        ratio = ((logprobs - before)[i, :n].mean()).exp()
        expected -= min(ratio * A[i], ratio.clamp(0.8, 1.2) * A[i]) / 4
    torch.testing.assert_close(loss, expected)
