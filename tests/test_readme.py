"""README and docs/ say what is: functions, flags, files and links are looked up, snippets run."""
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import warm
from conftest import ROOT, SCRIPTS, TEMPLATE, save_folder

PAGES = {path.stem: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                                      *sorted((ROOT / "docs").glob("*.md")))}
TEXT = {name: path.read_text() for name, path in PAGES.items()}
BLOCKS = re.findall(r"```python\n(.*?)```", "".join(TEXT.values()), re.S)
each_page = pytest.mark.parametrize("name", PAGES)


def block(start):
    (found,) = [text for text in BLOCKS if text.startswith(start)]
    return found


def test_readme_is_read_in_five_minutes_and_leads_to_every_page():
    assert len(TEXT["README"].splitlines()) <= 185 and len(TEXT["README"].split()) <= 2400
    assert "](CONTRIBUTING.md)" in TEXT["README"]
    for name in set(PAGES) - {"README", "CONTRIBUTING"}:
        assert f"](docs/{name}.md" in TEXT["README"], name
        longest = dict(diffs=2000, results=300).get(name, 240)
        assert len(TEXT[name].splitlines()) < longest, name


def test_the_chinese_readme_has_the_same_commands_figures_and_links():
    def facts(text):
        code = [re.sub(r"  # .*", "", part) for part in re.findall(r"```(.*?)```", text, re.S)]
        links = re.findall(r"\]\(([^)]+)\)", text)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        prose = re.sub(r"\]\([^)]*\)|```.*?```", "", text, flags=re.S)
        return code, Counter(links), Counter(spans), Counter(re.findall(r"\d+(?:\.\d+)?", prose))
    ours = facts(TEXT["README"].replace("](README.zh.md)", "](README.md)"))
    assert facts((ROOT / "README.zh.md").read_text()) == ours


@each_page
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\((?!https?://)([\w/.]*)#?([\w-]*)\)", TEXT[name]):
        path = (PAGES[name].parent / target).resolve() if target else PAGES[name]
        assert path.exists(), f"{name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in {re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
                              for title in titles}, f"{name}: {target}#{anchor}"


def test_the_files_that_contributing_names_exist():
    for file in re.findall(r"\b(?:plumbing|tools|tests)/[\w/]+\.py", TEXT["CONTRIBUTING"]):
        assert (ROOT / file).exists(), file
    for path in (ROOT / "plumbing").glob("*.py"):
        assert path.name == "__init__.py" or path.name in TEXT["CONTRIBUTING"], path


def test_every_script_is_in_the_tables_and_in_the_reading_order():
    for name in SCRIPTS:
        assert re.search(rf"^\| \[{name}.py\]\({name}.py\) ", TEXT["README"], re.M), name
    order = re.findall(r"^diff (\w+).py (\w+).py", TEXT["README"], re.M)
    assert len(order) == len(set(order)) == len(SCRIPTS) - 2
    assert {two for _, two in order} | {"reinforce", "sft"} == set(SCRIPTS)


def test_the_example_of_readme_prints_what_it_says(tmp_path):
    code = block("import torch\nfrom grpo")
    printed = warm.call("-c", code, cwd=tmp_path).strip()
    assert printed in code and printed.startswith("tensor([")


def test_functions_have_the_arguments_that_the_page_gives():
    names = "|".join(["common", "plumbing.rollout", *SCRIPTS])
    table = re.findall(rf"`({names})\.(\w+)\(([^)]*)\)`", TEXT["formulas"])
    assert len(table) >= 33
    for module, name, arguments in table:
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        assert list(signature.parameters) == arguments.split(", "), name


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"trl_openrlhf_verl", "recipes"}))  # others'
def test_flags_exist(name):
    known = {"help", "prompts", "prompt_tokens", "new_tokens", "rounds",  # the last four: bench.py
             "inplace",  # jupyter; the next five: torchrun
             "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    for script in [*SCRIPTS, "tools.make_pairs"]:
        config = importlib.import_module(script).Config
        known |= {field.name for field in dataclasses.fields(config)}
    for tool in [ROOT / "sample.py", *(ROOT / "tools").glob("*.py")]:
        known |= set(re.findall(r'"--(\w+)"', tool.read_text()))
    for flag in re.findall(r"--([a-z_]+)", TEXT[name]):
        assert flag in known, f"{name} speaks of --{flag}"


def test_the_tests_that_the_page_of_errors_names_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    rows = re.findall(r"^\|.*\|$", TEXT["errors_in_the_notes"], re.M)
    named = re.findall(r"`(test_\w+)` \|$", TEXT["errors_in_the_notes"], re.M)
    assert len(named) == len(rows) - 8 > 25  # four tables, with two lines above each
    for name in named:
        assert f"def {name}(" in tests, name


def test_the_table_of_memory_follows_from_the_formula_on_its_page():
    """Qwen2.5-0.5B: parameters, layers, width, MLP width, vocabulary."""
    p, layers, width, mlp, vocabulary = 494e6, 24, 896, 4864, 151936
    for micro, expected in ((8, "19.7 GB"), (16, "26.1 GB"), (64, "64.5 GB")):
        layer = 34.5 * width + 8 * mlp
        updating = micro * 384 * layers * layer + vocabulary * (micro * 256 * 4 + 1024 * 16)
        assert f"{(22 * p + updating) / 1e9:.1f} GB" == expected and expected in TEXT["memory"]


def test_the_snippets_that_load_a_model_run(tmp_path):
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model")
    assert "8+9-5=" in warm.call("-c", block("from transformers import AutoModel"), cwd=tmp_path)
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model", template=TEMPLATE)
    assert "'role': 'assistant'" in warm.call(
        "-c", block("from transformers import pipeline"), cwd=tmp_path)


def test_own_data_and_own_reward_as_the_page_shows_them(tmp_path, monkeypatch):
    """The two files written out, and its command, with a tiny model for the real one."""
    import reinforce_pp
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
    assert row["score"] == pytest.approx(row["reward_last_number"] + row["reward_brief"], abs=1e-6)
    prompts = {json.loads(text)["prompt"] for text in open("times.jsonl")}
    assert len(prompts) == 121 and "What is 12 times 12?" in prompts


def test_texts_that_contain_the_prompt_are_cut_as_the_page_shows(tmp_path):
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 1+2?\n\nAssistant:"
    rows = [dict(chosen=begin + " 3", rejected=begin + " 4"),
            dict(chosen=begin + " 3", rejected="\n\nHuman: Hi\n\nAssistant: What?")]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warm.call("-c", block("# cut.py"), cwd=tmp_path)
    (line,) = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert json.loads(line) == dict(prompt=begin, chosen=" 3", rejected=" 4")


def test_the_flawed_reward_of_the_page_counts_true_equations():
    space = {}
    exec(block("# equations.py"), space)
    texts = ["9-6=3,3+6=9,9-6=3", "1+1=3", "no equation", "18+9=27", "8+9=171"]
    assert space["true_equations"](prompts=texts, completions=texts) == [0.75, 0, 0, 0.25, 0]


def test_the_snippet_on_the_start_says_when_its_answers_are_right(tmp_path):
    printed = warm.call("-c", block("# right.py"), cwd=tmp_path)
    rights = re.findall(r"(shows its work|names the result): ([\d.]+) of", printed)
    found = {kind: float(right) for kind, right in rights}
    assert 0.95 < found["shows its work"] < 0.99 and 0.22 < found["names the result"] < 0.30


def test_a_table_becomes_lines_in_which_all_values_are_text(tmp_path):
    (tmp_path / "times.csv").write_text('prompt,answer,code\n"2,5 times 2?",5,007\nNone,NA,\n')
    warm.call("-c", block("import pandas\npandas.read_csv"), cwd=tmp_path)
    first, second = map(json.loads, open(tmp_path / "times.jsonl"))
    assert first == dict(prompt="2,5 times 2?", answer="5", code="007")
    assert second == dict(prompt="None", answer="NA", code="")


def test_puzzles_are_written_and_judged_by_their_library(tmp_path, monkeypatch):
    """With a stand-in of the same shape for reasoning-gym, which a user installs."""
    (tmp_path / "reasoning_gym.py").write_text(
        "def create_dataset(name, size, seed, **settings):\n"
        "    return [dict(question=f'{i} + 1 =', answer=str(i + 1), metadata=dict(\n"
        "        source_dataset=name, terms=[i, 1])) for i in range(5)]\n"
        "def get_score_answer_fn(name):\n"
        "    assert name == 'chain_sum'\n"
        "    return lambda answer, entry: float(answer == entry['answer'])\n")
    subprocess.run([sys.executable, "-c", block("# puzzles.py")], check=True, cwd=tmp_path)
    rows = [json.loads(line) for line in open(tmp_path / "puzzles.jsonl")]
    assert [row["prompt"] for row in rows] == [f"{i} + 1 =" for i in range(5)]
    monkeypatch.syspath_prepend(tmp_path)
    space = {}
    exec(block("# puzzle_reward.py"), space)
    texts = ["It is 0 + 1 = 1.", "1", "3 or -3", "no", "4 + 1 = 5"]
    columns = dict(puzzle=[row["puzzle"] for row in rows], prompts=texts)
    assert space["solved"](completions=texts, finished=[True] * 4 + [False], **columns) == [
        1, 0, 0, 0, 0]


def test_the_cells_of_a_notebook_run_in_their_order(tmp_path):
    """With fewer and smaller steps."""
    small = '"steps": 2, "prompts_per_step": 4, "eval_prompts": 8'
    train = block("# two_runs.py").replace('"steps": 20', small)
    assert small in train
    warm.call("-c", train, cwd=tmp_path)
    lines = warm.call("-c", block("# table.py"), cwd=tmp_path).splitlines()
    logs = [[json.loads(line) for line in open(tmp_path / f"runs/seed{seed}/metrics.jsonl")]
            for seed in (1, 2)]
    last = [round(log[1][key], 2) for key in ("score", "length") for log in logs]
    assert [float(word) for word in lines[-1].split()] == [2, *last]
    assert float(warm.call("-c", block("# own_loss.py"), cwd=tmp_path).split()[-1]) > 0.01


def test_the_snippet_on_token_rewards_takes_means_over_answers(tmp_path):
    (tmp_path / "runs" / "prime").mkdir(parents=True)
    rows = [dict(step_found=1.0, step_chance=0.5, wrong_answers=3), dict(score=1),
            dict(step_found=0.0, step_chance=0.1, wrong_answers=1)]
    (tmp_path / "runs" / "prime" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    assert warm.call("-c", block("# found.py"), cwd=tmp_path).splitlines() == [
        "step_found: 0.75 of 4", "step_chance: 0.40 of 4"]
