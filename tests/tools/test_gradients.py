"""tools/gradients.py: against loops over batches, differences, and the tables of the documents."""
import itertools
import re

import pytest
import torch
from conftest import ROOT

from tools import gradients


def objective(world, kl_coef):
    """J of a world, one completion and one token at a time."""
    policy, ref = world.logits.log_softmax(-1), world.ref_logits.log_softmax(-1)
    J = 0.0
    for prompt, (i, y) in itertools.product(range(2), enumerate(gradients.SEQUENCES)):
        where = [(prompt, gradients.PREFIXES.index(y[:t]), y[t]) for t in range(len(y))]
        logp, ref_logp = (sum(table[place] for place in where) for table in (policy, ref))
        J += logp.exp() * (world.scores[15 * prompt + i] - kl_coef * (logp - ref_logp)) / 2
    return J


@pytest.mark.parametrize("kind", gradients.SCORES)
def test_the_gradient_of_the_objective_is_that_of_finite_differences(kind):
    world, step = gradients.make_world(kind), 1e-5
    exact, found = gradients.objective_gradient(world, 0.3), torch.zeros(2, 7, 3).double()
    for place in itertools.product(range(2), range(7), range(3)):
        there = []
        for sign in (1, -1):
            logits = world.logits.clone()
            logits[place] += sign * step
            there.append(objective(world._replace(logits=logits), 0.3))
        found[place] = (there[0] - there[1]) / (2 * step)
    torch.testing.assert_close(exact, found, rtol=0, atol=1e-8)


@pytest.mark.parametrize("K, loss", [(1, gradients.reinforce_pp), (2, gradients.grpo),
                                     (2, gradients.raft)], ids=["reinforce_pp", "grpo", "raft"])
def test_an_expected_gradient_is_a_sum_over_all_ordered_batches(K, loss):
    """Two completions, which as a group have one prompt; each batch has its probability."""
    world = gradients.make_world("binary")
    logits = world.logits.clone().requires_grad_()
    logprobs, total = gradients.completion_logprobs(logits), 0
    completions, probabilities = gradients.all_completions(world)
    for i in map(list, itertools.product(range(30), repeat=2)):
        if K == 2 and i[0] // 15 != i[1] // 15:
            continue
        batch = gradients.Batch(*(x[i] for x in completions))
        best = [float(x > y) for x, y in zip(batch.scores, batch.scores.flip(0))]
        batch = batch._replace(is_best=torch.tensor(best),
                               z_scores=gradients.normalize_rewards(batch.scores, 5.0))
        draws = 4 if K == 1 else 2  # so many series of prompts are equally likely
        total += probabilities[i].prod() / draws * loss(logprobs[i], batch, K)
    found = gradients.expected_gradients(world, 2, K, [loss])[0, 0]
    torch.testing.assert_close(found, torch.autograd.grad(total, logits)[0], rtol=0, atol=1e-10)


def cells(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in text.splitlines() if line.startswith("| ") and "---" not in line]


def test_the_tables_are_those_of_the_documents():
    """Every row at N = 4, where all batches are enumerated, and the table of the KL."""
    printed = cells((ROOT / "docs" / "gradients.md").read_text())
    rows = [row for row in printed if re.fullmatch(r"[124]", row[1])]
    for kind in gradients.SCORES:
        for K in (1, 2, 4):
            ours = [row for row in gradients.ROWS if row[1] == K
                    and (kind == "binary" or row[2] is not gradients.prime)]
            found, _ = gradients.measure(gradients.make_world(kind), ours, 4, K, None)
            for (name, _, loss), (cosine, length) in zip(ours, found):
                kl_coef = "0" if loss in gradients.NO_KL else str(gradients.KL_COEF)
                row = next(row for row in rows if row[:3] == [name, str(K), kl_coef])
                rows.remove(row)
                there = [float(number) for number in row[3].split("/")]
                assert [cosine, length] == [pytest.approx(there[0], abs=6e-5),
                                            pytest.approx(there[1], abs=6e-4)], (kind, name, K)
    assert not rows
    header, *table = cells(gradients.kl_table())
    assert [row for row in printed if row in table] == table and header in printed


def test_random_batches_agree_with_all_batches():
    """Batches of 4 in pairs, within 5 standard errors, which are small and not 0."""
    world = gradients.make_world("binary")
    exact = -gradients.objective_gradient(world, 0.1)
    truth, drawn = (gradients.compare(gradients.expected_gradients(
        world, 4, 2, [gradients.grpo], count)[:, 0], exact) for count in (None, 4000))
    assert ((drawn[1] > 1e-4) & (drawn[1] < 0.03)).all()
    assert ((drawn[0] - truth[0]).abs() < 5 * drawn[1]).all()
