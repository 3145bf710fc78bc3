"""What a user sees: one process per behaviour, on tiny random models, in a fresh folder each."""
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import dpo
import grpo
import orpo
import ppo
import prime
import raft
import reinforce
import reinforce_pp
import remax
import reward_model
import rloo
import sft
import trpo
import warm
from conftest import (CONFIGS, HOSTILE, ROOT, TEMPLATE, by_text, moved, save_folder, to_problems,
                      write_jsonl)
from plumbing import command_line, model as model_py, rewards, run, toy
from plumbing.flags import check_ranges
from plumbing.model import load_policy

pytestmark = pytest.mark.usefixtures("few_problems")
SMALL = ["--device", "cpu", "--data", "toy", "--steps", "6", "--prompts_per_step", "8",
         "--minibatch_size", "4", "--micro_batch_size", "3", "--max_new_tokens", "8",
         "--eval_prompts", "5", "--save_every", "2", "--log_every", "2", "--lr", "1e-3"]


def call(script, *flags, cwd, code=0):
    return warm.call(ROOT / script, *flags, cwd=cwd, code=code)


def metrics(folder):
    """The rows of metrics.jsonl without what may differ between identical runs."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k and "per_s" not in k} for row in rows]


def weights(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["policy"]


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values()))


LONGER = ("def longer(prompts, completions, **columns):\n"
          "    return [len(text) / 60 for text in completions]")


def test_a_run_and_what_it_leaves(folders, tmp_path):
    model = folders("llama", hostile=True, template=TEMPLATE)
    (tmp_path / "mine.py").write_text(LONGER)
    screen = call("reinforce_pp.py", "--model", model, *SMALL, "--group-size", 2, "--eval_every", 3,
                  "--kl-coef", 0.1, "--reward", "mine.py:longer", cwd=tmp_path)
    folder = tmp_path / "runs" / "reinforce_pp"
    for word in ("parameters on cpu", "in fp32", "kl_coef=0.1", "score", "steps_per_s", "scores",
                 "before [95 % interval]", "exact match, sampled", "n = 5", "validation",
                 "runs/reinforce_pp/model", "metrics.jsonl"):
        assert word in screen, word
    assert "Traceback" not in screen
    config = json.loads((folder / "config.json").read_text())
    assert (config["group_size"], config["kl_coef"], config["steps"]) == (2, 0.1, 6)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for key in ("score score_std kl approx_kl entropy length truncated clip_frac ratio_max "
                "frac_zero_std grad_norm lr loss time_sample time_score time_update").split():
        assert all(isinstance(row[key], float) for row in rows), key
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[-1]["kl"])  # starts as the reference, and leaves
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert list(row) == ["step", "prompt", "completion", "score", "row"]
        assert row["row"]["answer"] and row["row"]["prompt"] == row["prompt"]
    rows = (folder / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in rows] == [3, 6]

    # the trained model loads with plain transformers in a fresh process, and is the trained one
    script = ("import sys, json, torch\n"
              "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
              "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
              "logits = m(torch.tensor([t('8+9=').input_ids])).logits.tolist()\n"
              "top_k = m.generation_config.top_k\n"
              "print(json.dumps([str(m.dtype), t.chat_template, top_k, logits]))")
    out = warm.call("-c", script, folder / "model", cwd=tmp_path).splitlines()[-1]
    dtype, template, top_k, logits = json.loads(out)
    policy, tokenizer = load_policy(str(folder), "cpu")
    with torch.no_grad():
        ours = policy(torch.tensor([tokenizer("8+9=").input_ids])).logits
    assert (dtype, template, top_k) == ("torch.float32", TEMPLATE, 2) and ours.tolist() == logits
    assert moved(model, folder) > 0.9

    # a second run takes the next number; plot.py draws both
    call("reinforce_pp.py", "--model", model, *SMALL, "--steps", 1, cwd=tmp_path)
    assert (tmp_path / "runs" / "reinforce_pp-2" / "model").exists()


def test_kill_and_resume_is_bit_for_bit(folders, tmp_path):
    flags = ["--model", folders("gpt2"), *SMALL, "--epochs", 2, "--group_size", 2, "--steps", 20]
    call("reinforce_pp.py", *flags, "--out_dir", "whole", cwd=tmp_path)
    process = warm.start([ROOT / "reinforce_pp.py", *flags, "--out_dir", "cut"], tmp_path,
                         tmp_path / "screen")
    log = tmp_path / "cut" / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    cut_at = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"]
    assert 2 <= cut_at < 20 and not (tmp_path / "cut" / "model").exists()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "sco')  # as if the kill had torn a line
    call("reinforce_pp.py", *flags, "--out_dir", "cut", "--resume", cwd=tmp_path)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_finishes_the_step_and_the_printed_command_goes_on(folders, tmp_path):
    flags = ["--model", folders("llama"), *SMALL, "--steps", 60, "--save_every", 500]
    process = warm.start([ROOT / "reinforce_pp.py", *flags, "--out_dir", "run"], tmp_path,
                         tmp_path / "screen")
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    screen = (tmp_path / "screen").read_text()
    assert process.exitcode == 130 and "Traceback" not in screen
    steps = len(metrics(tmp_path / "run"))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == steps < 60
    again = shlex.split(screen.strip().splitlines()[-1].partition("to go on: python ")[2])
    warm.call(*again, cwd=tmp_path)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 61))


LIMITED = """
import multiprocessing, os, signal, time

def sleep():
    time.sleep(600)  # stands for a judge that does not end

def limited(prompts, completions, **columns):
    for number in (signal.SIGTERM, signal.SIGINT):
        process = multiprocessing.get_context("fork").Process(target=sleep)
        process.start()
        time.sleep(0.2)
        os.kill(process.pid, number)
        process.join(20)
        if process.is_alive():
            process.kill()
            raise SystemError("nothing ends it")
    return [float(len(text)) for text in completions]
"""


def test_signals_end_the_processes_of_a_reward(folders, tmp_path, monkeypatch):
    """Our handlers finish a step of the run; a process that a reward forks has nothing to finish.
    And they are gone when the run is over, also if it failed."""
    (tmp_path / "mine.py").write_text(LIMITED)
    process = warm.start([ROOT / "reinforce_pp.py", "--model", folders("llama"), *SMALL, "--steps",
                          1, "--reward", "mine.py:limited"], tmp_path, tmp_path / "screen")
    process.join(120)
    screen = (tmp_path / "screen").read_text()
    assert process.exitcode == 0 and "nothing ends it" not in screen, screen
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for lr, code in ((1e-3, None), (1e18, 1)):
        try:
            reinforce_pp.train(quick(folders("llama"), lr=lr, steps=3, max_grad_norm=1e9,
                                     out_dir=f"run{lr}"))
        except (SystemExit, RuntimeError) as stop:
            assert code == 1 and "non-finite" in str(stop)
        assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_a_character_that_the_terminal_cannot_show_is_replaced(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_jsonl("sums.jsonl", [dict(prompt=f"{i}\u7b54\U0001f34e=", answer=i)
                                      for i in range(9)])
    model = folders("llama", text=True)
    monkeypatch.setattr(sys, "argv", ["reinforce_pp.py", "--model", model, *SMALL, "--steps", "1",
                                      "--data", file])
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    command_line.main(reinforce_pp.Config, reinforce_pp.REAL, reinforce_pp.train)
    screen.flush()
    assert b"\\u7b54" in screen.buffer.getvalue()
    assert Path("runs/reinforce_pp/model").is_dir()


def test_a_screen_that_nobody_reads_any_more_does_not_end_a_run(folders, tmp_path):
    """As `python reinforce_pp.py | head -1`, or a terminal that was closed."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "reinforce_pp.py"), "--model", folders("llama"), *SMALL],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline().startswith(b"reinforce_pp: model=")
    process.stdout.close()
    assert process.wait(120) == 0 and (tmp_path / "runs" / "reinforce_pp" / "model").is_dir()


def test_a_tilde_is_the_home_folder_and_stays_as_typed(folders, tmp_path, monkeypatch, capsys):
    """The shell does not expand it in --out_dir=~/run."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    shutil.copytree(folders("llama"), home / "m")
    write_jsonl(home / "sums.jsonl", [dict(prompt=f"{i}+1=", answer=i + 1) for i in range(9)])
    (home / "mine.py").write_text(LONGER)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    flags = dict(model="~/m", data="~/sums.jsonl", reward="last_number,~/mine.py:longer",
                 out_dir="~/run")
    reinforce_pp.train(quick(**flags))
    assert not list(here.iterdir()) and (home / "run" / "model").is_dir()
    config = json.loads((home / "run" / "config.json").read_text())
    assert {key: config[key] for key in flags} == flags
    assert "out_dir=~/run" in capsys.readouterr().out


def test_no_warning_is_printed(folders, tmp_path):
    """In a process that imports everything itself, as a user's does."""
    (tmp_path / "mine.py").write_text(LONGER)
    done = subprocess.run(
        [sys.executable, str(ROOT / "reinforce_pp.py"), "--model", folders("llama"), *SMALL,
         "--max_new_tokens", "60", "--reward", "mine.py:longer"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr


def test_help_and_dashes(tmp_path):
    screen = call("reinforce_pp.py", "--help", cwd=tmp_path)
    assert "A_t  = (G_t - mean) / std" in screen and "--group_baseline" in screen
    assert "--max-new-tokens" in screen and not list(tmp_path.iterdir())


def quick(model, **flags):
    base = dict(model=model, data="toy", device="cpu", steps=2, prompts_per_step=8,
                minibatch_size=8, micro_batch_size=8, max_new_tokens=6, eval_prompts=4, lr=1e-3)
    return reinforce_pp.Config(**{**base, **flags})


def test_a_run_that_blows_up_names_the_step(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reinforce_pp.py", "--model", folders("llama"), *SMALL,
                                      "--lr", "1e18", "--max_grad_norm", "1e9"])
    with pytest.raises(SystemExit) as stop:
        command_line.main(reinforce_pp.Config, reinforce_pp.REAL, reinforce_pp.train)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "in step 1, a gradient is nan" in error and "--lr" in error


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM as M, AutoTokenizer as T
for folder in sys.argv[1:]:
    m, t = M.from_pretrained(folder), T.from_pretrained(folder)
    logits = m(torch.tensor([t("8+9=").input_ids])).logits.tolist()
    settings = m.generation_config.to_dict()
    print(json.dumps([str(m.dtype), t.chat_template, t.pad_token, settings, logits]))
"""


def test_every_architecture_trains_saves_and_reloads(tmp_path, monkeypatch):
    """As a checkpoint may come: bf16, a chat template, a hostile generation_config, two EOS ids,
    pad == eos; on a file of one's own, with two rewards. Reloaded in a fresh process."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def short(prompts, completions, level, **columns):\n"
                               "    return [-len(text) / n for text, n in zip(completions, level)]")
    file = write_jsonl("sums.jsonl", [dict(prompt=f"{i}+{j}", answer=i + j, level=i + 1)
                                      for i in range(9) for j in range(9)])
    for name in CONFIGS:
        before = save_folder(tmp_path / f"{name}-before", name, hostile=True, template=TEMPLATE,
                             dtype=torch.bfloat16, pad="<eos>")
        reinforce_pp.train(quick(before, data=file, steps=3, group_size=2, minibatch_size=4,
                                 reward="last_number,mine.py:short", out_dir=name))
        assert moved(before, name) > 0.9, name
        row = metrics(name)[0]
        assert row["score"] == pytest.approx(row["reward_last_number"] + row["reward_short"])
    out = warm.call("-c", RELOAD, *(f"{name}/model" for name in CONFIGS), cwd=tmp_path)
    rows = [row for row in out.splitlines() if row.startswith('["')]
    for name, line in zip(CONFIGS, rows, strict=True):
        dtype, template, pad, settings, logits = json.loads(line)
        policy, tokenizer = load_policy(name, "cpu")
        with torch.no_grad():
            ours = policy(torch.tensor([tokenizer("8+9=").input_ids])).logits
        assert ours.tolist() == logits and (dtype, pad) == ("torch.float32", "<eos>")
        assert template == TEMPLATE
        # transformers up to 5.2x saves no temperature without do_sample, so that we have to set it
        assert {key: settings[key] for key in HOSTILE if key != "do_sample"} == {
            key: value for key, value in HOSTILE.items() if key != "do_sample"}, name


def test_infinite_gradients_and_full_memory_are_sentences(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reinforce_pp.py", "--micro_batch_size", "48"])
    cases = ((torch.OutOfMemoryError("CUDA out of memory"), "--micro_batch_size (it is 48)"),
             (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
             (RuntimeError("the norm is non-finite"), "--max_grad_norm"))
    for error, word in cases:
        def train(cfg):
            raise error
        with pytest.raises(SystemExit) as stop:
            command_line.main(reinforce_pp.Config, {}, train)
        assert stop.value.code == 1 and word in capsys.readouterr().err
    with pytest.raises(RuntimeError):  # anything else is our error, and shows itself
        command_line.main(reinforce_pp.Config, {},
                      lambda cfg: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_same_seed_same_run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags in (("a", {}), ("b", {}), ("c", dict(seed=2))):
        reinforce_pp.train(quick(folders("llama"), out_dir=name, **flags))
    assert metrics("a") == metrics("b") and same_weights("a", "b")
    assert metrics("a") != metrics("c")


def test_micro_batches_of_sft_do_not_matter(folders, tmp_path, monkeypatch, plain_descent):
    monkeypatch.chdir(tmp_path)
    for size in (16, 3):
        sft.train(sft.Config(model=folders("llama"), data="toy", device="cpu", steps=2, lr=0.1,
                             minibatch_size=16, max_new_tokens=8, eval_prompts=4,
                             micro_batch_size=size, out_dir=f"sft{size}"))
    for one, two in zip(weights("sft16").values(), weights("sft3").values()):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_memory_flags_may_change_on_resume(folders, tmp_path, monkeypatch, plain_descent):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rewards.REWARDS, "last_number", by_text)
    seen, real = set(), reinforce_pp.token_logprobs

    def spy(policy, *args):
        seen.add(any(getattr(m, "gradient_checkpointing", False) for m in policy.modules()))
        return real(policy, *args)

    def stop_in_the_third_step(run, step):
        if step == 2:
            raise KeyboardInterrupt
        end_step(run, step)

    end_step = reinforce_pp.Run.end_step

    monkeypatch.setattr(reinforce_pp, "token_logprobs", spy)
    flags = dict(group_size=2, lr=0.1, steps=3, save_every=1)
    reinforce_pp.train(quick(folders("llama"), **flags, out_dir="plain"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reinforce_pp.Run, "end_step", stop_in_the_third_step)
        reinforce_pp.train(quick(folders("llama"), **flags, out_dir="spare"))
    assert seen == {False}
    reinforce_pp.train(quick(folders("llama"), **flags, out_dir="spare", micro_batch_size=3,
                             gradient_checkpointing=True, resume=True))
    assert seen == {False, True}
    assert metrics("plain")[2] == pytest.approx(metrics("spare")[2], rel=1e-3, abs=1e-4)


def choose(script, *arguments):
    """The config that a script's train() gets."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        patch.setattr(sys.modules["__main__"], "__doc__", "")
        command_line.main(script.Config, script.REAL, seen.append)
    return seen[0]


def test_defaults_are_the_toys_unless_the_model_is_a_real_one(folders, monkeypatch, capsys):
    """What decides is the model's vocabulary, not --data; what is typed stays."""
    real = folders("llama", text=True)
    for cuda, lr, prompts, longest in ((False, 1e-5, 32, 48), (True, 1e-6, 256, 256)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        for flags in ([], ["--model", folders("llama")]):
            cfg = choose(reinforce_pp, *flags)
            assert (cfg.lr, cfg.data, cfg.prompts_per_step, cfg.max_new_tokens) == (
                2e-4, "toy", 256, 32)
        assert "real" not in capsys.readouterr().out
        cfg = choose(reinforce_pp, "--model", real, "--kl-coef", 0.5, "--epochs=2")
        assert (cfg.lr, cfg.data, cfg.prompts_per_step, cfg.max_new_tokens) == (
            lr, "words", prompts, longest)
        assert (cfg.kl_coef, cfg.epochs, cfg.minibatch_size) == (0.5, 2, prompts // 2)
        said = capsys.readouterr().out
        assert "defaults for a real model" in said and f"lr={lr}" in said
        assert ("on a CPU" in said) == (not cuda) and "kl_coef" not in said
        cfg = choose(reinforce_pp, "--model", real, "--data", "toy", "--lr", 3)
        assert (cfg.lr, cfg.data, cfg.steps) == (3, "toy", 200 if cuda else 15)
        assert choose(dpo, "--model", real).steps is None  # --epochs decides
        capsys.readouterr()


def test_a_default_never_makes_a_typed_size_wrong():
    """A step has as many completions as by default, among fewer prompts; no mini-batch is larger
    than the batch; and groups of 4 are what --group_baseline means."""
    for script, flags, expected in (
            (reinforce_pp, [], (256, 1, 64)), (reinforce_pp, ["--group_size", 8], (32, 8, 64)),
            (reinforce_pp, ["--prompts_per_step", 4], (4, 1, 4)),
            (reinforce_pp, ["--group_baseline"], (64, 4, 64)),
            (reinforce_pp, ["--group_baseline", "--group_size", 2], (128, 2, 64)),
            (reinforce_pp, ["--group_baseline", "--prompts_per_step", 4], (4, 4, 16)),
            (grpo, [], (64, 4, 64)), (grpo, ["--group_size", 100], (2, 100, 100)),
            (grpo, ["--group_size", 1000], (1, 1000, 1000)), (remax, [], (128, 1, 32)),
            (grpo, ["--prompts_per_step", 4, "--group_size", 8], (4, 8, 32)),
            (reinforce, ["--prompts_per_step", 4], (4, 1, None))):
        cfg = choose(script, *flags)
        assert (cfg.prompts_per_step, cfg.group_size, cfg.minibatch_size) == expected, flags
        check_ranges(cfg)


@pytest.mark.parametrize("script", [dpo, grpo, orpo, ppo, prime, raft, reinforce, reinforce_pp,
                                    remax, reward_model, rloo, sft, trpo])
def test_help_shows_the_defaults_of_all_three(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit):
        command_line.main(script.Config, script.REAL, None)
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {script.Config().max_new_tokens})" in text
    on_gpu, on_cpu = text.partition("a real model on a GPU, and on a CPU:")[2].split("--data")[1:]
    for key, value in script.REAL.items():
        assert f"--{key} {value}" in on_gpu and f"--{key} " in on_cpu
    config = script.Config(**script.REAL)  # each is a flag, and none is out of range
    check_ranges(config)
    check_ranges(script.Config(**command_line.for_a_cpu(script.Config, script.REAL)))


def test_learning_rate():
    cfg = reinforce_pp.Config(lr=1.0, steps=11, warmup_steps=4)
    rates = [common.learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr) for step in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[7] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1)


# ------------------------------------------------------------------ saving, SFT, plot

def test_settings_that_transformers_would_not_save_are_saved(tmp_path, capsys):
    from transformers import GenerationConfig
    policy, tokenizer = toy.make_model(0), toy.make_tokenizer()
    policy.generation_config = GenerationConfig(temperature=0.7, top_k=5)
    model_py.check_saving(policy, tokenizer, tmp_path)
    for _ in range(2):  # the second replaces the first
        model_py.save_policy(policy, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_policy(str(tmp_path), "cpu")[0].generation_config.top_k == 5
    policy.generation_config = GenerationConfig(early_stopping=True, num_beams=1)
    with pytest.raises(SystemExit):  # before the training, and not after it
        model_py.check_saving(policy, tokenizer, tmp_path)
    assert "generation_config.json" in capsys.readouterr().err


def test_sft_learns_the_demonstrations_and_where_they_end(folders, tmp_path, monkeypatch):
    """Twelve problems, by heart: the loss falls, and greedy decoding stops by itself."""
    monkeypatch.chdir(tmp_path)
    real = toy.problems
    monkeypatch.setattr(toy, "problems", lambda kind, split, n: [
        dict(row, completion=row["answer"]) for row in real(kind, split, 12)])
    sft.train(sft.Config(data="toy", device="cpu", steps=150, minibatch_size=12, micro_batch_size=7,
                         max_new_tokens=8, eval_prompts=4, lr=5e-3, out_dir="run"))
    losses = [row["loss"] for row in metrics("run")]
    assert losses[0] > 2 and losses[-1] < 0.3
    policy, tokenizer = load_policy("run", "cpu")
    rows = to_problems(toy.problems("toy", "train", 12), tokenizer)
    from plumbing.rollout import sample
    batch = sample(policy, tokenizer, [row["ids"] for row in rows], 1, 8, 0.0, None)
    assert batch.finished.all()
    _, scores, _ = rewards.score(dict(r=rewards.last_number), rows, batch, tokenizer)
    assert scores.mean() > 0.9


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing is optional: requirements-dev.txt")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(dict(step=i, score=i / 9, length=9, kl=0)) + "\n" for i in range(9)))
    warm.call("-m", "tools.plot", "a", "b", "--out", "curves.svg", cwd=tmp_path)
    assert (tmp_path / "curves.svg").read_text().count("<svg") == 1
    assert "--keys nope" in warm.call("-m", "tools.plot", "a", "--keys", "nope", cwd=tmp_path,
                                      code=1)


def test_a_disk_that_fills_up_ends_the_run_with_one_sentence(tmp_path, capsys):
    """The file that was there stays as it was."""
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("ne")
        raise RuntimeError("unexpected pos 64 vs 0\nand more")  # as torch.save says it

    with pytest.raises(SystemExit) as stop:
        run.write_atomically(path, full)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "checkpoint.pt" in error
    assert path.read_text() == "old"
