"""Data: what a row means, what is refused, which rows are held out, and text -> tokens."""
import functools
import os
import zlib
from contextlib import contextmanager

import datasets
import pytest
import transformers
from conftest import TEMPLATE, write_jsonl
from tokenizers.processors import TemplateProcessing

from plumbing import data
from plumbing.flags import RunConfig
from plumbing.toy_model import make_model, make_tokenizer

POLICY = make_model(0)  # its context is 128 tokens
BARE = TEMPLATE.replace("{{ bos_token }}", "")


def user(text, role="user", **more):
    return dict(role=role, content=text, **more)


assistant = functools.partial(user, role="assistant")
CHAT = [user("p")]
AB = dict(chosen="a", rejected="b")
BOTH = dict(chosen=[*CHAT, assistant("a")], rejected=[*CHAT, assistant("b")])  # and the prompt


@contextmanager
def refused(capsys, *words):
    """The run ends with exit code 2 and one sentence that contains the words."""
    with pytest.raises(SystemExit) as stop:
        yield
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def load(where, wanted=None, **flags):
    """The three splits that load_problems() makes of a file or folder."""
    cfg = RunConfig(**{**dict(data=str(where), max_new_tokens=32, eval_prompts=1000), **flags})
    return data.load_problems(cfg, POLICY, make_tokenizer(), wanted)


def sums(n, **more):
    """n rows with a different prompt each."""
    return [dict(prompt=f"{i % 10}+{i // 10 % 10}+{i // 100}=", **more) for i in range(n)]


def prompts(problems):
    return {problem["prompt"] for problem in problems}


@pytest.mark.parametrize("wanted, row, prompt, completions", [
    (None, dict(question="q"), "q", []),
    (None, dict(prompt="p", question="q"), "p", []),
    (None, dict(prompt=[user("p", name=None, tool_calls=None)]), CHAT, []),   # as Arrow fills
    (None, BOTH, CHAT, []),
    (None, dict(prompt="p", completion=7, chosen=8), "p", []),     # not wanted, so not looked at
    ("demonstration", dict(prompt="p", completion="c"), "p", ["c"]),
    ("demonstration", dict(completion=[*CHAT, assistant("c")]), CHAT, ["c"]),
    ("demonstration", dict(question="q", answer="So\n#### 1,234"), "q", ["So\n#### 1,234"]),
    ("demonstration", dict(prompt="p", completion="c", answer="a\n#### 4"), "p", ["c"]),
    ("pair", dict(AB, prompt="p"), "p", ["a", "b"]),
    ("pair", dict(prompt="p", completions=["a", "b"]), "p", ["a", "b"]),
    ("pair", dict(AB, prompt="p", completions=["x", "y", "z"]), "p", ["a", "b"]),
    ("pair", dict(prompt="p", chosen=[assistant("a")], rejected=[assistant("b")]), "p", ["a", "b"]),
    ("pair", BOTH, CHAT, ["a", "b"]),
    ("pair", dict(BOTH, prompt="p"), CHAT, ["a", "b"]),
    ("pair", dict(BOTH, prompt=[user("p", name=None)]), CHAT, ["a", "b"]),
    ("pair", dict(prompt="p", chosen=[user("s"), *CHAT, assistant("a")],
                  rejected=[user("s"), *CHAT, assistant("b")]), [user("s"), *CHAT], ["a", "b"]),
    ("ranking", dict(prompt="p", completions=["a", "b", "c"]), "p", ["a", "b", "c"]),
    ("ranking", dict(AB, prompt="p"), "p", ["a", "b"]),
    ("pair", dict(prompt="p", chosen="a"), "p", []),                  # a prompt to be answered
    ("ranking", dict(AB, prompt="p", completions=["x", "y", "z"]), "p", ["x", "y", "z"])])
def test_what_a_row_means(wanted, row, prompt, completions):
    """Only a training row must have what is wanted."""
    problem = data.to_problem(row, wanted, completions != [], "here")
    assert problem == dict(row=row, prompt=prompt, completions=completions)


@pytest.mark.parametrize("wanted, words, rows", [
    (None, "prompt", [
        dict(text="1"), dict(prompt=3), dict(prompt=[]), dict(prompt=["p"]), AB,
        dict(prompt=[dict(role="user")]), dict(prompt=[user(None)]), dict(prompt=[user(3)]),
        dict(prompt="p\ud800"), dict(prompt=[user("p\ud800")])]),              # half a letter
    ("pair", "has chosen, rejected; it must have a prompt", [AB, dict(AB, prompt=None)]),
    ("pair", "a pair", [dict(prompt="p", chosen="a", rejected=None), dict(
        prompt="p", completions=["a", "b", "c"]), dict(prompt="p", completion="a")]),
    ("pair", "a completion must be", [
        dict(prompt="p", chosen=3, rejected=4), dict(prompt="p", chosen="a", rejected="\ud800"),
        dict(prompt="p", chosen=["a"], rejected=["b"]), dict(BOTH, prompt="q"),
        dict(BOTH, rejected=[user("q"), assistant("b")]),
        dict(prompt=CHAT, chosen=[user("s"), *CHAT, assistant("a")], rejected="b")]),
    ("demonstration", "a demonstration", [
        dict(prompt="p", answer="1"), dict(prompt="p", answer="#### A title\ntext")]),
    ("demonstration", "a completion must be", [
        dict(prompt="p", completion=3), dict(prompt="p", completion=[user("c")]),
        dict(prompt="p", completion=[assistant("a"), user("b"), assistant("c")])]),
    ("ranking", "a ranking", [
        dict(prompt="p", completions=["a"]), dict(prompt="p", completions="abc"),
        dict(prompt="p", completions=["a", None])])])
def test_rows_that_are_refused(capsys, wanted, words, rows):
    for row in rows:
        with refused(capsys, "row 7", words):
            data.to_problem(row, wanted, True, "row 7")


def test_a_problem_has_every_column_of_the_data_whatever_its_name(tmp_path):
    """A row that lacks a column has None for it, and so has one of another split."""
    write_jsonl(tmp_path / "train.jsonl", sums(9, ids=7) + [dict(prompt="9-9=", targets=8)])
    write_jsonl(tmp_path / "test.jsonl", [dict(prompt="1=", row=[1], completions="x")])
    write_jsonl(tmp_path / "validation.jsonl", [dict(question="1-1=")])
    found = sum(load(tmp_path), [])
    names = {"ids", "targets", "row", "completions", "prompt", "question"}
    assert len(found) == 12 and all(problem["row"].keys() == names for problem in found)
    assert found[9]["row"] == dict(dict.fromkeys(names), prompt="9-9=", targets=8)
    assert found[10]["row"]["question"] == found[10]["prompt"] == "1-1="
    assert all(problem["targets"] == problem["completions"] == [] and problem["ids"]
               == make_tokenizer()(problem["prompt"]).input_ids for problem in found)


@pytest.mark.parametrize("split, wanted, rows, words", [
    ("train", None, sums(2) + [dict(prompt=3)], ["row 3 of train"]),
    ("test", "demonstration", sums(9), ["row 1 of test", "demonstration"]),  # the only split
    ("train", "ranking", [dict(row, completions=["4", "5", "6"][: 2 + i % 2])
                          for i, row in enumerate(sums(9))], ["completions"]),
    ("train", None, [dict(prompt="What is 1?")] * 3, ["toy", "--model"]),
    ("train", None, [dict(prompt="")] * 3, ["''"]),
    ("train", None, [dict(prompt=CHAT)] * 3, ["chat template"])])
def test_data_that_is_refused(tmp_path, capsys, split, wanted, rows, words):
    write_jsonl(tmp_path / f"{split}.jsonl", rows)
    with refused(capsys, "--data", *words):
        load(tmp_path, wanted)


def test_a_file_as_windows_writes_it(tmp_path):
    """A BOM, \\r\\n, empty lines, no last newline, and a line separator inside a text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "1\u20282"}\r\n\r\n  \r\n{"prompt": "3"}'.encode())
    assert data.read_jsonl(path) == [dict(prompt="1\u20282"), dict(prompt="3")]


@pytest.mark.parametrize("line", [b'{"prompt":', b"[1]", b"3", b"[" * 100_000, b'{"a": "\xe9"}'])
def test_a_broken_line_is_named(tmp_path, capsys, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "1"}\n\n' + line + b"\n")
    with refused(capsys, "a.jsonl", "line 3"):
        data.read_jsonl(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["{}/no.jsonl", "{}/nothing", "{}", "{}/a.csv", "none/none:main"])
def test_what_is_not_there_is_one_sentence(tmp_path, capsys, name):
    (tmp_path / "a.csv").write_text("prompt\n1+1=\n") if "csv" in name else None
    with refused(capsys, f"--data {name.format(tmp_path)}", "name"):
        data.read(name.format(tmp_path), 8)


def test_a_table_without_types_is_refused(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train.csv").write_text("prompt,answer\n1+1=,002\n")
    with refused(capsys, f"--data {tmp_path}", "csv", ".jsonl"):
        data.read(str(tmp_path), 8)


@pytest.mark.parametrize("name", ["json", "set.jsonl"])
def test_a_folder_gives_the_same_values_as_its_files(tmp_path, monkeypatch, name):
    """Dates stay text; a folder may be called as a format of the library is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    rows = [[dict(prompt=f"{i}=", born=f"2001-02-0{i}", symbol=text)]
            for i, text in enumerate(["None", "NA", "null", "007", ""], 1)]
    for file, row in zip(("more", "train-0", "train-1", "test", "validation"), rows):
        write_jsonl(f"{name}/{file}.jsonl", row)
    assert data.read(name, 8) == dict(train=sum(rows[:3], []), test=rows[3], validation=rows[4])


def test_a_folder_is_read_anew_although_its_time_is_the_same(tmp_path):
    for answer in (5, 7):
        rows = [dict(prompt="1+1=", answer=answer)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
        os.utime(tmp_path / "train.parquet", (10**9, 10**9))
        assert data.read(str(tmp_path), 8) == dict(train=rows)


def test_messages_in_parquet_are_what_was_written(tmp_path):
    """Arrow gives every message all keys; a template could take the None for a name."""
    prompts = [[user("1")], [user("2", name="n")], [user("3"), assistant("4"), user("5")]]
    rows = [dict(prompt=prompt) for prompt in prompts]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    found = data.read(str(tmp_path), 8)["train"]
    assert [data.to_problem(row, None, True, "here")["prompt"] for row in found] == prompts


def test_a_configuration_is_named_after_a_colon(tmp_path):
    """Of a data set of the hub; a folder that is built like one stands for it here."""
    lines = ["---", "configs:"]
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [dict(prompt=name)])
        lines += [f"- config_name: {name}", f"  data_files: {name}.jsonl"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    assert data.read(f"{tmp_path}:two", 8) == dict(train=[dict(prompt="two")])


def split(n, repeat=1, **given):
    """What is made of n prompts, and the prompts by their checksums."""
    order = sorted(prompts(sums(n)), key=lambda prompt: zlib.crc32(prompt.encode()))
    return data.hold_out(dict(train=sums(n) * repeat, **given), "x"), order


@pytest.mark.parametrize("n, eighth", [(2, 0), (7, 0), (8, 1), (15, 1), (16, 2), (100, 12)])
def test_an_eighth_of_the_prompts_is_test_and_the_next_validation(n, eighth):
    """However often a prompt is repeated, it lies in one split; there is always a test."""
    made, order = split(n, repeat=3)
    tests = max(eighth, 1)
    assert prompts(made["test"]) == set(order[:tests])
    assert prompts(made["validation"]) == set(order[tests : tests + eighth])
    assert prompts(made["train"]) == set(order[tests + eighth :])
    assert sum(map(len, made.values())) == 3 * n


def test_splits_that_the_data_has_stay(capsys):
    given = [dict(prompt="own")]
    made, order = split(16, test=given)
    assert made["test"] == given and prompts(made["validation"]) == set(order[2:4])
    assert prompts(made["train"]) == set(order) - set(order[2:4])
    made, order = split(16, validation=given, test=given)
    assert made == dict(train=sums(16), validation=given, test=given)
    assert data.hold_out(dict(easy=sums(16)), "x") == split(16)[0]  # one split of any name
    for splits in (dict(test=sums(9), validation=sums(9)), dict(train=sums(1) * 9)):
        with refused(capsys, "--data x", "train"):
            data.hold_out(splits, "x")


def test_few_of_many_held_out_prompts_are_always_the_same(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", sums(400))
    everything, few = load(path), load(path, eval_prompts=5)
    assert few == load(path, eval_prompts=5) and few.train == everything.train
    for part, rest in zip(few[1:], everything[1:]):  # drawn from all of them
        assert len(part) == 5 and prompts(part) < prompts(rest) and part != rest[:5]
    with refused(capsys, "--eval_every"):
        load(write_jsonl(tmp_path / "a.jsonl", sums(5)), eval_every=1)


def test_rows_that_do_not_fit_are_dropped_and_counted_never_cut(tmp_path, capsys):
    """A prompt above 128 - 32 tokens, a completion above 32 with its EOS, and equal completions."""
    pair, long = dict(chosen="1" * 31, rejected="2"), dict(chosen="3", rejected="1" * 32)
    rows = sums(40, **pair) + sums(3, **long) + [dict(prompt="3=", chosen="4", rejected="4")]
    rows += [dict(pair, prompt="1" * n) for n in (96, 97, 200)]
    found = sum(load(write_jsonl(tmp_path / "a.jsonl", rows), "pair"), [])
    assert "dropped 6 of 47 rows of train" in capsys.readouterr().out
    assert sorted(len(row["ids"]) for row in found) == [6] * 40 + [96]
    assert all(list(map(len, row["targets"])) == [32, 2] for row in found)
    with refused(capsys, "--data", "train", "--max_new_tokens"):
        load(tmp_path / "a.jsonl", "pair", max_new_tokens=1)


@pytest.mark.parametrize("tokenizer_writes, template, before", [
    ("$A", None, []), ("$A", BARE, []), ("$A", TEMPLATE, [1]),
    ("<bos> $A", None, [1]), ("<bos> $A", BARE, [1]), ("<bos> $A", TEMPLATE, [1]),
    ("<bos> $A <eos>", None, [1]), ("<bos> $A <eos>", BARE, [1]),
    ("<pad> <bos> $A", BARE, [0, 1]), ("<pad> <bos> $A", "<pad><bos>" + BARE, [0, 1])])
def test_a_prompt_begins_as_a_text_does(tokenizer, tokenizer_writes, template, before):
    """So there is one BOS or none, whoever writes it; and no EOS ends a prompt."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=tokenizer_writes, special_tokens=[("<pad>", 0), ("<bos>", 1), ("<eos>", 2)])
    tokenizer.chat_template = template
    (problem,) = data.encode([dict(prompt="1+2", completions=["3"])], tokenizer)
    assert problem["ids"] == before + [5, 14, 6] + ([16] if template else [])
    assert problem["targets"] == [[7, 2]]


@pytest.mark.parametrize("written, ids", [
    ("12", [5, 6, 2]), ("12<eos>", [5, 6, 2]), ("12<eos>\n", [5, 6, 2]), ("1<eos>2", [5, 2, 6, 2]),
    ("12<pad>", [5, 6, 0, 2]), ("<eos>", [2]), ("", [2])])
def test_a_completion_ends_with_one_eos_whether_it_is_written_or_not(tokenizer, written, ids):
    (problem,) = data.encode([dict(prompt="1", completions=[written, "3"])], tokenizer)
    assert problem["targets"] == [ids, [7, 2]]


def test_a_tokenizer_that_was_saved_with_truncation_cuts_nothing(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20, pad_id=0, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (problem,) = data.encode([dict(prompt="1+2+3+4=", completions=["1+2+3+4"])], loaded)
    assert (len(problem["ids"]), len(problem["targets"][0])) == (8, 8)


@pytest.mark.parametrize("content", ["{{ m['content'] }}", "{{ m['content'] | trim }}"])
@pytest.mark.parametrize("begun", ["", "<think>\n", "Let me see: ", "\n", "7"])
def test_an_answer_that_the_data_has_begun_stays_to_the_letter(tokenizer, content, begun):
    """The model sees the prompt, the assistant's header, and what has been begun."""
    tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}]" + content + "[end]"
                               "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    turns = [user("1"), assistant("2"), user("3")] + [assistant(begun)] * bool(begun)
    shown = "[user]1[end][assistant]2[end][user]3[end][assistant]"
    assert data.render(turns, tokenizer, "x") == shown + begun
    assert data.render("3", tokenizer, "x") == "[user]3[end][assistant]"  # text is the user's


def test_the_problems_of_a_step_are_a_function_of_seed_and_step():
    rows = list(range(10))
    steps = [data.draw_problems(rows, step, 4, seed=1) for step in range(5)]
    flat = sum(steps, [])
    assert sorted(flat[:10]) == rows == sorted(flat[10:]) and flat[:10] != flat[10:]
    assert steps[3] == data.draw_problems(rows, 3, 4, seed=1)
    assert steps[0] != data.draw_problems(rows, 0, 4, seed=2)
    assert sorted(data.draw_problems(rows, 0, 30, seed=1)) == sorted(rows * 3)
