"""What a flag may be, and what a run works with: check() and the paths in flags."""
import dataclasses
from pathlib import Path

import pytest
from test_command_line import each_script, grpo

from plumbing import toy
from plumbing.flags import absolute, check, split_rewards

ABOVE_0 = set(  # all other numbers may be 0
    "steps max_grad_norm minibatch_size micro_batch_size max_new_tokens log_every eval_prompts "
    "save_every prompts_per_step group_size temperature epochs clip_eps value_clip delta "
    "fisher_fraction cg_iterations backtrack max_tries".split())
AT_MOST = dict(gamma=1, lam=1, decay=1, backtrack=1, fisher_fraction=1, accuracy_filter=0.5)


def config(script, **flags):
    return script.Config(**{**script.TOY, "device": "cpu", **flags})


def refusal(capsys, cfg, **more):
    """The one sentence with which it is refused; "" if it is not."""
    try:
        check(cfg, **more)
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return ""


@each_script
def test_the_range_of_every_number(script, capsys):
    """Of every flag of every script; and both kinds of defaults are in their range."""
    assert not refusal(capsys, script.Config(device="cpu")) + refusal(capsys, config(script))
    flags = {field.name for field in dataclasses.fields(script.Config) if field.init}
    numbers = {key for key, value in vars(config(script)).items() if key in flags
               and (type(value) in (int, float) or (key, value) == ("steps", None))}
    assert len(numbers) > 12 and set(script.TOY) <= flags
    for key in numbers:
        for value, fits in ((-1, False), (float("nan"), False), (0, key not in ABOVE_0),
                            (AT_MOST.get(key, 7), True), (1.5, key not in AT_MOST)):
            error = refusal(capsys, config(script, **{key: value}))
            assert (error == "") == fits and (fits or f"--{key} {value}" in error), (key, value)


@pytest.mark.parametrize("flag", [
    "model=", "data=", "reward=", "out_dir=", "resume=", "device=", "device=tpu", "device=cuda:99",
    "out_dir=empty", "out_dir=file", "out_dir=dangling", "out_dir=~/there"])
def test_what_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, flag):
    """Empty values, devices that are not there, folders of a run that are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "there").mkdir(parents=True)
    Path("empty").mkdir(), Path("file").touch(), Path("dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    key, value = flag.split("=")
    error = refusal(capsys, config(grpo, **{key: value}))
    assert f"--{key}" in error and value.strip("~/") in error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_refused_only_sometimes(tmp_path, capsys):
    """The folder of a run that goes on is there; a group is too small where answers compete."""
    cfg = config(grpo, resume=str(tmp_path), out_dir=str(tmp_path), group_size=2)
    assert not refusal(capsys, cfg) + refusal(capsys, cfg, min_group=2)
    assert "--group_size 2" in refusal(capsys, cfg, min_group=3)


def test_check_gives_a_copy_with_a_device_and_whole_paths(tmp_path, monkeypatch):
    """The config that the user has made stays as it was; what is no path stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("m").mkdir(), Path("sums.jsonl").touch(), Path("mine.py").touch(), Path("toy").mkdir()
    cfg = config(grpo, device=None, model="m", data="~/sums.jsonl",
                 reward="last_number,mine.py:f")
    before = dict(vars(cfg))
    checked = check(cfg)
    assert vars(cfg) == before and checked.device in ("cpu", "cuda")
    assert (checked.model, checked.data) == (f"{tmp_path}/m", f"{tmp_path}/sums.jsonl")
    assert checked.reward == f"last_number,{tmp_path}/mine.py:f"
    hub = check(config(grpo, model="someone/m", data="someone/set:main"))
    assert (hub.model, hub.data) == ("someone/m", "someone/set:main")
    Path("m/tokenizer.json").write_text((toy.POLICY / "tokenizer.json").read_text())
    data = [check(config(grpo, model=name)).data for name in (None, "m", "someone/m")]
    assert data == ["toy", "toy", "words"]  # whatever folders there are
    assert check(config(grpo, data="words")).data == "words"


def test_rewards_are_split_at_commas_that_are_not_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = str(tmp_path)
    for file in ("a,b/mine.py", "c:d/mine.py", "runs/judge", "mine.py", "x,y.py"):
        Path(file).parent.mkdir(parents=True, exist_ok=True), Path(file).touch()
    for spec, parts in {
            "last_number": ["last_number"], "mine.py:f": [f"{here}/mine.py:f"],
            "last_number, ~/mine.py:f": ["last_number", f"{here}/mine.py:f"],
            "runs/judge,mine.py:g,last_number": [f"{here}/runs/judge", f"{here}/mine.py:g",
                                                 "last_number"],
            "a,b": [f"{here}/a,b"], "a,b/mine.py:f": [f"{here}/a,b/mine.py:f"],
            "x,y.py:f": [f"{here}/x,y.py:f"], "c:d": [f"{here}/c:d"],
            "last_number,c:d/mine.py:f": ["last_number", f"{here}/c:d/mine.py:f"],
            "nope.py:f,nope": ["nope.py:f", "nope"]}.items():
        assert split_rewards(spec) == parts, spec
    assert absolute("nope") == "nope" and absolute("mine.py") == f"{here}/mine.py"
