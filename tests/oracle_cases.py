"""What the tests of the equations share: reference values, a batch with padding, comparisons."""
import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, save_folder, seeded

from plumbing.rollout import all_logprobs, sample


def T(x):
    return torch.as_tensor(x, dtype=torch.float64)


def cases(name):
    """The cases in oracles/NAME.json, as parameters of a test: inputs and expected results."""
    path = Path(__file__).parent / "oracles" / f"{name}.json"
    return [pytest.param(c["inputs"], c["expected"], id=f"{name}-{c['name']}")
            for c in json.loads(path.read_text())["cases"]]


def same(ours, theirs, mask=None, rtol=1e-6, atol=1e-7):
    """With a mask, ours must be 0 on padding, where theirs may be anything."""
    theirs = T(theirs)
    if mask is not None:
        assert (ours[~T(mask).bool()] == 0).all(), "not 0 on padding"
        theirs = theirs * T(mask)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def random_batch():
    """mask (6, 7) of ragged completions, and three random tensors (6, 7), random on padding too."""
    mask = (torch.arange(7) < torch.tensor([7, 1, 3, 5, 2, 7])[:, None]).double()
    return mask, *torch.randn(3, 6, 7, dtype=torch.float64, generator=seeded())


def check_padding(every_function):
    """Results with zeros on padding, with garbage, and with three more columns of it are the same.
    every_function(mask, a, b, c) returns a list of results, scalars or (N, C), of three (N, C)."""
    mask, *values = random_batch()
    clean = [torch.where(mask.bool(), x, 0) for x in values]
    for garbage in (1e30, float("inf"), float("nan")):
        dirty = [torch.where(mask.bool(), x, garbage) for x in values]
        wide = [torch.nn.functional.pad(x, (0, 3), value=garbage) for x in dirty]
        for one, two, three in zip(every_function(mask, *clean), every_function(mask, *dirty),
                                   every_function(torch.nn.functional.pad(mask, (0, 3)), *wide)):
            assert torch.equal(one, two)
            if three.dim():
                assert (three[:, 7:] == 0).all() and (one[mask == 0] == 0).all()
                three = three[:, :7]
            torch.testing.assert_close(one, three, rtol=1e-14, atol=1e-14)


def nudge(model):
    """Move a model a little, always in the same direction."""
    noise = seeded(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)


def same_gradient(model, theirs):
    """A model's gradient and that of its copy in another library, {name: gradient}."""
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-5, atol=1e-5)
    assert max(grad.abs().max() for grad in theirs.values()) > 0.01  # there is one to compare


def run_script(script, monkeypatch, folder, reward, **flags):
    """A short run of a script's train() with this reward; its --out_dir is `folder` -> the log.
    Without flags: one step of 8 completions on the toy's model."""
    monkeypatch.setattr(script, "load_rewards", lambda cfg, problems: {"reward": reward})
    prompts = 8 // flags.get("group_size", script.Config.group_size)
    small = dict(device="cpu", steps=1, prompts_per_step=prompts, micro_batch_size=8,
                 max_new_tokens=6, eval_prompts=2, out_dir=str(folder),
                 **dict(kl_coef=0.0) if hasattr(script.Config, "kl_coef") else {})
    script.train(script.Config(**{**script.TOY, **small, **flags}))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TRL = dict(num_generations=4, temperature=0.7, beta=0.1, max_completion_length=14)


def trl_reward(completions, **columns):
    """Of the text, and no two the same, so that no group is constant."""
    return [len(set(text)) - 0.3 * len(text) + 0.01 * i for i, text in enumerate(completions)]


def trl_step(folder, name, move=True, **settings):
    """A step of TRL's GRPOTrainer or RLOOTrainer (name: GRPO or RLOO) on completions of ours.
    move: after sampling, the policy moves a little, so that the ratios are not 1.
    -> what TRL computed, its gradient {name: gradient}; the policy, as moved; our batch, its
    log-probs under the reference, the scores."""
    trl = pytest.importorskip("trl", reason="an oracle for development: requirements-dev.txt")
    import datasets
    prompts, K, tokenizer = ["8+9-5=", "1+2=", "7-3+4-1="], TRL["num_generations"], make_tokenizer()
    reference = save_folder(folder / "model", scale=0.1)
    policy, ref_model = (make_model("llama", scale=0.1, seed=seed).eval() for seed in (3, 0))
    batch = sample(policy, tokenizer, tokenizer(prompts, add_special_tokens=False).input_ids, K,
                   TRL["max_completion_length"], TRL["temperature"], seeded())
    completions = [ids[mask.bool()].tolist() for ids, mask in zip(batch.completions, batch.mask)]
    assert 1 < len(set(map(len, completions))) and not batch.finished.all()  # ragged, some cut off
    rows = [dict(prompt=prompt) for prompt in prompts for _ in range(K)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL calls the cache by its old name
        home = trl if hasattr(trl, f"{name}Config") else importlib.import_module(
            f"trl.experimental.{name.lower()}")
        config = getattr(home, f"{name}Config")(
            output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows),
            num_iterations=2, disable_dropout=True, use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, **{**TRL, "epsilon": 0.2, **settings})
        trainer = getattr(home, f"{name}Trainer")(
            model=reference, reward_funcs=trl_reward, args=config, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows))
        trainer.model.train().load_state_dict(policy.state_dict())
        trainer._generate_single_turn = lambda *args: \
            completions if name == "RLOO" else (completions, None)
        trainer.current_gradient_accumulation_steps = 1
        theirs = trainer._generate_and_score_completions(rows)
        for model in (trainer.model, policy) if move else ():
            nudge(model)
        trainer._compute_loss(trainer.model, theirs).backward()
    gradient = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    scores = torch.tensor(trl_reward(tokenizer.batch_decode(completions, skip_special_tokens=True)))
    ref_logprobs = all_logprobs(ref_model, batch, 5, TRL["temperature"])
    return theirs, gradient, policy, batch, ref_logprobs, scores
