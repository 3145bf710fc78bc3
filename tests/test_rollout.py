"""Is the distribution that is sampled the one that is differentiated? On every architecture."""
import copy
import random
import shutil
import tempfile

import numpy
import pytest
import torch
import transformers

from common import mini_batches
from conftest import CONFIGS, HOSTILE, make_model, save_folder, seeded
from plumbing import rollout
from plumbing.model import (checkpoint_activations, load_model, load_policy, load_tokenizer,
                            plain_logprobs, save_policy)
from plumbing.rollout import (Batch, all_logprobs, all_values, draw, make_batch, micro_batches,
                              sample, step_generator, token_logprobs, token_values)
from ppo import make_critic

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6], [13, 4, 4, 5, 0]]  # ragged; one contains the pad id


def gap(rows, table):
    """The largest difference, relative to numbers above 1: fp32 has seven digits."""
    return max(((row - table[i, : len(row)]).abs() / row.abs().clamp(min=1)).max().item()
               for i, row in enumerate(rows))


# ------------------------------------------------------------------ the three ways to a log-prob

@pytest.mark.parametrize("name", CONFIGS)
def test_sampler_shared_and_plain_pass_agree(folders, name):
    """Ragged prompts, windows shorter than the sequence, T = 0.7, a hostile configuration."""
    policy, tokenizer = load_policy(folders(name, hostile=True), "cpu")
    batch = sample(policy, tokenizer, PROMPTS, 4, 12, 0.7, seeded())
    everything, one_each = torch.arange(12), torch.tensor([1, 4, 8])
    with torch.no_grad():
        plain = plain_logprobs(policy, batch, 0.7)
        assert gap(plain, batch.logprobs) < 1e-4
        assert gap(plain, token_logprobs(policy, batch, everything, 0.7)) < 1e-4
        unshared = token_logprobs(policy, batch, one_each, 0.7)
        assert gap([plain[i] for i in one_each], unshared) < 1e-4
        assert gap(plain, all_logprobs(policy, batch, 5, 0.7)) < 1e-4
    assert batch.mask.sum(1).unique().numel() > 1 or name != "gpt2"  # some rows did end early
    assert policy.generation_config.top_k == HOSTILE["top_k"]        # kept, and not obeyed


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_of_the_state_before_the_token(folders, name):
    """Against a plain forward of each row: the head's output one column before its token."""
    policy, tokenizer = load_policy(folders(name), "cpu")
    critic = make_critic(policy)
    batch = sample(policy, tokenizer, PROMPTS, 4, 12, 0.7, seeded())
    everything, one_each = torch.arange(12), torch.tensor([1, 4, 8])
    with torch.no_grad():
        assert all_values(critic, batch, 5).abs().max() == 0  # a fresh critic expects nothing
        critic.get_output_embeddings().weight.normal_(generator=seeded(1))
        critic.get_output_embeddings().bias.fill_(0.5)
        plain = []
        for owner, ids, mask in zip(batch.owner, batch.completions, batch.mask.bool()):
            row = torch.cat([torch.tensor(PROMPTS[owner]), ids[mask]])
            plain.append(critic(row[None]).logits[0, -mask.sum() - 1 : -1, 0])
        values = token_values(critic, batch, everything)
        unshared = token_values(critic, batch, one_each)
        assert gap(plain, values) < 1e-4 and gap(plain, all_values(critic, batch, 5)) < 1e-4
        assert gap([plain[i] for i in one_each], unshared) < 1e-4
    assert (values[batch.mask == 0] == 0).all() and values.std() > 0.1
    assert torch.equal(policy.get_input_embeddings().weight, critic.get_input_embeddings().weight)
    assert policy.get_output_embeddings().weight.shape[0] == 18  # untouched


def test_plain_pass_is_a_loop_over_tokens(policy, tokenizer):
    batch = sample(policy, tokenizer, PROMPTS, 1, 6, 0.7, seeded())
    for i, row in enumerate(plain_logprobs(policy, batch, 0.7)):
        ids, total = list(PROMPTS[i]), 0.0
        for token in batch.completions[i][: len(row)].tolist():
            with torch.no_grad():
                logits = policy(torch.tensor([ids])).logits[0, -1] / 0.7
            total += (logits[token] - logits.logsumexp(-1)).item()
            ids.append(token)
        assert row.sum().item() == pytest.approx(total, abs=1e-4)


def test_gradient_of_the_shared_pass(policy, tokenizer):
    """Shared prompts, micro-batches of every size and the plain forward give one and the same."""
    batch = sample(policy, tokenizer, PROMPTS, 4, 10, 1.0, seeded())
    weights = torch.randn(batch.mask.shape, generator=seeded(1))

    def gradient():
        flat = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        policy.zero_grad()
        return flat

    plain = plain_logprobs(policy, batch, 1.0)
    total = sum((row * weights[i, : len(row)]).sum() for i, row in enumerate(plain))
    (total / batch.mask.sum()).backward()
    expected = gradient()
    for size in (1, 2, 5, 12):
        total = 0
        for rows, by_token, _ in micro_batches(batch, torch.randperm(12), size):
            logprobs = token_logprobs(policy, batch, rows, 1.0)
            loss = (logprobs * weights[rows]).sum() / batch.mask[rows].sum()  # a token mean
            (loss * by_token).backward()
            total += by_token
        assert total == pytest.approx(1)
        assert (gradient() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name, tokenizer):
    """Its plain pass against the shared one: equal gradient, and less kept for the backward."""
    policy = load_model_like(name)
    batch = sample(policy, tokenizer, [PROMPTS[0] * 4, PROMPTS[1]], 3, 20, 1.0, seeded())
    weights = torch.randn(batch.mask.shape, generator=seeded(1))

    def gradient_and_bytes():
        own, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        policy.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logprobs = token_logprobs(policy, batch, torch.arange(6), 1.0)
        (logprobs * weights).sum().backward()
        flat = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        return flat, sum(size for key, size in kept.items() if key not in own)

    shared, before = gradient_and_bytes()
    checkpoint_activations(policy)
    with torch.no_grad():
        alone, calls = plain_logprobs(policy, batch, 1.0), []
        hook = policy.register_forward_hook(lambda *_: calls.append(policy.training))
        assert gap(alone, token_logprobs(policy, batch, torch.arange(6), 1.0)) < 1e-4
        hook.remove()
    assert calls == [False, False]  # without gradient: prompts, then completions, as ever
    plain, after = gradient_and_bytes()
    assert not policy.training  # sampling, afterwards, keeps its cache
    torch.testing.assert_close(plain, shared, rtol=1e-4, atol=1e-4 * shared.abs().max().item())
    assert after < 0.5 * before, (before, after)


def load_model_like(name):
    """make_model without dropout, as loading does it."""
    policy = make_model(name)
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        return load_model(folder)


def test_same_seed_same_gradient_bits(policy, tokenizer):
    """Plain indexing x[owner] has a backward that adds in any order: it must not be there."""
    batch = sample(policy, tokenizer, PROMPTS, 40, 10, 1.0, seeded())
    graph = [token_logprobs(policy, batch, torch.arange(120), 1.0).grad_fn]
    names, seen = set(), set()
    while graph:
        node = graph.pop()
        if node not in seen:
            seen.add(node)
            names.add(node.name())
            graph += [parent for parent, _ in node.next_functions if parent is not None]
    assert "IndexSelectBackward0" in names and "IndexBackward0" not in names
    bits = set()
    for _ in range(5):
        policy.zero_grad()
        token_logprobs(policy, batch, torch.arange(120), 1.0).sum().backward()
        bits.add(tuple(policy.get_input_embeddings().weight.grad.flatten().tolist()))
    assert len(bits) == 1


def test_padding_columns_hold_nothing(policy, tokenizer):
    batch = sample(policy, tokenizer, PROMPTS, 4, 10, 1.0, seeded())
    with torch.no_grad():
        before = token_logprobs(policy, batch, torch.arange(12), 1.0)
        ids, mask = (torch.nn.functional.pad(x, (0, 5)) for x in (batch.completions, batch.mask))
        wide = Batch(batch.prompts, batch.owner, ids, mask)
        wide.completions[wide.mask == 0] = 9
        after = token_logprobs(policy, wide, torch.arange(12), 1.0)
    assert (after[:, before.shape[1]:] == 0).all() and (before[batch.mask == 0] == 0).all()
    torch.testing.assert_close(after[:, : before.shape[1]], before, rtol=0, atol=1e-6)


def test_logprobs_are_fp32_under_autocast(policy):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = policy(torch.tensor([PROMPTS[0]])).logits
        assert logits.dtype == torch.bfloat16
        assert rollout.pick(logits, logits.argmax(-1), 1.0).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_under_bf16_the_ratio_is_noisy_but_centred(name, tokenizer, monkeypatch):
    """What CUDA does, on a CPU: autocast around the passes, weights and log-probs in fp32."""
    monkeypatch.setattr(rollout, "precision", lambda device, **kwargs: torch.autocast(
        "cpu", torch.bfloat16))
    seen, real = [], rollout.pick
    monkeypatch.setattr(rollout, "pick", lambda logits, *more: seen.append(logits.dtype) or real(
        logits, *more))
    policy = make_model(name, scale=0.1).eval()
    batch = sample(policy, tokenizer, PROMPTS, 16, 20, 1.0, seeded())
    logprobs = token_logprobs(policy, batch, torch.arange(48), 1.0)
    ratio = (logprobs - batch.logprobs)[batch.mask.bool()].exp()
    assert logprobs.dtype == batch.logprobs.dtype == torch.float32
    assert (ratio - 1).abs().mean() < 0.05 and abs(ratio.mean() - 1) < 0.01
    assert set(seen) == {torch.bfloat16}  # of the logits that log-probs are taken of
    logprobs.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.parameters())


# ------------------------------------------------------------------ what is sampled

def test_draw_follows_the_softmax():
    """Chi-square of 40,000 draws at T = 0.7; tokens of probability 0 are never drawn."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 2.0, -1.0, -torch.inf])
    uniform = torch.rand(40_000, dtype=torch.float64, generator=seeded())
    tokens, logprobs = draw(logits.expand(40_000, -1), 0.7, uniform)
    probabilities = (logits / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=7).double()
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities.double() * 40_000
    chi2 = ((counts - expected) ** 2 / expected)[probabilities > 0].sum().item()
    assert chi2 < 16.3  # 3 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprobs, probabilities.log()[tokens])


def test_draw_at_the_edges():
    """The uniform number 0 draws no token of probability 0. And in a large vocabulary, one token of
    weight 1 and 150,000 of 3e-8, each has a place of its own: an fp32 sum would merge them."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert draw(torch.tensor([[-torch.inf, 1.0, 2.0]]), 1.0, zero)[0].item() == 1
    tail = torch.cat([torch.ones(1), torch.full((150_000,), 3e-8)]).log()[None]
    cumulative = tail[0].double().exp().cumsum(0)
    for k in (1, 70_001, 83_002, 149_999):
        uniform = (cumulative[k - 1] + cumulative[k]) / 2 / cumulative[-1]
        token, logprob = draw(tail, 1.0, uniform[None])
        assert token.item() == k
        assert logprob.item() == pytest.approx((tail[0, k].double() - cumulative[-1].log()).item())


def test_completions_follow_the_model(policy, tokenizer):
    """All two-token completions of a prompt: frequencies against the model's probabilities."""
    policy.generation_config.update(**HOSTILE)
    n, temperature = 20_000, 1.5
    batch = sample(policy, tokenizer, [PROMPTS[0]], n, 2, temperature, seeded())
    with torch.no_grad():
        one = (policy(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
        pairs = torch.tensor([PROMPTS[0] + [token] for token in range(18)])
        two = one[:, None] * (policy(pairs).logits[:, -1] / temperature).softmax(-1)
    ended = torch.isin(batch.completions[:, 0], torch.tensor([2, 7]))  # the two EOS ids
    counts = torch.zeros(18, 18)
    for a, b in batch.completions[~ended].tolist():
        counts[a, b] += 1
    two[[2, 7]] = 0
    likely = two * n > 5
    chi2 = ((counts - two * n) ** 2 / (two * n))[likely].sum().item()
    k = int(likely.sum())
    assert chi2 < k + 4 * (2 * k) ** 0.5
    assert ended.float().mean().item() == pytest.approx(one[[2, 7]].sum().item(), abs=0.02)


def test_greedy_is_the_argmax(policy, tokenizer):
    batch = sample(policy, tokenizer, PROMPTS, 1, 5, 0.0, seeded())
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for token in batch.completions[i][batch.mask[i].bool()].tolist():
            with torch.no_grad():
                assert token == policy(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_dropping_finished_rows_changes_nothing(policy, tokenizer):
    """Each row alone (so that nothing is ever dropped) gives the log-probs of the batch."""
    batch = sample(policy, tokenizer, PROMPTS, 16, 24, 1.5, seeded())
    assert batch.finished.float().mean() > 0.3  # rows were dropped on the way
    with torch.no_grad():
        assert gap(plain_logprobs(policy, batch, 1.5), batch.logprobs) < 1e-4


def test_a_row_draws_its_own_numbers(policy, tokenizer):
    """Whatever the global generators hold, and whether the rows beside it have ended or not."""
    batch = sample(policy, tokenizer, PROMPTS, 16, 24, 1.5, seeded())
    torch.manual_seed(7)
    policy.generation_config.eos_token_id = policy.config.eos_token_id = 17
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(17)
    longer = sample(policy, tokenizer, PROMPTS, 16, 24, 1.5, seeded())
    assert not torch.equal(batch.mask, longer.mask[:, : batch.mask.shape[1]])
    for i, (one, two) in enumerate(zip(batch.mask, longer.mask)):
        n = int(min(one.sum(), two.sum()))
        assert torch.equal(batch.completions[i, :n], longer.completions[i, :n])


def test_greedy_decoding_draws_nothing(policy, tokenizer):
    generator = seeded()
    sample(policy, tokenizer, PROMPTS, 2, 5, 0, generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_the_random_numbers_of_a_step():
    """The same for the same seed and step; and no seed is another one, some steps later."""
    def numbers(seed, step):
        found = torch.rand(2, generator=step_generator(seed, step)).tolist()
        return (*found, random.random(), numpy.random.rand(), torch.rand(()).item())
    steps = [numbers(seed, step) for seed in (1, 2, 2**32 + 1) for step in range(20)]
    assert numbers(1, 0) == steps[0]
    for column in zip(*steps):
        assert len(set(column)) == 60


# ------------------------------------------------------------------ where a completion ends

def scripted(tokenizer, script):
    """A policy that writes script[t] at step t whatever the prompt, by way of its position."""
    model = make_model("gpt2", scale=0.0)
    width = len(PROMPTS[0])
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_(), block.mlp.c_proj.weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(18, 32))
        for t, token in enumerate(script):
            model.transformer.wpe.weight[width - 1 + t] = 50 * torch.eye(18, 32)[token]
        model.transformer.ln_f.weight.fill_(10)
    return model.eval()


def test_the_mask_ends_with_the_eos_even_if_pad_is_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    policy = scripted(tokenizer, [5, 6, 2, 5, 5])
    batch = sample(policy, tokenizer, [PROMPTS[0]], 2, 5, 1.0, seeded())
    assert batch.completions.tolist() == [[5, 6, 2]] * 2 and batch.mask.tolist() == [[1, 1, 1]] * 2
    assert batch.finished.all()


def test_an_eos_of_several_and_an_eos_at_once(tokenizer):
    model = scripted(tokenizer, [5, 7, 5, 5])
    model.generation_config.eos_token_id = [2, 7]
    batch = sample(model, tokenizer, [PROMPTS[0]], 1, 4, 1.0, seeded())
    assert batch.completions.tolist() == [[5, 7]] and batch.finished.all()
    model = scripted(tokenizer, [2, 5])
    batch = sample(model, tokenizer, [PROMPTS[0]], 1, 4, 1.0, seeded())
    assert batch.mask.tolist() == [[1]] and batch.finished.all()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
                    reason="--compile needs torch 2.11")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_decoding_draws_the_same_tokens(tokenizer):
    """Ragged prompts, rows that end at different times; the same steps for other prompts."""
    policy = make_model("llama").eval()
    compiled = copy.deepcopy(policy)
    rollout.compile_decoding(compiled)
    for prompts in (PROMPTS, [prompt[:2] for prompt in PROMPTS]):
        plain, ours = (sample(p, tokenizer, prompts, 2, 12, 0.7, seeded())
                       for p in (policy, compiled))
        assert torch.equal(plain.mask, ours.mask) and torch.equal(plain.finished, ours.finished)
        m = plain.mask.bool()
        assert torch.equal(plain.completions[m], ours.completions[m])
        torch.testing.assert_close(plain.logprobs, ours.logprobs, rtol=0, atol=1e-4)
        assert plain.finished.any() and not plain.finished.all()


def test_truncated_is_not_finished(tokenizer):
    policy = scripted(tokenizer, [5, 6, 5, 2])
    batch = sample(policy, tokenizer, [PROMPTS[0]], 1, 3, 1.0, seeded())
    assert batch.mask.tolist() == [[1, 1, 1]] and not batch.finished.any()


@pytest.mark.parametrize("generation, config, expected", [
    ([2, 7], 9, [2, 7, 8]), (7, 9, [7, 8]), (None, 9, [8, 9]), (None, [5, 9], [5, 8, 9]),
    (None, None, [8]), (8, 2, [8]), ("no file", 9, [8, 9])])
def test_a_completion_ends_with_what_generation_config_says_or_the_eos(
        tmp_path, tokenizer, generation, config, expected):
    """config.json counts only where generation_config.json names nothing, as in transformers; and
    the trained model is saved with what ended its completions."""
    model = make_model("llama")
    model.generation_config.eos_token_id = None if generation == "no file" else generation
    model.config.eos_token_id = config
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(8)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    if generation == "no file":
        (tmp_path / "generation_config.json").unlink()
    assert load_tokenizer(str(tmp_path))[3] == expected
    policy, tokenizer = load_policy(str(tmp_path), "cpu")
    save_policy(policy, tokenizer, tmp_path / "run")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.generation_config.eos_token_id == expected
    for token in range(18):
        batch = sample(scripted_like(again, token), tokenizer, [PROMPTS[0]], 1, 3, 0, None)
        assert batch.finished.tolist() == [token in expected]


def scripted_like(model, token):
    """A policy that writes this token only, and ends where `model` does."""
    policy = scripted(None, [token] * 3)
    policy.generation_config = model.generation_config
    return policy


# ------------------------------------------------------------------ loading

def test_weights_are_fp32_and_dropout_is_off(folders):
    for name in ("gpt2", "opt", "gpt_neox"):
        policy, tokenizer = load_policy(folders(name, dtype=torch.bfloat16), "cpu")
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        policy.train()
        batch = make_batch(PROMPTS, [[5, 2]] * 3, "cpu")
        one, two = (token_logprobs(policy, batch, torch.arange(3), 1.0) for _ in range(2))
        assert torch.equal(one, two)


@pytest.mark.parametrize("config", [
    transformers.BertConfig(vocab_size=18, hidden_size=32, num_hidden_layers=2,
                            num_attention_heads=4, intermediate_size=64, eos_token_id=2),
    transformers.BloomConfig(vocab_size=18, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2),
    transformers.MambaConfig(vocab_size=18, hidden_size=32, num_hidden_layers=2, state_size=4,
                             eos_token_id=2)], ids=lambda config: config.model_type)
def test_what_cannot_be_served_is_refused(tmp_path, tokenizer, capsys, config):
    """Not causal, ALiBi over a 2-D mask, state-space: one sentence, exit code 2."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        load_policy(str(tmp_path), "cpu")
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --model")
    assert config.model_type in error or "linear_attention" in error


def test_a_run_folder_stands_for_its_model(tmp_path):
    save_folder(tmp_path / "model")
    assert load_policy(str(tmp_path), "cpu")[0].config.model_type == "llama"


# ------------------------------------------------------------------ slices

def test_mini_batches_are_shuffled_whole_groups():
    minis = list(mini_batches(24, 8, 4, 2, seeded()))
    assert len(minis) == 6 and all(len(rows) == 8 for rows in minis)
    for epoch in (minis[:3], minis[3:]):
        rows = torch.cat(epoch)
        assert sorted(rows.tolist()) == list(range(24))
        assert (rows.view(-1, 4) // 4 == rows.view(-1, 4)[:, :1] // 4).all()
    assert not torch.equal(torch.cat(minis[:3]), torch.cat(minis[3:]))


@pytest.mark.parametrize("n, size, K", [(255, 64, 3), (256, 64, 4), (254, 64, 2), (7, 4, 1)])
def test_no_mini_batch_is_a_tiny_rest(n, size, K):
    """It would make a full step of the optimizer from a group or two."""
    sizes = [len(rows) for rows in mini_batches(n, size, K, 1, seeded())]
    assert sum(sizes) == n and max(sizes) <= size and max(sizes) - min(sizes) <= K


def test_micro_batches_are_weighted_by_tokens_or_rows_and_sorted_by_length():
    batch = make_batch([[5]] * 5, [[5] * n for n in (8, 2, 5, 1, 4)], "cpu")
    parts = list(micro_batches(batch, torch.tensor([0, 1, 2, 4]), 3))
    assert [rows.tolist() for rows, *_ in parts] == [[1, 4, 2], [0]]
    assert [by_token for _, by_token, _ in parts] == pytest.approx([11 / 19, 8 / 19])
    assert [by_row for *_, by_row in parts] == [3 / 4, 1 / 4]


def test_the_completions_of_a_prompt_stay_together():
    """Also if the mini-batch is not in order: prompts in order of their longest completion."""
    batch = make_batch([[5]] * 3, [[5] * n for n in (1, 9, 2, 3, 1, 8)], "cpu")
    for seed in range(5):
        rows = torch.randperm(6, generator=seeded(seed))
        parts = [sorted(part.tolist()) for part, *_ in micro_batches(batch, rows, 2)]
        assert parts == [[2, 3], [4, 5], [0, 1]]
