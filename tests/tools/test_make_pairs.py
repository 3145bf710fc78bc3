"""tools/make_pairs.py: pairs and rankings of a policy's own answers."""
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl

import dpo
from plumbing import command_line, toy
from plumbing.data import load_problems, read_jsonl
from plumbing.model import load_policy
from plumbing.rewards import last_number
from tools import make_pairs

SHOWN = ["--rankings", "--reward", f"{Path(make_pairs.__file__)}:shown_work"]


def make(monkeypatch, folder, *flags):
    """`python -m tools.make_pairs --out_dir FOLDER FLAGS` -> rows of training, validation, test."""
    monkeypatch.setattr(sys, "argv", ["make_pairs.py", "--out_dir", str(folder), "--device", "cpu",
                                      *flags])
    command_line.main(make_pairs.Config, make_pairs.TOY, make_pairs.make)
    return [read_jsonl(Path(folder, f"{split}.jsonl")) for split in ("train", "validation", "test")]


@pytest.mark.parametrize("wanted, there, flags", [
    ("pair", toy.PAIRS, []), ("ranking", toy.RANKINGS, SHOWN)], ids=["pairs", "rankings"])
def test_the_toys_data_are_made_again(tmp_path, monkeypatch, few_problems, wanted, there, flags):
    """The first 64 training prompts, to the letter. Each held-out prompt is a row, also alone."""
    rows = make(monkeypatch, tmp_path / "made", *flags, "--prompts", "64", "--eval_prompts", "40")
    made, known = ((folder / "train.jsonl").read_bytes() for folder in (tmp_path / "made", there))
    assert known.startswith(made) and len({row["prompt"] for row in rows[0]}) > 20
    for split, part in zip(("validation", "test"), rows[1:]):
        assert [row["prompt"] for row in part] == [
            row["prompt"] for row in toy.problems("toy", split, 40)]
    alone = [sum(len(row) == 2 for row in part) for part in rows]  # a prompt and an answer
    assert alone[0] == 0 and 0 < alone[1] < 40 and 0 < alone[2] < 40

    policy, tokenizer = load_policy(None, "cpu")
    cfg = dpo.Config(**{**dpo.TOY, "data": str(tmp_path / "made"), "eval_prompts": 40})
    problems = load_problems(cfg, policy, tokenizer, wanted)
    assert [len(part) for part in problems] == list(map(len, rows))
    assert {len(problem["completions"]) for problem in problems.train} == {4 if flags else 2}
    judge = make_pairs.shown_work if flags else last_number
    for problem in problems.train:
        scores = judge(prompts=[problem["prompt"]] * 4, completions=problem["completions"],
                       answer=[problem["row"]["answer"]] * 4, finished=[True] * 4)
        assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


def test_a_right_answer_beats_a_wrong_one_and_none_is_in_two_pairs():
    found = make_pairs.to_pairs([("a", 0.0), ("b", 1.0), ("c", 0.4), ("d", 0.6), ("e", 0.5)])
    assert found == [dict(chosen="b", rejected="a"), dict(chosen="d", rejected="c")]
    assert make_pairs.to_pairs([("a", 1.0), ("b", 1.0)]) == make_pairs.to_pairs([]) == []


def test_a_ranking_has_four_different_answers_best_first():
    scored = [("a", 0.0), ("b", 1.0), ("b", 1.0), ("c", 0.0), ("d", 0.0), ("e", 2.0)]
    orders = [make_pairs.to_rankings(scored, prompt)[0]["completions"] for prompt in range(20)]
    assert all(order[0] == "b" and sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len(set(map(tuple, orders))) > 1  # the order of equals is one of chance
    assert make_pairs.to_rankings(scored[:4], 0) == []
    assert make_pairs.to_rankings([(text, 1.0) for text in "abcd"], 0) == []


def test_another_reward_and_data(tmp_path, monkeypatch):
    """Columns are kept, but completions that the data had; the longer answer is the better one."""
    (tmp_path / "long_answers.py").write_text(
        "def long(completions, **columns):\n    return [len(text) for text in completions]\n")
    data = write_jsonl(tmp_path / "own.jsonl", [
        dict(prompt=f"{i}+{i + 1}-1=", note=i, completion="1") for i in range(9)])
    flags = ["--data", data, "--reward", f"{tmp_path}/long_answers.py:long", "--group_size", "4"]
    rows = sum(make(monkeypatch, tmp_path / "made", *flags), [])
    assert all(row["note"] == int(row["prompt"][0]) and "completion" not in row for row in rows)
    pairs = [row for row in rows if len(row) == 4]
    assert len(pairs) > 9 and all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
