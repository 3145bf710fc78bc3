"""Rewards: built in, one's own, and what may go wrong with them."""
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, make_model, seeded, to_problems
from plumbing import rewards, toy
from plumbing.rollout import make_batch, sample, to_texts


def test_texts_are_to_the_letter_but_for_the_eos_that_ended_them(tokenizer):
    """Also where that EOS is an ordinary token, here "3" (id 7), and last_number would count it."""
    batch = make_batch([[5]] * 3, [[5, 6, 2], [5, 6, 7], [5, 7, 6]], "cpu")
    batch.finished = torch.tensor([True, True, False])
    assert to_texts(tokenizer, batch) == ["12", "12", "132"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>7</think>8<bos>,<pad>").input_ids
    batch = make_batch([[5]] * 2, [ids + [2], ids + [0, 2, 2]], "cpu")
    batch.finished = torch.tensor([True, False])
    assert to_texts(tokenizer, batch) == [
        "<think>7</think>8<bos>,<pad>", "<think>7</think>8<bos>,<pad><pad><eos><eos>"]


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
    assert seen["completions"] == texts == to_texts(tokenizer, batch)
    assert seen["finished"] == batch.finished.tolist() and "ids" not in seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_a_number_stops_the_run(tokenizer, capsys, value):
    batch = sample(make_model("llama"), tokenizer, [[5]], 3, 3, 1.0, seeded())
    mine = dict(mine=lambda *a, **k: [0.0, value, 1.0])
    with pytest.raises(SystemExit) as stop:
        rewards.score(mine, to_problems([dict(prompt="")]), batch, tokenizer, 4)
    error, text = capsys.readouterr().err, to_texts(tokenizer, batch)[1]
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
    ("bad.py:nothing", ["nothing returned None", "list with one number"]),
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


@pytest.mark.parametrize("text, number", [
    (r"The total is \boxed{9{,}500}.", 9500), (r"$12\,345$", 12345), (r"\(42\)", 42),
    (r"\boxed{24 \text{ cm}^2}", 24), (r"45^\circ", 45), ("\uff18\uff0c\uff10\uff10\uff10", 8000),
    ("8\u202f000 s", 8000), ("12 345", 12345), ("1'000", 1000), ("The answer is \u22125.", -5),
    ("-$5", -5), ("x = - 5", -5), ("minus 5", -5), ("costs $.75", 0.75), ("1.5e3", 1500),
    ("1/2", 0.5), ("3 / 4", 0.75), ("US$5", 5), ("50%", 50), (r"50\%", 50), ("**42**.", 42),
    ("**Answer:** 42", 42), ("<answer>42</answer>", 42), ("24 cm\u00b2", 24), ("24 cm^2", 24),
    ("42km", 42), ("9.8m/s^2", 9.8), ("\u7b54\u6848\u662f42\u5143\u3002", 42), ("No.5", 5),
    ("Total: 3\n- 5 apples", 5), ("The answer is - 5", -5), ("24 m", 24),
    (r"-\boxed{5}", -5), ("minus **5**", -5), ("= \u2212\u00a05", -5), (r"-$\$5$", -5),
    ("-(5)", -5), ("\u20125", -5), ("\u20105", -5), ("1\u20442", 0.5), ("5\u066b5", 5.5),
    ("9 - 5 = 4", 4), ("2^3 = 8", 8), ("3, 4, 5", 5), ("(5)", 5)])
def test_a_number_is_read_as_models_write_it(text, number):
    assert rewards.last_number(["?"], [text], answer=[number], finished=[True]) == [1.0]


@pytest.mark.parametrize("text", [
    "0,5", "12,34", "1234,567", r"1{,}5", r"12\,34", "1.299,00", "1.234.567", "3-4", "3\u20134",
    "2024-01-05", "12:30", "10^3", r"2 \times 10^3", "10\u00b3", r"10^{-3}", "9 - 5", "2 x 5",
    r"\frac{1}{2}", r"3\sqrt{5}", "3 sqrt(5)", "\u221a5", "2 1/2", "2\u00bd", "5k", "5 million",
    "5 Millions", "5 bn", "5\u03c0", r"5 \pi", "5 \u00b1 1", "\u00b15", "9" * 5000,
    "5thousand", "5 *million*", "5 dozens", "5 lakh", "10 ** 3", "5 \u00d7 10 ^ {3}", "\u221a 16",
    r"\sqrt 16", "2\u03c0", "2\u207f", "2\u2153", "12 : 30", "3 \u00b7 4", "3~4", "7 % 5",
    "5\u4e07", "0x1F", "5/0", "2x", "none", ""])
def test_or_not_at_all(text):
    """No part of it is a number, nor one that stands before it: a wrong answer is never paid."""
    assert rewards.find_number("7 or " + text if text not in ("none", "") else text) is None


def test_an_answer_that_is_a_float_is_compared_as_one():
    texts, answers = ["1/3", "0.1", "0.1000000001", "1e99"], [1 / 3, 0.1, 0.1, 1e300]
    assert rewards.last_number(["?"] * 4, texts, answers, [True] * 4) == [1.0, 1.0, 0.0, 0.0]


# ------------------------------------------------------------------ a reward runs in our process

def test_what_a_reward_sets_globally_is_its_own_affair(tmp_path, monkeypatch):
    """It finds again what it has set, when it is loaded or called; and nobody else finds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weight.txt").write_text("3")
    (tmp_path / "sets.py").write_text("""
import os, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_float32_matmul_precision("medium")
os.chdir("elsewhere")

def judge(prompts, completions, **columns):
    assert not torch.is_grad_enabled() and torch.tensor(1.0).dtype == torch.float64
    assert torch.tensor(1.0).device.type == "meta"
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    return [float(open("weight.txt").read())] * len(prompts)

def second(prompts, completions, **columns):
    assert torch.tensor(1.0).dtype == torch.float64
    return [0.0] * len(prompts)

def fails(prompts, completions, **columns):
    os.chdir("/")
    raise ValueError("no")
""")
    def settings():
        return (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(),
                torch.get_num_threads(), torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(),
                torch.tensor(1.0).device.type)

    before = settings()
    (judge,) = load("sets.py:judge").values()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert judge(prompts=["?"], completions=["!"]) == [3.0]
            assert torch.is_grad_enabled() == grad
    load("sets.py:second")  # what the file has set holds for all its functions
    with pytest.raises(SystemExit):
        load("sets.py:fails")
    assert settings() == before


def test_a_reward_finds_the_settings_it_was_loaded_under(tmp_path, monkeypatch):
    """Also within an evaluation, which has no gradients, and in the deterministic mode of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "learns.py").write_text("""
import torch
weight = torch.ones(3, requires_grad=True)

def judge(prompts, completions, **columns):
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))  # has no deterministic form
    (gradient,) = torch.autograd.grad((weight**2).sum(), weight)
    return [gradient[0].item()] * len(prompts)
""")
    torch.use_deterministic_algorithms(False)
    (judge,) = load("learns.py:judge").values()
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        assert judge(prompts=["?"], completions=["!"]) == [2.0]
    assert torch.are_deterministic_algorithms_enabled()


def test_a_reward_may_be_a_link(tmp_path, monkeypatch):
    """To a file without its suffix, as the cache of the hub has them; its neighbours are the
    link's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir(), (tmp_path / "here").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text(GOOD.replace("helper_of_rewards", "beside_the_link"))
    (tmp_path / "here" / "linked.py").symlink_to(tmp_path / "blobs" / "0a1b")
    (tmp_path / "here" / "beside_the_link.py").write_text("weight = 3")
    (short,) = load("here/linked.py:short").values()
    assert short(prompts=["?"], completions=["!!"]) == [-6]


def test_each_completion_has_copies_of_its_own(tokenizer):
    """A reward that extends the chat it is given: as often as it is asked, it sees two turns."""
    def turns(prompts, completions, tags, **columns):
        for chat, text, tag in zip(prompts, completions, tags):
            chat.append(text), tag.append(text)
        return [len(chat) + len(tag) for chat, tag in zip(prompts, tags)]

    chat = [dict(role="user", content="1")]
    problems = to_problems([dict(prompt=chat, tags=[])])
    batch = make_batch([[5]], [[7, 2], [8, 8]], "cpu")
    batch.finished = torch.tensor([True, False])
    for _ in range(2):
        scores = rewards.score(dict(a=turns, b=turns), problems, batch, tokenizer)[1]
        assert scores.tolist() == [6, 6] and len(chat) == 1 and problems[0]["row"]["tags"] == []


def test_trl_calls_by_keyword_and_so_do_we(tokenizer):
    """Whatever order the arguments are named in, and if the prompts are not asked for."""
    def swapped(completions, prompts, **columns):
        return [float(prompt == "?" and text != "?") for prompt, text in zip(prompts, completions)]

    def only(completions, **columns):
        return [float(text != "?") for text in completions]

    batch = make_batch([[5]], [[7, 2]], "cpu")
    batch.finished = torch.tensor([True])
    for reward in (swapped, only):
        assert rewards.score(dict(r=reward), to_problems([dict(prompt="?")]), batch, tokenizer
                             )[1].tolist() == [1]


POOLS = """
import sys
if __name__ == "__main__":
    from types import SimpleNamespace
    import json
    from plumbing import data, rewards
    problems = data.settle({"test": [dict(prompt="?")]}, "data")["test"]
    for file in sys.argv[1:]:
        (reward,) = rewards.load_rewards(SimpleNamespace(reward=file + ":own"), problems).values()
        assert reward(prompts=["?"] * 2, completions=["a", "bb"]) == [1, 2], file
    assert json.loads("1") == 1 and rewards.last_number
    print("all well")
"""
POOL = """
import multiprocessing
from pathlib import Path

import neighbour

def judge(text):
    assert Path(__file__).name == NAME
    return len(text) + neighbour.zero

def own(prompts, completions, **columns):
    with multiprocessing.get_context(HOW).Pool(1) as pool:
        return pool.map(judge, completions)
"""


@pytest.mark.parametrize("how", ["spawn", "forkserver", "fork"])
def test_a_reward_hands_its_functions_to_a_pool(tmp_path, how):
    """Whatever its file is called, and however the processes of the pool begin."""
    files = []
    for name in ("plain.py", "common.py", "json.py", "two words.py", "v1.2.py", "b/plain.py",
                 "c/common.py"):
        file = tmp_path / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(POOL.replace("NAME", repr(file.name)).replace("HOW", repr(how)))
        (file.parent / "neighbour.py").write_text("zero = 0")
        files.append(file)
    (tmp_path / "use.py").write_text(POOLS)
    done = subprocess.run([sys.executable, tmp_path / "use.py", *files], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.stdout.strip() == "all well", done.stderr


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
    decoded = to_texts(tokenizer, batch)
    step_rewards, step_ends = toy.score_steps(problems, batch, decoded, outcomes, tokenizer)
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
    found = toy.score_steps([dict(prompt="8+9-5=")], batch, to_texts(tokenizer, batch),
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
    assert to_texts(tokenizer, batch) == ["8 + 9=17,12"]
    found = toy.score_steps([dict(prompt="8+9-5=")], batch, to_texts(tokenizer, batch),
                                torch.ones(1), tokenizer)
    assert found == ([[0.0, 1.0]], [[3, 5]])
