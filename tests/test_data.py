"""Prompts, and the toy world."""
import re
import zlib

from types import SimpleNamespace

import datasets
import pytest
import torch

from conftest import TEMPLATE, write_jsonl
from plumbing import data, toy
from plumbing.rewards import as_number
from plumbing.rollout import make_batch


# ------------------------------------------------------------------ the toy world

def test_problems_are_right_and_splits_disjoint():
    seen = {}
    for kind in ("toy", "words"):
        for split in ("train", "validation", "test"):
            rows = toy.problems(kind, split, 300)
            assert rows == toy.problems(kind, split, 300)  # always the same
            for row in rows:
                sum_ = re.sub(r"[^0-9+-]", "", row["prompt"])
                assert str(eval(sum_)) == row["answer"] == re.findall(r"\d+", row["completion"])[-1]
                for step in re.split("[,\n]", row["completion"].replace(" ", "")):
                    left, _, right = step.rpartition("=")
                    assert not left or eval(left) == int(right) and 0 <= int(right) <= 50
                home = zlib.crc32(f"{sum_}=".encode()) % 8
                assert split == {0: "test", 1: "validation"}.get(home, "train")
                assert seen.setdefault(sum_, split) == split
            worked = sum("=" in row["completion"] for row in rows) / 300
            assert 0.4 < worked < 0.6
    assert len({row["prompt"] for row in toy.problems("toy", "test", 512)}) == 512
    assert 100 < len(toy.problems("words", "test", 5000)) < 1000  # few short ones: it stops


def test_tokenizer_and_model_round_trip(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer, model = toy.make_tokenizer(), toy.make_model(1).eval()
    assert sum(p.numel() for p in model.parameters()) == 162_496
    tokenizer.save_pretrained(tmp_path), model.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    same = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = again("8+9-5=").input_ids
    assert ids == tokenizer("8+9-5=").input_ids and len(ids) == 6 and again.decode(ids) == "8+9-5="
    assert again.padding_side == "left"
    ids = torch.tensor([ids])
    assert torch.equal(model(ids).logits, same.eval()(ids).logits)
    assert not torch.equal(toy.make_model(2).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("completion, expected", [
    ("8+9=17,17-5=12", [(6, 1.0), (13, 1.0)]),
    ("8+9=18,18-5=13", [(6, 0.0), (13, 0.0)]),       # a wrong step, and one that builds on it
    ("8+9=17,17-5=11", [(6, 1.0), (13, 0.0)]),
    ("12", [(1, 0.0)]),
    ("8+9=17,17-5=12,1", [(6, 1.0), (14, 1.0), (15, 0.0)]),
    ("", []), ("8+9=17,", [(6, 1.0)])])
def test_check_steps(completion, expected):
    assert toy.check_steps("8+9-5=", completion) == expected


def test_check_steps_accepts_every_demonstration():
    for row in toy.problems("toy", "train", 200):
        marks = toy.check_steps(row["prompt"], row["completion"])
        assert marks[-1][0] == len(row["completion"]) - 1
        assert [right for _, right in marks] == [1.0] * len(marks) or "=" not in row["completion"]


# ------------------------------------------------------------------ prompts

def bos_first(tokenizer):
    """Make the tokenizer prepend its BOS by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


@pytest.mark.parametrize("template", [None, TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("prepends", [False, True])
def test_exactly_one_bos_or_none(tokenizer, template, prepends):
    tokenizer = bos_first(tokenizer) if prepends else tokenizer
    tokenizer.chat_template = template
    (row,) = data.encode([{"prompt": "1+2"}], tokenizer)
    wants_one = prepends or (template and "bos" in template)
    assert row["ids"].count(1) == bool(wants_one) and (row["ids"][0] == 1) == bool(wants_one)
    assert tokenizer.decode(row["ids"][bool(wants_one):]) == ("1+2=" if template else "1+2")


def test_completions_end_with_the_eos(tokenizer):
    (row,) = data.encode_completions([{"completion": "12"}], tokenizer)
    assert row["targets"] == [[5, 6, 2]]
    batch = make_batch([[5]], [[5, 6, 2]], "cpu")
    assert batch.mask.tolist() == [[1, 1, 1]]  # the EOS is a target


@pytest.mark.parametrize("written, ids", [
    ("12", [5, 6, 2]), ("12<eos>", [5, 6, 2]), ("12<eos><eos>", [5, 6, 2]),
    ("12<pad>", [5, 6, 0]), ("12<pad><eos>", [5, 6, 0]), ("1<eos>2", [5, 2, 6, 2]),
    ("<eos>", [2]), ("", [2])])
def test_a_demonstration_ends_with_exactly_one_eos(tokenizer, written, ids):
    """Written or not; one of the model's others, here <pad>, is as good. An EOS inside stays."""
    for column, row in (("completion", written), ("completions", [written, "3"])):
        (problem,) = data.encode_completions([{column: row}], tokenizer, column, [0, 2])
        assert problem["targets"][0] == ids
    assert data.end_once([5, 2, 3], {2}, tokenizer) == [5, 2, 3, 2]  # <unk> comes after it
    from tokenizers import decoders
    tokenizer.backend_tokenizer.decoder = decoders.Replace("<unk>", " ")
    assert data.end_once([5, 2, 3], {2}, tokenizer) == [5, 2]  # as templates end: EOS, newline


@pytest.mark.parametrize("content", ["{{ m['content'] }}", "{{ m['content'] | trim }}"])
@pytest.mark.parametrize("begun", ["<think>\n", "Let me see: ", "\n", "7"])
def test_an_answer_that_the_data_has_begun_stays_to_the_letter(content, begun):
    """Whether the template keeps white space or trims it; the prompt is what it would be without
    the beginning, and the beginning."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}]" + content + "[end]"
                               "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    turns = [dict(role="user", content="1+2="), dict(role="assistant", content=begun)]
    assert data.render(turns, tokenizer, "x") == "[user]1+2=[end][assistant]" + begun
    assert data.render(turns[:1], tokenizer, "x") == "[user]1+2=[end][assistant]"


@pytest.mark.parametrize("row, prompt, completions", [
    (dict(question="Q", chosen="For 2", rejected="For 3"), "Q", ["For 2", "For 3"]),
    (dict(prompt=None, question="Q", chosen="a", rejected="b"), "Q", ["a", "b"]),
    (dict(prompt="P", question="Q", chosen="a", rejected="b"), "P", ["a", "b"]),
    (dict(chosen="For 2", rejected="For 3"), "For", [" 2", " 3"]),
    (dict(chosen="For 2", rejected="For 3", score=7), "For", [" 2", " 3"]),
    (dict(prompt="P", chosen="P 2", rejected="P 3"), "P", ["P 2", "P 3"])])
def test_what_a_column_means_is_the_same_for_all_scripts(row, prompt, completions):
    """A prompt is inferred only where there is none."""
    for wanted in (None, "pairs", "rankings"):
        (problem,) = data.settle({"train": [row]}, "x", wanted)["train"]
        assert (problem["prompt"], problem["completions"]) == (prompt, completions)
        assert problem["row"] is row


def test_columns_are_those_of_the_whole_data_set():
    """None where a row lacks one; a column may have any name, and what we add is beside it."""
    splits = dict(train=[dict(prompt="1", ids=7), dict(prompt="2", targets=8, row=9)],
                  test=[dict(prompt="3", columns=1, completions="x")])
    problems = [problem for part in data.settle(splits, "x").values() for problem in part]
    names = ["prompt", "ids", "targets", "row", "columns", "completions"]
    assert all(list(problem["columns"]) == names for problem in problems)
    assert problems[1]["columns"] == dict(prompt="2", ids=None, targets=8, row=9, columns=None,
                                          completions=None)
    assert data.encode(problems, toy.make_tokenizer())[0]["ids"] == [5]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_number_has_the_precision_of_its_column(tmp_path, dtype):
    """0.1 in a column of 32 bits is 0.100000001490116, and 0.1 was meant."""
    numbers = [0.1, 2.55, 3.5, None, 0.333]
    table = datasets.Dataset.from_list([dict(prompt=f"{i}", answer=value, count=i)
                                        for i, value in enumerate(numbers)])
    table = table.cast_column("answer", datasets.Value(dtype))
    table.to_parquet(tmp_path / "train.parquet")
    rows = data.read(str(tmp_path), 1)["train"]
    assert [row["answer"] for row in rows] == numbers
    assert [row["count"] for row in rows] == [0, 1, 2, 3, 4]


def test_a_saved_format_changes_nothing(tmp_path):
    table = datasets.Dataset.from_list(sums(30)).with_format("torch")
    table.save_to_disk(tmp_path / "set")
    train, _, test = load(tmp_path / "set")
    assert keys(train) | keys(test) <= keys(sums(30)) and type(train[0]["row"]["level"]) is int


def test_the_checksum_sees_every_value():
    import datetime
    import decimal
    values = ["a", 1, 1.5, None, b"a", b"b", datetime.date(2026, 1, 1), datetime.date(2026, 1, 2),
              decimal.Decimal("1.5"), decimal.Decimal("1.6"), [1], [2], {"a": 1}, {"b": 1}]
    sums = [data.checksum([dict(value=value)]) for value in values]
    assert len(set(sums)) == len(values)
    assert data.checksum([object()]) == data.checksum([object()])  # an address is no value
    assert data.checksum([dict(a=1, b=2)]) == data.checksum([dict(b=2, a=1)])


def test_draw_problems_is_a_function_of_seed_and_step():
    rows = list(range(10))
    steps = [data.draw_problems(rows, step, 4, seed=1) for step in range(5)]
    flat = sum(steps, [])
    assert sorted(flat[:10]) == rows and sorted(flat[10:]) == rows and flat[:10] != flat[10:]
    assert steps[3] == data.draw_problems(rows, 3, 4, seed=1)
    assert steps[0] != data.draw_problems(rows, 0, 4, seed=2)


# ------------------------------------------------------------------ --data

def load(where, column=None, **flags):
    base = dict(model=None, max_new_tokens=32, eval_prompts=1000, eval_every=0)
    return data.load_problems(SimpleNamespace(data=str(where), **{**base, **flags}), column)


def sums(n):
    """n rows with a different prompt each, an answer and one more column."""
    prompts = [f"{i % 10}+{i // 10 % 10}+{i // 100}=" for i in range(n)]
    return [dict(prompt=p, answer=str(eval(p[:-1])), level=len(p)) for p in prompts]


def keys(problems):
    return {row["prompt"] for row in problems}


def test_a_file_of_json_lines(tmp_path, tokenizer):
    rows = sums(400)
    path = tmp_path / "sums.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(data.json.dumps, rows)))  # BOM, empty lines, no end
    train, validation, test = load(path)
    for part, homes in ((test, {0}), (validation, {1}), (train, {2, 3, 4, 5, 6, 7})):
        assert {zlib.crc32(row["prompt"].encode()) % 8 for row in part} == homes
    assert keys(train) | keys(validation) | keys(test) == keys(rows)
    assert all(row["ids"] == tokenizer(row["prompt"]).input_ids and row["columns"]["level"] == 6
               for row in train)
    few = load(path, eval_prompts=5)
    assert len(few[1]) == len(few[2]) == 5 and keys(few[2]) < keys(test)
    assert keys(few[2]) != keys(test[:5])  # drawn from all of them, and always the same
    assert few[0] == train and load(path, eval_prompts=5) == few


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_a_handful_of_rows_still_has_a_test(tmp_path, n):
    for first in range(0, 60, 7):  # wherever the checksums fall
        rows = sums(80)[first : first + n] * 2  # every prompt twice
        train, validation, test = load(write_jsonl(tmp_path / "few.jsonl", rows))
        assert train and test and len(train + validation + test) == 2 * n
        assert not keys(train) & keys(test)


def test_a_folder_that_datasets_can_load(tmp_path):
    rows, parts = sums(60), {}
    for split in ("train", "test"):
        parts[split] = rows[:40] if split == "train" else rows[40:]
    for name in ("jsonl", "parquet", "disk", "only"):
        folder = tmp_path / name
        folder.mkdir()
        for split, part in parts.items():
            if name == "jsonl":
                write_jsonl(folder / f"{split}.jsonl", part)
            elif name == "parquet":
                datasets.Dataset.from_list(part).to_parquet(folder / f"{split}.parquet")
        if name == "disk":
            datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}
                                 ).save_to_disk(folder)
        if name == "only":  # one split, whatever its name, is divided by the checksum
            write_jsonl(folder / "test.jsonl", rows)
        train, validation, test = load(folder)
        if name == "only":
            assert {zlib.crc32(row["prompt"].encode()) % 8 for row in test} == {0}
        else:
            assert keys(test) == keys(parts["test"]) and keys(train + validation) == keys(rows[:40])
            assert {zlib.crc32(row["prompt"].encode()) % 8 for row in validation} == {1}
        assert train[0]["columns"]["level"] == 6


def test_a_configuration_is_named_after_a_colon(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        rows = [dict(question=f"{name == 'two'}{row['prompt']}".replace("True", "1+").replace(
            "False", ""), answer=f"{row['prompt']} is <<1>>so\n#### 1,2{row['level']}0")
            for row in sums(30)]
        write_jsonl(tmp_path / "set" / name / "train.jsonl", rows)
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/train.jsonl\n"
        "- config_name: two\n  data_files: two/train.jsonl\n---\n")
    train, _, test = load(tmp_path / "set:two")
    assert all(row["prompt"].startswith("1+") for row in train + test)
    # the form of GSM8K: all of it may serve as a demonstration, the number after #### is the answer
    assert all(problem["completion"] == problem["row"]["answer"] for problem in train)
    assert {as_number(problem["columns"]["answer"]) for problem in train} == {1260}
    assert data.settle({"train": rows}, "set", "completion")


def test_an_answer_with_headings_is_left_alone(tmp_path):
    rows = [dict(row, answer="#### Title\ntext of it") for row in sums(20)]
    (problem, *_), *_ = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert problem["row"] in rows and as_number(problem["columns"]["answer"]) is None
    assert problem["completion"] is None  # it is no demonstration either


def test_long_prompts_are_dropped_and_counted_never_cut(tmp_path, capsys):
    rows = sums(40) + [dict(prompt="1" * n + "=", answer="1", level=6) for n in (95, 96, 200)]
    parts = load(write_jsonl(tmp_path / "a.jsonl", rows))  # the toy's context is 128 tokens
    assert max(len(row["ids"]) for part in parts for row in part) == 96 == 128 - 32
    assert sum(map(len, parts)) == 41 and "dropped 2 of 43 rows" in capsys.readouterr().out
    rows = [dict(row, completion="1" * (i + 1)) for i, row in enumerate(sums(40))]
    train, validation, test = load(write_jsonl(tmp_path / "b.jsonl", rows), "completion")
    assert max(len(row["completion"]) for row in train + validation + test) == 31  # and the EOS
    assert "dropped 9 of 40 rows" in capsys.readouterr().out


def test_prompts_may_be_messages(tmp_path, tokenizer, capsys):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] | replace('u','+') | replace('a','-') }}"
        "{{ m['content'] }},{% endfor %}{% if add_generation_prompt %}-{% endif %}")
    turns = [dict(role="user", content="1"), dict(role="assistant", content="2"),
             dict(role="user", content="3")]
    texts = [tokenizer.decode(row["ids"]) for row in data.encode(
        [dict(prompt=turns), dict(prompt="7"), dict(prompt=turns[:2])], tokenizer)]
    assert texts == ["+1,-2,+3,-", "+7,-", "+1,-2"]  # an answer that has been begun goes on
    done = [dict(completion=[dict(role="assistant", content="12")]), dict(completion="12")]
    assert [row["targets"] for row in data.encode_completions(done, tokenizer)] == [[[5, 6, 2]]] * 2
    with pytest.raises(SystemExit):
        load(write_jsonl(tmp_path / "a.jsonl", [dict(prompt=turns)] * 3))
    assert "chat_template is not set" in capsys.readouterr().err
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SystemExit):
        data.encode([dict(prompt="1")], tokenizer, "--data x")
    assert "by the model's chat template" in capsys.readouterr().err


@pytest.mark.parametrize("rows, column, words", [
    ([], None, ["empty"]),
    ([dict(text="1")], None, ["row 1 of train has text; it must have a prompt"]),
    ([dict(prompt="1", answer="1")], "completion",
     ["has answer, prompt; it must have a completion"]),
    ([dict(prompt="1"), dict(prompt=3)], None, ["row 2 of train: its prompt is 3"]),
    ([dict(prompt="1"), dict(answer="3")], None,
     ["row 2 of train has answer; it must have a prompt"]),
    ([dict(prompt=[dict(role="user")])], None, ["row 1 of train: its prompt", "role, content"]),
    ([dict(prompt=[])], None, ["row 1 of train: its prompt is []"]),
    ([dict(prompt="1", completion=None)], "completion",
     ["row 1 of train has prompt; it must have a completion"]),
    ([dict(prompt="")] * 2, None, ["no tokens"]),
    ([dict(prompt="1=\ud800")] * 2, None, ["row 1 of train: its prompt"]),
    ([dict(prompt="1=", completion="2"), dict(prompt="2=", completion="two")], "completion",
     ["toy model", "--model"]),
    ([dict(prompt="1", completion=[dict(role="user", content="1")])], "completion",
     ["row 1 of train: its completion", "assistant"]),
    ([dict(prompt="1", completion=[dict(role="assistant", content="1")] * 2)], "completion",
     ["row 1 of train: its completion", "assistant"]),
    ([dict(prompt="1=")] * 9, None, ["only one prompt"]),
    ([dict(prompt="1+" * 60 + "1=")], None, ["all 1 rows", "128", "--max_new_tokens"]),
    ([dict(prompt="What is 1?"), dict(prompt="2=")], None, ["toy model", "--model"])])
def test_data_that_will_not_do(tmp_path, capsys, rows, column, words):
    with pytest.raises(SystemExit) as stop:
        load(write_jsonl(tmp_path / "a.jsonl", rows), column)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--data" in error and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_validation_needs_rows(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", sums(2))
    with pytest.raises(SystemExit):
        load(path, eval_every=1)
    assert "--eval_every" in capsys.readouterr().err


def test_splits_without_train_are_refused(tmp_path, capsys):
    datasets.DatasetDict({k: datasets.Dataset.from_list(sums(9)) for k in ("easy", "hard")}
                         ).save_to_disk(tmp_path / "set")
    with pytest.raises(SystemExit):
        load(tmp_path / "set")
    assert "easy, hard" in capsys.readouterr().err
