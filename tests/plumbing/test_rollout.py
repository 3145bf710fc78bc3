"""The distribution that is sampled is the one that is differentiated, on every architecture."""
import copy
import random
import shutil

import numpy
import pytest
import torch
from conftest import CONFIGS, HOSTILE, make_model, seeded

from plumbing import rollout
from plumbing.model import load_policy, plain_logprobs, remove_dropout
from plumbing.rollout import Batch, all_logprobs, micro_batches, sample, token_logprobs

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6], [13, 4, 4, 5, 0]]  # ragged; one contains the pad id
ALL = torch.arange(12)  # the rows of three prompts with four completions each


def by_definition(policy, batch, temperature):
    """log pi(y_t | x, y_<t): each row alone, without padding, cache or mask -> (N, C)."""
    result = torch.zeros(batch.mask.shape)
    for i, n in enumerate(batch.mask.sum(1).long().tolist()):
        ids = batch.completions[i, :n]
        logits = policy(torch.tensor([batch.prompts[batch.owner[i]] + ids.tolist()])).logits
        result[i, :n] = (logits[0, -n - 1 : -1] / temperature).log_softmax(-1)[range(n), ids]
    return result


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gradient(policy):
    """The gradient that has gathered, in one piece; it is 0 afterwards."""
    flat = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    return flat


def make_batch(lengths, prompts):
    """Completions of these lengths, the same number for each prompt; nothing was sampled."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
    owner = torch.arange(len(lengths)) * len(prompts) // len(lengths)
    return Batch(prompts, owner, torch.full(mask.shape, 6), mask)


@pytest.fixture
def forwards(monkeypatch):
    """The rows and columns of each forward, and whether a gradient can be asked of it."""
    real, seen = rollout.forward, []

    def forward(policy, ids, *args, **kwargs):
        seen.append((*ids.shape, torch.is_grad_enabled()))
        return real(policy, ids, *args, **kwargs)
    monkeypatch.setattr(rollout, "forward", forward)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_shared_pass_and_plain_forward_agree(folders, name):
    """Prompts are ragged, T is 0.7, and generation_config asks for much that is not done."""
    policy, tokenizer = load_policy(folders(name, hostile=True), "cpu")
    policy.generation_config.update(**HOSTILE)
    batch = sample(policy, tokenizer, PROMPTS, 4, 12, 0.7, seeded())
    one_each = torch.tensor([1, 4, 8])
    assert 0 < batch.finished.sum()
    with torch.no_grad():
        expected = by_definition(policy, batch, 0.7)
        close(batch.logprobs, expected)
        close(token_logprobs(policy, batch, ALL, 0.7), expected)
        close(token_logprobs(policy, batch, one_each, 0.7), expected[one_each])
        close(all_logprobs(policy, batch, 5, 0.7), expected)
        for row, same in zip(plain_logprobs(policy, batch, 0.7), expected):
            close(row, same[: len(row)])


def check_same_draws(policy, other, tokenizer):
    plain, ours = (sample(p, tokenizer, PROMPTS, 4, 12, 0.7, seeded()) for p in (policy, other))
    assert plain.finished.any() and torch.equal(plain.mask, ours.mask)
    assert torch.equal(plain.completions * plain.mask, ours.completions * ours.mask)
    close(ours.logprobs, plain.logprobs)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_of_compile_draws_the_same_tokens(name, tokenizer):
    """Its fixed shape and its padding to 64 columns, without the compiler."""
    policy = remove_dropout(make_model(name))
    policy.generation_config.eos_token_id = [2, 7]
    fixed = copy.deepcopy(policy)
    fixed.compiled_forward, fixed.fixed_caches = rollout.forward, {}
    for _ in range(2):  # the second time, the memory of the first is written over
        check_same_draws(policy, fixed, tokenizer)


@pytest.mark.skipif(not shutil.which("g++") or torch.__version__ < "2.11",
                    reason="--compile needs a C++ compiler and torch 2.11")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_decoding_draws_the_same_tokens(tokenizer):
    policy = make_model("llama").eval()
    del policy.model.layers[1]  # the compiler takes its time for each
    compiled = copy.deepcopy(policy)
    rollout.compile_decoding(compiled)
    check_same_draws(policy, compiled, tokenizer)


def test_the_gradients_of_micro_batches_add_up_to_that_of_the_plain_forward(policy, tokenizer):
    batch = sample(policy, tokenizer, PROMPTS, 4, 10, 0.7, seeded())
    share = torch.randn(batch.mask.shape, generator=seeded(1)) * batch.mask
    (by_definition(policy, batch, 0.7) * share).sum().backward()
    expected = gradient(policy)
    for size in (1, 2, 5, 12):
        for rows in micro_batches(batch, torch.randperm(12, generator=seeded(size)), size):
            (token_logprobs(policy, batch, rows, 0.7) * share[rows]).sum().backward()
        assert (gradient(policy) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name, tokenizer):
    policy = remove_dropout(make_model(name))
    batch = sample(policy, tokenizer, [PROMPTS[0] * 4, PROMPTS[1]], 3, 20, 1.0, seeded())
    weights = torch.randn(batch.mask.shape, generator=seeded(1))
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def gradient_and_bytes():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            logprobs = token_logprobs(policy, batch, torch.arange(6), 1.0)
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        (logprobs * weights).sum().backward()
        return gradient(policy), sum(size for key, size in sizes.items() if key not in own)

    expected, before = gradient_and_bytes()
    policy.gradient_checkpointing_enable()
    found, after = gradient_and_bytes()
    assert not policy.training  # or else sampling would have no cache
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert after < 0.5 * before, (before, after)


def test_the_gradient_of_a_shared_prompt_is_added_in_a_fixed_order(policy, tokenizer):
    """On a GPU, the backward of plain indexing, x[owner], adds in any order."""
    batch = sample(policy, tokenizer, PROMPTS, 4, 10, 1.0, seeded())
    new = graph = {token_logprobs(policy, batch, ALL, 1.0).grad_fn}
    while new:
        new = {parent for node in new for parent, _ in node.next_functions} - graph - {None}
        graph = graph | new
    names = {node.name() for node in graph}
    assert "IndexSelectBackward0" in names and "IndexBackward0" not in names


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_under_bf16_the_ratio_is_noisy_but_centred(name, tokenizer, monkeypatch):
    """What CUDA does, on a CPU: autocast around the passes; weights and log-probs are fp32."""
    monkeypatch.setattr(rollout, "use_bf16", lambda device: True)
    policy = remove_dropout(make_model(name, scale=0.1))
    batch = sample(policy, tokenizer, PROMPTS, 16, 20, 1.0, seeded())
    logprobs = token_logprobs(policy, batch, torch.arange(48), 1.0)
    ratio = (logprobs - batch.logprobs)[batch.mask.bool()].exp()
    assert logprobs.dtype == batch.logprobs.dtype == torch.float32
    assert 1e-3 < (ratio - 1).abs().mean() < 0.05 and abs(ratio.mean() - 1) < 0.01


def test_log_softmax_in_chunks_is_exact_and_keeps_no_copy_of_the_logits():
    logits = torch.randn(3, 700, 50, generator=seeded()).bfloat16().requires_grad_()  # 3 chunks
    tokens = torch.randint(50, (3, 700), generator=seeded(1))
    weights, kept = torch.randn(3, 700, generator=seeded(2)), []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        found = rollout.pick_in_chunks(logits, tokens, 0.7)
    (found * weights).sum().backward()
    exact = (logits.detach().double() / 0.7).softmax(-1)
    close(found.double(), exact.gather(-1, tokens[..., None]).log().squeeze(-1), 1e-6)
    one_hot = torch.nn.functional.one_hot(tokens, 50)
    close(logits.grad.double(), weights[..., None] * (one_hot - exact) / 0.7, 0.01)
    assert found.dtype == torch.float32 and max(kept, default=0) < logits.nbytes


def test_draw_at_the_edges():
    """The uniform number 0 draws no token of probability 0. And in a large vocabulary, one token of
    weight 1 and 150,000 of 3e-8, each has a place of its own: an fp32 sum would merge them."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert rollout.draw(torch.tensor([[-torch.inf, 1.0, 2.0]]), 1.0, zero)[0].item() == 1
    tail = torch.cat([torch.ones(1), torch.full((150_000,), 3e-8)]).log()[None]
    cumulative = tail[0].double().exp().cumsum(0)
    for k in (1, 70_001, 83_002, 149_999):
        uniform = (cumulative[k - 1] + cumulative[k]) / 2 / cumulative[-1]
        token, logprob = rollout.draw(tail, 1.0, uniform[None])
        assert token.item() == k
        assert logprob.item() == pytest.approx((tail[0, k].double() - cumulative[-1].log()).item())


def test_completions_follow_the_model(policy, tokenizer):
    """All two-token completions of a prompt: frequencies against the model's probabilities."""
    policy.generation_config.update(**HOSTILE)  # ends are 2 and 7
    n, temperature = 20_000, 1.5
    batch = sample(policy, tokenizer, [PROMPTS[0]], n, 2, temperature, seeded())
    with torch.no_grad():
        one = (policy(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
        pairs = torch.tensor([PROMPTS[0] + [token] for token in range(18)])
        two = one[:, None] * (policy(pairs).logits[:, -1] / temperature).softmax(-1)
    two[[2, 7]] = torch.zeros(18).index_fill(0, torch.tensor(0), 1) * one[[2, 7], None]
    first, second = (batch.completions * batch.mask).long().unbind(1)  # 0 where one has ended
    counts = torch.bincount(18 * first + second, minlength=18 * 18).view(18, 18)
    likely = two * n > 5
    k = int(likely.sum())
    assert ((counts / n - two)**2 / two)[likely].sum() * n < k + 4 * (2 * k)**0.5


def test_a_row_draws_its_own_numbers(policy, tokenizer):
    """Neither the global generators matter, nor whether the rows beside it have ended."""
    batch = sample(policy, tokenizer, PROMPTS, 16, 24, 1.5, seeded())
    torch.manual_seed(7)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id = 17
    longer = sample(policy, tokenizer, PROMPTS, 16, 24, 1.5, seeded())
    assert not torch.equal(batch.mask, longer.mask[:, : batch.mask.shape[1]])
    both = batch.mask.bool() & longer.mask[:, : batch.mask.shape[1]].bool()
    assert torch.equal(batch.completions[both], longer.completions[:, : batch.mask.shape[1]][both])


def test_the_random_numbers_of_a_step():
    """They are the same for the same seed and step; no seed repeats another, some steps later."""
    def numbers(seed, step):
        found = torch.rand(2, generator=rollout.step_generator(seed, step)).tolist()
        return (*found, random.random(), numpy.random.rand(), torch.rand(()).item())
    steps = [numbers(seed, step) for seed in (1, 2, 2**32 + 1) for step in range(20)]
    assert numbers(1, 0) == steps[0]
    for column in zip(*steps):
        assert len(set(column)) == 60


def scripted(script):
    """A policy that writes script[t] at step t after PROMPTS[0], by way of its positions."""
    model = make_model("gpt2", scale=0.0)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(18, 32))
        for t, token in enumerate(script, len(PROMPTS[0]) - 1):
            model.transformer.wpe.weight[t] = 50 * torch.eye(18, 32)[token]
        model.transformer.ln_f.weight.fill_(10)
    return model.eval()


@pytest.mark.parametrize("script, more_eos, expected, finished, text", [
    ([5, 6, 2, 5], None, [5, 6, 2], True, "12"), ([2, 5], None, [2], True, ""),
    ([5, 7, 5, 5], [7], [5, 7], True, "1"), ([5, 2, 7], [7], [5, 2], True, "1"),
    ([5, 6, 5, 2], None, [5, 6, 5], False, "121"), ([5, 1, 6], None, [5, 1, 6], False, "1<bos>2")])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_completion_ends_with_any_eos_or_is_cut_off(
        tokenizer, pad, script, more_eos, expected, finished, text):
    """Its mask holds the EOS, even where padding is the EOS too; its text does not."""
    tokenizer.pad_token = pad
    policy = scripted(script)
    policy.generation_config.eos_token_id = more_eos
    batch = sample(policy, tokenizer, [PROMPTS[0]], 2, 3, 1.0, seeded())
    assert batch.completions.tolist() == [expected] * 2 and batch.mask.all()
    assert batch.finished.tolist() == [finished] * 2
    assert rollout.to_texts(tokenizer, batch) == [text] * 2


def test_a_rollout_forwards_each_prompt_once_and_few_ended_rows(policy, tokenizer, forwards):
    batch = sample(policy, tokenizer, PROMPTS, 32, 50, 1.5, seeded())
    first, *steps = forwards
    assert first == (3, 8, False)
    lengths = batch.mask.sum(1)
    assert len(steps) == lengths.max() - 1  # the last token is drawn, and not forwarded
    assert {step[1:] for step in steps} == {(1, False)}
    needed = int((lengths - 1).sum())  # rows that have not ended, in all steps
    assert needed <= sum(rows for rows, *_ in steps) <= needed / 0.75 < 0.7 * 96 * len(steps)


def test_a_pass_forwards_each_prompt_once_per_group(policy, forwards):
    batch = make_batch((3, 9, 4, 4, 2, 8, 1, 9), [[5] * 9, [7] * 4])
    token_logprobs(policy, batch, torch.arange(8), 1.0)
    all_logprobs(policy, batch, 4, 1.0)
    assert forwards == [(2, 9, True), (8, 8, True),
                        (1, 9, False), (4, 8, False), (1, 4, False), (4, 8, False)]


def test_micro_batches_yield_each_row_once_and_the_rows_of_a_prompt_together():
    """Prompts come in the order of their longest completion, however the mini-batch is shuffled."""
    batch = make_batch((1, 9, 2, 3, 1, 8), [[5]] * 3)
    for seed in range(5):
        rows = torch.randperm(6, generator=seeded(seed))
        parts = [sorted(part.tolist()) for part in micro_batches(batch, rows, 2)]
        assert parts == [[2, 3], [4, 5], [0, 1]]
    parts = list(micro_batches(batch, torch.tensor([4, 5, 0, 1, 2]), 3))
    assert [len(part) for part in parts] == [3, 2]
    assert sorted(torch.cat(parts).tolist()) == [0, 1, 2, 4, 5]


def test_rows_without_signal_are_not_forwarded():
    """Where no row has one, a row is forwarded all the same: AdamW needs a gradient, be it 0."""
    batch = make_batch([3] * 12, PROMPTS)
    advantages = torch.tensor([0.0] * 4 + [1, 0, -1, 0] + [0] * 4)
    for signal in (advantages, advantages[:, None] * torch.tensor([0, 1, 0])):
        forwarded = torch.cat(list(micro_batches(batch, ALL, 2, signal)))
        assert {4, 6} <= set(forwarded.tolist()) <= {0, 4, 6}
        kept, = micro_batches(batch, ALL, 2, 0 * signal)
        assert len(kept) == 1
