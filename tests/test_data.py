"""Prompts, rewards, evaluation, and the toy world."""
import math
import re
import zlib

import pytest
import torch

import data
import toy
from conftest import TEMPLATE, make_model
from rollout import make_batch, sample


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
    assert data.encode_completions([{"completion": "12"}], tokenizer) == [[5, 6, 2]]
    batch = make_batch([[5]], [[5, 6, 2]], "cpu")
    assert batch.mask.tolist() == [[1, 1, 1]]  # the EOS is a target


def test_draw_problems_is_a_function_of_seed_and_step():
    rows = list(range(10))
    steps = [data.draw_problems(rows, step, 4, seed=1) for step in range(5)]
    flat = sum(steps, [])
    assert sorted(flat[:10]) == rows and sorted(flat[10:]) == rows and flat[:10] != flat[10:]
    assert steps[3] == data.draw_problems(rows, 3, 4, seed=1)
    assert steps[0] != data.draw_problems(rows, 0, 4, seed=2)


def test_texts_are_without_the_eos_that_ended_them(tokenizer):
    """Also where that EOS is an ordinary token, here "3" (id 7), and last_number would count it."""
    batch = make_batch([[5]] * 3, [[5, 6, 2], [5, 6, 7], [5, 7, 6]], "cpu")
    batch.finished = torch.tensor([True, True, False])
    assert data.decode(tokenizer, batch) == ["12", "12", "132"]


# ------------------------------------------------------------------ rewards

@pytest.mark.parametrize("text, answer, finished, expected", [
    ("1+2=3", "3", True, 1.0), ("1+2=3", "3", False, 0.0), ("it is -4.50", "-4.5", True, 1.0),
    ("3", "3.0", True, 1.0), ("12 or 3", "12", True, 0.0), ("none", "3", True, 0.0),
    ("", "3", True, 0.0), ("the answer is 7.", "7", True, 1.0), ("7-3=4", "4", True, 1.0)])
def test_last_number(text, answer, finished, expected):
    columns = dict(answer=[answer], finished=[finished], other=[1])
    assert data.last_number(["?"], [text], **columns) == [expected]


def test_score_hands_each_completion_its_own_problem(tokenizer):
    """A reward that returns its problem's column: group i must get row i's, K times."""
    batch = sample(make_model("llama"), tokenizer, [[5], [6, 7], [8]], 4, 3, 1.0)
    problems = [dict(prompt=str(i), ids=[5], value=i) for i in range(3)]
    seen = {}

    def reward(prompts, completions, value, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [float(v) for v in value]

    texts, scores = data.score(reward, problems, batch, tokenizer)
    assert scores.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert seen["prompts"] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert seen["completions"] == texts == data.decode(tokenizer, batch)
    assert seen["finished"] == batch.finished.tolist() and "ids" not in seen


def test_a_score_that_is_not_a_number_stops_the_run(tokenizer, capsys):
    batch = sample(make_model("llama"), tokenizer, [[5]], 3, 3, 1.0)
    with pytest.raises(SystemExit) as stop:
        data.score(lambda *a, **k: [0.0, math.nan, 1.0], [dict(prompt="")], batch, tokenizer, 4)
    error, text = capsys.readouterr().err, data.decode(tokenizer, batch)[1]
    assert stop.value.code == 1 and "score is nan in step 5" in error and repr(text) in error


# ------------------------------------------------------------------ looking at a policy

def test_wilson():
    share, low, high = data.wilson([1] * 9 + [0])
    assert (share, low, high) == pytest.approx((0.9, 0.596, 0.982), abs=1e-3)  # published table
    assert data.wilson([1] * 10)[2] == pytest.approx(1)
    assert data.wilson([0] * 10)[1] == pytest.approx(0)


def test_batch_stats(tokenizer):
    batch = sample(make_model("llama"), tokenizer, [[5], [6]], 2, 4, 1.0)
    batch.mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).float()
    batch.finished = torch.tensor([True, False, True, True])
    batch.logprobs = -torch.ones(4, 4)
    kl = torch.where(batch.mask.bool(), 0.5, math.nan)
    stats = data.batch_stats(torch.tensor([1.0, 1, 0, 1]), kl, batch, 2)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(dict(
        score=0.75, score_std=0.75**0.5 / 2, kl=0.5 * 10 / 4, entropy=1.0, length=2.5,
        truncated=0.25, frac_zero_std=0.5))
    assert data.batch_stats(torch.tensor([1.0, 1, 0, 1]), kl, batch, 1)["frac_zero_std"] == 0


class Knobs:
    temperature, micro_batch_size, max_new_tokens, minibatch_size = 1.0, 8, 6, 3


def test_first_step_checks_are_silent_when_all_is_well_and_speak_when_not(tokenizer, capsys):
    policy = make_model("llama").eval()
    policy.generation_config.eos_token_id = list(range(9))
    batch = sample(policy, tokenizer, [[5], [6]], 8, 12, 1.0)
    scores, kl = torch.arange(16).float(), torch.zeros_like(batch.mask)
    data.check_first_step(0, policy, batch, scores, kl, Knobs)
    assert capsys.readouterr().out == ""
    batch.finished[:9] = False
    data.check_first_step(0, make_model("llama", seed=1).eval(), batch, 0 * scores, kl + 0.1, Knobs)
    out = capsys.readouterr().out
    assert out.count("warning") == 4
    for word in ("ratio", "KL", "scores", "--max_new_tokens"):
        assert word in out


def test_evaluate_counts_and_leaves_the_random_state_alone(tokenizer):
    policy = make_model("llama").eval()
    problems = data.encode(toy.problems("toy", "test", 10), tokenizer)
    state = torch.get_rng_state()
    results = data.evaluate(policy, tokenizer, problems, Knobs)
    assert torch.equal(state, torch.get_rng_state()) and results["n"] == 10
    assert results == data.evaluate(policy, tokenizer, problems, Knobs)
    for name in ("sampled", "greedy", "shows_work", "length"):
        value, low, high = results[name]
        assert low <= value <= high
