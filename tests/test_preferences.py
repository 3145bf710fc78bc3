"""Preference data: TRL's formats, and the pairs and rankings that are made of the toy."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import TEMPLATE, write_jsonl
from plumbing import data, preferences, toy
from plumbing.preferences import load_preferences


def config(data, model=None, **flags):
    return SimpleNamespace(**{**dict(
        data=str(data), model=model, max_new_tokens=16, eval_every=0, eval_prompts=50, seed=1,
        prompts=40, device="cpu", micro_batch_size=64), **flags})


def says(text):
    return dict(role="assistant", content=text)


def asks(text):
    return dict(role="user", content=text)


# ------------------------------------------------------------------------------------------ formats

@pytest.mark.parametrize("chosen, rejected, prompt, rests", [
    ("The sky is blue.", "The sky is green.", "The sky is", [" blue.", " green."]),  # as in TRL
    ("The sky is blue.", "The sky is black.", "The sky is", [" blue.", " black."]),  # not "bl"
    ("8+9=17", "8+9=16", "8+9=", ["17", "16"]),                  # not "8+9=1"
    ("Q: two\nA:yes", "Q: two\nA:no", "Q: two\nA:", ["yes", "no"]),
    ("Q: two\nA:", "Q: two\nA: no", "Q: two\nA:", ["", " no"]),   # one rest may be empty
    ("one two", "one twofold", "one", [" two", " twofold"]),
    ("\u6211\u3002\u5929\u84dd", "\u6211\u3002\u5929\u7eff", "\u6211\u3002",  # as one word
     ["\u5929\u84dd", "\u5929\u7eff"]),
    ("yes", "no", "", ["yes", "no"]),
    ("This is", "That is", "", ["This is", "That is"]), (" a", " b", "", [" a", " b"]),
    ("abc\nd e", "abc\nf", "abc", ["\nd e", "\nf"]),
    ([asks("hm?"), says("yes")], [asks("hm?"), says("no")], [asks("hm?")],
     [[says("yes")], [says("no")]])])
def test_the_prompt_is_what_both_begin_with(chosen, rejected, prompt, rests):
    assert data.split_prompt(chosen, rejected) == (prompt, rests)


def test_where_trl_cuts_between_words_so_do_we():
    data_utils = pytest.importorskip("trl.data_utils", reason="an oracle for development")
    for chosen, rejected in [("The sky is blue.", "The sky is green."), ("a b c", "a b d"),
                             ("Human: hi\n\nAssistant: Hello", "Human: hi\n\nAssistant: No way")]:
        theirs = data_utils.extract_prompt(dict(chosen=chosen, rejected=rejected))
        assert data.split_prompt(chosen, rejected) == (
            theirs["prompt"], [theirs["chosen"], theirs["rejected"]])


@pytest.mark.parametrize("row", [
    dict(prompt="1+2=", chosen="3", rejected="4"),
    dict(chosen="1+2=3", rejected="1+2=4"),
    dict(prompt="1+2=", completions=["3", "4"]),
    dict(prompt=[asks("1+2=")], chosen=[says("3")], rejected=[says("4")]),
    dict(chosen=[asks("1+2="), says("3")], rejected=[asks("1+2="), says("4")]),
    dict(prompt="1+2=", chosen=[asks("1+2="), says("3")], rejected=[asks("1+2="), says("4")])])
def test_every_format_is_the_same_pair(folders, tmp_path, row):
    rows = [{**row, "answer": 3, "note": i} for i in range(3)]
    for i, other in enumerate(("7-3=", "5-2=")):  # as text: prompts of two more splits
        rows.append(dict(prompt=other, chosen="4", rejected="1", note=i) if "prompt" in row else
                    dict(chosen=f"{other}4", rejected=f"{other}1", note=i))
    model = folders("llama", template=TEMPLATE if "role" in str(row) else None, text=True)
    found = load_preferences(config(write_jsonl(tmp_path / "p.jsonl", rows), model))
    pair = next(problem for part in found for problem in part
                if problem["row"].get("answer") == 3)
    ids = toy.make_tokenizer()(["3", "4"]).input_ids
    assert pair["targets"] == [ids[0] + [2], ids[1] + [2]]  # an EOS is part of each
    wanted = toy.make_tokenizer()("1+2=").input_ids
    assert pair["ids"][-len(wanted):] == wanted or "role" in str(row)


def test_rankings_keep_their_order_and_truncation_is_counted(tmp_path, capsys):
    rows = [dict(prompt=f"{i}+1=", completions=["9", "8", "7"]) for i in range(10)]
    rows += [dict(prompt="1+1=", completions=["9", "8" * 20, "7"]),
             dict(prompt="2+2=", completions=["4", "4", "5"])]
    train, validation, test = load_preferences(
        config(write_jsonl(tmp_path / "r.jsonl", rows)), "rankings")
    screen = capsys.readouterr().out
    assert "dropped 1 of 11 rows of train: prompts above" in screen
    assert "dropped 1 of 12 rows of train: two completions are the same, or" in screen
    assert len(train + validation + test) == 10
    nine, eight, seven = (toy.make_tokenizer()(text).input_ids + [2] for text in "987")
    assert all(row["targets"] == [nine, eight, seven] for row in train)


def test_several_turns_are_left_out_and_counted(folders, tmp_path, capsys):
    """What differs must be one message; an explicit prompt is not looked for in the answers."""
    start = [asks("1+2="), says("hm?"), asks("well?")]
    rows = [dict(chosen=[*start, says("3")], rejected=[*start, says("4")]),
            dict(chosen=[*start, says("3")], rejected=[asks("1+2="), says("4")]),
            dict(prompt=start[:1], chosen=start[1:], rejected=start[1:2])]
    rows += [dict(prompt=[asks(f"{i}+2=")], chosen=[says("3")], rejected=[says("4")])
             for i in range(9)]
    found = load_preferences(config(write_jsonl(tmp_path / "p.jsonl", rows),
                                    folders("llama", template=TEMPLATE, text=True)))
    assert "dropped 2 of 12 rows of train" in capsys.readouterr().out
    prompts = [row["prompt"] for part in found for row in part]
    assert len(prompts) == 10 and start in prompts


def test_a_conversation_that_repeats_its_prompt_is_cut_after_it(folders, tmp_path, capsys):
    start = [asks("1+2="), says("hm?"), asks("well?")]
    prompts = [[*start, says("so?"), asks(f"{i}+2=")] for i in range(9)]
    rows = [dict(prompt=prompt, chosen=[*prompt, says("3")], rejected=[*prompt, says("4")])
            for prompt in prompts]
    found = load_preferences(config(write_jsonl(tmp_path / "p.jsonl", rows),
                                    folders("llama", template=TEMPLATE, text=True)))
    problems = [problem for part in found for problem in part]
    assert len(problems) == 9 and "dropped" not in capsys.readouterr().out
    for problem in problems:
        assert problem["prompt"] == problem["row"]["prompt"]
        assert problem["completions"] == [[says("3")], [says("4")]]


@pytest.mark.parametrize("prompt, chosen, rejected, found", [
    ("q", [asks("q"), says("a")], [asks("q"), says("b")],
     ([asks("q")], [[says("a")], [says("b")]])),
    ("q", [dict(role="system", content="s"), asks("q"), says("a")],
     [dict(role="system", content="s"), asks("q"), says("b")],
     ([dict(role="system", content="s"), asks("q")], [[says("a")], [says("b")]])),
    ("q", [asks("q"), says("a")], [asks("q"), says("a")],
     ([asks("q")], [[says("a")], [says("a")]])),
    ("q", [says("a")], [says("b")], ("q", [[says("a")], [says("b")]])),
    ("q", ["a", "b"], ["c", "d"], ("q", [["a", "b"], ["c", "d"]])),
    ([asks("q")], [asks("q"), says("a")], [says("b")],
     ([asks("q")], [[asks("q"), says("a")], [says("b")]])),
    (None, "a", [says("b")], (None, ["a", [says("b")]])),
    (None, "so 3", "so 4", (None, ["so 3", "so 4"]))])
def test_a_prompt_that_is_given_stays_the_prompt(prompt, chosen, rejected, found):
    """A conversation may hold more before it, a system message; nothing that comes after it."""
    assert data.to_pair(prompt, chosen, rejected) == found


def test_if_all_rows_are_left_out_the_error_says_why(folders, tmp_path, capsys):
    rows = [dict(prompt=[asks("1")], chosen=[says("1"), asks("2")], rejected=[says("4")]),
            dict(prompt=[asks("1")], chosen=[says("4")], rejected=[says("4")])]
    with pytest.raises(SystemExit) as stop:
        load_preferences(config(write_jsonl(tmp_path / "p.jsonl", rows),
                                folders("llama", template=TEMPLATE, text=True)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "2 of 2 rows of train" in error and "several messages" in error and "the same" in error


P, C, R = dict(prompt="1+2="), dict(chosen="3"), dict(rejected="4")


@pytest.mark.parametrize("rows, kind, words", [
    ([{**P, **C}], "pairs",
     ["row 1 of train has chosen, prompt; it must have chosen and rejected"]),
    ([{**P, "completions": ["1", "2", "3"]}], "pairs", ["plackett_luce"]),
    ([{**P, "completions": ["1"]}], "rankings", ["completions, a list, best first"]),
    ([dict(chosen="3", rejected="4")], "pairs", ["row 1 of train", "begin alike"]),
    ([dict(instruction="1+2=", chosen="so 3", rejected="so 4")], "pairs",
     ["row 1 of train has chosen, instruction, rejected; it must have a prompt", "no other text"]),
    ([{**P, **C, **R}, dict(prompt=None, chosen="so 3", rejected="so 4")], "pairs",
     ["row 2 of train has chosen, rejected; it must have a prompt"]),
    ([{**P, "chosen": 3, "rejected": 4}], "pairs", ["row 1 of train"]),
    ([{**P, "completions": ["1", 2]}], "rankings", ["row 1 of train: its completion is 2",
                                                   "must be text"]),
    ([{**P, "chosen": [asks("3")], "rejected": [asks("4")]}], "pairs", ["one, assistant"]),
    ([{**P, "completions": ["1", "2"]}, {**P, "completions": ["1", "2", "3"]},
      {"prompt": "4+4=", "completions": ["1", "2"]}], "rankings", ["of 2 and of 3"]),
    ([{"prompt": None, **C, **R}], "pairs", ["row 1 of train has chosen, rejected", "prompt"])])
def test_wrong_rows_are_named(tmp_path, capsys, rows, kind, words):
    with pytest.raises(SystemExit) as stop:
        load_preferences(config(write_jsonl(tmp_path / "p.jsonl", rows)), kind)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_row_is_not_changed():
    row = dict(prompt="1+2=", chosen="3", rejected="4")
    assert data.settle({"train": [row]}, "x", "pairs")["train"][0]["row"] is row
    assert row == dict(prompt="1+2=", chosen="3", rejected="4")


# --------------------------------------------------------------------------------- made of the toy

@pytest.fixture
def made(tmp_path, monkeypatch, folders):
    """Random weights are right too seldom: here the first digit of an answer decides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preferences, "last_number", lambda prompts, completions, *rest: [
        float(text[:1] in "0123456789" and text != "") for text in completions])
    return config("toy", folders("llama", text=True), prompts=40)


def test_pairs_and_rankings_are_made_once_and_kept(made, capsys):
    train, validation, test = load_preferences(made)
    assert capsys.readouterr().out.count("making preferences") == 1
    (folder,) = Path("runs/preferences").iterdir()
    kept = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    by_split = {s: [row for row in kept if row["split"] == s] for s in
                ("train", "validation", "test")}
    assert [row["completions"] for row in train] == [
        [row["chosen"], row["rejected"]] for row in by_split["train"]]
    assert all(r["chosen"][0].isdigit() and not r["rejected"][:1].isdigit() for r in kept)
    for found, split in ((validation, "validation"), (test, "test")):
        problems = toy.problems("toy", split, 50)
        assert [row["prompt"] for row in found] == [row["prompt"] for row in problems]
        known = {row["prompt"] for row in by_split[split]}
        assert {row["prompt"] for row in found if "targets" in row} == known != set()
    rankings, *_ = load_preferences(made, "rankings")
    assert "making" not in capsys.readouterr().out
    for row in rankings:
        grades = [preferences.grade(row["row"], text, "toy") for text in row["completions"]]
        assert len(set(row["completions"])) == 4
        assert grades == sorted(grades, reverse=True) and grades[0] > grades[-1]


def test_what_another_process_made_meanwhile_is_used(tmp_path, capsys):
    """Whichever is the first; and what is left of the other one goes."""
    def make(temporary):
        for folder in (temporary, tmp_path / "kept"):
            folder.mkdir()
            (folder / "who").write_text(folder.name)

    preferences.make_once(tmp_path / "kept", make)
    assert (tmp_path / "kept" / "who").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    preferences.make_once(tmp_path / "kept", None)  # it is there: nothing is made

    def fail(temporary):
        temporary.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preferences.make_once(tmp_path / "more", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        preferences.make_once(tmp_path / "file" / "kept", None)
    assert "cannot write into" in capsys.readouterr().err


def test_it_is_said_at_once_if_preferences_cannot_be_kept(made, monkeypatch, capsys):
    Path("runs").touch()  # a file in the way
    monkeypatch.setattr(preferences, "load_policy", lambda *_: pytest.fail("it begins to sample"))
    with pytest.raises(SystemExit) as stop:
        load_preferences(made)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "runs/preferences" in error and error.count("\n") == 1


def test_no_prompt_is_in_two_splits(made):
    train, validation, test = load_preferences(made)
    one, two, three = ({row["prompt"] for row in rows} for rows in (train, validation, test))
    assert not one & two and not two & three and not one & three


def test_another_model_or_size_makes_its_own(made, folders):
    load_preferences(made)
    load_preferences(config("toy", made.model, prompts=20))
    load_preferences(config("toy", folders("gpt2", text=True), prompts=40))
    assert len(list(Path("runs/preferences").iterdir())) == 3


def test_a_model_that_is_always_wrong_gives_no_pairs(made, monkeypatch, capsys):
    monkeypatch.setattr(preferences, "last_number", lambda prompts, *rest: [0.0] * len(prompts))
    with pytest.raises(SystemExit):
        load_preferences(made)
    assert "--prompts" in capsys.readouterr().err


def test_the_grade_counts_the_answer_and_the_work_that_is_right():
    row = dict(prompt="8+9-5=", answer="12")
    for text, value in (("12", 1), ("8+9=17,17-5=12", 1.5), ("8+9=17,17-5=13", 0.25),
                        ("13", 0), ("8+9=16,16-5=12", 1), ("8+9=17,17-5=12,13", 0.5)):
        assert preferences.grade(row, text, "toy") == value
    assert preferences.grade(row, "8+9=17,17-5=12", "words") == 1


def test_what_the_toy_has_sampled_may_hold_an_unknown_token(made, folders, monkeypatch):
    """Random weights write <unk> often, the toy's policy once in thousands of answers."""
    train, *_ = load_preferences(config("toy", folders("llama"), prompts=40))
    assert any("<unk>" in text for row in train for text in row["completions"])
