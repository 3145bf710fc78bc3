"""The toy: its problems, files and policy. FULL=1 trains the policy anew, for two minutes."""
import json
import os
import re
import zlib
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_folder, to_problems

import sft
from plumbing import data, toy
from plumbing.evaluation import evaluate
from plumbing.model import load_policy
from plumbing.offline import make_batch
from plumbing.rollout import to_texts
from plumbing.toy_model import make_tokenizer


def work(prompt):
    """The lines of work that a toy prompt asks for: 8+9-5= -> 8+9=17, 17-5=12."""
    total, *terms = re.findall("[+-]?[0-9]+", prompt)
    lines = []
    for term in terms:
        lines.append(f"{total}{term}={eval(total + term)}")
        total = lines[-1].partition("=")[2]
    return lines


def home(prompt):
    return {0: "test", 1: "validation"}.get(zlib.crc32(prompt.encode()) % 8, "train")


@pytest.mark.parametrize("kind", toy.KINDS)
def test_problems_are_right_and_their_splits_never_overlap(kind):
    for split in ("train", "validation", "test"):
        rows = toy.problems(kind, split, 300)
        assert rows == toy.problems(kind, split, 300) and len(rows) == 300  # always the same
        for row in rows:
            chain = re.sub("[^0-9+-]", "", row["prompt"])
            assert str(eval(chain)) == row["answer"] == re.findall("[0-9]+", row["completion"])[-1]
            text = row["completion"].replace(" ", "").replace("\n", ",")
            assert text in (",".join(work(chain)), row["answer"])
            assert all(0 <= int(step.rpartition("=")[2]) <= 50 for step in work(chain))
            assert home(f"{chain}=") == split
        assert 0.35 < sum("=" in row["completion"] for row in rows) / len(rows) < 0.65
        assert split == "train" or len({row["prompt"] for row in rows}) == len(rows)


def grade(prompt, text):
    """1 for a right answer, and up to a half for the lines that are right, each in its place."""
    lines, result = work(prompt), re.fullmatch("(?:.*=)?([0-9]+)", text)  # what follows the last =
    right = bool(result) and result[1] == str(eval(prompt[:-1]))
    return right + sum(a == b for a, b in zip(lines, text.split(","))) / len(lines) / 2


@pytest.mark.parametrize("wanted", ["pair", "ranking"])
def test_in_the_files_the_better_comes_first_and_every_prompt_is_in_its_split(wanted):
    for split, rows in data.read("toy", 8, wanted).items():
        for row in rows:
            prompt = row["prompt"]
            assert re.fullmatch(r"\d([+-]\d){1,4}=", prompt) and home(prompt) == split
            assert row["answer"] == work(prompt)[-1].partition("=")[2]
            texts = data.to_problem(row, wanted, split == "train", split)["completions"]
            grades = [grade(prompt, text) for text in texts]
            assert grades == sorted(grades, reverse=True) and len(set(texts)) == len(texts)
            right = [grade >= 1 for grade in grades]
            assert len(texts) in (0, 4) if wanted == "ranking" else right in ([], [True, False])
            assert not texts or grades[0] > grades[-1]
        if split != "train":  # the problems that every script is tested on, some with completions
            assert [row["prompt"] for row in rows] == [
                row["prompt"] for row in toy.problems("toy", split, 512)]


def test_a_character_is_a_token():
    text = "0123456789+-=,"
    for one in (make_tokenizer(), transformers.AutoTokenizer.from_pretrained(toy.POLICY)):
        assert one(text).input_ids == list(range(4, 18)) and one.decode(range(4, 18)) == text
        assert (one.pad_token_id, one.bos_token_id, one.eos_token_id) == (0, 1, 2)


def test_which_models_are_the_toys(tmp_path, monkeypatch):
    """Those with its tokens: they decide the default flags. A name of the hub is none."""
    own, more = save_folder(tmp_path / "own"), save_folder(tmp_path / "more", text=True)
    (tmp_path / "run").mkdir()
    Path(own).rename(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [None, toy.POLICY, "run", "run/model", "~/run", more, "nobody/nothing"]
    assert [toy.is_toy(name) for name in names] == [True] * 5 + [False] * 2


def check_policy(found):
    """It shows its work half of the time, and is right more often where it is greedy."""
    assert 0.5 < found["sampled"][0] < 0.75 < found["greedy"][0]
    assert 0.4 < found["shows_work"][0] < 0.65


def test_the_toys_policy_is_as_good_as_it_was():
    policy, tokenizer = load_policy(None, "cpu")
    assert sum(parameter.numel() for parameter in policy.parameters()) == 162_496
    problems = to_problems(toy.problems("toy", "test", 128), tokenizer)
    check_policy(evaluate(policy, tokenizer, problems, sft.Config(**{**sft.TOY, "data": "toy"})))


def test_sft_still_makes_a_policy_that_is_as_good(tmp_path, monkeypatch, request):
    """From nothing. Without FULL=1 it takes the first steps only."""
    monkeypatch.chdir(tmp_path)
    short = {} if "FULL" in os.environ else dict(steps=20, eval_prompts=16)
    if short:
        request.getfixturevalue("few_problems")
    sft.train(sft.Config(**{**sft.TOY, "device": "cpu", "out_dir": "run", **short}))
    found = json.loads(Path("run/test.json").read_text())
    assert found["after"]["nats"][0] < found["before"]["nats"][0] * (0.75 if short else 0.08)
    if not short:
        check_policy(found["after"])


@pytest.mark.parametrize("text, marks", [
    ("8+9=17,17-5=12", [(6, 1.0), (13, 1.0)]),
    ("8+9=18,18-5=13", [(6, 0.0), (13, 0.0)]),       # a wrong step, and one that builds on it
    ("17-5=12,8+9=17", [(7, 0.0), (13, 0.0)]),       # right lines in the wrong order
    ("12", [(1, 0.0)]), ("", []), ("8+9=17,", [(6, 1.0)]), (",,8+9=17", [(7, 1.0)])])
def test_a_step_is_right_if_it_is_the_next_line_of_the_work(text, marks):
    assert toy.check_steps("8+9-5=", text) == marks


@pytest.mark.parametrize("tokens, finished, rewards, ends", [  # of 8+9-5=; the outcome is 9
    ([*"8+9=17,17-5=12"], True, [1, 9], [6, 14]),              # 14: the EOS
    ([*"8+9=16,16-5=11"], True, [0, 9], [6, 14]),
    ([*"12"], True, [9], [2]),                                 # answers directly
    ([], True, [9], [0]),                                      # the EOS at once
    ([*"8+9=17,1"], False, [1, 9], [6, 7]),                    # cut short
    (["<bos>", *"8+9=17,12"], True, [0, 9], [7, 10]),
    ([*"8+9=17,", "<unk>", *"12"], True, [1, 9], [6, 10]),
    ([*"8+9=17,8+9=17,3"], True, [1, 0, 9], [6, 13, 15]),      # a step said twice
    ([*"8+9=17,17-5=12,12"], True, [1, 0, 9], [6, 14, 17])])   # the result once more: not paid
def test_step_rewards_and_the_tokens_where_they_end(tokenizer, tokens, finished, rewards, ends):
    """Beside a longer row, so that there is padding."""
    ids = [tokenizer.convert_tokens_to_ids(tokens) + [2] * finished, [7] * 20]
    batch = make_batch([[5]], ids, "cpu")
    batch.finished = torch.tensor([finished, False])
    found = toy.score_steps([dict(prompt="8+9-5=")], batch, to_texts(tokenizer, batch),
                            torch.tensor([9.0, 0]))
    assert found == ([rewards, [0.0]], [ends, [19]])
