"""Rewards: built in, one's own, and what may go wrong with them."""
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rewards
from conftest import make_model, seeded, to_problems
from rollout import make_batch, sample


def test_texts_are_without_the_eos_that_ended_them(tokenizer):
    """Also where that EOS is an ordinary token, here "3" (id 7), and last_number would count it."""
    batch = make_batch([[5]] * 3, [[5, 6, 2], [5, 6, 7], [5, 7, 6]], "cpu")
    batch.finished = torch.tensor([True, True, False])
    assert rewards.decode(tokenizer, batch) == ["12", "12", "132"]


@pytest.mark.parametrize("text, answer, finished, expected", [
    ("1+2=3", "3", True, 1.0), ("1+2=3", "3", False, 0.0), ("it is -4.50", "-4.5", True, 1.0),
    ("3", "3.0", True, 1.0), ("12 or 3", "12", True, 0.0), ("none", "3", True, 0.0),
    ("", "3", True, 0.0), ("the answer is 7.", "7", True, 1.0), ("7-3=4", "4", True, 1.0)])
def test_last_number(text, answer, finished, expected):
    columns = dict(answer=[answer], finished=[finished], other=[1])
    assert rewards.last_number(["?"], [text], **columns) == [expected]


def test_score_hands_each_completion_its_own_problem(tokenizer):
    """A reward that returns its problem's column: group i must get row i's, K times."""
    batch = sample(make_model("llama"), tokenizer, [[5], [6, 7], [8]], 4, 3, 1.0, seeded())
    problems = to_problems([dict(prompt=str(i), value=i) for i in range(3)])
    seen = {}

    def reward(prompts, completions, value, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [float(v) for v in value]

    texts, scores, each = rewards.score(dict(mine=reward), problems, batch, tokenizer)
    assert scores.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and each == {}
    assert seen["prompts"] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert seen["completions"] == texts == rewards.decode(tokenizer, batch)
    assert seen["finished"] == batch.finished.tolist() and "ids" not in seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_a_number_stops_the_run(tokenizer, capsys, value):
    batch = sample(make_model("llama"), tokenizer, [[5]], 3, 3, 1.0, seeded())
    mine = dict(mine=lambda *a, **k: [0.0, value, 1.0])
    with pytest.raises(SystemExit) as stop:
        rewards.score(mine, to_problems([dict(prompt="")]), batch, tokenizer, 4)
    error, text = capsys.readouterr().err, rewards.decode(tokenizer, batch)[1]
    assert stop.value.code == 2 and repr(text) in error
    assert f"--reward mine in step 5 gave {value}" in error


# ------------------------------------------------------------------ one's own

GOOD = """
from pathlib import Path

from helper_of_rewards import weight

def short(prompts, completions, **columns):
    return [-weight * len(text) for text in completions]

def named(prompts, completions, level, **columns):
    return level

def tensor(prompts, completions, **columns):
    import torch
    return torch.ones(len(prompts))

with Path("count").open("a") as file:
    file.write("x")
"""
BAD = """
import math

def few(prompts, completions, **columns):
    return [1.0]

def nothing(prompts, completions, **columns):
    pass

def nan(prompts, completions, **columns):
    return [math.nan] * len(prompts)

def words(prompts, completions, **columns):
    return ["good"] * len(prompts)

def none(prompts, completions, **columns):
    return [None] * len(prompts)

def asks(prompts, completions, solution, **columns):
    return [1.0] * len(prompts)

def raises(prompts, completions, **columns):
    return [{}["a"] for _ in prompts]

seven = 7
"""
ROWS = [dict(prompt="1+2=", answer="3", level=4), dict(prompt="2+2=", answer="4", level=5),
        dict(prompt="3", answer="3")]


def load(spec, rows=ROWS):
    return rewards.load_rewards(SimpleNamespace(reward=spec), to_problems(rows))


def test_rewards_of_ones_own(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "helper_of_rewards.py").write_text("weight = 2")  # beside it, as imports go
    several = load("last_number,mine.py:short, mine.py:named,mine.py:tensor", ROWS[:2])
    assert list(several) == ["last_number", "short", "named", "tensor"]
    assert Path("count").read_text() == "x"  # the file runs once
    batch = make_batch([[5], [6]], [[7, 2], [8, 8]], "cpu")
    batch.finished = torch.tensor([True, False])
    texts, scores, each = rewards.score(several, to_problems(ROWS[:2]), batch, tokenizer)
    assert texts == ["3", "44"]
    assert scores.tolist() == [1 - 2 + 4 + 1, 0 - 4 + 5 + 1]
    assert {k: v.item() for k, v in each.items()} == dict(
        reward_last_number=0.5, reward_short=-3.0, reward_named=4.5, reward_tensor=1.0)


def test_a_reward_that_spoils_its_arguments_spoils_them_for_itself_alone(tokenizer):
    def spoil(prompts, completions, finished, completion_ids, **columns):
        finished.clear(), completions.clear(), completion_ids[0].clear()
        return [0] * len(prompts)

    def count(prompts, completions, finished, completion_ids, **columns):
        return [len(text) + 10 * done + 100 * len(ids)
                for text, done, ids in zip(completions, finished, completion_ids)]

    batch = make_batch([[5], [6]], [[7, 2], [8, 8]], "cpu")
    batch.finished = torch.tensor([True, False])
    judges = dict(spoil=spoil, count=count)
    assert rewards.score(judges, to_problems(ROWS[:2]), batch, tokenizer)[1].tolist() == [211, 202]


def test_what_a_reward_is_given(tokenizer):
    """All columns of the data, None where a row lacks one, and never a second `completions`."""
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns)
        return [0] * len(prompts)

    names = ("completions", "prompts", "finished", "completion_ids", "ids", "targets", "step",
             "score", "name", "row", "columns", "self", "two words")
    problems = to_problems([dict(ROWS[0], **dict.fromkeys(names, 7)), *ROWS[1:]])
    batch = make_batch([[5], [6]], [[7, 2], [8, 8, 8]], "cpu")
    batch.finished = torch.tensor([True, False])
    rewards.score(dict(r=reward), [problems[1], problems[2]], batch, tokenizer)
    assert seen == {**dict.fromkeys(names[4:], [None, None]), "answer": ["4", "3"],
                    "level": [5, None], "finished": [True, False],
                    "completion_ids": [[7, 2], [8, 8, 8]]}


@pytest.mark.parametrize("spec, words", [
    ("bad.py:few", ["few", "1 scores for 2 completions"]),
    ("bad.py:nothing", ["nothing returned None", "list of numbers"]),
    ("bad.py:nan", ["nan gave nan to the completion '1' of the prompt '1+2='"]),
    ("bad.py:words", ["words gave good to the completion '1'"]),
    ("bad.py:none", ["none gave None"]),
    ("bad.py:asks", ["TypeError", "solution",
                      "by keyword, with prompts, completions, answer, level, finished"]),
    ("bad.py:raises", ["KeyError: 'a'", "line 23 of bad.py"]),
    ("bad.py:seven", ["no function seven", "few"]),
    ("bad.py:eight", ["no function eight", "few"]),
    ("torn.py:f", ["SyntaxError", "torn.py, line 2"]),
    ("lost.py:f", ["ModuleNotFoundError", "no_such_module"]),
    ("gone.py:f", ["no Python file gone.py"]), ("notes.txt:f", ["no Python file notes.txt"]),
    ("last_numbers", ["no such reward", "last_number", "file.py:function"]),
    ("", ["no such reward"]),
    ("last_number,last_number", ["two are called last_number"])])
def test_rewards_that_will_not_do(tmp_path, monkeypatch, capsys, spec, words):
    monkeypatch.chdir(tmp_path)
    texts = dict(bad=BAD, torn="x = 1\ndef f(:\n", lost="import no_such_module")
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "notes.txt").write_text("def f(): pass")
    with pytest.raises(SystemExit) as stop:
        load(spec)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --reward") and error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize("answer", [
    "blue", None, "12 apples", "1,23", math.nan, math.inf, "nan", True, "1/0", "#### so"])
def test_last_number_wants_numbers_for_answers(capsys, answer):
    load("last_number", [dict(ROWS[0], answer=value) for value in (
        "1,234", 5, " -0.5 ", 1e22, "\u22125", "1/2", ".5", "so ...\n#### 1,200", "4e3")])
    with pytest.raises(SystemExit):
        load("last_number", ROWS + [dict(ROWS[0], answer=answer)])
    error = capsys.readouterr().err
    assert "1 of 4 answers" in error and repr(str(answer)) in error and "--data" in error


@pytest.mark.parametrize("text, number", [
    ("so 1,234", 1234), ("1,234,567.5", 1234567.5), ("$12,345.", 12345), ("-1,234", -1234),
    ("17,17-5=12,12-8=4", 4), ("8+9=17,170", 17170), ("1, 234", 234)])
def test_thousands_commas_only_in_their_form(text, number):
    assert rewards.last_number(["?"], [text], answer=[number], finished=[True]) == [1.0]
    assert rewards.last_number(["?"], [text], answer=[number + 1], finished=[True]) == [0.0]


# ------------------------------------------------------------------------------ process supervision

STEPS = [  # a completion's tokens (characters, or specials), finished; rewards of its steps, and
    # where they end: the last step has the outcome, 9, and ends with the completion
    (["8", "+", "9", "=", "1", "7", ",", "1", "7", "-", "5", "=", "1", "2"], True, [1, 9], [6, 14]),
    (["8", "+", "9", "=", "1", "6", ",", "1", "6", "-", "5", "=", "1", "1"], True, [0, 9], [6, 14]),
    (["1", "2"], True, [9], [2]),                                          # answers directly
    ([], True, [9], [0]),                                                  # the EOS at once
    ([","], True, [9], [1]),
    (["8", "+", "9", "=", "1", "7", ",", "1"], False, [1, 9], [6, 7]),     # cut short
    (["<bos>", "8", "+", "9", "=", "1", "7", ",", "1", "2"], True, [0, 9], [7, 10]),
    (["8", "+", "9", "=", "1", "7", ",", "<bos>", "1", "2"], True, [1, 9], [6, 10]),
    (["8", "+", "9", "=", "1", "7", ",", "8", "+", "9", "=", "1", "7", ",", "3"], True, [1, 0, 9],
     [6, 13, 15]),                                                         # a step said twice
    ([*"8+9=17,17-5=12,12"], True, [1, 0, 9], [6, 14, 17])]    # the result once more: not paid


def test_steps_of_the_toy_and_where_they_end(tokenizer):
    eos = tokenizer.eos_token_id
    ids = [tokenizer.convert_tokens_to_ids(tokens) + [eos] * done for tokens, done, *_ in STEPS]
    batch = make_batch([[5]] * len(ids), ids, "cpu")
    batch.finished = torch.tensor([done for _, done, *_ in STEPS])
    problems, outcomes = [dict(prompt="8+9-5=")] * len(ids), torch.full((len(ids),), 9.0)
    decoded = rewards.decode(tokenizer, batch)
    step_rewards, step_ends = rewards.score_steps(problems, batch, decoded, outcomes, tokenizer)
    assert step_rewards == [row for _, _, row, _ in STEPS]
    assert step_ends == [row for *_, row in STEPS]


def test_steps_in_tokens_of_several_characters(tokenizer):
    """As a pretrained model has them: a step ends with the token that holds its last character."""
    from tokenizers import Tokenizer, decoders, models
    words = ["<eos>", "8+", "9=1", "7,17", "-5", "=", "12"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    inner.decoder = decoders.Fuse()
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    batch = make_batch([[5]], [[1, 2, 3, 4, 5, 6, 0]], "cpu")
    batch.finished = torch.ones(1, dtype=torch.bool)
    found = rewards.score_steps([dict(prompt="8+9-5=")], batch, rewards.decode(tokenizer, batch),
                                torch.ones(1), tokenizer)
    assert found == ([[1.0, 1.0]], [[2, 6]])


def test_steps_in_tokens_that_decode_otherwise_alone():
    """As of SentencePiece, whose first space goes: "▁9" is one character alone, two in a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    words = ["<eos>", "▁8", "▁+", "▁9", "=17,", "12"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    batch = make_batch([[5]], [[1, 2, 3, 4, 5, 0]], "cpu")
    batch.finished = torch.ones(1, dtype=torch.bool)
    assert rewards.decode(tokenizer, batch) == ["8 + 9=17,12"]
    found = rewards.score_steps([dict(prompt="8+9-5=")], batch, rewards.decode(tokenizer, batch),
                                torch.ones(1), tokenizer)
    assert found == ([[0.0, 1.0]], [[3, 5]])
