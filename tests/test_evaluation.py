"""Looking at a policy: the log of a step, and the held-out problems."""
import importlib.util
import math
import sys

import pytest
import torch

from conftest import ROOT, make_model, seeded, to_problems
from plumbing import data, evaluation, rewards, toy
from plumbing.rollout import sample


def test_wilson():
    share, low, high = evaluation.wilson([1] * 9 + [0])
    assert (share, low, high) == pytest.approx((0.9, 0.596, 0.982), abs=1e-3)  # published table
    assert evaluation.wilson([1] * 10)[2] == pytest.approx(1)
    assert evaluation.wilson([0] * 10)[1] == pytest.approx(0)


def test_batch_stats(tokenizer):
    batch = sample(make_model("llama"), tokenizer, [[5], [6]], 2, 4, 1.0, seeded())
    batch.mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).float()
    batch.finished = torch.tensor([True, False, True, True])
    batch.logprobs = -torch.ones(4, 4)
    kl = torch.where(batch.mask.bool(), 0.5, math.nan)
    stats = evaluation.batch_stats(torch.tensor([1.0, 1, 0, 1]), kl, batch, 2)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(dict(
        score=0.75, score_std=0.75**0.5 / 2, kl=0.5 * 10 / 4, entropy=1.0, length=2.5,
        truncated=0.25, frac_zero_std=0.5))
    assert evaluation.batch_stats(torch.tensor([1.0, 1, 0, 1]), kl, batch, 1)["frac_zero_std"] == 0


EXACT = dict(last_number=rewards.last_number)


class Knobs:
    temperature, micro_batch_size, max_new_tokens, minibatch_size, data = 1.0, 8, 6, 3, "toy"


def test_first_step_checks_are_silent_when_all_is_well_and_speak_when_not(tokenizer, capsys):
    policy = make_model("llama").eval()
    policy.generation_config.eos_token_id = list(range(9))
    batch = sample(policy, tokenizer, [[5], [6]], 8, 12, 1.0, seeded())
    scores, kl = torch.arange(16).float(), torch.zeros_like(batch.mask)
    evaluation.check_first_step(policy, batch, scores, kl, Knobs)
    assert capsys.readouterr().out == ""
    batch.finished[:9] = False
    other = make_model("llama", seed=1).eval()
    evaluation.check_first_step(other, batch, 0 * scores, kl + 0.1, Knobs)
    out = capsys.readouterr().out
    assert out.count("warning") == 4
    for word in ("ratio", "KL", "scores", "--max_new_tokens"):
        assert word in out


def test_evaluate_counts_and_always_draws_the_same(tokenizer):
    policy = make_model("llama").eval()
    problems = to_problems(toy.problems("toy", "test", 200), tokenizer)
    results = evaluation.evaluate(policy, tokenizer, problems, Knobs, EXACT)
    torch.manual_seed(7)
    assert results == evaluation.evaluate(policy, tokenizer, problems, Knobs, EXACT)
    assert results["n"] == 200
    for name in ("sampled", "greedy", "shows_work", "length"):
        value, low, high = results[name]
        assert low <= value <= high


def test_an_interval_of_a_mean_is_the_usual_one_and_stays_in_the_range_of_the_scores():
    """Of many numbers, +- 1.96 std / sqrt(n); of a few near their end, that would leave 0..1."""
    values = torch.randn(500, generator=seeded()).double()
    mean, low, high = evaluation.interval(values.tolist())
    margin = 1.96 * values.std().item() / 500**0.5
    assert mean == pytest.approx(values.mean().item()) and low < mean < high
    assert [mean - low, high - mean] == pytest.approx([margin, margin], rel=0.15)
    few = [0.0] * 19 + [1.0]
    mean, low, high = evaluation.interval(few)
    assert mean == 0.05 and low == 0 and 0.1 <= high <= 0.2  # 0.05 - 1.96 std / sqrt(20) is -0.05
    assert evaluation.interval(few) == evaluation.interval(few)
    assert evaluation.interval([3.0, 3.0]) == [3, 3, 3]


def test_what_is_evaluated_follows_the_data_and_the_rewards(tokenizer):
    """Exact match where all answers are numbers, the rewards where they say more, else the nats."""
    policy, exact = make_model("llama").eval(), EXACT
    problems = to_problems(toy.problems("toy", "test", 10), tokenizer)
    data.encode_completions(problems, tokenizer)

    def names(*args, **knobs):
        return set(evaluation.evaluate(policy, tokenizer, problems, type("K", (Knobs,), knobs),
                                       *args)) - {"n", "length"}

    two = {**exact, "long": lambda prompts, completions, **columns: list(map(len, completions))}
    both = {"sampled", "greedy", "shows_work"}
    assert names(exact) == both == names() - {"nats"} and "nats" in names()
    assert names(two) == both | {"score_sampled", "score_greedy"}
    assert names(exact, data="file.jsonl") == {"sampled", "greedy"}
    results = evaluation.evaluate(policy, tokenizer, problems, Knobs, two)
    assert results["score_greedy"][0] > results["greedy"][0]
    problems[3]["columns"]["answer"] = "blue"
    assert names(two, data="file.jsonl") == {"score_sampled", "score_greedy"}


def test_nats_per_demonstration(tokenizer):
    policy = make_model("llama").eval()
    problems = to_problems(toy.problems("toy", "test", 7), tokenizer)
    data.encode_completions(problems, tokenizer)
    costs = []
    for problem in problems:
        ids = problem["ids"] + tokenizer(problem["completion"]).input_ids + [2]
        with torch.no_grad():
            logprobs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(problem["ids"])
        costs.append(-sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))))
    mean, low, high = evaluation.evaluate(policy, tokenizer, problems, Knobs)["nats"]
    assert mean == pytest.approx(sum(costs) / 7, rel=1e-5)
    assert min(costs) < low < mean < high < max(costs)


def test_windows_has_no_resource(tmp_path, monkeypatch, capsys):
    """Then the peak of memory is not known and not printed."""
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("anew", ROOT / "plumbing" / "evaluation.py")
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    anew.report(dict(n=3), dict(n=3), tmp_path)
    screen = capsys.readouterr().out
    assert "The trained model is in" in screen and "Peak memory" not in screen
