"""PRIME: its equations by oracle, loop and enumeration; which groups it learns from."""
import pytest
import torch
from conftest import moved, seeded
from exact_world import MASK, REF_LOGPROBS, SCORES, SEQUENCES, THETA, expected_gradient, logprobs_of
from oracle_cases import T, cases, check_padding, random_batch, run_script, same

import common
import prime

@pytest.mark.parametrize("x, y", cases("prime_advantages"))
def test_advantages(x, y):
    ours = prime.prime_advantages(T(x["implicit_rewards"]), T(x["scores"]), T(x["mask"]),
                                  x["group_size"], x["gamma"])
    same(ours, y["HAND_paper_eq_returns_outcome_undiscounted"], x["mask"])


@pytest.mark.parametrize("x, y", cases("prime_ce_loss"))
def test_implicit_rewards_and_their_loss(x, y):
    mask, prm = T(x["mask"]), T(x["prm_logprobs"]).requires_grad_()
    ref_logprobs = T(x["ref_logprobs"]) * mask
    q = prime.implicit_rewards(prm.detach() * mask, ref_logprobs, x["beta"])
    same(q, y["HAND_implicit_rewards_beta_logratio"], mask)
    loss = prime.implicit_reward_loss(prm * mask, ref_logprobs, T(x["labels"]), x["beta"]).mean()
    loss.backward()
    same(loss.detach(), y["ce_loss"])
    same(prm.grad, y["grad_wrt_logprobs"], mask)


def test_the_loss_is_finite_where_the_sigmoid_is_0_or_1():
    for sign in (1, -1):
        prm = torch.full((2, 3), 1e4 * sign).requires_grad_()
        losses = prime.implicit_reward_loss(prm, torch.zeros(2, 3), torch.tensor([0, 1]), 0.5)
        losses.sum().backward()
        assert sorted(losses.tolist()) == pytest.approx([0, 1.5e4])  # one of the two is quite wrong
        assert prm.grad.isfinite().all() and prm.grad.abs().max() == 0.5


def test_advantages_are_the_sums_of_the_paper():
    """Groups of three, gamma = 0.9; and where all are equal there is no rounding error to learn."""
    mask, q, *_ = random_batch()
    L, scores, gamma = mask.sum(1).int().tolist(), torch.arange(6).double() ** 2, 0.9
    A, mean = torch.zeros(6, 7).double(), [sum(q[i, : L[i]].tolist()) / L[i] for i in range(6)]
    for i in range(6):
        others = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        for t in range(L[i]):
            process = sum(gamma ** (u - t) * (q[i, u] - sum(mean[j] for j in others) / 2)
                          for u in range(t, L[i]))
            A[i, t] = process + scores[i] - sum(scores[j] for j in others) / 2
    same(prime.prime_advantages(q, scores, mask, 3, gamma), A)
    assert (prime.prime_advantages(0 * q, torch.full((6,), 0.9), mask, 3, gamma) == 0).all()
    check_padding(lambda mask, q, *_: [prime.prime_advantages(q, scores, mask, 3, gamma)])


def test_the_expected_gradient_is_that_of_outcome_and_process_less_a_price_per_token():
    """By enumeration, groups of two, a fixed q: the gradient of E[s + sum_t q_t] - b E[length].

    b is the mean over completions of their mean q. So the process part's baseline is none: it does
    not only lower the variance, it charges b for each token. That is the paper's equation, not an
    error here; with b = 0 it would be unbiased, as the outcome part is.
    """
    prm = logprobs_of(torch.randn(7, 3, generator=seeded(1)).double())
    q = prime.implicit_rewards(prm, REF_LOGPROBS, 1.0)

    def losses_of(logprobs, rows):
        A = prime.prime_advantages(q[rows], SCORES[rows], MASK[rows], 2)
        return common.ppo_clip_loss(logprobs, logprobs.detach(), A)[0]

    theta = THETA.clone().requires_grad_()
    p = logprobs_of(theta).sum(1).exp()
    b = (p * q.sum(1) / MASK.sum(1)).sum().detach()
    unpriced, length = (p * (SCORES + q.sum(1))).sum(), (p * MASK.sum(1)).sum()
    priced, unpriced = (torch.autograd.grad(J, theta, retain_graph=True)[0]
                        for J in (unpriced - b * length, unpriced))
    ours = -expected_gradient(losses_of, 2)
    torch.testing.assert_close(ours, priced, rtol=0, atol=1e-10)
    assert (ours - unpriced).abs().max() > 0.01


def test_a_partial_sum_of_q_is_a_soft_mean_of_the_final_sums():
    """beta log E_ref[exp(Q / beta) | the beginning], by enumeration of all ends; for any prm."""
    beta, ref = 0.5, REF_LOGPROBS.sum(1).exp()
    q = prime.implicit_rewards(logprobs_of(THETA), REF_LOGPROBS, beta)
    for y, row in zip(SEQUENCES, q):
        for n in range(1, len(y) + 1):
            ends = [i for i, other in enumerate(SEQUENCES) if other[:n] == y[:n]]
            mean = (ref[ends] * (q[ends].sum(1) / beta).exp()).sum() / ref[ends].sum()
            assert row[:n].sum().item() == pytest.approx(beta * mean.log().item(), abs=1e-12)


def test_the_step_with_the_lowest_reward():
    """Steps of 2 tokens. Found; not found; right after all; of one step only."""
    q = torch.tensor([[0, 1, -1, -1, 0, 0.5], [-3, 0, 0.5, 0, 1, 0], [-5, 0, 0, 0, 0, 0],
                      [-1, 0, 0, 0, 0, 0]])
    steps = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0]], [[1, 3, 5]] * 3 + [[5]]
    stats = prime.prm_stats(q, torch.tensor([0.0, 0, 1, 0]), *steps)
    assert stats.pop("prm_accuracy").item() == 0.75  # the third is right, and its sum says wrong
    assert stats == dict(wrong_answers=2, step_found=0.5, step_chance=pytest.approx(1 / 3))
    assert set(prime.prm_stats(q, torch.zeros(4))) == {"prm_accuracy"}


@pytest.fixture
def train(tmp_path, monkeypatch, few_problems, folders):
    """train(scores, folder, **flags) makes a step of four groups of four -> the row of the log."""
    return lambda scores, folder="run", **flags: run_script(
        prime, monkeypatch, tmp_path / folder,
        lambda completions, **columns: scores[: len(completions)], model=folders("llama"),
        prompts_per_step=4, micro_batch_size=64, **flags)[0]


def test_the_filter_by_accuracy(train, monkeypatch, tmp_path, folders):
    """Of groups with 0 to 3 right ones of 4, the third remains at 0.3. Where all are wrong, there
    is no step."""
    scores = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    for margin, kept in ((0.0, range(16)), (0.25, range(4, 16)), (0.3, range(8, 12))):
        assert prime.filter_by_accuracy(scores, 4, margin).tolist() == list(kept)
    learned, real = [], prime.token_logprobs
    monkeypatch.setattr(prime, "token_logprobs", lambda net, batch, rows, T: learned.extend(
        rows.tolist()) or real(net, batch, rows, T))
    train(scores.tolist(), accuracy_filter=0.3)
    assert sorted(learned) == sorted([8, 9, 10, 11] * 2)  # policy and reward model
    row = train([0.0] * 16, "none", accuracy_filter=0.3)
    assert row["loss"] == 0 and "prm_loss" not in row
    assert moved(folders("llama"), tmp_path / "none") == 0


@pytest.mark.parametrize("score", [-0.5, 1.5])
def test_a_reward_that_is_no_outcome_gets_one_sentence(train, capsys, score):
    with pytest.raises(SystemExit) as stop:
        train([score] * 16)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--reward" in error and "0 to 1" in error
