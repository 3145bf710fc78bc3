"""recipes/: each applies, is small, runs, and has the loss that its formula and TRL say."""
import copy
import dataclasses
import difflib
import functools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, by_text, make_model, save_folder
from offline_cases import trl_step as trl_step_on_pairs
from oracle_cases import TRL, T, same, same_gradient, trl_step

from plumbing.rollout import all_logprobs, token_logprobs
from tools import recipe

RECIPES = sorted(recipe.RECIPES)
LOGGERS = {"tensorboard", "wandb"}
ONLINE = [name for name in RECIPES if recipe.parts(name)[1] in ("grpo", "rloo")
          and name not in LOGGERS | {"lora"}]
OFFLINE = [name for name in RECIPES if recipe.parts(name)[1] in ("dpo", "orpo")]
each_recipe = pytest.mark.parametrize("name", RECIPES)


@functools.cache
def patched(name, script=None):
    """The module that `python -m tools.recipe NAME SCRIPT` writes."""
    module = types.ModuleType(f"recipe_{name}_{script}")
    sys.modules[module.__name__] = module
    source = recipe.merge(name, script) if script else recipe.apply(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


# --------------------------------------------------------------------------------------- the tool

@each_recipe
def test_a_recipe_is_fresh_and_small_and_says_what_it_is(name):
    """Stale: python -m tools.recipe --refresh. At most 20 lines of code, and 100 columns."""
    text, script, difference = recipe.parts(name)
    old, new = (ROOT / f"{script}.py").read_text(), recipe.apply(name)
    assert difference == recipe.difference(old, new, script)
    blocks = difflib.SequenceMatcher(None, *(recipe.split(source)[1].splitlines()
                                             for source in (old, new)), autojunk=False)
    assert 0 < sum(max(b - a, d - c) for kind, a, b, c, d in blocks.get_opcodes()
                   if kind != "equal") <= 20
    run = f"{script}_{name}" if name in LOGGERS | {"lora"} else name  # wandb.py would hide wandb
    assert f'Run(cfg, "{run}"' in new and f"python {run}.py" in new
    assert all(len(line) <= 100 for line in (text + new).splitlines())
    assert len(text.split()) > 40 and "TRL" in text and "What to expect" in text
    table = (ROOT / "docs" / "recipes.md").read_text()
    assert f"| [{name}](../recipes/{name}.diff) | {script}.py |" in table


def test_the_copy_is_written_beside_the_scripts_and_shown(tmp_path, monkeypatch, capsys):
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    for words, file, name in ((["gspo"], "gspo.py", "gspo"),
                              (["lora", "rloo.py"], "rloo_lora.py", "rloo_lora"),
                              (["wandb"], "grpo_wandb.py", "grpo_wandb")):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
        recipe.main()
        assert f'Run(cfg, "{name}"' in (tmp_path / file).read_text()
        shown = capsys.readouterr().out
        assert f'+    run = Run(cfg, "{name}"' in shown and f"wrote {tmp_path / file}" in shown
    with open(tmp_path / "gspo.py", "a") as copy_of_mine:
        copy_of_mine.write("# mine\n")
    for words, word in ((["nothing"], "gspo"), (["lora", "none"], "none.py"),
                        (["lora", "raft"], "raft.py"), (["gspo"], "move it away")):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
        with pytest.raises(SystemExit) as stop:
            recipe.main()
        assert stop.value.code == 2 and word in capsys.readouterr().err


def test_refresh_follows_the_script_and_names_what_needs_a_hand(tmp_path, monkeypatch, capsys):
    """A new line above moves a change; another text at its place is in its way."""
    script = (ROOT / "dpo.py").read_text()
    (tmp_path / "dpo.py").write_text(script.replace("def dpo_loss", "# new\n\n\ndef dpo_loss"))
    copies = {name: tmp_path / f"{name}.diff" for name in ("ipo", "cdpo")}
    for name, path in copies.items():
        path.write_text(recipe.RECIPES[name].read_text())
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr(recipe, "RECIPES", copies)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--refresh"])
    for change, words, code in ((("", ""), "made anew", 0), (("", ""), "as it was", 0),
                                (("losses = -F.", "losses = -1.0 * F."), "needs a hand", 1)):
        (tmp_path / "dpo.py").write_text((tmp_path / "dpo.py").read_text().replace(*change))
        with pytest.raises(SystemExit) as stop:
            recipe.main()
        assert capsys.readouterr().out.count(words) == 2 and bool(stop.value.code) == bool(code)


# ------------------------------------------------------------------------------------- they train

PEFT = '''
import contextlib, torch
from torch import nn

class LoraConfig:
    def __init__(self, r, lora_alpha, lora_dropout, target_modules):
        assert lora_dropout == 0 and target_modules == "all-linear"
        self.r, self.scale = r, lora_alpha / r

class Adapter(nn.Module):
    def __init__(self, base, config):
        super().__init__()
        self.base, self.scale, self.on = base.requires_grad_(False), config.scale, True
        self.A = nn.Parameter(torch.randn(config.r, base.in_features) / 8)
        self.B = nn.Parameter(torch.zeros(base.out_features, config.r))
    def forward(self, x):
        return self.base(x) + self.on * self.scale * x @ self.A.T @ self.B.T

class get_peft_model:
    """A stand-in for the library peft, with the three functions that the recipe calls."""
    def __init__(self, model, config):
        model.requires_grad_(False)
        self.places = [(parent, name) for parent in model.modules() for name, child in
                       parent.named_children() if type(child) is nn.Linear and name != "lm_head"]
        for parent, name in self.places:
            setattr(parent, name, Adapter(getattr(parent, name), config))
    @contextlib.contextmanager
    def disable_adapter(self):
        for on in (False, True):
            for parent, name in self.places:
                getattr(parent, name).on = on
            if not on:
                yield
    def merge_and_unload(self):
        for parent, name in self.places:
            adapter = getattr(parent, name)
            adapter.base.weight.data += adapter.scale * adapter.B.data @ adapter.A.data
            setattr(parent, name, adapter.base)
'''


def short_run(module, folder, reward=by_text, **flags):
    """Two steps of a tiny model, of 2 epochs where there are any -> log, weights of model/."""
    cfg = {**module.TOY, **dict(device="cpu", data="toy", steps=2, lr=1e-3, minibatch_size=8,
                                eval_prompts=3, max_new_tokens=6, out_dir=str(folder)), **flags}
    if "load_rewards" in vars(module):
        module.load_rewards = lambda cfg, problems: {"reward": reward}
        cfg.update(prompts_per_step=4, group_size=4, epochs=2)
    else:
        cfg.update(max_new_tokens=16)
    module.train(module.Config(**cfg))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, torch.load(folder / "checkpoint.pt", weights_only=True)["policy"]


def even(completions, **columns):
    """0 or 1; in some groups all are equal."""
    return [float(len(text) % 2 == 0) for text in completions]


@pytest.mark.parametrize("name", ONLINE + OFFLINE)
def test_two_steps_are_the_same_for_every_micro_batch_size(name, tmp_path):
    """Also where completions without an advantage are left out: half of the groups are equal."""
    module, model = patched(name), save_folder(tmp_path / "model")
    before = make_model("llama").state_dict()
    flags = dict(kl_coef=0.0) if "kl_coef" in module.TOY else {}
    runs = [short_run(module, tmp_path / f"run{size}", even, model=model, micro_batch_size=size,
                      **flags) for size in (8, 3)]
    if name in ONLINE:
        assert 0 < sum(row["frac_zero_std"] for row in runs[0][0]) < 2
    (rows, one), (others, two) = runs
    for row, other in zip(rows, others):  # AdamW does not see the size of a gradient; these do
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=5e-3, abs=1e-5), key
    assert one.keys() == two.keys() == before.keys()
    one, two, before = (torch.cat([state[key].flatten() for key in one])
                        for state in (one, two, before))
    assert (one - two).norm() <= 1e-2 * (one - before).norm() > 0


@pytest.mark.parametrize("script", [None, "reinforce", "reinforce_pp", "rloo", "remax", "ppo"])
def test_lora_trains_small_matrices_and_saves_an_ordinary_model(script, tmp_path, monkeypatch):
    """The reference is the policy without them: of the first step, the KL is 0."""
    space = types.ModuleType("peft")
    exec(PEFT, space.__dict__)
    folder = save_folder(tmp_path / "model")
    with monkeypatch.context() as for_the_import:  # transformers would ask for its version
        for_the_import.setitem(sys.modules, "peft", space)
        module = patched("lora", script)
    group = dict(reinforce=dict(minibatch_size=None)).get(script, {})
    fields = {field.name for field in dataclasses.fields(module.Config) if field.init}
    monkeypatch.setattr(module, "load_rewards", lambda cfg, problems: {"reward": by_text})
    cfg = {**module.TOY, **dict(device="cpu", model=folder, steps=2, lr=1e-2, prompts_per_step=4,
                                group_size=4, eval_prompts=3, max_new_tokens=6, minibatch_size=16,
                                out_dir=str(tmp_path / "run"), kl_coef=0.1), **group}
    module.train(module.Config(**{key: value for key, value in cfg.items() if key in fields}))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["kl"]) < 1e-5 < 1e-3 < abs(rows[1]["kl"])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["policy"]
    from safetensors.torch import load_file
    start, end = (load_file(Path(place, "model.safetensors")) for place in (
        folder, tmp_path / "run" / "model"))
    assert start.keys() == end.keys()
    for key in start:
        prefix = key.removesuffix(".weight")
        if f"{prefix}.A" in saved:  # what was trained is B A, beside the weights of the start
            assert torch.equal(saved[f"{prefix}.base.weight"], start[key])
            change = 2 * saved[f"{prefix}.B"] @ saved[f"{prefix}.A"]
            assert change.abs().max() > 0
            torch.testing.assert_close(end[key], start[key] + change)
        else:
            assert torch.equal(start[key], end[key])
    assert sum(key.endswith(".A") for key in saved) == 2 * 7


@pytest.mark.parametrize("script", [None, "sft", "dpo", "ppo", "trpo", "raft", "prime", "remax",
                                    "orpo", "rloo", "reinforce", "reinforce_pp", "reward_model"])
@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_loggers_get_the_numbers_of_the_log(name, script, tmp_path, monkeypatch):
    """With a stand-in for the library. One script runs; the others have the same function."""
    module, seen = patched(name, script), []
    space = types.ModuleType(name)
    space.SummaryWriter = lambda folder: types.SimpleNamespace(
        add_scalar=lambda key, value, step: seen.append((step, key, value)), flush=lambda: None)
    space.init = lambda **settings: seen.clear()
    space.log = lambda fields, step: seen.extend((step, *pair) for pair in fields.items())
    monkeypatch.setitem(sys.modules, dict(tensorboard="torch.utils.tensorboard").get(name, name),
                        space)
    if script is None:
        rows, _ = short_run(module, tmp_path / "run", model=save_folder(tmp_path / "model"))
        assert seen == [(row["step"], key, value) for row in rows for key, value in row.items()
                        if key != "step"]
    else:
        written = []
        run = types.SimpleNamespace(folder=tmp_path, cfg=module.Config(),
                                    write=lambda *args, **fields: written.append((args, fields)))
        getattr(module, f"also_to_{name}")(run)
        run.write("metrics.jsonl", 3, score=0.5), run.write("samples.jsonl", 3, text="a")
        assert seen == [(3, "score", 0.5)] and len(written) == 2
        lines = f"    also_to_{name}(run)\n    for step in run.steps():"
        assert lines in recipe.merge(name, script)


# ------------------------------------------------------------- their losses: numbers, loops, TRL

MASK = T([[1, 1, 1], [1, 1, 0]])
LOGPROBS, OLD = T([[-.5, -1, -.2], [-.7, -.3, 0]]), T([[-.9, -.8, -.2], [-.4, -.5, 0]])
A = T([1, -1])
SEQ, TOK = MASK / MASK.sum(1, keepdim=True) / 2, MASK / 5


def loss_of(name, logprobs, share, *settings, old=OLD, ref=None, advantages=A, mask=MASK):
    """The weighted loss by a recipe's own function."""
    function, settings = patched(name).grpo_loss, list(settings)
    if name in ("gspo", "gmpo"):
        settings.insert(0, mask)
    ref = logprobs.detach() if ref is None else ref
    found = function(logprobs, old, ref, advantages, *settings)
    return ((found if name == "sapo" else found[0]) * share).sum()


@pytest.mark.parametrize("name, share, settings, loss, gradient", [
    ("clip_higher", SEQ, (.2, .28, 0), -.011104, None),
    ("clip_higher", SEQ, (.2, .2, 0), .002229, None),
    ("dapo", TOK, (.2, .28, 0), -.215466, None), ("dapo", TOK, (.2, .2, 0), -.199466, None),
    ("dr_grpo", MASK / (2 * 4), (.2, 0), -.124666, None),
    ("cispo", TOK, (1.28, 0), .154747, [[-.256, -.163746, -.2], [.148164, .244281, 0]]),
    ("cispo", TOK, (5.0, 0), .175930, [[-.298365, -.163746, -.2], [.148164, .244281, 0]]),
    ("gspo", SEQ, (3e-4, 4e-4, 0), -.00035, None), ("gspo", SEQ, (.2, .28, 0), -.058855, None),
    ("gmpo", SEQ, (.4, 0), -.058855, None), ("gmpo", SEQ, (.1, 0), .042027, None),
    ("sapo", SEQ, ((T(1.0), T(1.05)), 0), -.107143,
     [[-.234188, -.13534, -.166667], [.181817, .301262, 0]])])
def test_losses_are_the_numbers_of_the_formulas(name, share, settings, loss, gradient):
    logprobs = LOGPROBS.clone().requires_grad_()
    ours = loss_of(name, logprobs, share, *settings)
    assert ours.item() == pytest.approx(loss, abs=1e-6)
    ours.backward()
    if gradient:
        torch.testing.assert_close(logprobs.grad, T(gradient), rtol=0, atol=1e-6)


def by_loop(name, logprobs, old, ref, A, mask, kl_coef):
    """The loss of a mini-batch by the formula of the recipe, token by token, in plain numbers."""
    total, tokens = 0.0, mask.sum().item()
    for i in range(len(mask)):
        L = int(mask[i].sum())
        d = [(logprobs[i, t] - old[i, t]).item() for t in range(L)]
        k3 = [math.exp(x) - 1 - x for x in ((ref[i, t] - logprobs[i, t]).item() for t in range(L))]
        a, row = A[i].item(), 0.0
        for t in range(L):
            rho = math.exp(d[t])
            if name in ("clip_higher", "dapo"):
                term = -min(rho * a, min(max(rho, .8), 1.28) * a)
            elif name == "cispo":  # its value; the gradient is that of a weight that is fixed
                term = -min(rho, 1.28) * a * logprobs[i, t].item()
            elif name == "gspo":
                s = math.exp(sum(d) / L)
                term = -min(s * a, min(max(s, 1 - .02), 1 + .03) * a)
            elif name == "gmpo":
                cut = [min(max(x, -.1), .1) for x in d]
                cut = [min(x, y) if a > 0 else max(x, y) for x, y in zip(d, cut)]
                term = -a * math.exp(sum(cut) / L)
            elif name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                term = -a * 4 / tau / (1 + math.exp(-tau * (rho - 1)))
            else:
                term = -min(rho * a, min(max(rho, .8), 1.2) * a)
            row += term + kl_coef * k3[t] * (rho if name == "kl_with_ratio" else 1)
        total += row / {"dapo": tokens, "cispo": tokens, "dr_grpo": len(mask) * 9}.get(
            name, L * len(mask))
    return total


SETTINGS = dict(clip_higher=(.2, .28), dapo=(.2, .28), dr_grpo=(.2,), cispo=(1.28,),
                gspo=(.02, .03), gmpo=(.1,), sapo=((T(1.0), T(1.05)),), kl_with_ratio=(.2,))


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_of_loops_over_tokens(name):
    """Of a ragged batch, with a KL; the gradient by finite differences of the loop."""
    generator = torch.Generator().manual_seed(1)
    old, ref, step = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]).double()
    old, ref, A = old * mask, ref * mask, T([1.5, -.7, -1, 0.4])
    logprobs = ((old + .2 * step) * mask).requires_grad_()
    share = {"dapo": mask / mask.sum(), "cispo": mask / mask.sum(),
             "dr_grpo": mask / (4 * 9)}.get(name, mask / mask.sum(1, keepdim=True) / 4)
    loss = loss_of(name, logprobs, share, *SETTINGS[name], .1, old=old, ref=ref, advantages=A,
                   mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(by_loop(name, logprobs, old, ref, A, mask, .1), abs=1e-9)
    for i, t in mask.nonzero().tolist():
        moved = []
        for h in (1e-5, -1e-5):
            other = logprobs.detach().clone()
            other[i, t] += h
            fixed = old + (other - logprobs.detach()) if name == "cispo" else old
            moved.append(by_loop(name, other, fixed, ref, A, mask, .1))  # cispo: the same weight
        slope = (moved[0] - moved[1]) / 2e-5
        assert logprobs.grad[i, t].item() == pytest.approx(slope, abs=1e-7), (i, t)


TRL_CASES = {  # what TRL 1.16 is told, what the recipe's loss is told, the share
    "clip_higher": (dict(loss_type="grpo", epsilon_high=.28, use_bias_correction_kl=False),
                    (.2, .28, .1), "rows"),
    "dapo": (dict(loss_type="dapo", epsilon_high=.28, beta=0.0), (.2, .28, 0), "tokens"),
    "dr_grpo": (dict(loss_type="dr_grpo", scale_rewards="none", beta=0.0), (.2, 0), "constant"),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.05, beta=0.0), (1.05, 0), "tokens"),
    "gspo": (dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4,
                  epsilon_high=4e-4, beta=0.0), (3e-4, 4e-4, 0), "rows"),
    "gmpo": (dict(epsilon=.02, beta=0.0), (.02, 0), "rows"),
    "sapo": (dict(loss_type="sapo", beta=0.0), ((T(1.0).float(), T(1.05).float()), 0), "rows"),
    "kl_with_ratio": (dict(loss_type="grpo"), (.2, .1), "rows")}


@pytest.mark.parametrize("name", TRL_CASES)
def test_trl_has_the_same_gradient(name, tmp_path):
    settings, ours, kind = TRL_CASES[name]
    trainer = "GMPO" if name == "gmpo" else "GRPO"
    theirs, gradient, policy, batch, ref_logprobs, scores = trl_step(tmp_path, trainer, **settings)
    A, mask = patched(name).group_advantages(scores, TRL["num_generations"]), batch.mask
    torch.testing.assert_close(A, theirs["advantages"], rtol=1e-5, atol=1e-5)
    logprobs = token_logprobs(policy, batch, torch.arange(len(A)), TRL["temperature"])
    share = dict(rows=mask / mask.sum(1, keepdim=True) / len(A), tokens=mask / mask.sum(),
                 constant=mask / (len(A) * TRL["max_completion_length"]))[kind]
    loss_of(name, logprobs, share, *ours, old=batch.logprobs, ref=ref_logprobs, advantages=A,
            mask=mask).backward()
    same_gradient(policy, gradient)


def test_trl_has_the_same_gradient_of_rloo_with_one_ratio(tmp_path):
    """After an update: the completions' ratios are not 1, and some are clipped."""
    from common import ppo_clip_loss
    module = patched("sequence_ratio")
    theirs, gradient, policy, batch, ref_logprobs, scores = trl_step(tmp_path, "RLOO")
    A = module.leave_one_out_advantages(
        scores - TRL["beta"] * (batch.logprobs - ref_logprobs).sum(1), TRL["num_generations"])
    mask, rows = batch.mask, torch.arange(len(A))
    logprobs = token_logprobs(policy, batch, rows, TRL["temperature"])
    losses, is_clipped = ppo_clip_loss(logprobs.sum(1, keepdim=True),
                                       batch.logprobs.sum(1, keepdim=True), A[:, None], 0.2)
    (losses * mask / mask.sum(dim=1, keepdim=True) / len(A)).sum().backward()
    assert 0 < is_clipped.sum() < len(A)
    same_gradient(policy, gradient)


def test_trl_has_the_same_gradient_of_the_entropy(tmp_path):
    """The bonus alone: the gradient with it, minus that without it; and by the definition."""
    module, gradients = patched("entropy_bonus"), []
    for coefficient in (0.0, 0.5):
        _, gradient, policy, batch, *_ = trl_step(tmp_path / str(coefficient), "GRPO", beta=0.0,
                                                  entropy_coef=coefficient, loss_type="grpo")
        gradients.append(gradient)
    T_, mask = TRL["temperature"], batch.mask
    both = module.per_token(policy, batch, torch.arange(len(mask)), lambda logits, tokens:
                            module.logprob_and_entropy(logits, tokens, T_))
    logprobs, entropies = both.unbind(-1)
    torch.testing.assert_close(logprobs, token_logprobs(policy, batch, torch.arange(len(mask)), T_))
    (-0.5 * (entropies * mask).sum() / mask.sum()).backward()
    same_gradient(policy, {key: gradients[1][key] - gradients[0][key] for key in gradient})
    probabilities = torch.tensor([.5, .25, .25])
    found = module.logprob_and_entropy(T_ * probabilities.log()[None], torch.tensor([1]), T_)[0]
    torch.testing.assert_close(found, torch.tensor([math.log(.25), 1.5 * math.log(2)]))


def test_advantages_penalties_and_weights_are_the_numbers_of_the_formulas():
    maxrl, dapo = patched("maxrl"), patched("dapo")
    same(maxrl.group_advantages(T([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]), 4),
         [3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1, *[0] * 8])
    same(patched("dr_grpo").group_advantages(T([1, 0, 0, .1 + .2, .3, .1 + .2]), 3),
         [2 / 3, -1 / 3, -1 / 3, 0, 0, 0], atol=1e-15)
    same(dapo.overlong_penalty(T([3, 12, 14, 16, 20]), 20, 8), [0, 0, -.25, -.5, -1])
    sampler = T([[-1.9, -.8, -.25], [-.35, -.5, 0]])
    module = patched("truncated_is")
    losses, _ = module.grpo_loss(LOGPROBS, OLD, LOGPROBS, A, .2, 0)
    weights = module.truncated_weights(OLD, sampler, 2.0)
    assert (losses * weights * TOK).sum().item() == pytest.approx(-.457523, abs=1e-6)
    logprobs = T([[-1.0]]).requires_grad_()
    patched("kl_with_ratio").grpo_loss(logprobs, T([[-1.3]]), T([[-1.7]]), T([0]), .2, 1.0)[0].sum(
        ).backward()
    assert logprobs.grad.item() == pytest.approx(.944901, abs=1e-6)


def test_maxrl_takes_scores_of_0_and_1_alone(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        short_run(patched("maxrl"), tmp_path / "run", model=save_folder(tmp_path / "model"))
    assert stop.value.code == 2 and "0 and 1" in capsys.readouterr().err


PAIR = T([-12]), T([-20]), T([-14]), T([-19])  # policy's and reference's, chosen and rejected


@pytest.mark.parametrize("name, settings, loss", [
    ("ipo", (.1,), 4.0), ("cdpo", (.1, .1), .584355), ("cdpo", (.1, 0), .554355),
    ("robust_dpo", (.1, .1), .516855), ("robust_dpo", (.1, 0), .554355),
    ("kto", (0, .1), (.450166 + .475021) / 2), ("kto", (.05, .1), .46257)])
def test_preference_losses_are_the_numbers_of_the_formulas(name, settings, loss):
    losses, chosen, rejected = patched(name).dpo_loss(*PAIR, *settings)
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert (chosen.item(), rejected.item()) == pytest.approx((.2, -.1))


def test_preference_losses_of_means_are_the_numbers_of_the_formulas():
    """Lengths 4 and 10."""
    means = [logp / n for logp, n in zip(PAIR, (4, 10, 4, 10))]
    for beta, loss in ((.1, .663597), (5, .048587)):
        losses, *_ = patched("length_normalized_dpo").dpo_loss(*means, beta)
        assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert patched("simpo").simpo_loss(*means[:2], 2, 1).item() == pytest.approx(3.048587, abs=1e-6)


@pytest.mark.parametrize("name, loss_type, more", [
    ("robust_dpo", "robust", dict(label_smoothing=.1)),
    ("length_normalized_dpo", "sigmoid_norm", {})])
def test_trl_has_the_same_preference_gradient(name, loss_type, more, tokenizer, tmp_path):
    policy, ref_model = (make_model("llama", scale=0.1, seed=seed).eval() for seed in (3, 0))
    batch, loss, gradient = trl_step_on_pairs(
        "DPO", copy.deepcopy(policy), tokenizer, tmp_path,
        dict(loss_type=loss_type, beta=.3, **more), ref_model=ref_model)
    n = batch.mask.sum(1) if name == "length_normalized_dpo" else torch.ones(6)
    logps = (token_logprobs(policy, batch, torch.arange(6), 1.0).sum(1) / n).view(-1, 2)
    ref = (all_logprobs(ref_model, batch, 4, 1.0).sum(1) / n).view(-1, 2)
    losses, *_ = patched(name).dpo_loss(*logps.T, *ref.T, .3, *more.values())
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(loss, rel=1e-5)
    same_gradient(policy, gradient)


def test_trl_has_the_same_loss_of_simpo():
    """Its CPOTrainer's, of the same mean log-probs."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="requirements-dev.txt")
    chosen, rejected = -torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).double() * 3
    settings = types.SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.5, label_smoothing=0.0,
        accelerator=types.SimpleNamespace(device="cpu"))
    theirs, *_ = cpo.CPOTrainer.cpo_loss(settings, chosen, rejected)
    same(patched("simpo").simpo_loss(chosen, rejected, 2.5, 0.8), theirs)


def test_ktos_z0_is_the_kl_of_answers_to_other_prompts(tmp_path, monkeypatch):
    """At first it is 0, so the loss is 1/2; later it is what a loop over prompts gives."""
    module, seen = patched("kto"), []
    real = module.dpo_loss
    monkeypatch.setattr(module, "dpo_loss", lambda *args: seen.append(args[4]) or real(*args))
    rows, _ = short_run(module, tmp_path / "run", model=save_folder(tmp_path / "model"), lr=1e-2,
                        minibatch_size=3, micro_batch_size=3, beta=.5)
    assert rows[0]["loss"] == pytest.approx(.5, abs=1e-6) and seen[0].item() < 1e-6
    assert not any(z0.requires_grad for z0 in seen)
