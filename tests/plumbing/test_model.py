"""Loading: what cannot be trained is refused in one sentence; what is loaded is what was saved."""
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_folder, seeded
from safetensors.torch import load_file, save_file
from test_rollout import by_definition, close

from plumbing.model import load_policy
from plumbing.rollout import padding_sees_all, sample, token_logprobs
from plumbing.toy_model import make_tokenizer


def refused(capsys, folder):
    """-> the one sentence with which load_policy() ends."""
    capsys.readouterr()  # of what the test has done before
    with pytest.raises(SystemExit) as stop:
        load_policy(str(folder), "cpu")
    error = capsys.readouterr().err.splitlines()[-1]  # before it, transformers shows a bar
    assert stop.value.code == 2
    assert error.startswith(f"error: --model {folder}"), error
    return error


def change(file, **values):
    """Of a JSON file; a value of None takes the key away."""
    known = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))


def edit_weights(edit):
    def with_weights(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    return with_weights


def config(**values):
    return lambda folder: change(folder / "config.json", **values)


HEAD, MLP = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
KINDS = {  # name: (what is done to a good folder, words of the sentence)
    "no config": (lambda folder: (folder / "config.json").unlink(), "config"),
    "an unfinished run": (lambda folder: (folder / "config.json").write_text(
        '{"steps": 3, "model": null}'), "model_type"),
    "code of its own": (config(model_type="new", auto_map=dict(AutoConfig="a.B")), "custom code"),
    "quantised": (config(quantization_config=dict(quant_method="gptq", bits=4)), "quantised"),
    "no EOS": (lambda folder: change(folder / "tokenizer_config.json", eos_token=None), "EOS"),
    "an EOS that the model lacks": (config(vocab_size=2), "EOS"),
    "torn weights": (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:1000]), ""),
    "missing weights": (edit_weights(lambda weights: weights.pop(HEAD)), HEAD),
    "weights of another shape": (config(hidden_size=64), "shape"),
    "nan": (edit_weights(lambda weights: weights[MLP][0].fill_(torch.nan)), "nan"),
    "-inf": (edit_weights(lambda weights: weights[HEAD][0].fill_(-torch.inf)), "infinite"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_holds_no_whole_model_is_refused(tmp_path, capsys, kind):
    spoil, word = KINDS[kind]
    spoil(Path(save_folder(tmp_path)))
    assert word in refused(capsys, tmp_path)


def test_a_name_that_is_not_there_is_refused(tmp_path, capsys):
    for name in (tmp_path / "nope", "someone/nothing"):
        refused(capsys, name)


TINY = dict(vocab_size=18, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
LONG = dict(rope_type="longrope", rope_theta=100.0, original_max_position_embeddings=24,
            factor=8.0, short_factor=[1.0] * 4, long_factor=[8.0] * 4)
ROPE = dict(**TINY, intermediate_size=64, num_key_value_heads=2)
CHUNKED = dict(**ROPE, head_dim=8, intermediate_size_mlp=64, num_local_experts=2,
               attention_chunk_size=16)


def save_random(model_config, folder):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder), make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("word, model_config", [
    ("bert", transformers.BertConfig(**TINY, intermediate_size=64)),
    ("mamba", transformers.MambaConfig(vocab_size=18, hidden_size=32, num_hidden_layers=2)),
    ("LongRoPE", transformers.LlamaConfig(**ROPE, rope_parameters=LONG))])
def test_what_the_sampler_would_serve_wrongly_is_refused(tmp_path, capsys, word, model_config):
    """It looks ahead, keeps no keys and values, or turns a token by the length of all prompts."""
    assert word in refused(capsys, save_random(model_config, tmp_path))


@pytest.mark.parametrize("model_config", [
    transformers.Llama4TextConfig(**CHUNKED), transformers.BloomConfig(**TINY)],
    ids=["chunks of 16", "alibi"])
def test_attention_in_chunks_and_by_distance_is_served_right(tmp_path, model_config):
    """Prompts are longer than a chunk, shorter, and such that their completions cross its end."""
    policy, tokenizer = load_policy(save_random(model_config, tmp_path), "cpu")
    prompts = [[7 * i % 18 for i in range(n)] for n in (40, 3, 14)]
    batch = sample(policy, tokenizer, prompts, 4, 8, 0.7, seeded())
    with torch.no_grad():
        expected = by_definition(policy, batch, 0.7)
        close(batch.logprobs, expected)
        close(token_logprobs(policy, batch, torch.arange(12), 0.7), expected)


def test_weights_without_a_place_are_named(tmp_path, caplog):
    """By transformers, whose reports stay on. Frequencies of rotary positions are silent."""
    def add(key):
        edit_weights(lambda weights: weights.update({key: torch.ones(4)}))(Path(tmp_path))
    save_folder(tmp_path)
    add("model.layers.0.self_attn.rotary_emb.inv_freq")
    transformers.utils.logging.enable_propagation()
    load_policy(str(tmp_path), "cpu")
    assert not caplog.text
    add("model.layers.0.mlp.up_proj.bias")
    load_policy(str(tmp_path), "cpu")
    assert "UNEXPECTED" in caplog.text and "up_proj.bias" in caplog.text


@pytest.mark.parametrize("config_too", [True, False])
def test_an_adapter_is_refused(tmp_path, capsys, config_too):
    """Beside a whole model too: without peft nobody would read it, with peft it would be saved."""
    folder = Path(save_folder(tmp_path))
    (folder / "adapter_config.json").write_text("{}")
    if not config_too:
        (folder / "config.json").unlink()
    assert "merge_and_unload" in refused(capsys, tmp_path)


def test_other_models_keep_their_attention_masks(tmp_path):
    """Of a row without padding, transformers makes none; ours has one, and is not saved."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    policy, _ = load_policy(save_folder(tmp_path), "cpu")
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    assert ALL_MASK_ATTENTION_FUNCTIONS[policy.config._attn_implementation] is padding_sees_all
    policy.save_pretrained(tmp_path / "saved")
    assert "padded" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_weights_are_fp32_and_dropout_is_off(tmp_path, name):
    """In train mode too, which gradient checkpointing needs; a run folder stands for its model."""
    folder = save_folder(tmp_path / "model", name, dtype=torch.bfloat16)
    policy, _ = load_policy(str(tmp_path), "cpu")
    saved = load_file(Path(folder) / "model.safetensors")
    for key, weights in policy.state_dict().items():
        assert weights.dtype == torch.float32
        if key in saved:  # one that is tied to another is saved once
            assert saved[key].dtype == torch.bfloat16 and torch.equal(weights, saved[key].float())
    ids = torch.arange(18)[None]
    assert not policy.training
    expected = policy(ids).logits
    policy.train()
    assert torch.equal(policy(ids).logits, expected)


@pytest.mark.parametrize("generation, config_eos, expected", [
    (dict(eos_token_id=[2, 7]), 9, [2, 7, 8]), (dict(eos_token_id=7), 9, [7, 8]),
    (dict(eos_token_id=8), None, [8]), (dict(top_k=1), 9, [8]),
    (None, 9, [8, 9]), (None, [5, 9], [5, 8, 9]), (None, None, [8])])
def test_a_completion_ends_with_the_eos_ids_of_generation_config_and_tokenizer(
        tmp_path, generation, config_eos, expected):
    """As in transformers, those of config.json count only where there is no generation_config.json.
    The model is saved with what ended its completions, and with no other setting of sampling."""
    save_folder(tmp_path)
    change(tmp_path / "config.json", eos_token_id=config_eos)
    change(tmp_path / "tokenizer_config.json", eos_token=make_tokenizer().convert_ids_to_tokens(8))
    (tmp_path / "generation_config.json").unlink()
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    policy, tokenizer = load_policy(str(tmp_path), "cpu")
    policy.save_pretrained(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert kept.pop("eos_token_id") == expected and kept.keys() <= {"transformers_version"}


def test_the_saved_model_stops_where_training_did(tmp_path):
    """transformers generates from it what sample() takes greedily, and ends at the same token."""
    policy, tokenizer = load_policy(save_folder(tmp_path, hostile=True), "cpu")
    prompt, lengths = [5, 6, 7], set()
    for eos in (3, 8, 11, 13, 16):
        policy.generation_config.eos_token_id = [2, eos]
        batch = sample(policy, tokenizer, [prompt], 1, 12, 0, None)
        policy.save_pretrained(tmp_path / "run")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        generated = again.generate(torch.tensor([prompt]), max_new_tokens=12, pad_token_id=0)
        assert generated[0, 3:].tolist() == batch.completions[0].tolist()
        lengths.add(len(batch.completions[0]))
    assert len(lengths) > 1
