"""The formula of memory.py: bytes counted on a model of SmolLM2's shape, with fewer layers."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import trpo
import warm
from plumbing import rewards, rollout, run, toy
from plumbing.model import checkpoint_activations
from plumbing.rollout import make_batch, sample, token_logprobs
from tools import memory

ROWS, PROMPT, COMPLETION = 4, 64, 64


def llama(layers=4, mlp=1536):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, eos_token_id=2)).eval()


def kept_for_backward(policy):
    """Bytes of activations that token_logprobs leaves behind: without weights and their copies."""
    batch = make_batch([[5] * PROMPT] * ROWS, [[6] * COMPLETION] * ROWS, "cpu")
    own, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(policy, batch, torch.arange(ROWS), 1.0)
    weights = {shape for p in policy.parameters() for shape in (p.shape, p.shape[::-1])}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items()
               if key not in own and tensor.shape not in weights)


@pytest.mark.parametrize("bf16, recompute, width, per_mlp", [
    (False, False, 40, 16), (True, False, 34.5, 8), (False, True, 4, 0), (True, True, 4, 0)])
def test_activations_per_token_and_layer(monkeypatch, bf16, recompute, width, per_mlp):
    monkeypatch.setattr(rollout, "use_bf16", lambda device: bf16)
    for mlp in (1536, 2304):
        kept = []
        for layers in (2, 5):  # the difference, without what comes before and after the layers
            policy = llama(layers, mlp)
            if recompute:
                checkpoint_activations(policy)
            kept.append(kept_for_backward(policy))
        found = (kept[1] - kept[0]) / (ROWS * (PROMPT + COMPLETION - 1) * 3)
        assert found == pytest.approx(width * 576 + per_mlp * mlp, rel=0.01)


def test_the_sum_of_it():
    """A model of round numbers: 1,000 parameters, one layer; 10 completions of 3 + 7 tokens."""
    model = memory.Model(1000, 1, 100, 1000, 10, 50)
    args = SimpleNamespace(completions=10, micro_batch_size=2, prompt_tokens=3, new_tokens=7)
    activations, logits = 2 * 10 * (3450 + 8000), 2 * 7 * 50 * (4 + 16)
    prompts = 10 * 3 * (8000 + 1600 + 60)
    assert memory.gigabytes(model, 22, args, False) * 1e9 == pytest.approx(22_000 + prompts)
    args.micro_batch_size = 4
    assert memory.gigabytes(model, 22, args, False) * 1e9 == pytest.approx(
        22_000 + 2 * (activations + logits))
    args = SimpleNamespace(completions=10, micro_batch_size=2, prompt_tokens=1, new_tokens=900)
    cache, sampler = 10 * 901 * 10 * 6, 10 * 50 * 22
    activations, logits = 2 * 901 * 400, 50 * (2 * 900 * 4 + 1024 * 16)
    assert memory.gigabytes(model, 22, args, True) * 1e9 == pytest.approx(
        22_000 + activations + logits)
    args.micro_batch_size = 0  # so that only the sampling is left
    assert memory.gigabytes(model, 22, args, True) * 1e9 == pytest.approx(22_000 + cache + sampler)


def test_weights_and_cache(monkeypatch):
    policy, tokenizer, caches = llama(), toy.make_tokenizer(), []
    n = sum(p.numel() for p in policy.parameters())
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    batch = make_batch([[5]] * 2, [[6, 7]] * 2, "cpu")
    token_logprobs(policy, batch, torch.arange(2), 1.0).sum().backward()
    optimizer.step()
    tensors = [t for p in policy.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    assert sum(t.nbytes for t in tensors) / n == pytest.approx(16, abs=0.01)
    real = rollout.DynamicCache
    monkeypatch.setattr(rollout, "DynamicCache", lambda: caches.append(real()) or caches[-1])
    sample(policy, tokenizer, [[5] * 10, [6] * 10], 3, 20, 1.0, torch.Generator())
    found = sum(t.nbytes for layer in caches[0].layers for t in (layer.keys, layer.values))
    assert 0.5 <= found / (6 * 30 * 4 * 3 * 64 * 2 * 4) <= 1  # 4 bytes on a CPU; finished rows go


def of_this_process(key):
    """Bytes, now (VmRSS) or at most (VmHWM; ru_maxrss would count what pytest has taken, too)."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def take_one_step_of_trpo(folder):
    """In a process of its own -> bytes per parameter that it took at most, the weights included."""
    real, start = trpo.load_policy, {}

    def note(*args):
        policy, tokenizer = real(*args)
        start["size"] = sum(p.numel() for p in policy.parameters())
        start["bytes"] = of_this_process("VmRSS")
        return policy, tokenizer

    trpo.load_policy, run.evaluate = note, lambda *args: {"n": 1}
    trpo.Run.close = trpo.Run.end_step = lambda *args, **kwargs: None
    rewards.REWARDS["last_number"] = lambda prompts, completions, **columns: [
        float(i % 2) for i in range(len(prompts))]
    torch.set_num_threads(1)
    trpo.train(trpo.Config(model=folder, data="toy", device="cpu", steps=1, prompts_per_step=4,
                           max_new_tokens=2, eval_prompts=2, micro_batch_size=1, cg_iterations=2,
                           out_dir=f"{folder}/run"))
    print("bytes", (of_this_process("VmHWM") - start["bytes"]) / start["size"] + 4)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory of a process")
def test_bytes_per_parameter_of_trpo(tmp_path):
    """What docs/memory.md says."""
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=18, hidden_size=768, intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=8, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    policy.save_pretrained(tmp_path)
    toy.make_tokenizer().save_pretrained(tmp_path)
    code = f"import test_memory; test_memory.take_one_step_of_trpo({str(tmp_path)!r})"
    screen = warm.call("-c", code, cwd=tmp_path)
    assert float(screen.split("bytes ")[-1]) == pytest.approx(59, abs=3)
