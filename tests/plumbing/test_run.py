"""A run: its folder, how it goes on, and what happens to it when something comes between."""
import contextlib
import copy
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import warm
from conftest import ROOT, save_folder, write_jsonl
from test_command_line import as_in_a_new_process, enter, refused  # noqa: F401

import dpo
import grpo
import rloo
from plumbing.run import Run

pytestmark = [pytest.mark.usefixtures("few_problems"), pytest.mark.filterwarnings(
    "error", *(f"ignore::{kind}" for kind in ("DeprecationWarning", "ResourceWarning",
                                              "pytest.PytestUnraisableExceptionWarning")))]
SMALL = dict(device="cpu", steps=2, prompts_per_step=4, minibatch_size=8, micro_batch_size=8,
             max_new_tokens=6, eval_prompts=4, save_every=1, log_every=1, lr=1e-3)
TYPED = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
REWARDS = '''
import multiprocessing, pathlib, subprocess, time, torch

def longer(prompts, completions, **columns):
    return [len(text) / 60 for text in completions]

def equal(prompts, completions, **columns):
    return [0.5] * len(prompts)

def listed(prompts, completions, **columns):
    with open("prompts.txt", "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    return longer(prompts, completions)

def broken(prompts, completions, **columns):
    torch.set_default_dtype(torch.float64), 1 / 0

def slow(text):
    time.sleep(600)

def program(prompts, completions, **columns):  # each completion is judged by one
    if len(prompts) < 16:  # before the training
        return longer(prompts, completions)
    jobs = [subprocess.Popen(["sleep", "600"]) for text in completions]
    pathlib.Path("judging").touch()
    return [float(job.wait()) for job in jobs]

def pool(prompts, completions, **columns):
    if len(prompts) < 16:
        return longer(prompts, completions)
    with multiprocessing.get_context("fork").Pool(2) as workers:
        pathlib.Path("judging").touch()
        return workers.map(slow, completions)
'''


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def steps(folder):
    return [row["step"] for row in rows(f"{folder}/metrics.jsonl")]


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def props(tmp_path_factory, folders):
    """Data, rewards, a model; and `run`, a run of two steps that was given relative paths."""
    folder = tmp_path_factory.mktemp("props")
    write_jsonl(folder / "sums.jsonl", [
        dict(prompt=f"{i}+{j}=", answer=i + j, chosen=str(i + j), rejected="50")
        for i in range(9) for j in range(9)])
    (folder / "judges.py").write_text(REWARDS)
    (folder / "m").symlink_to(folders("llama"))
    save_folder(folder / "other", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        enter(grpo, *TYPED, "--model", "m", "--data", "sums.jsonl", "--reward", "judges.py:longer",
              "--out_dir", "run", train=grpo.train)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, props):
    """A current folder of its own, with a copy of the run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(props / "run", "run")
    return monkeypatch


# ---------------------------------------------------------------------------------- how it goes on

def test_a_run_goes_on_from_any_folder_and_through_links(here, props):
    """The run, its model/ and its checkpoint have been moved; links to them are in their places."""
    Path("disk").mkdir()
    for name in ("model", "checkpoint.pt"):
        shutil.move(f"run/{name}", f"disk/{name}")
        Path("run", name).symlink_to(f"../../disk/{name}")
    shutil.move("run", "disk/run"), Path("run").symlink_to("disk/run")
    with open("run/metrics.jsonl", "a") as log:
        log.write("\0\0\n" + '{"step": 3, "sco')  # torn by a crash
    old, before = json.loads(Path("run/config.json").read_text()), files("disk/model")
    Path("empty").mkdir(), here.chdir("empty")
    enter(grpo, "--resume", "../run", "--steps", 3, "--lr", 1e-2, train=grpo.train)
    assert not list(Path().iterdir())
    here.chdir("..")
    assert steps("run") == [1, 2, 3] and rows("run/metrics.jsonl")[:2] == rows(
        props / "run" / "metrics.jsonl")
    assert json.loads(Path("run/config.json").read_text()) == {**old, "steps": 3, "lr": 1e-2}
    links = "run", "disk/run/model", "disk/run/checkpoint.pt"
    assert all(Path(name).is_symlink() for name in links)
    assert torch.load("disk/checkpoint.pt", weights_only=True)["step"] == 3
    after = files("disk/model")
    assert [path.name for path in before if before[path] != after[path]] == ["model.safetensors"]
    assert {path.name for path in Path("disk").iterdir()} == {"run", "model", "checkpoint.pt"}


@pytest.mark.parametrize("words, flags, file, change", [
    (["this script"], None, "", None), (["--steps 1", "2"], ["--steps", "1"], "", None),
    (["data"], ["--data", "changed.jsonl"], "", None), (["model"], ["--model", "{}/other"], "", 0),
    (["another.py"], [], "config.json", lambda old: old.replace(b'"grpo"', b'"another"')),
    (["config.json"], [], "config.json", lambda old: old[:9]),
    (["--resume"], [], "checkpoint.pt", lambda old: old[:40_000]),
    (["--resume"], [], "checkpoint.pt", lambda old: b"")])
def test_what_does_not_go_on_is_one_sentence_and_loses_nothing(here, props, capsys, words, flags,
                                                               file, change):
    """Another script; fewer steps than were made; other data, of which one prompt suffices; other
    weights; torn files."""
    sums = rows(props / "sums.jsonl")
    write_jsonl("changed.jsonl", sums[:40] + [dict(sums[40], prompt="9+9=")] + sums[41:])
    if change:
        Path("run", file).write_bytes(change(Path("run", file).read_bytes()))
    before = files("run")
    error = refused(capsys, rloo if flags is None else grpo, "--resume", "run",
                    *(flag.format(props) for flag in flags or []))
    assert all(word in error for word in words) and files("run") == before


def test_more_epochs_may_be_asked_for(here, props):
    """The number of steps follows from them, also where they are typed at --resume."""
    cfg = dpo.Config(**{**dpo.TOY, "model": f"{props}/m", "data": f"{props}/sums.jsonl",
                        "minibatch_size": 20, "eval_prompts": 4, "device": "cpu"})
    for cfg.epochs, cfg.out_dir, n in ((2, "two", 7), (1, "one", 4)):
        same = copy.copy(cfg)
        dpo.train(cfg)
        assert cfg == same and steps(cfg.out_dir) == list(range(1, n + 1))  # of 61 in 81 prompts
    enter(dpo, "--resume", "one", "--epochs", 2, train=dpo.train)
    assert steps("one") == steps("two")


# ------------------------------------------------------------------------------ called from Python

def settings():
    return (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_default_dtype(),
            torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(), *map(signal.getsignal, (2, 15)),
            torch._dynamo.config.recompile_limit, torch.get_num_threads(),
            transformers.utils.logging.get_verbosity(),
            transformers.utils.logging.is_progress_bar_enabled())


BEFORE = settings()  # when no run has been made in this process


def test_train_in_a_loop_in_a_thread_and_what_it_leaves_behind(folders, props, here):
    """One Config for two seeds makes two runs; the settings of torch are those from before."""
    cfg = grpo.Config(**{**grpo.TOY, **SMALL, "model": folders("llama"), "steps": 1})
    for cfg.seed in (1, 2):
        same = copy.copy(cfg)
        thread = threading.Thread(target=grpo.train, args=[cfg])
        thread.start()
        thread.join()
        assert cfg == same and settings() == BEFORE
    for folder, seed in (("runs/grpo", 1), ("runs/grpo-2", 2)):
        assert json.loads(Path(folder, "config.json").read_text())["seed"] == seed
        assert Path(folder, "model").is_dir() and steps(folder) == [1]
    here.setattr(Run, "log", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.train(cfg)
    assert settings() == BEFORE and Path("runs/grpo-3").is_dir()
    cfg.reward = f"{props}/judges.py:broken"
    with pytest.raises(SystemExit):
        grpo.train(cfg)
    after = settings()
    torch.set_default_dtype(torch.float32)  # for the other tests
    assert after == BEFORE


def test_validation_is_looked_at_in_training_and_test_before_and_after(props, here):
    """Each look judges a sampled and a greedy answer to each prompt."""
    homes = {home: {f"{a}+{b}=" for a in range(8) for b in (i, 9 - i)}
             for i, home in enumerate(("train", "validation", "test"))}
    Path("sums").mkdir()
    for home, prompts in homes.items():
        write_jsonl(f"sums/{home}.jsonl", [dict(prompt=prompt, answer=1) for prompt in prompts])
    grpo.train(grpo.Config(**{**SMALL, "model": f"{props}/m", "data": "sums", "steps": 3,
                              "eval_every": 1, "eval_prompts": 99, "out_dir": "looked",
                              "reward": f"{props}/judges.py:listed"}))
    judged = Counter(Path("prompts.txt").read_text().split())
    assert {judged[prompt] for prompt in homes["validation"]} == {2 * 4}
    assert {judged[prompt] for prompt in homes["test"]} == {2 * 2}
    looks = rows("looked/validation.jsonl")
    assert [(row["step"], row["n"]) for row in looks] == [(step, 16) for step in range(4)]


def test_a_run_that_stopped_before_its_first_checkpoint_looks_at_step_0_once(folders, here):
    cfg = {**grpo.TOY, **SMALL, "model": folders("llama"), "steps": 1, "eval_every": 1}
    grpo.train(grpo.Config(**cfg, out_dir="new"))
    Path("new/checkpoint.pt").unlink()
    grpo.train(grpo.Config(**cfg, resume="new"))
    assert [row["step"] for row in rows("new/validation.jsonl")] == [0, 1]


def test_the_first_step_warns_of_equal_scores_and_of_short_answers(folders, props, here, capsys):
    for i, (reward, longest, words) in enumerate((
            ("longer", 60, []), ("equal", 60, ["scores are equal"]),
            ("longer", 2, ["--max_new_tokens"]))):
        grpo.train(grpo.Config(**{**grpo.TOY, **SMALL, "model": folders("llama", hostile=True),
                                  "reward": f"{props}/judges.py:{reward}", "out_dir": str(i),
                                  "max_new_tokens": longest}))
        said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        assert len(said) == len(words) and all(word in said[0] for word in words)


# -------------------------------------------------------------------------- what comes between

def test_a_run_that_blows_up_goes_on_with_a_smaller_learning_rate(folders, here, capsys):
    """What it has saved is from before: no weights are infinite."""
    error = refused(capsys, grpo, *TYPED, "--model", folders("llama"), "--minibatch_size", 99,
                    "--lr", 1e39, "--out_dir", "large", code=1)
    assert "--lr" in error and not Path("large/model").exists()
    enter(grpo, "--resume", "large", "--lr", 1e-3, train=grpo.train)
    assert steps("large") == [1, 2]


@pytest.mark.parametrize("full", ["config.json", "metrics.jsonl", "checkpoint.pt", "model"])
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(here, capsys, full):
    """For a program, it is as if a file could not be longer than so many bytes."""
    def fill(method):
        def wrapped(run, name, *args, **fields):
            if name == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            return method(run, name, *args, **fields)
        return wrapped

    resource = pytest.importorskip("resource")
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), files("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "replace", fill(Run.replace))
        patch.setattr(Run, "write", fill(Run.write))
        try:
            error = refused(capsys, grpo, "--resume", "run", "--steps", 3, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full in error or (full == "metrics.jsonl" and "too large" in error)
    for name in files("run"):
        assert name.name != full and full not in name.parts or (
            files("run")[name].startswith(before[name]))
    enter(grpo, "--resume", "run", "--steps", 3, train=grpo.train)
    assert steps("run") == [1, 2, 3]


def test_of_two_processes_with_one_folder_one_is_refused(here, folders, capsys):
    """Also where neither saw the other's folder when it looked."""
    here.setattr(os.path, "lexists", lambda path: False)
    here.setattr(os.path, "exists", lambda path: False)
    before, flags = files("run"), ["--model", folders("llama"), "--out_dir", "run"]
    assert "--out_dir" in refused(capsys, grpo, *TYPED, *flags) and files("run") == before


GROUP = "import os, runpy, sys; os.setpgid(0, 0); sys.argv = sys.argv[1:]; runpy.run_path(" \
        "sys.argv[0], run_name='__main__')"


@pytest.mark.parametrize("number, judge", [
    (signal.SIGINT, "program"), (signal.SIGINT, "pool"), (signal.SIGTERM, "program")])
def test_signals_end_a_run_at_once_and_the_printed_command_goes_on(here, props, number, judge):
    """A terminal sends Ctrl-C to all processes of the command: what they answer then is no score.
    SIGTERM has its usual effect."""
    flags = ["--model", props / "m", "--data", props / "sums.jsonl", "--out_dir", "my run"]
    process = warm.start(["-c", GROUP, ROOT / "grpo.py", *TYPED, *flags, "--reward",
                          props / f"judges.py:{judge}"], Path.cwd(), Path("screen").absolute())
    while not Path("judging").exists():
        assert process.is_alive(), Path("screen").read_text()
        time.sleep(0.01)
    time.sleep(0.5)  # else Python may miss it, on its way into the wait
    os.killpg(process.pid, number)
    process.join(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of it
    screen, command = Path("screen").read_text(), ["--resume", str(Path("my run").absolute())]
    assert not Path("my run/metrics.jsonl").exists() and Path("my run/config.json").exists()
    assert process.exitcode == (130 if number == signal.SIGINT else -number), screen
    assert ("\nerror: stopped\n" in screen) == (number == signal.SIGINT), screen
    assert "Traceback" not in screen or judge == "pool"  # of its workers
    if number == signal.SIGINT:
        words = shlex.split(screen.splitlines()[-1].partition("checkpoint: ")[2])
        assert words == ["python", str(ROOT / "grpo.py"), *command]
    warm.call(ROOT / "grpo.py", *command, "--reward", props / "judges.py:longer", cwd=Path.cwd())
    assert steps("my run") == [1, 2]


def test_a_screen_that_nobody_reads_any_more(here, props):
    """As in `python grpo.py | head -1`: one sentence. The process imports all itself, as a user's
    does, and prints no warning."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *TYPED, "--steps", "999", "--model",
         str(props / "m"), "--data", str(props / "sums.jsonl"), "--out_dir", "unread"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("data ")
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1 and not Path("unread/model").exists(), said
    assert said.count("error: ") == said.count("to go on") == 1
    assert not any(word in said.lower() for word in ("warning", "traceback", "ignored"))
