"""Rewards: the number that is read, one's own file, and what a reward is given and may do."""
import gc
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, save_folder, seeded, to_problems, write_jsonl

import rloo
from plumbing import rewards
from plumbing.rewards import last_number, read_number
from plumbing.rollout import sample, to_texts


def paid(text, answer):
    return last_number(prompts=["?"], completions=[text], answer=[answer], finished=[True]) == [1.0]


@pytest.mark.parametrize("text, number", [
    ("42", 42), ("it is -4.50", -4.5), ("The answer is \u22125.", -5), ("+5", 5), (".5", 0.5),
    ("-.5", -0.5), ("$.75", 0.75), ("$5.", 5), ("$-5", -5), ("5\u20ac", 5), ("\u00a35", 5),
    ("1,234", 1234), ("-1,234.50", -1234.5), ("1,234,567.00 dollars", 1234567), ("007", 7),
    ("50%", 50), ("50 %", 50), (r"50\%", 50), ("45\u00b0", 45), ("\uff14\uff12", 42),
    ("24 cm\u00b2", 24), ("9.8 m/s", 9.8), ("42 km.", 42), ("(5)", 5), ("[5]", 5), ('"5"', 5),
    ("`5`", 5), ("_5_", 5), ("5!", 5), ("42...", 42), (r"\boxed{42}", 42), (r"$\boxed{-42}$.", -42),
    (r"\boxed{x = 42}", 42), (r"\boxed{24 \text{ cm}}", 24), (r"\boxed{\$42}", 42), (r"\(42\)", 42),
    (r"\[ x=42 \]", 42), ("$42$", 42), ("**42**.", 42), ("**42.**", 42), ("**Answer:** 42", 42),
    ("**Answer: 42**", 42), ("Answer: `42`\n```", 42), ("#### 42", 42), ("####42", 42),
    ("so 7\n#### -1,200", -1200), ("12 or 3", 3), ("8+9=17,17-5=12,12-8=4", 4), ("9 - 5 = 4", 4),
    ("2^3 = 8", 8), ("x=5", 5), ("4 =", 4), ("17\n42", 42), ("42, as 7 is", 7),
    ("<answer> 42 </answer>", 42), ("<answer>42</answer>", 42)])
def test_a_number_is_read_as_models_write_it(text, number):
    assert paid(text, number) and paid(text, str(number)) and not paid(text, number + 1)


@pytest.mark.parametrize("text", [  # separators, ranges, fractions, powers, other work, words
    r"9{,}500", r"9\,500", r"9\ 500", r"9 \, 500", "9 500", "9\u00a0500", "9\u2009500",
    "9\u202f500", "9'500", "9_500", "9.500.000", "0,5", "0,500", "1,23", "1234,567", "12,34,567",
    "1.2.3", "3-4", "3\u20134", "3 - 4", "3 -4", "3 \u2013 4", "3 ~4", "2024-01-05", "12:30",
    "12 : 30", "1/2", "1 / 2", "1/ 2", "2 1/2", "2\u00bd", "2 \u00bd", r"\frac{1}{2}", r"\frac12",
    r"\frac 1 2", r"\frac{1} {2}", r"\frac{ 1 }{ 2 }", r"2 \frac{1}{2}", "10 - 5", "(10) - 5",
    "(10) / 5", "10% / 5", "6 km / 5", "10^3", "10**3", "10 ** 3", "10 ^ 3", r"10^{3}", r"10^{ 3 }",
    "2 * 10^ 3", "10\u00b3", "10\u207b\u00b3", "1.5e3", "2E+8", "1.5 e3", r"5 \times 10^3",
    r"5 \times 4", r"5\times 4", r"5 \cdot 4", "5 x 4", "5*4", "5 * 4", "5 \u00d7 4",
    "5 cm \u00d7 4", "7 % 5", "5 \u00b1 1", r"5 \pm 1", r"\sqrt{16}", r"\sqrt 16", r"\sqrt {16}",
    "\u221a16", "\u221a 16", "5\u03c0", r"5 \pi", r"5\pi", r"- 5", "\u2013 5", "minus 5",
    "negative 5", "--5", "5 million", "5 Million", "5 *million*", "5\u00a0million", "5 hundred",
    "5k", "5 thousand", "5 dozen", "0x1F", "3rd", "x5", "H2O", "a5b"])
def test_or_else_nothing_is_paid_for_any_part_of_it(text):
    parts = {sign * int(part) for part in [*re.findall(r"\d+", text), re.sub(r"\D", "", text)]
             for sign in (1, -1)}
    for frame in ("{}", "7 or {}.", "**{}**", "$x = {}$", "\\boxed{{{}}}"):
        assert not [part for part in parts if paid(frame.format(text), part)], frame.format(text)


@pytest.mark.parametrize("text, finished", [("", True), ("none", True), ("=", True), ("3", False)])
def test_no_number_or_no_end_is_0(text, finished):
    assert last_number(completions=[text], answer=["3"], finished=[finished]) == [0.0]


def test_a_long_text_is_read_in_time_that_grows_with_its_length():
    """A policy that has gone astray writes the same character until it is cut off."""
    for word in ("1", "a", "$", " ", ".", "-", "1 ", "- ", "1 - ", "1+", "1,", ",111", "* ", "{ ",
                 "1" + 98 * " ", "\\times ", "minus "):
        for end in ("", "x", "5 million"):
            start = time.process_time()
            paid((word * 20000)[:20000] + end, "1")
            assert time.process_time() - start < 1, word + end


@pytest.mark.parametrize("answer, right, wrong", [
    ("1,234", "1234", "234"), (" -0.5 ", "-.5", ".5"), ("so ...\n#### 1,200", "1200", "200"),
    (42, "42.0", "4"), (10**30, "1" + 30 * "0", "1e30"), (9500.0, "9,500", "9,501"),
    (0.1, "0.1", "0.10001"), (torch.tensor(0.1).item(), "0.1", "0.10001"),
    (1 / 3, "0.33333334", "0.3333"), (0.0, "0", "0.00000001"),
    (12345678.0, "12,345,678", "12345679")])  # a column is float if one of its rows is
def test_answers_as_columns_have_them(answer, right, wrong):
    assert paid(right, answer) and not paid(wrong, answer)


@pytest.mark.parametrize("answer", [
    "blue", None, "12 apples", "1,23", math.nan, math.inf, "nan", True, "1/2", "1e3", "#### so"])
def test_last_number_wants_numbers_for_answers(answer, capsys):
    rows = [dict(prompt="1+2=", answer=3), dict(prompt="2+2=", answer="4")]
    assert load("last_number", rows) and read_number(answer) is None and not paid("3", answer)
    error = refused("last_number", capsys, rows + [dict(prompt="3", answer=answer)])
    assert "1 of 3 answers" in error and repr(str(answer)) in error


GOOD = """
import multiprocessing, numpy
from the_neighbour import weight

def short(completions, prompts, **columns):  # TRL calls by keyword, so any order is common
    return (-weight * len(text) for text in completions)

def numbers(completions, level, **columns):
    return numpy.float32(level)

def size(text):
    return weight**2 * len(text)

def pooled(completions, **columns):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(size, completions)
"""
BAD = """
import math, sys
few = lambda **columns: [1.0]
nothing = lambda **columns: None
nan = lambda **columns: [0.0, math.nan]
none = lambda **columns: [1.0, None]
huge = lambda **columns: [10**400, 1]
asks = lambda completions, solution, **columns: [1.0, 1.0]
raises = lambda completions, **columns: [{}["a"] for text in completions]
lazy = lambda completions, **columns: ({}["a"] for text in completions)
leaves = lambda **columns: sys.exit()
seven = 7
async def later(**columns):
    return [1.0, 1.0]
"""
ROWS = [dict(prompt="1+2=", answer="3", level=4), dict(prompt="2+2=", answer="4", level=5)]


def load(spec, rows=ROWS):
    return rewards.load_rewards(SimpleNamespace(reward=spec), to_problems(rows))


def refused(spec, capsys, rows=ROWS):
    """--reward spec ends with exit code 2 and one sentence, which is returned."""
    with pytest.raises(SystemExit) as stop:
        load(spec, rows)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: --reward") and error.count("\n") == 1
    return error


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch, tmp_path):
    """Each test has its own folder, and what it has imported is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def a_batch(tokenizer, k=1):
    """Completions of ROWS, k of each, by a model of noise."""
    return sample(make_model("llama"), tokenizer, [[5], [6, 7]], k, 4, 1.0, seeded())


def test_rewards_are_added_and_the_mean_of_each_is_logged(tmp_path, tokenizer):
    """A reward's file may import its neighbours, and hand its functions to other processes."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "my own.py").write_text(GOOD)
    (tmp_path / "there" / "the_neighbour.py").write_text("weight = 2")
    file = "there/my own.py"
    several = load(f"last_number,{file}:short, {file}:numbers,{file}:pooled")
    batch = a_batch(tokenizer, 3)
    texts, scores, means = rewards.score(several, to_problems(ROWS), batch, tokenizer)
    right = [float(paid(text, "34"[i // 3])) * batch.finished[i].item()
             for i, text in enumerate(texts)]
    sizes, level = list(map(len, texts)), [4] * 3 + [5] * 3
    assert texts == to_texts(tokenizer, batch) and scores.dtype == torch.float32
    assert scores.tolist() == [a + b + 2 * c for a, b, c in zip(right, level, sizes)]
    assert {key: value.item() for key, value in means.items()} == pytest.approx(dict(
        reward_last_number=sum(right) / 6, reward_short=-sum(sizes) / 3, reward_numbers=4.5,
        reward_pooled=sum(sizes) / 1.5))


def test_rewards_are_added_in_float64(tokenizer):
    """0.1 + 0.6 + 0.1 + 0.2 is above 1 in float32, and prime.py would refuse it."""
    parts = {str(i): lambda completions, x=x, **columns: [x] * len(completions)
             for i, x in enumerate((0.1, 0.6, 0.1, 0.2))}
    scores = rewards.score(parts, to_problems(ROWS), a_batch(tokenizer), tokenizer)[1]
    assert scores.tolist() == [1, 1] and sum(map(torch.tensor, (0.1, 0.6, 0.1, 0.2))) > 1


@pytest.mark.parametrize("name, words", [
    ("few", "[1.0] for 2 completions"), ("nothing", "None"), ("nan", "nan"), ("none", "None"),
    ("huge", "huge"), ("seven", "int"), ("lazy", "lazy"),
    ("asks", "solution' by keyword prompts, completions, answer"), ("leaves", "leaves"),
    ("raises", "KeyError('a') line 9 bad.py"), ("eight", "eight"), ("later", "coroutine")])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_reward_that_cannot_be_used_is_refused_before_the_run(name, words, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(BAD)
    error = refused(f"bad.py:{name}", capsys)
    gc.collect()  # or the coroutine would warn in another test that nobody awaited it
    assert all(word in error for word in [name, *words.split()]), error


@pytest.mark.parametrize("spec, word", [
    ("torn.py:f", "SyntaxError"), ("gone.py:f", "choose"),
    ("notes.txt:f", "notes"), ("json.py:f", "rename"), ("common.py:f", "rename"),
    ("fine.py:f,other/fine.py:g", "rename"), ("fine.py:", "fine.py"), ("other", "choose"),
    ("exact_match", "choose"), ("last_number,last_number", "two"), (",", "choose")])
def test_what_is_no_reward_is_refused(spec, word, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    f = "def f(completions, **columns): return [0] * len(completions)\ng = f\n"
    for name in ("fine.py", "other/fine.py", "json.py", "common.py", "notes.txt"):
        (tmp_path / name).write_text(f)
    (tmp_path / "torn.py").write_text("x = 1\ndef f(:\n")
    assert word in refused(spec, capsys)


def test_a_folder_with_a_reward_of_its_own_is_a_reward_by_the_folders_name(tmp_path):
    """As reward_model.py leaves it. Names with colons and commas are common for runs."""
    for name in ("plain", "12:30", "lr=1e-4,beta=0.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(
            f"def score(completions, **columns):\n    return [{len(name)}] * len(completions)")
        ((found, reward),) = load(name).items()
        assert found == name and reward(completions=["a"]) == [len(name)]
    assert list(load("plain,last_number")) == ["plain", "last_number"]


def test_a_file_is_read_anew_each_time(tmp_path, monkeypatch):
    """Also after an edit that changes neither its size nor its time, as in a notebook."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "edited.py"
    for value in ("1.0", "0.5"):
        file.write_text(f"def f(completions, **columns):\n    return [{value}] * len(completions)")
        os.utime(file, (1e9, 1e9))
        assert load("edited.py:f")["f"](completions=["a"]) == [float(value)]


def test_what_a_reward_is_given(tokenizer):
    """All columns of the data, None where a row lacks one; nothing of ours is displaced."""
    names = "completions prompts finished completion_ids ids targets row name reward self".split()
    problems = to_problems([ROWS[0], dict(prompt="?", **dict.fromkeys(names, 7))])
    batch, seen = a_batch(tokenizer, 2), {}
    batch.finished = torch.tensor([True, False, False, True])

    def reward(**columns):
        seen.update(columns)
        return [0] * 4
    texts = rewards.score(dict(r=reward), problems, batch, tokenizer)[0]
    ids = [row[: int(n)] for row, n in zip(batch.completions.tolist(), batch.mask.sum(1))]
    assert seen == {**dict.fromkeys(names[4:], [None, None, 7, 7]), "completions": texts,
                    "answer": ["3", "3", None, None], "level": [4, 4, None, None],
                    "prompts": ["1+2=", "1+2=", "?", "?"], "completion_ids": ids,
                    "finished": [True, False, False, True]}


def test_each_completion_has_copies_of_its_own(tokenizer):
    """A reward that extends the chat it is given: as often as it is asked, it sees two turns."""
    def turns(prompts, completion_ids, **columns):
        for chat, ids in zip(prompts, completion_ids):
            chat.append("turn"), ids.append(1)
        return [len(chat) + len(ids) for chat, ids in zip(prompts, completion_ids)]

    problems = to_problems([dict(prompt=[dict(role="user", content="1")])] * 2)
    batch = a_batch(tokenizer, 3)
    for _ in range(2):
        scores = rewards.score(dict(a=turns, b=turns), problems, batch, tokenizer)[1]
        assert scores.tolist() == (2 * (3 + batch.mask.sum(1))).tolist()
    assert len(problems[0]["prompt"]) == 1


HOSTILE = """
import os, random
import numpy, torch
torch.set_grad_enabled(False)  # as scripts for inference have it at their top

def judge(prompts, completions, kind, **columns):
    if kind[0] == "hostile":
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        torch.set_grad_enabled(True)
        os.chdir("/")
        prompts.clear(), columns["completion_ids"].clear()
    return [sum(map(ord, text)) % 97 / 96 for text in completions]
"""


def test_a_reward_may_do_as_it_likes_and_the_run_is_the_same(tmp_path):
    """It reseeds the generators, sets the gradient mode, changes folder, and spoils its lists. One
    run is evaluated after each step, which changes nothing either."""
    def run(kind):
        rows = [dict(prompt=f"{i}+{j}=", kind=kind) for i in range(4) for j in range(4)]
        os.chdir(tmp_path)
        rloo.train(rloo.Config(**{**rloo.TOY, **dict(
            model=model, data=write_jsonl("rows.jsonl", rows), reward="hostile.py:judge", steps=3,
            prompts_per_step=4, minibatch_size=8, max_new_tokens=6, eval_prompts=2, out_dir=kind,
            eval_every=int(kind == "hostile"))}))
        weights = torch.load(f"{kind}/checkpoint.pt", weights_only=True)["policy"]
        return Path(f"{kind}/samples.jsonl").read_text().replace(kind, ""), weights
    (tmp_path / "hostile.py").write_text(HOSTILE)
    model = save_folder(tmp_path / "model", "llama")
    (texts, weights), (others, same) = run("hostile"), run("gentle")
    assert texts == others and texts.count("\n") >= 4
    assert all(torch.equal(weights[key], same[key]) for key in weights)
