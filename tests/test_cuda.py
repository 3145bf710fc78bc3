"""
What a GPU runs, within five minutes, without a network and without `datasets`:

    python -m pytest tests/test_cuda.py

Where there is no GPU, test_paper_cuda.py runs the same tests on the device of paper_cuda.py, and
with them those that only that device can tell.
"""
import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import reward_model
import sft
import test_offline_scripts
import test_scripts
from conftest import by_text, make_model, moved, seeded, write_jsonl
from plumbing import rewards, rollout, run, toy
from plumbing.model import load_policy
from plumbing.rollout import make_batch, sample, token_logprobs
from test_command_line import metrics
from tools import memory

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
PAPER = sys.modules.get("paper_cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
on_paper = pytest.mark.skipif(not PAPER, reason="only the device of paper_cuda.py can tell")

VARIANTS = [("sft", {}), *test_scripts.VARIANTS, *test_offline_scripts.VARIANTS,
            *((name, dict(gradient_checkpointing=True)) for name in ("grpo", "trpo", "dpo")),
            ("reinforce_pp", dict(reward="judge"))]
each_variant = pytest.mark.parametrize("name, variant", VARIANTS, ids=[
    " ".join([name, *(f"{k}={v}" for k, v in variant.items())]) for name, variant in VARIANTS])
each_script = pytest.mark.parametrize("name", dict(VARIANTS))


@pytest.fixture
def here(tmp_path, monkeypatch, few_problems):
    """A folder with pairs and rankings in it; scores that differ, in whatever a model writes."""
    monkeypatch.chdir(tmp_path)
    texts = ["7", "12,1", "3,3,3,3"]
    prompts = [f"{i}+{j}=" for i in range(10) for j in range(4)]
    write_jsonl("pairs.jsonl", [dict(prompt=p, chosen="7", rejected="3,3,3,3") for p in prompts])
    write_jsonl("rankings.jsonl", [dict(prompt=p, completions=texts) for p in prompts])
    monkeypatch.setitem(rewards.REWARDS, "last_number", by_text)
    return monkeypatch


def large_model(folder):
    """A Llama of 30M parameters with random weights; of paper, one of 1M."""
    torch.manual_seed(0)
    size = dict(vocab_size=24576, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
                num_attention_heads=8, num_key_value_heads=2)
    if PAPER:
        size.update(vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **size, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder)
    toy.make_tokenizer().save_pretrained(folder)
    return str(folder), model.config


SCRIPTS = {"sft": sft, **test_scripts.SCRIPTS, **test_offline_scripts.SCRIPTS}


def config(name, model, **flags):
    flags = {**dict(device="cuda", out_dir="run"), **flags}
    if name in test_offline_scripts.SCRIPTS:
        return test_offline_scripts.quick(name, model, **flags)
    if name in test_scripts.SCRIPTS:
        return test_scripts.quick(name, model, **flags)
    return sft.Config(**{**dict(model=model, data="toy", steps=2, minibatch_size=8,
                                micro_batch_size=4, max_new_tokens=24, eval_prompts=2, lr=1e-3),
                         **flags})


def train(name, model, **flags):
    SCRIPTS[name].train(config(name, model, **flags))


def finite(folder, steps):
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert all(torch.isfinite(torch.tensor(float(value))) for value in row.values()), row
    return rows


# ------------------------------------------------------------------ every script and every path

@each_variant
def test_it_trains_and_evaluates(folders, here, name, variant):
    """Three steps of a model with the toy's vocabulary; what is saved loads on a CPU."""
    model = folders("llama")
    if variant.get("reward") == "judge":
        reward_model.train(test_offline_scripts.quick("reward_model", model, device="cuda",
                                                      out_dir="judge"))
    steps = 2 if PAPER else 3
    train(name, model, **variant, steps=steps, eval_every=2)
    finite("run", steps)
    if name != "reward_model":
        assert moved(model, "run") > 0.5
        assert json.loads(Path("run/test.json").read_text())["peak_memory"] > 1e5


@each_script
def test_a_larger_model_trains_in_bf16(tmp_path, here, capsys, name):
    """A vocabulary larger than the tokenizer's, and prompts of different lengths."""
    if PAPER and name not in ("sft", "grpo"):
        pytest.skip("of paper, all models are small")
    model, _ = large_model(tmp_path / "large")
    train(name, model, steps=3)
    how = "in bf16 over fp32 weights" if rollout.use_bf16(torch.device("cuda")) else "in fp32"
    assert f"computing {how}" in capsys.readouterr().out
    finite("run", 3)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
@pytest.mark.parametrize("name", ["grpo", "trpo", "reward_model"])
def test_other_architectures(folders, here, name, kind):
    train(name, folders(kind), steps=2)
    finite("run", 2)


@pytest.mark.parametrize("name", ["reinforce_pp", "prime", "dpo"])
def test_kill_and_resume(folders, here, name):
    """Whatever the global generators held when the run was killed."""
    decide = torch.use_deterministic_algorithms  # else a GPU adds in any order
    here.setattr(torch, "use_deterministic_algorithms", lambda _: decide(True, warn_only=True))

    class Killed(BaseException):
        pass

    def kill(run, step, **numbers):
        if step == 1:
            raise Killed
        end_step(run, step, **numbers)

    end_step = SCRIPTS[name].Run.end_step

    train(name, folders("llama"), steps=3, save_every=1)
    Path("run").rename("whole")
    with here.context() as patch:
        patch.setattr(SCRIPTS[name].Run, "end_step", kill)
        with pytest.raises(Killed):
            train(name, folders("llama"), steps=3, save_every=1)
    torch.manual_seed(7)  # of both devices
    train(name, folders("llama"), steps=3, save_every=1, resume=True)
    decide(False)
    for one, two in zip(finite("run", 3), finite("whole", 3)):
        assert one == (two if PAPER else pytest.approx(two, rel=1e-2, abs=1e-3))


# ------------------------------------------------------------------ the same numbers as on a CPU

@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "large"])
def test_log_probs_are_those_of_the_cpu(tmp_path, monkeypatch, kind, bf16):
    if bf16 and not rollout.use_bf16(torch.device("cuda")):
        pytest.skip("this GPU has no bf16")
    if kind == "large":
        model = load_policy(large_model(tmp_path)[0], "cpu")[0]
    else:
        model = make_model(kind, scale=0.1).eval()
    monkeypatch.setattr(rollout, "use_bf16", lambda device: bf16 and device.type == "cuda")
    found, ids = [], torch.randint(3, 18, (8, 20), generator=seeded()).tolist()
    batch = make_batch([row[: 3 + i % 4] for i, row in enumerate(ids[:4])],
                       [row[: 4 + 2 * i] for i, row in enumerate(ids)], "cpu")
    for device in ("cpu", "cuda"):
        there = rollout.Batch(batch.prompts, *(x.to(device) for x in (
            batch.owner, batch.completions, batch.mask)))
        with torch.no_grad():
            found.append(token_logprobs(model.to(device), there, torch.arange(8), 0.7).cpu())
    ratio = (found[1] - found[0])[batch.mask.bool()].exp()
    if bf16:
        assert 1e-5 < (ratio - 1).abs().mean() < 0.02
    else:
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_the_first_ratio_is_one(folders):
    """The sampler's log-probs against the log-prob pass, both on the GPU, in bf16."""
    policy, tokenizer = load_policy(folders("llama", scale=0.1), "cuda")
    batch = sample(policy, tokenizer, [[5, 6, 7, 8, 9], [5, 6]], 16, 20, 1.0, seeded())
    assert batch.logprobs.device.type == "cuda" and not batch.logprobs.requires_grad
    logprobs = token_logprobs(policy, batch, torch.arange(32), 1.0)
    ratio = (logprobs - batch.logprobs)[batch.mask.bool()].exp()
    assert (ratio - 1).abs().mean() < 0.02 and abs(ratio.mean() - 1) < 0.01


@on_paper
@each_variant
def test_same_metrics_as_on_a_cpu(folders, here, plain_descent, name, variant):
    """In fp32: a GPU samples from the same random numbers as a CPU."""
    here.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: False)
    model, found = folders("llama", scale=0.1), []
    for device in ("cpu", "cuda"):
        if variant.get("reward") == "judge":
            reward_model.train(test_offline_scripts.quick(
                "reward_model", model, device=device, out_dir=f"{device}/judge"))
            variant = dict(reward=f"{device}/judge")
        train(name, model, **dict(variant, device=device, out_dir=f"{device}/run", lr=0.3))
        found.append([*metrics(f"{device}/run"), *results(f"{device}/run")])
        for coin in ("accuracy", "prm_accuracy"):  # at first, what is compared differs by rounding
            found[-1][0].pop(coin, None)
    for one, two in zip(*found):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


def results(folder):
    """What the table at the end says, before and after, as two flat dicts."""
    test = json.loads(Path(folder, "test.json").read_text())
    for part in (test["before"], test["after"]):
        yield {f"{key} {i}": number for key, value in part.items()
               for i, number in enumerate(value if isinstance(value, list) else [value])}


# ------------------------------------------------------------------ waits and memory

def waits(function, *args, **flags):
    """-> how often the program waited for the GPU meanwhile, by kind."""
    before = dict(PAPER.SYNCS)
    function(*args, **flags)
    return {kind: n - before.get(kind, 0) for kind, n in PAPER.SYNCS.items()
            if n > before.get(kind, 0)}


@on_paper
def test_sampling_waits_only_when_it_asks_which_rows_have_ended(folders):
    """That is every 16th token; and a constant number of times at the beginning and at the end."""
    policy, tokenizer = load_policy(folders("gpt2", scale=0.02), "cuda")
    tokenizer.eos_token_id = 9
    policy.generation_config.eos_token_id = policy.config.eos_token_id = 9
    with torch.no_grad():  # so that no row ends
        policy.get_output_embeddings().weight[9] = -10 * policy.transformer.ln_f.weight
        policy.transformer.ln_f.bias.copy_(policy.transformer.ln_f.weight)
    found = [waits(sample, policy, tokenizer, [[5, 6, 7], [5]], 2, n, 1.0, seeded())
             for n in (9, 15, 31, 47)]
    assert found[0] == found[1] and sum(found[0].values()) < 12
    for i in (1, 2):
        assert {kind: n - found[i].get(kind, 0) for kind, n in found[i + 1].items()} == {
            **dict.fromkeys(found[i], 0), "nonzero": 1}


@on_paper
def test_a_log_prob_pass_and_its_backward_wait_a_known_number_of_times(folders):
    policy, _ = load_policy(folders("llama"), "cuda")
    batch = make_batch([[5, 6, 7], [5]], [[6] * n for n in (3, 9, 4, 4)], "cuda")

    def update():
        token_logprobs(policy, batch, torch.arange(4), 1.0).sum().backward()
    assert waits(update) == {"item": 1, "unique": 1, "tolist": 1, "copy to GPU": 6}


WAITS = dict(sft=22, reinforce=60, reinforce_pp=73, ppo=97, remax=94, rloo=76, grpo=72, trpo=124,
             prime=108, raft=62, reward_model=19, dpo=21, orpo=20)


@on_paper
@each_script
def test_a_training_step_waits_a_known_number_of_times(folders, here, name):
    """The second step, without an evaluation. A change that adds a wait has to say so here."""
    write_jsonl("sums.jsonl", [dict(prompt=f"{i}+1=", answer=i + 1, completion="7")
                               for i in range(30)])
    script, marks = SCRIPTS[name], []
    here.setattr(run, "evaluate", lambda *args, **kwargs: {})
    here.setattr(script.Run, "close", lambda *args: None)
    here.setattr(script.Run, "end_step", lambda *args, **kwargs: marks.append(
        sum(PAPER.SYNCS.values())))
    data = "pairs.jsonl" if name in test_offline_scripts.SCRIPTS else "sums.jsonl"
    train(name, folders("llama", scale=0.1), data=data, log_every=9)
    assert marks[1] - marks[0] == WAITS[name]


@pytest.mark.skipif(PAPER is not None, reason="nothing can be compiled for a device of paper")
def test_compiled_decoding_gives_the_same_tokens_and_its_time_is_printed(tmp_path, monkeypatch):
    """In fp32; the times are those of bf16, of the third of three samplings, once all is compiled.
    Run with -s to see them."""
    folder, _ = large_model(tmp_path / "large")
    (policy, tokenizer), found = load_policy(folder, "cuda"), {}
    prompts = [[5 + i % 9] * (20 + i) for i in range(16)]
    for fp32 in (True, False):
        with monkeypatch.context() as patch:
            if fp32:
                patch.setattr(rollout, "use_bf16", lambda device: False)
            for compiled in (False, True):
                policy.__dict__.pop("compiled_forward", None)
                if compiled:
                    rollout.compile_decoding(policy)
                for _ in range(3):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    batch = sample(policy, tokenizer, prompts, 4, 128, 1.0, seeded())
                    torch.cuda.synchronize()
                found[fp32, compiled] = batch, time.perf_counter() - start
    plain, ours = found[True, False][0], found[True, True][0]
    assert torch.equal(plain.mask, ours.mask)
    m = plain.mask.bool()
    assert (plain.completions[m] == ours.completions[m]).float().mean() > 0.99  # a tie may turn
    print(f"\n64 completions of 128 tokens: {found[False, False][1]:.3f} s, compiled "
          f"{found[False, True][1]:.3f} s")


@on_paper
def test_the_cache_of_a_fixed_shape_knows_devices_and_dtypes(folders):
    """What torch.compile is given, not compiled: under autocast keys come in fp32, values in bf16.
    """
    policy, tokenizer = load_policy(folders("llama"), "cuda")
    policy.compiled_forward, policy.fixed_caches = rollout.forward, {}
    batch = sample(policy, tokenizer, [[5, 6, 7], [8]], 2, 6, 1.0, seeded())
    again = token_logprobs(policy, batch, torch.arange(4), 1.0)
    assert batch.mask.sum() > 8 and (again - batch.logprobs).abs().max() < 0.5


def test_peak_memory_is_that_of_the_formula(tmp_path, here):
    """reinforce_pp.py with its reference: 22 bytes per parameter, and the largest phase."""
    folder, shape = large_model(tmp_path / "large")
    prompt, new, completions, micro = (16, 48, 32, 16) if PAPER else (64, 128, 64, 16)
    write_jsonl("long.jsonl", [dict(prompt=("12345678" * 8)[: prompt - 3] + f"{i:03d}", answer=i)
                               for i in range(64)])
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train("reinforce_pp", folder, data="long.jsonl", prompts_per_step=completions,
          minibatch_size=completions, micro_batch_size=micro, max_new_tokens=new)
    model = memory.Model(
        sum(p.numel() for p in load_policy(folder, "cpu")[0].parameters()),
        shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size,
        shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads,
        shape.vocab_size)
    args = argparse.Namespace(completions=completions, micro_batch_size=micro,
                              prompt_tokens=prompt, new_tokens=new)
    found = torch.cuda.max_memory_allocated() - before
    assert found == pytest.approx(1e9 * memory.gigabytes(model, 22, args, False), rel=0.15)
