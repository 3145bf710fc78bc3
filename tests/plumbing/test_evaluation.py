"""Looking at a policy: the log of a step, held-out problems, intervals, and the last table."""
import json
import math
import random
import re
import statistics
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import make_model, seeded, to_problems

from plumbing import evaluation, toy
from plumbing.model import load_policy
from plumbing.rewards import last_number
from plumbing.rollout import sample

EXACT = dict(last_number=last_number)


def knobs(**changes):
    return SimpleNamespace(**{**dict(data="toy", max_new_tokens=24, micro_batch_size=8,
                                     minibatch_size=3, temperature=0.5), **changes})


def test_batch_stats_by_a_loop(tokenizer):
    batch = sample(make_model("llama"), tokenizer, [[5], [6]], 2, 4, 1.0, seeded())
    lengths, C = [2, 4, 1, 3], 4
    batch.mask = (torch.arange(C) < torch.tensor(lengths)[:, None]).float()
    batch.finished = torch.tensor([True, False, True, True])
    batch.logprobs, kl = (torch.randn(4, C, generator=seeded(i)) * batch.mask for i in (1, 2))
    scores = [1.0, 1.0, 0.0, 0.5]
    tokens = [(i, t) for i in range(4) for t in range(lengths[i])]
    expected = dict(
        score=statistics.mean(scores), score_std=statistics.pstdev(scores),
        kl=sum(kl[i, t].item() for i, t in tokens) / 4,
        entropy=-statistics.mean(batch.logprobs[i, t].item() for i, t in tokens),
        length=2.5, truncated=0.25, frac_zero_std=0.5)
    for K, zero in {2: 0.5, 1: 0.0, 4: 0.0}.items():  # without groups, the batch is the group
        stats = evaluation.batch_stats(torch.tensor(scores), kl, batch, K)
        assert {key: value.item() for key, value in stats.items()} == pytest.approx(
            {**expected, "frac_zero_std": zero}, rel=1e-4, abs=1e-6)


def test_approx_kl_is_in_expectation_the_kl_from_the_policy_that_sampled():
    """By enumeration of 5 tokens: the share of each is its probability under that policy."""
    old, new = torch.randn(2, 3, 5, generator=seeded(), dtype=torch.float64).log_softmax(-1)
    found = evaluation.approx_kl(new.requires_grad_(), old, old.exp() / 3)
    expected = sum((old[i].exp() * (old[i] - new[i])).sum() for i in range(3)) / 3
    assert found.item() == pytest.approx(expected.item()) and not found.requires_grad


def test_wilson_is_the_solution_of_its_quadratic():
    """The bounds are the p for which the share is 1.96 standard errors away from p."""
    for ones, n in ((9, 10), (1, 3), (0, 10), (10, 10), (250, 512)):
        share, low, high = evaluation.wilson([1] * ones + [0] * (n - ones))
        a = 1.96**2 / n  # (share - p)^2 = a p (1 - p)
        roots = sorted(numpy.roots([1 + a, -2 * share - a, share**2]).real)
        assert share == ones / n and [low, high] == pytest.approx(roots, abs=1e-7)
    assert evaluation.wilson([1] * 9 + [0]) == pytest.approx((0.9, 0.596, 0.982), abs=1e-3)


def test_the_interval_of_a_mean():
    values = [random.Random(i).gauss(3, 2) for i in range(50)]
    mean, margin = statistics.mean(values), 1.96 * statistics.pstdev(values) / math.sqrt(50)
    assert evaluation.interval(values) == pytest.approx([mean, mean - margin, mean + margin])
    assert evaluation.interval([5]) == [5, 5, 5]


@pytest.fixture(scope="module")
def trained():
    """The toy's policy, less sure of all tokens, so that greedy and sampled answers differ."""
    policy, tokenizer = load_policy(None, "cpu")
    policy.model.norm.weight.data *= 0.3
    return policy, tokenizer, to_problems(toy.problems("toy", "test", 12), tokenizer)


def test_greedy_is_the_most_likely_token_again_and_again(trained):
    """Each problem alone, no cache and no padding: hits and lengths as evaluate() has them."""
    policy, tokenizer, problems = trained
    hits, lengths = [], []
    for problem in problems:
        ids = list(problem["ids"])
        while ids[-1] != tokenizer.eos_token_id and len(ids) < len(problem["ids"]) + 24:
            ids.append(policy(torch.tensor([ids])).logits[0, -1].argmax().item())
        lengths.append(len(ids) - len(problem["ids"]))
        text = tokenizer.decode(ids[-lengths[-1] :]).replace(",", "=").split("=")[-1]
        hits.append(text == problem["row"]["answer"] + tokenizer.eos_token)
    assert 0 < sum(hits) < 12
    results = evaluation.evaluate(policy, tokenizer, problems, knobs(), EXACT)
    assert results["greedy"] == evaluation.wilson(hits) and results["n"] == 12
    found = evaluation.look(policy, tokenizer, problems, knobs(), dict(exact=EXACT), 0.0, None)
    assert found["lengths"] == lengths and found["exact"] == hits


def test_an_evaluation_always_draws_the_same_at_temperature_1(trained):
    """Whatever was drawn before, the micro-batches, and the temperature of the training."""
    policy, tokenizer, _ = trained
    problems = to_problems(toy.problems("toy", "test", 70), tokenizer)  # sampled in two parts
    seen, found = [], []

    def watch(prompts, completions, **columns):
        seen.append(list(completions))
        return [float(len(text)) for text in completions]
    for cfg in knobs(), knobs(micro_batch_size=64, minibatch_size=64, temperature=2.0):
        torch.rand(3), random.random()
        found.append(evaluation.evaluate(policy, tokenizer, problems, cfg, dict(watch=watch)))
    assert found[0] == found[1] and seen[:4] == seen[4:] and seen[0] != seen[2]
    lengths = [len(text) for text in seen[0] + seen[1]]
    assert found[0]["score_sampled"][0] == pytest.approx(statistics.mean(lengths))


def test_what_is_evaluated_follows_the_data_and_the_rewards(tokenizer):
    """Exact match where all answers are numbers, and the rewards where they say something else."""
    policy, rows = make_model("llama").eval(), toy.problems("toy", "test", 6)
    numbers = to_problems(rows, tokenizer)
    words = to_problems([{**rows[0], "answer": "blue"}, *rows[1:]], tokenizer)
    demonstrations = to_problems(rows, tokenizer, "demonstration")
    demonstrations[1]["targets"] = []  # a prompt alone, which can only be answered
    long = dict(long=lambda completions, **columns: list(map(len, completions)))
    exact, scores = {"sampled", "greedy", "length"}, {"score_sampled", "score_greedy", "length"}

    def measure(problems):
        assert len(problems) == 5 and all(problem["targets"] for problem in problems)
        return dict(nats=[1, 1, 1])

    def names(problems, data="own.jsonl", policy=policy, **more):
        found = evaluation.evaluate(policy, tokenizer, problems, knobs(data=data), **more)
        assert found.pop("n") == 6
        return set(found)
    assert names(numbers) == names(numbers, rewards=EXACT) == exact
    assert names(numbers, rewards=long) == names(numbers, rewards=EXACT | long) == exact | scores
    assert names(words, rewards=long) == scores
    assert names(numbers, "toy", measure=measure) == exact | {"shows_work"}  # prompts alone
    assert names(demonstrations, measure=measure) == exact | {"nats"}
    scorer = SimpleNamespace(can_generate=lambda: False)  # as reward_model.py trains
    assert names(demonstrations, policy=scorer, measure=measure) == {"nats"}


def test_the_report_shows_what_was_measured_and_writes_all_of_it(tmp_path, capsys):
    before = dict(n=7, sampled=[0.5, 0.25, 0.75], length=[9.0, 8.0, 10.0])
    after = dict(n=7, sampled=[0.875, 0.75, 1.0], length=[12.0, 11.0, 13.0], other=[1, 1, 1])
    evaluation.report(before, after, tmp_path)
    screen = capsys.readouterr().out
    (line,) = [line for line in screen.splitlines() if line.startswith("exact match, sampled")]
    assert re.findall(r"\d\.\d+", line) == "0.500 0.250 0.750 0.875 0.750 1.000".split()
    assert "n = 7" in screen and "greedy" not in screen and str(tmp_path / "model") in screen
    results = json.loads((tmp_path / "test.json").read_text())
    assert results["before"] == before and results["after"] == after
