"""What a user types: --help, wrong flags, defaults, flags of --resume; and how a failure ends."""
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

from plumbing import command_line, toy
from plumbing.run import Run

SCRIPTS = {name: importlib.import_module(name) for name in (
    "reinforce reinforce_pp ppo trpo remax rloo grpo prime raft sft reward_model dpo orpo").split()}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
grpo, sft = SCRIPTS["grpo"], SCRIPTS["sft"]


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(Run, "unfinished", None)


def enter(script, *flags, train=None, file=None):
    """What `python SCRIPT.py FLAGS` does, in this process -> the config that train() gets."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file or f"{script.__name__}.py", *map(str, flags)])
        patch.setitem(sys.modules, "__main__", script)
        command_line.main(script.Config, script.TOY, lambda cfg: (seen.append(cfg),
                                                                  (train or str)(cfg)))
    return seen[0]


def refused(capsys, script, *flags, code=2, train=None):
    """The one sentence on stderr; nobody sees a traceback, whose last line has the word error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        enter(script, *flags, train=train or script.train)
    lines = re.split("[\r\n]+", capsys.readouterr().err)  # with those of the progress bar
    (error,) = [line for line in lines if "error" in line.lower()]
    assert stop.value.code == code and error.startswith("error: ")
    return error


# ------------------------------------------------------------------------------------ what is typed

@each_script
def test_help_shows_the_docstring_and_each_flag_with_both_defaults(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "9999")
    with pytest.raises(SystemExit) as stop:
        enter(script, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__.strip() in text
    entries = re.split(r"\n  (?=-)", text.partition("options:")[2])[2:]
    shown = {entry.split()[0].strip(","): " ".join(entry.split()) for entry in entries}
    flags = [field for field in dataclasses.fields(script.Config) if field.init]
    assert list(shown) == [f"--{flag.name}" for flag in flags]
    for flag in flags:
        toys = f"; toy: {script.TOY[flag.name]}" if flag.name in script.TOY else ""
        assert shown[f"--{flag.name}"].endswith(
            f" {flag.metadata['help']} (default: {flag.default}{toys})")


@pytest.mark.parametrize("flags, words", [
    ("--learning_rate 1", "--learning_rate"), ("--temp 1", "--temp"), ("runs/grpo", "runs/grpo"),
    ("--steps many", "--steps"), ("--steps 1.5", "--steps"), ("--steps", "--steps"),
    ("--lr", "--lr"), ("--process maybe", "--process"), ("--resume", "--resume")])
def test_what_is_no_flag_or_no_value_is_one_sentence(capsys, flags, words):
    error = refused(capsys, grpo, *flags.split(), train=lambda cfg: pytest.fail("it began"))
    assert words in error and "--help" in error


@each_script
def test_defaults_are_the_toys_where_the_model_is_the_toys(script, tmp_path, folders):
    """No --model, or one with the toy's tokens; --data does not decide, and what is typed stays."""
    real, toys = folders("llama", text=True), folders("gpt2")
    for name, model in (("run", toys), ("real", real)):  # a run folder stands for the model in it
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(model)
    for defaults, typed in (
            (script.TOY, {}), (script.TOY, dict(model=str(toy.POLICY))),
            (script.TOY, dict(model=toys, eval_prompts=3)), (script.TOY, dict(data="words")),
            (script.TOY, dict(model=f"{tmp_path}/run")), ({}, dict(model=real, eval_prompts=3)),
            ({}, dict(model=real, data="toy")), ({}, dict(model=f"{tmp_path}/real")),
            ({}, dict(model="someone/nothing"))):
        flags = [f"--{key}={value}" for key, value in typed.items()]
        assert enter(script, *flags) == script.Config(**{**defaults, **typed}), flags


# --------------------------------------------------------------------------- the flags of --resume

def test_resume_has_the_flags_of_the_run_and_what_is_typed_wins(tmp_path, monkeypatch):
    """Of the toy and of other models; from another folder; ~ is the home folder."""
    saved = dict(vars(grpo.Config(model="some/model", steps=7, lr=0.5, process=True)))
    (tmp_path / "config.json").write_text(json.dumps(dict(saved, script="grpo", checksum=1)))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for folder in (str(tmp_path), f"~/{tmp_path.name}"):
        assert vars(enter(grpo, "--resume", folder)) == dict(saved, resume=folder)
        cfg = enter(grpo, "--resume", folder, "--save-every", 3, "--steps=9", "--process", "False")
        assert cfg == grpo.Config(model="some/model", lr=0.5, steps=9, save_every=3, resume=folder)


@pytest.mark.parametrize("text", [
    None, "", '{"lr": 1', "[1]", "null", '{"lr": 1.0}', '{"script": "sft"}', "\xff",
    '{"script": "dpo", "checksum": 1, "beta": 0.1}', '{"script": "sft", "checksum": 1, "lr": "x"}'])
def test_a_folder_without_a_config_of_this_script_is_refused(tmp_path, capsys, text):
    """No file, torn, another shape, flags of another script, a value that is none."""
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    error = refused(capsys, sft, "--resume", tmp_path, train=lambda cfg: pytest.fail("it began"))
    assert "--resume" in error or "--lr" in error


def test_a_home_folder_that_is_not_there_is_one_sentence(tmp_path, monkeypatch, capsys):
    """Of no user; with --out_dir, "~no_such_user" may also be a name like any other."""
    monkeypatch.chdir(tmp_path)
    for flag in ("--resume", "--model"):
        assert flag in refused(capsys, grpo, flag, "~no_such_user/x")
    with contextlib.suppress(SystemExit):
        Run.make(SimpleNamespace(name="grpo"), "~no_such_user/x")


# ------------------------------------------------------------------------------ how a failure ends

def failing(error, folder):
    """A train() that begins a run in the folder, if there is one, and fails."""
    def train(cfg):
        Run.unfinished = folder
        if isinstance(error, BaseException):
            raise error
        error()
    return train


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "stopped"), (OSError(28, "No space left on device"), 1, "No space"),
    (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1, "--micro_batch_size 48"),
    (lambda: torch.empty(2**58), 1, "--micro_batch_size 48")])
def test_a_failure_is_one_sentence_and_the_command_that_goes_on(capsys, error, code, words):
    """The command survives a copy from the screen. Before the run has a folder, there is none."""
    for folder in (None, "/my runs/a"):
        with pytest.raises(SystemExit) as stop:
            enter(grpo, "--micro_batch_size", 48, train=failing(error, folder), file="my dir/g.py")
        sentence, *command = capsys.readouterr().err.splitlines()
        assert stop.value.code == code and sentence.startswith("error: ") and words in sentence
        assert [shlex.split(line.partition("point: ")[2]) for line in command] == [
            ["python", "my dir/g.py", "--resume", folder]] * (folder is not None)


def test_an_error_of_ours_shows_itself_and_a_run_that_ends_well_prints_nothing(capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        enter(grpo, train=failing(RuntimeError("a bug"), "runs/a"))
    assert capsys.readouterr().err.endswith("python grpo.py --resume runs/a\n")
    enter(grpo, train=failing(str, None))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", None])
def test_a_screen_that_lacks_a_character_or_is_closed(monkeypatch, encoding):
    """The character is written as its number, and all others as they are."""
    screens = [encoding and io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", screens[0]), monkeypatch.setattr(sys, "stderr", screens[1])
    enter(grpo, train=lambda cfg: (print("2 \U0001f34e"), print("3 \u7b54", file=sys.stderr)))
    for screen, text in zip(screens, (b"2 \\U0001f34e\n", b"3 \\u7b54\n")):
        if screen:
            screen.flush()
            assert screen.buffer.getvalue() == text
