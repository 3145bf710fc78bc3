"""README's formula of memory: bytes counted on a model of SmolLM2's shape, with fewer layers."""
import pytest
import torch
import transformers

import rollout
import toy
from model import checkpoint_activations
from rollout import make_batch, sample, token_logprobs

ROWS, PROMPT, COMPLETION = 4, 64, 64


def llama(layers=4):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
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


@pytest.mark.parametrize("bf16, recompute, expected", [
    (False, False, 83), (True, False, 56), (False, True, 4), (True, True, 4)])
def test_activations_per_token_layer_and_width(monkeypatch, bf16, recompute, expected):
    monkeypatch.setattr(rollout, "use_bf16", lambda device: bf16)
    kept = []
    for layers in (2, 5):  # the difference: what comes before and after the layers is not theirs
        policy = llama(layers)
        if recompute:
            checkpoint_activations(policy)
        kept.append(kept_for_backward(policy))
    tokens = ROWS * (PROMPT + COMPLETION - 1)
    assert (kept[1] - kept[0]) / (tokens * 3 * 576) == pytest.approx(expected, abs=0.7)


def test_weights_and_cache():
    policy, tokenizer, caches = llama(), toy.make_tokenizer(), []
    n = sum(p.numel() for p in policy.parameters())
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    batch = make_batch([[5]] * 2, [[6, 7]] * 2, "cpu")
    token_logprobs(policy, batch, torch.arange(2), 1.0).sum().backward()
    optimizer.step()
    tensors = [t for p in policy.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    assert sum(t.nbytes for t in tensors) / n == pytest.approx(16, abs=0.01)
    real = rollout.Cache
    try:
        rollout.Cache = lambda layers: caches.append(layers) or real(layers=layers)
        sample(policy, tokenizer, [[5] * 10, [6] * 10], 3, 20, 1.0)
    finally:
        rollout.Cache = real
    found = sum(t.nbytes for layer in caches[0] for t in (layer.keys, layer.values))
    assert 0.5 <= found / (6 * 30 * 4 * 3 * 64 * 2 * 4) <= 1  # 4 bytes on a CPU; finished rows go
