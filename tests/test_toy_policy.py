"""toy_policy/, from which every script starts: what `python sft.py` makes, and as good as it was.

FULL=1 python -m pytest tests/test_toy_policy.py      the whole training once more: some two minutes
"""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch

import dpo
import reinforce_pp
import sft
from conftest import to_problems
from plumbing import toy
from plumbing.data import encode_completions
from plumbing.evaluation import evaluate
from plumbing.model import load_policy

FULL = bool(os.environ.get("FULL"))


def look(model, n):
    """How a policy fares on n held-out problems, and what their demonstrations cost."""
    policy, tokenizer = load_policy(model, "cpu")
    problems = to_problems(toy.problems("toy", "test", n), tokenizer)
    encode_completions(problems, tokenizer)
    cfg = SimpleNamespace(data="toy", device="cpu", max_new_tokens=32, micro_batch_size=64)
    return evaluate(policy, tokenizer, problems, cfg)


def test_it_shows_its_work_half_of_the_time_and_is_right_more_often_when_asked_for_its_best():
    found = look(None, 512 if FULL else 128)
    assert 0.5 < found["sampled"][0] < 0.75 and found["greedy"][0] > 0.75
    assert 0.4 < found["shows_work"][0] < 0.65 and 1.2 < found["nats"][0] < 2


def test_it_is_an_ordinary_model_folder_and_small():
    policy, tokenizer = load_policy(None, "cpu")
    assert sum(p.numel() for p in policy.parameters()) == 162_496
    assert tokenizer.get_vocab() == toy.make_tokenizer().get_vocab()
    wanted = toy.make_model(0)
    assert {key: p.shape for key, p in policy.state_dict().items()} == {
        key: p.shape for key, p in wanted.state_dict().items()}
    for key in ("rope_parameters", "max_position_embeddings", "eos_token_id"):
        assert getattr(policy.config, key) == getattr(wanted.config, key)
    text = "8+9-5="
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert sum(path.stat().st_size for path in toy.POLICY.iterdir()) < 700_000


def test_sft_still_makes_a_policy_that_is_as_good(tmp_path, monkeypatch):
    """With FULL=1 the whole recipe; else its first steps, from which the demonstrations cost as
    little as they did when the file was made, 11 nats instead of 32."""
    monkeypatch.chdir(tmp_path)
    settings = {} if FULL else dict(steps=60, eval_prompts=64)
    sft.train(sft.Config(device="cpu", out_dir="run", **settings))
    found = json.loads(Path("run/test.json").read_text())["after"]
    if not FULL:
        assert found["nats"][0] < 13
        return
    kept = look(None, 512)
    assert found["sampled"][1] < kept["sampled"][2] and kept["sampled"][1] < found["sampled"][2]
    assert found["greedy"][0] > kept["greedy"][0] - 0.1
    assert found["nats"][0] < kept["nats"][0] + 0.3


def test_a_script_without_a_model_starts_from_it_and_names_no_path(tmp_path, monkeypatch, capsys):
    """So that a clone that has moved can still resume."""
    monkeypatch.chdir(tmp_path)
    start = load_policy(None, "cpu")[0].state_dict()
    flags = dict(data="toy", device="cpu", steps=1, lr=0.0, minibatch_size=8, micro_batch_size=8,
                 max_new_tokens=32, eval_prompts=8)
    reinforce_pp.train(reinforce_pp.Config(**flags, prompts_per_step=8, out_dir="online"))
    dpo.train(dpo.Config(**flags, prompts=32, out_dir="pairs"))
    for name in ("online", "pairs"):
        end = load_policy(name, "cpu")[0].state_dict()
        assert all(torch.equal(start[key], end[key]) for key in start)
        assert json.loads(Path(name, "config.json").read_text())["model"] is None
    screen = capsys.readouterr()
    assert str(toy.POLICY.parent) not in screen.out + screen.err
