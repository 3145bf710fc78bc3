"""Work is counted, because time is no matter for a test: tokens forwarded, rows decoded, passes."""
import pytest
import torch

from conftest import seeded
from plumbing import rollout, run
from plumbing.model import load_policy
from plumbing.rollout import Batch, make_batch, micro_batches, sample, token_logprobs
from test_scripts import SCRIPTS, quick

PROMPTS = [[5, 6, 7, 8, 9, 10], [4, 5], [11, 9, 6, 7]]


@pytest.fixture
def forwards(monkeypatch):
    """Of each forward: the policy, rows, columns, and whether a gradient will be asked of it."""
    real, seen = rollout.forward, []

    def forward(policy, ids, *args, **kwargs):
        seen.append((policy, *ids.shape, torch.is_grad_enabled()))
        return real(policy, ids, *args, **kwargs)
    monkeypatch.setattr(rollout, "forward", forward)
    return seen


# ------------------------------------------------------------------ how much is forwarded

def test_a_rollout_forwards_each_prompt_once_and_few_ended_rows(policy, tokenizer, forwards):
    batch = sample(policy, tokenizer, PROMPTS, 32, 50, 1.5, seeded())
    (_, rows, columns, _), *steps = forwards
    assert (rows, columns) == (3, 6)
    assert all(columns == 1 for _, _, columns, _ in steps)
    lengths = batch.mask.sum(1)
    assert len(steps) == lengths.max() - 1  # the last token is drawn, and not forwarded
    needed = int((lengths - 1).sum())  # rows that have not ended, in all steps
    assert needed <= sum(rows for _, rows, _, _ in steps) <= needed / 0.75 < 0.7 * 96 * len(steps)


@pytest.mark.parametrize("name, flags, with_gradient, without", [
    ("reinforce", dict(kl_coef=0.0), 1, 0), ("reinforce", {}, 1, 1),
    ("reinforce_pp", dict(kl_coef=0.0), 1, 0), ("reinforce_pp", {}, 1, 1),
    ("reinforce_pp", dict(epochs=2), 2, 1), ("rloo", {}, 1, 1), ("remax", {}, 1, 1),
    ("rloo", dict(sequence_ratio=True), 1, 2), ("grpo", dict(kl_coef=0.0), 1, 0),
    ("grpo", {}, 1, 1), ("grpo", dict(kl_coef=0.0, epochs=3), 3, 0), ("ppo", {}, 2, 2),
    ("ppo", dict(kl_coef=0.0), 2, 1)])
def test_no_step_makes_a_pass_that_is_not_needed(
        folders, tmp_path, monkeypatch, few_problems, forwards, name, flags, with_gradient,
        without):
    """Passes over the 16 completions, after sampling: two micro-batches of 8 each."""
    def sample_and_forget(*args, **kwargs):
        batch = sample(*args, **kwargs)
        forwards.clear()
        return batch
    script = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "sample", sample_and_forget)
    monkeypatch.setattr(run, "evaluate", lambda *args: {})
    monkeypatch.setattr(run, "report", lambda *args: None)
    monkeypatch.setattr(script, "check_first_step", lambda *args: None)
    monkeypatch.setattr(script, "micro_batches", lambda batch, rows, size, *signal: micro_batches(
        batch, rows, size))  # of these few answers, most are wrong
    script.train(quick(name, folders("llama"), prompts=16, steps=1, **flags))
    each = 4 if name in ("rloo", "grpo") else 2  # shared prompts are a forward of their own
    assert sum(gradient for *_, gradient in forwards) == with_gradient * each
    assert sum(not gradient for *_, gradient in forwards) == without * each


def test_a_pass_forwards_each_prompt_once(policy, forwards):
    batch = make_batch([[5] * 9] * 8, [[6] * n for n in (3, 9, 4, 4, 2, 8, 1, 9)], "cpu")
    batch = Batch([[5] * 9, [7] * 4], torch.arange(8) // 4, batch.completions, batch.mask)
    token_logprobs(policy, batch, torch.arange(8), 1.0)
    assert [(rows, columns) for _, rows, columns, _ in forwards] == [(2, 9), (8, 8)]


# ------------------------------------------------------------------ micro-batches

def test_rows_without_signal_are_not_forwarded_and_not_missed(policy, tokenizer):
    """Same gradient, and the weights are still those of the whole mini-batch."""
    batch = sample(policy, tokenizer, PROMPTS, 4, 10, 1.0, seeded())
    advantages = torch.tensor([0.0] * 4 + [1, 0, -1, 0] + [0] * 4)
    gradients = []
    for signal in (None, advantages, advantages[:, None] * batch.mask):
        policy.zero_grad()
        forwarded = []
        for rows, by_token, _ in micro_batches(batch, torch.arange(12), 2, signal):
            logprobs, m = token_logprobs(policy, batch, rows, 1.0), batch.mask[rows]
            loss = (logprobs * advantages[rows, None]).sum() / m.sum()
            (loss * by_token).backward()
            forwarded += rows.tolist()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()
                                    if p.grad is not None]))
        assert sorted(forwarded) == (list(range(12)) if signal is None else [0, 4, 6])
    assert gradients[0].norm() > 0.1
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)
    rows, = [rows for rows, *_ in micro_batches(batch, torch.arange(12), 2, 0 * advantages)]
    assert rows.tolist() == [0]  # AdamW, whose moments go on, gets a gradient of 0


@pytest.mark.parametrize("name, kl_coef", [
    ("rloo", 0.0), ("remax", 0.0), ("grpo", 0.0), ("grpo", 0.1)])
def test_scripts_skip_what_has_no_gradient(
        folders, tmp_path, monkeypatch, few_problems, plain_descent, name, kl_coef):
    """With and without skipping: the same weights. With a KL in the loss there is a gradient."""
    monkeypatch.chdir(tmp_path)
    script, seen = SCRIPTS[name], []

    def blind_in_the_first_half(prompts, completions, **columns):
        return [float(i % 3 == 0) if i >= len(prompts) // 2 else 1.0 for i in range(len(prompts))]
    monkeypatch.setattr(script, "load_rewards", lambda *args: {"r": blind_in_the_first_half})

    def spy(skip):
        def split(batch, rows, size, *signal):
            parts = list(micro_batches(batch, rows, size, *(signal if skip else ())))
            seen.append(sum(len(part) for part, *_ in parts) / len(rows))
            return parts
        return split
    for skip in (True, False):
        monkeypatch.setattr(script, "micro_batches", spy(skip))
        script.train(quick(name, folders("llama"), prompts=16, steps=1, kl_coef=kl_coef, lr=0.1,
                           minibatch_size=16, micro_batch_size=4, out_dir=str(skip)))
    skipping, everything = seen
    assert everything == 1 and (skipping < 0.7 if kl_coef == 0 else skipping == 1)
    one, two = (load_policy(out, "cpu")[0].state_dict() for out in ("True", "False"))
    moved = max((one[key] - two[key]).abs().max() for key in one)
    assert moved < 1e-5


# ------------------------------------------------------------------ no gradient while sampling

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_that_is_sampled_has_a_gradient(policy, tokenizer, forwards, monkeypatch, device):
    """In the mode of either device; inference_mode(False) would switch gradients on."""
    mode = rollout.without_gradient
    monkeypatch.setattr(rollout, "without_gradient", lambda _: mode(torch.device(device)))
    batch = sample(policy, tokenizer, PROMPTS, 2, 5, 1.0, seeded())
    assert len(forwards) > 1 and not any(gradient for *_, gradient in forwards)
    tensors = batch.owner, batch.completions, batch.mask, batch.logprobs, batch.finished
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)


def test_a_batch_can_be_trained_on(policy, tokenizer):
    """Tensors made in inference mode could not be: autograd refuses to keep them."""
    batch = sample(policy, tokenizer, PROMPTS, 2, 5, 1.0, seeded())
    weight = torch.ones((), requires_grad=True)
    for tensor in (batch.logprobs, batch.mask, batch.finished.float(), batch.completions.float()):
        assert not tensor.is_inference()
        (weight * tensor).sum().backward()
