"""PRIME: its equations by oracle, loop and enumeration; what its reward model learns."""
import itertools
import json
import math
import sys
import xml.dom.minidom

import pytest
import torch

import prime
from plumbing import rewards
from plumbing.model import load_policy
from test_command_line import metrics, weights
from test_exact_gradient import (MASK, REF_LOGPROBS, SCORES, SEQUENCES, THETA, clip_loss,
                                 logprobs_of)
from test_mathematics import T, cases, check_padding, random_batch, same
from test_scripts import blind, here, shorter, train  # noqa: F401
from tools import plot


@pytest.mark.parametrize("x, y", cases("prime_advantages"))
def test_advantages(x, y):
    ours = prime.prime_advantages(T(x["implicit_rewards"]), T(x["scores"]), T(x["mask"]),
                                  x["group_size"], x["gamma"])
    same(ours, y["HAND_paper_eq_returns_outcome_undiscounted"], x["mask"])


@pytest.mark.parametrize("x, y", cases("prime_ce_loss"))
def test_implicit_rewards_and_their_loss(x, y):
    mask, prm = T(x["mask"]), T(x["prm_logprobs"]).requires_grad_()
    loss = prime.implicit_reward_loss(prm, T(x["ref_logprobs"]), mask, T(x["labels"]), x["beta"])
    loss.backward()
    same(loss.detach(), y["ce_loss"])
    same(prm.grad, y["grad_wrt_logprobs"], x["mask"])
    q = prime.implicit_rewards(prm.detach(), T(x["ref_logprobs"]), x["beta"])
    same(q * mask, y["HAND_implicit_rewards_beta_logratio"], x["mask"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_loss_is_finite_where_the_sigmoid_is_0_or_1(sign):
    prm = torch.full((2, 3), 1e4 * sign).requires_grad_()
    loss = prime.implicit_reward_loss(prm, torch.zeros(2, 3), torch.ones(2, 3),
                                      torch.tensor([0, 1]), 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1.5e4 / 2, rel=1e-6)  # one of the two is quite wrong
    assert prm.grad.isfinite().all() and prm.grad.abs().max() > 0.1


def test_loops():
    """The paper's equation, sum by sum; K = 3, gamma = 0.9."""
    mask, q, *_ = random_batch()
    L, scores, gamma = mask.sum(1).int().tolist(), torch.randn(6).double(), 0.9
    A, mean = torch.zeros(6, 7).double(), [sum(q[i, : L[i]].tolist()) / L[i] for i in range(6)]
    for i in range(6):
        others = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        for t in range(L[i]):
            process = sum(gamma ** (u - t) * (q[i, u] - sum(mean[j] for j in others) / 2)
                          for u in range(t, L[i]))
            A[i, t] = process + scores[i] - sum(scores[j] for j in others) / 2
    same(prime.prime_advantages(q, scores, mask, 3, gamma), A)
    equal = prime.prime_advantages(0 * q, torch.full((6,), 0.9).double(), mask, 3)
    assert (equal == 0).all()  # no rounding error for the optimizer to make a step of


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_padding_changes_nothing(garbage):
    def every_function(mask, q, ref, _):
        leaf = q.clone().requires_grad_()
        loss = prime.implicit_reward_loss(leaf, ref, mask, mask[:, 2], 0.05)
        yield prime.prime_advantages(q, mask[:, 3], mask, 3, 0.9)
        yield loss.detach()
        yield torch.autograd.grad(loss, leaf)[0]
    check_padding(every_function, garbage)


def test_the_expected_gradient_is_that_of_outcome_and_process_less_a_price_per_token():
    """By enumeration, groups of two, a fixed q: the gradient of E[s + sum_t q_t] - b E[length].

    b is the mean over answers of their mean q. So the process part's baseline is none: it does not
    only lower the variance, it charges b for each token. That is the paper's equation, not an error
    here; with b = 0 it would be unbiased, as the outcome part is.
    """
    torch.manual_seed(1)
    prm = logprobs_of(torch.randn(len(THETA), 3).double().log_softmax(-1))
    q = prime.implicit_rewards(prm, REF_LOGPROBS, 1.0)
    theta = THETA.clone().requires_grad_()
    logprobs = logprobs_of(theta.log_softmax(-1))
    p = (logprobs * MASK).sum(1).exp()
    expected = 0
    for pair in itertools.product(range(len(SEQUENCES)), repeat=2):
        rows = torch.tensor(pair)
        A = prime.prime_advantages(q[rows], SCORES[rows], MASK[rows], 2)
        expected = expected - p[rows].prod().detach() * clip_loss(logprobs[rows], A, MASK[rows])
    ours = torch.autograd.grad(expected, theta, retain_graph=True)[0]
    b = (p * (q * MASK).sum(1) / MASK.sum(1)).sum().detach()
    J = (p * (SCORES + (q * MASK).sum(1) - b * MASK.sum(1))).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(J, theta, retain_graph=True)[0], rtol=0,
                               atol=1e-10)
    unpriced = torch.autograd.grad((p * (SCORES + (q * MASK).sum(1))).sum(), theta)[0]
    assert abs(b) > 0.05 and (ours - unpriced).abs().max() > 0.01


def test_a_partial_sum_of_q_is_a_soft_mean_of_the_final_sums():
    """beta log E_ref[exp(Q / beta) | the beginning], by enumeration of all ends; for any prm."""
    torch.manual_seed(2)
    beta, ref = 0.5, (REF_LOGPROBS * MASK).sum(1).exp()
    prm = logprobs_of(torch.randn(len(THETA), 3).double().log_softmax(-1))
    q = prime.implicit_rewards(prm, REF_LOGPROBS, beta) * MASK
    for y, row in zip(SEQUENCES, q):
        for n in range(1, len(y) + 1):
            ends = [i for i, other in enumerate(SEQUENCES) if other[:n] == y[:n]]
            mean = sum(ref[i] * (q[i].sum() / beta).exp() for i in ends) / sum(ref[i] for i in ends)
            assert row[:n].sum().item() == pytest.approx(beta * mean.log().item(), abs=1e-12)


# --------------------------------------------------------------------------------- the reward model

def test_the_step_with_the_lowest_reward():
    """Steps of 2 tokens. Found; not found; right after all; of one step only."""
    q = torch.tensor([[0, 1, -1, -1, 0, 0.5], [-3, 0, 0.5, 0, 1, 0], [-5, 0, 0, 0, 0, 0],
                      [-1, 0, 0, 0, 0, 0]])
    steps = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0]], [[1, 3, 5]] * 3 + [[5]]
    stats = prime.prm_stats(q, torch.tensor([0.0, 0, 1, 0]), *steps)
    assert stats.pop("prm_accuracy").item() == 0.75  # the third is right, and its sum says wrong
    assert stats == dict(wrong_answers=2, step_found=0.5, step_chance=pytest.approx(1 / 3))
    assert set(prime.prm_stats(q, torch.zeros(4))) == {"prm_accuracy"}


def test_on_the_toy_the_log_says_how_often_the_wrong_step_was_found(tmp_path, monkeypatch):
    """All answers are called wrong, so that there are some of several steps among them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rewards.REWARDS, "last_number", lambda prompts, completions, **columns: [
        0.0 for _ in completions])
    prime.train(prime.Config(steps=1, prompts_per_step=16, minibatch_size=64, eval_prompts=16,
                             device="cpu", out_dir="run"))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["wrong_answers"] > 0 and 0 <= row["step_found"] <= 1
    assert 0.2 <= row["step_chance"] <= 0.5  # answers of 2 to 5 steps


def has_a_plus(prompts, completions, **columns):
    return [float("+" in text) for text in completions]


def test_outcomes_alone_say_which_token_matters(folders, here):  # noqa: F811
    """An answer is right if it has a plus; nobody says where. The policy is held still."""
    seen, real = [], prime.prime_advantages
    here.setattr(prime, "prime_advantages", lambda q, scores, mask, *args: seen.append(
        (q, mask)) or real(q, scores, mask, *args))
    ids, sample = [], prime.sample
    here.setattr(prime, "sample", lambda *args: ids.append(sample(*args)) or ids[-1])
    here.setitem(rewards.REWARDS, "last_number", has_a_plus)
    train("prime", folders("llama"), prompts=64, steps=15, minibatch_size=32, lr=0.0, prm_lr=5e-3,
          beta=0.5, micro_batch_size=16)
    assert (seen[0][0].abs() < 1e-5).all()  # it starts as the reference
    plus = load_policy(folders("llama"), "cpu")[1].convert_tokens_to_ids("+")
    q, mask, is_plus = (torch.cat([x[i][:, :5].flatten() for x in rows[-5:]]) for rows, i in (
        (seen, 0), (seen, 1), ([(batch.completions == plus,) for batch in ids], 0)))
    good, other = (q[is_plus == kind][mask[is_plus == kind] == 1] for kind in (True, False))
    assert good.mean() > 0.1 > 0 > other.mean(), (good.mean(), other.mean())
    rows = metrics("run")
    loss, accuracy = (sum(row[key] for row in rows[-5:]) / 5
                      for key in ("prm_loss", "prm_accuracy"))
    assert loss < 0.8 * rows[0]["prm_loss"] and accuracy > 0.7


def test_micro_batches_do_not_matter_to_the_reward_model(folders, here):  # noqa: F811
    """Its loss is a mean over completions, however long they are. The policy stays as it is."""
    here.setitem(rewards.REWARDS, "last_number", has_a_plus)
    for size in (16, 3):
        train("prime", folders("llama", hostile=True), prompts=16, micro_batch_size=size, lr=0.0,
              prm_lr=1e-2, beta=0.5, max_new_tokens=24, steps=3, out_dir=f"run{size}")
    one, two = ([row["prm_loss"] for row in metrics(f"run{size}")] for size in (16, 3))
    assert one == pytest.approx(two, rel=2e-4)
    one, two = (torch.load(f"run{size}/checkpoint.pt", weights_only=True)["prm"]
                for size in (16, 3))
    gaps = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert gaps.mean() < 0.02 * 1e-2


def test_a_batch_is_judged_by_the_model_from_before_it(folders, here):  # noqa: F811
    """As in the authors' code: else it would have seen the outcomes that it is to foresee."""
    loaded, real = [], prime.all_logprobs

    def spy(network, *args):
        loaded.append({key: value.clone() for key, value in network.state_dict().items()})
        return real(network, *args)

    here.setattr(prime, "all_logprobs", spy)
    here.setitem(rewards.REWARDS, "last_number", has_a_plus)
    train("prime", folders("gpt2"), steps=2, prm_lr=1e-2)
    (ref, first), (again, second) = loaded[:2], loaded[2:]
    start = load_policy(folders("gpt2"), "cpu")[0].state_dict()
    assert all(torch.equal(start[k], x) for net in (ref, first, again) for k, x in net.items())
    assert any(not torch.equal(start[k], x) for k, x in second.items())
    saved = torch.load("run/checkpoint.pt", weights_only=True)["prm"]
    assert any(not torch.equal(saved[k], x) for k, x in second.items())


# ------------------------------------------------------------------------------ the rest of the run

def test_the_filter_by_accuracy(folders, here):  # noqa: F811
    """Groups of 4 with 0 to 3 right ones. Those with none are left out; of the best too, at 0.3."""
    scores = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    assert prime.filter_by_accuracy(scores, 4, 0.0).tolist() == list(range(16))
    assert prime.filter_by_accuracy(scores, 4, 0.2).tolist() == list(range(4, 16))
    assert prime.filter_by_accuracy(scores, 4, 0.3).tolist() == list(range(8, 12))
    seen, real = [], prime.token_logprobs
    here.setattr(prime, "token_logprobs", lambda net, batch, rows, T: seen.extend(
        rows.tolist()) or real(net, batch, rows, T))
    here.setitem(rewards.REWARDS, "last_number", lambda prompts, completions, **columns: [
        scores[i % 16].item() for i in range(len(prompts))])
    train("prime", folders("llama"), steps=1, prompts=16, accuracy_filter=0.3, eval_prompts=1)
    assert sorted(seen) == sorted([8, 9, 10, 11] * 2)  # policy and reward model


def test_nothing_is_learned_where_the_filter_leaves_nothing(folders, here):  # noqa: F811
    here.setitem(rewards.REWARDS, "last_number", lambda prompts, completions, **columns: [
        1.0] * len(prompts))
    train("prime", folders("llama"), accuracy_filter=0.2)
    assert metrics("run")[-1]["loss"] == 0 and "prm_loss" not in metrics("run")[-1]
    old = load_policy(folders("llama"), "cpu")[0].state_dict()
    assert all(torch.equal(old[key], value) for key, value in weights("run").items())


@pytest.mark.parametrize("score", [-0.5, 1.5])
def test_a_reward_that_is_no_outcome_gets_one_sentence(folders, here, capsys, score):  # noqa: F811
    here.setitem(rewards.REWARDS, "last_number", lambda prompts, completions, **columns: [
        score] * len(prompts))
    with pytest.raises(SystemExit) as stop:
        train("prime", folders("llama"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--reward last_number" in error and "0 to 1" in error


def test_samples_show_each_token_with_its_reward(folders, here):  # noqa: F811
    here.setitem(rewards.REWARDS, "last_number", has_a_plus)
    train("prime", folders("llama"), steps=2, log_every=1, prm_lr=1e-2, beta=0.5)
    rows = [json.loads(line) for line in open("run/samples.jsonl")]
    for row in rows:
        tokens, q = zip(*row["token_rewards"])
        assert "".join(tokens).removesuffix("<eos>") == row["completion"]
    assert max(abs(q) for row in rows[-4:] for _, q in row["token_rewards"]) > 1e-3


def test_the_picture_of_a_wrong_answer(tmp_path, monkeypatch, capsys):
    """Of the wrong ones with most steps, that of the lowest sum; red boxes below 0, else blue."""
    monkeypatch.chdir(tmp_path)

    def row(completion, score, *q):
        return dict(prompt="1+2<3=", completion=completion, score=score, token_rewards=list(q))

    rows = [row("1,2", 0.0, ["1", 9.0]), row("1,2,3", 1.0, ["1", 9.0]), row("7", 0.0, ["7", -9.0]),
            row("8,9", 0.0, ["8", 0.25], [",9", -0.5], ["<eos>", 0.0]),
            row("5,6", 0.0, ["5", 0.0])]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(sys, "argv", ["plot.py", ".", "--tokens", "--out", "tokens.svg"])
    plot.main()
    drawn = xml.dom.minidom.parse("tokens.svg")
    texts = [text.firstChild.data for text in drawn.getElementsByTagName("text")]
    assert texts == ["1+2<3=", "8", "+0.250", ",9", "-0.500", "<eos>", "+0.000"]
    boxes = [(box.getAttribute("fill"), box.getAttribute("fill-opacity"))
             for box in drawn.getElementsByTagName("rect")[1:]]
    assert boxes == [("#2166ac", "0.50"), ("#b2182b", "1.00"), ("#b2182b", "0.00")]
    (tmp_path / "samples.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert "no wrong answer" in str(stop.value)
