"""README says what is: its functions, flags, files and snippets are looked up and run."""
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys

import dpo
import ppo
import prime
import reinforce_pp
import sft
import trpo
import warm
from conftest import ROOT, TEMPLATE, save_folder
from plumbing import command_line
from test_offline_scripts import SCRIPTS as OFFLINE
from test_scripts import CAPS, SCRIPTS
from tools import memory

README = (ROOT / "README.md").read_text()


FIELDS = {field.name for script in (sft, *SCRIPTS.values(), *OFFLINE.values())
          for field in dataclasses.fields(script.Config) if field.init}
EVERY = SCRIPTS | OFFLINE | dict(sft=sft)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def block(start):
    (found,) = [text for text in BLOCKS if text.startswith(start)]
    return found


def test_functions_have_the_arguments_that_readme_gives():
    table = re.findall(r"`(common|rollout|%s)\.(\w+)\(([^)]*)\)`" % "|".join(EVERY), README)
    assert len(table) >= 35
    for module, name, arguments in table:
        module = f"plumbing.{module}" if module == "rollout" else module
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        assert list(signature.parameters) == arguments.split(", "), name


def test_flags_and_files_exist():
    flags = FIELDS | {"keys", "out", "help", "seeds", "tokens"}
    flags |= set(re.findall(r'"--(\w+)"', (ROOT / "tools" / "bench.py").read_text()))
    flags |= {"prompts", "prompt_tokens", "new_tokens", "rounds"}  # of bench.py, too
    ours = README[: README.index("## When one GPU is not enough")].replace(" `--normalize", "")
    for flag in re.findall(r"--([a-z_]+)", ours):
        assert flag in flags, f"README speaks of --{flag}"
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_flag_is_in_the_table():
    table = README[README.index("## Every flag") : README.index("## How much memory")]
    for name in FIELDS:
        (default,) = re.findall(rf"^\| `--{name}` \|[^|]*\| ([^|]*)\|", table, re.M)
        script = dict(critic_lr=ppo, prompts=dpo, beta=dpo, prm_lr=prime, delta=trpo,
                      damping=trpo, fisher_fraction=trpo).get(name, reinforce_pp)
        world = [row.get(name) for row in (
            vars(script.Config()), {**vars(script.Config()), **script.REAL},
            command_line.for_a_cpu(script.Config, script.REAL))]
        if None not in world:
            assert [float(value) for value in default.split(";")[0].split("/")] == world, name


def test_the_table_of_memory_is_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    table = capsys.readouterr().out.split("\n\n")[0]
    assert len(table.splitlines()) == 7 and table in README


def test_the_snippet_that_loads_a_model_runs(tmp_path):
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model")
    assert "8+9-5=" in warm.call("-c", block("from transformers import AutoModel"), cwd=tmp_path)
    save_folder(tmp_path / "runs" / "reinforce_pp" / "model", template=TEMPLATE)
    assert "'role': 'assistant'" in warm.call(
        "-c", block("from transformers import pipeline"), cwd=tmp_path)


def test_own_data_and_own_reward_as_readme_shows_them(tmp_path, monkeypatch):
    """The two files written out, and its command, with a tiny model for the real one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(block("# my_rewards.py"))
    subprocess.run([sys.executable, "-c", block("# times.py")], check=True)
    (line,) = re.findall(r"^python reinforce_pp.py (.*my_rewards.*)$", README, re.M)
    flags = dict(zip(*[iter(line.replace("--", "").split())] * 2))
    flags["model"] = save_folder(tmp_path / "model", text=True)
    reinforce_pp.train(reinforce_pp.Config(
        **flags, steps=1, prompts_per_step=4, minibatch_size=4, max_new_tokens=8, eval_prompts=4,
        device="cpu", out_dir="run"))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["score"] == row["reward_last_number"] + row["reward_brief"]
    prompts = {json.loads(text)["prompt"] for text in open("times.jsonl")}
    assert len(prompts) == 121 and "What is 12 times 12?" in prompts


def test_every_log_key_is_explained():
    for key in ("score score_std kl entropy length truncated frac_zero_std approx_kl clip_frac "
                "ratio_max grad_norm lr loss steps_per_s value_loss explained_var chosen rejected "
                "margin accuracy kl_full_step kl_step tries value_clip_frac greedy_score "
                "predicted_gain real_gain prm_loss prm_accuracy step_found step_chance "
                "wrong_answers").split():
        assert f"`{key}`" in README, key


def test_the_reading_order_is_that_of_the_tested_diffs():
    order = re.findall(r"^diff (\w+).py (\w+).py", README, re.M)
    assert len(order) == len(set(order)) == 11 and set(order) <= set(CAPS)
    assert {two for _, two in order} | {"reinforce", "sft"} == set(EVERY)


def test_every_script_is_in_the_table_of_algorithms():
    for name in EVERY:
        assert re.search(rf"^\| \[{name}.py\]\({name}.py\) ", README, re.M), name
