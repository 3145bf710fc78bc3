"""
What a GPU runs, within five minutes, without a network and without `datasets`:

    python -m pytest tests/paper_cuda

Where there is no GPU, test_paper_device.py runs these tests on the device of device.py, and with
them those that only that device can tell.
"""
import copy
import gc
import sys
from collections import Counter

import pytest
import test_every_script as every
import torch
import transformers
from conftest import make_model, save_folder, seeded

import ppo
from plumbing import rollout, run
from plumbing.data import draw_problems
from plumbing.model import load_policy, plain_logprobs
from plumbing.rollout import Batch, sample, token_logprobs
from plumbing.scorer import load_scorer

PAPER = sys.modules.get("device")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
on_paper = pytest.mark.skipif(not PAPER, reason="only the device of device.py can tell")
here, props = every.here, every.props


def waited():
    """-> how often the program has waited for the GPU so far, by kind."""
    return Counter(PAPER.SYNCS) if PAPER else Counter()


def without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: False)


# ------------------------------------------------------------------------ every script and variant

WAITS = {  # those inside transformers among them
    "reinforce": 83, "reinforce running_mean": 84, "reinforce_pp": 91,
    "reinforce_pp group_baseline": 90, "ppo": 120, "ppo warmup": 120, "trpo": 169, "remax": 135,
    "remax groups": 119, "rloo": 94, "rloo no_kl": 78, "grpo": 88, "grpo no_kl": 76,
    "grpo process": 136, "prime": 123, "raft": 74, "sft": 14, "reward_model": 17, "dpo": 19,
    "dpo plackett_luce": 19, "orpo": 18}


@pytest.mark.parametrize("variant", every.VARIANTS)
def test_it_trains_in_bf16(folders, props, here, capsys, variant):
    """Between the ends of its two steps it waits a known number of times, if no completion ends. A
    change that adds a wait has to say so in WAITS."""
    marks, log = [], run.Run.log
    here.setattr(run.Run, "log", lambda *args, **more: marks.append(waited()) or log(*args, **more))
    here.setattr(run, "evaluate", lambda *args: dict(n=0))
    here.setattr(rollout, "eos_ids", lambda *args: [])
    every.run(variant, device="cuda", model=folders("gpt2"), **every.inputs(variant, props))
    kind = "bf16" if PAPER or rollout.use_bf16(torch.device("cuda")) else "fp32"
    assert f"on cuda:0, computing in {kind}" in capsys.readouterr().out
    assert torch.tensor([list(row.values()) for row in every.lines("metrics")]).isfinite().all()
    found = marks[1] - marks[0]
    older = WAITS[variant] + 20 * (variant == "trpo")  # with transformers 5.17
    assert not PAPER or found.total() in (WAITS[variant], older), found


@on_paper
@pytest.mark.parametrize("variant", [*every.SCRIPTS, "grpo process"])
def test_it_is_the_same_as_on_a_cpu(folders, props, here, plain_descent, variant):
    """In fp32; the GPU also recomputes activations. Both draw the same random numbers."""
    without_bf16(here)
    if variant.split()[0] in every.ONLINE and variant != "rloo":  # they evaluate in the same way
        here.setattr(run, "evaluate", lambda *args: dict(n=0))
    found = []
    for device in ("cuda", "cpu"):
        every.run(variant, device=device, out_dir=device, model=folders("llama"), lr=0.3,
                  gradient_checkpointing=device == "cuda", **every.inputs(variant, props))
        test = every.results(device)
        rows = [*every.lines("metrics", device), test["before"], test["after"]]
        found.append([{key: value for key, value in row.items()  # a rounding error has any sign
                       if "accuracy" not in key and key != "step_found"} for row in rows])
    for one, two in zip(*found):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert value == pytest.approx(two[key], rel=1e-4, abs=1e-5), key


def test_a_run_that_was_stopped_goes_on(folders, props, here):
    """With the states of critic and optimizer on the GPU again, whatever the generators hold."""
    here.setattr(run, "evaluate", lambda *args: dict(n=0))
    flags = dict(every.inputs("ppo", props), device="cuda", model=folders("llama"), steps=3,
                 save_every=1)
    every.run("ppo", **flags, out_dir="whole")
    with here.context() as patch, pytest.raises(StopIteration):
        steps = iter(range(2))
        patch.setattr(ppo, "draw_problems", lambda *args: [next(steps), draw_problems(*args)][1])
        every.run("ppo", **flags)
    torch.manual_seed(7)  # of both devices
    every.command("ppo", "--resume", "run")
    for one, two in zip(every.lines("metrics"), every.lines("metrics", "whole"), strict=True):
        assert one == (two if PAPER else pytest.approx(two, rel=1e-2, abs=1e-3))
    assert load_policy("run", "cpu")[0].device.type == "cpu"


# ------------------------------------------------------------------------------ devices and dtypes

def test_a_gpu_refuses_tensors_that_lie_elsewhere():
    cpu, cuda = torch.ones(3), torch.ones(3, device="cuda")
    for wrong in (lambda: cpu + cuda, lambda: torch.cat([cuda, cpu]), lambda: cpu[cuda.long()],
                  lambda: torch.nn.functional.embedding(cpu.long(), cuda[:, None]),
                  lambda: cpu.index_select(0, cuda.long()), lambda: cuda.numpy(),
                  lambda: torch.rand(2, device="cuda", generator=torch.Generator())):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (cuda[cpu.long()] + cpu.sum() * cuda.cpu().to("cuda")).device == torch.device("cuda:0")


def test_autocast_gives_the_dtypes_of_a_gpu():
    """A CPU would leave the sum in bf16."""
    with torch.autocast("cuda", torch.bfloat16):
        product = torch.ones(4, 4, device="cuda") @ torch.ones(4, 4, device="cuda")
        assert product.dtype == torch.bfloat16 and product.sum().dtype == torch.float32


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3"])
def test_log_probs_are_those_of_the_cpu(monkeypatch, tokenizer, kind, bf16):
    """Those of the sampler and those of a log-prob pass; on the CPU, each row alone in fp32."""
    if not bf16:
        without_bf16(monkeypatch)
    elif not rollout.use_bf16(torch.device("cuda")):
        pytest.skip("this GPU has no bf16")
    model = make_model(kind, scale=0.1).eval()
    there = copy.deepcopy(model)
    batch = sample(model.to("cuda"), tokenizer, [[5, 6, 7, 8, 9], [5, 6]], 8, 12, 0.7, seeded())
    with torch.no_grad():
        found = token_logprobs(model, batch, torch.arange(16), 0.7)
        copies = (x.cpu() for x in (batch.owner, batch.completions, batch.mask))
        plain = torch.cat(plain_logprobs(there, Batch(batch.prompts, *copies), 0.7))
    for ours in (found, batch.logprobs):
        assert ours.device.type == "cuda" and ours.dtype == torch.float32
        ratio = (ours[batch.mask.bool()].cpu() - plain).exp()
        if bf16:
            assert 1e-5 < (ratio - 1).abs().mean() < 0.02
        else:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_a_learned_reward_is_that_of_the_cpu(props, monkeypatch):
    without_bf16(monkeypatch)
    texts, found = ["7", "7=7=7,7", "12,1+1", "3"], []
    for is_available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
        found.append(load_scorer(props / "judge")(["1+2=", "3-1="] * 2, texts, [True] * 4))
    assert found[0] == pytest.approx(found[1], abs=1e-4) and len(set(found[0])) > 2


def test_compiled_decoding_gives_the_same_tokens(folders, monkeypatch):
    """Of paper nothing can be compiled: what torch.compile is given runs as it is."""
    if PAPER:
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    for bf16 in (True, False):
        policy, tokenizer = load_policy(folders("llama"), "cuda")
        wanted = policy, tokenizer, [[5, 6, 7], [8]], 8, 20, 1.0
        with monkeypatch.context() as patch:
            if not bf16:
                without_bf16(patch)
            plain = sample(*wanted, seeded())
            rollout.compile_decoding(policy)
            for _ in range(1 if PAPER else 3):  # the third is the first that repeats a graph
                ours = sample(*wanted, seeded())
            again = token_logprobs(policy, ours, torch.arange(16), 1.0)
        assert (again - ours.logprobs).abs().max() < (0.5 if bf16 else 1e-3)
    assert torch.equal(plain.mask, ours.mask) and plain.mask.sum() > 100  # in fp32
    same = (plain.completions == ours.completions)[plain.mask.bool()].float().mean()
    assert same > 0.99  # a tie may turn


# ------------------------------------------------------------------------------- waits and memory

@on_paper
def test_sampling_waits_once_in_16_tokens(folders):
    """Every 16th token, to ask which rows have ended; else at the beginning or at the end."""
    policy, tokenizer = load_policy(folders("llama"), "cuda")
    policy.generation_config.eos_token_id = tokenizer.eos_token_id = None  # so that no row ends
    found = []
    for n in (9, 15, 31, 47):
        before = waited()
        sample(policy, tokenizer, [[5, 6, 7], [5]], 2, n, 1.0, seeded())
        found.append(waited() - before)
    assert not found[1] - found[0] and found[0].total() < 9
    for i in (1, 2):
        assert found[i + 1] - found[i] == dict(nonzero=1)


@on_paper
def test_bytes_of_each_parameter(tmp_path, here, props):
    """What is trained has a weight, a gradient and two moments of AdamW, of 4 bytes each; while its
    gradient is computed, 2 more for the weight in bf16. A reference has a weight."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2))
    folder, n = save_folder(tmp_path / "large"), model.num_parameters()
    model.save_pretrained(folder)
    found = {}
    for variant in ("rloo no_kl", "rloo", "ppo"):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        every.run(variant, completions=4, device="cuda", model=folder, eval_prompts=1,
                  out_dir=variant, **every.inputs(variant, props))
        found[variant] = (torch.cuda.max_memory_allocated() - before) / n
    assert found["rloo no_kl"] == pytest.approx(18, abs=1)
    assert found["rloo"] - found["rloo no_kl"] == pytest.approx(4, abs=0.2)
    assert found["ppo"] - found["rloo"] == pytest.approx(16, abs=0.5)
    assert every.results("ppo")["peak_memory"] == torch.cuda.max_memory_allocated()
