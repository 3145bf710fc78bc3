"""What all scripts must do, on tiny models and a few problems: one test per behaviour."""
import copy
import difflib
import importlib
import json
import math
import re
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TEMPLATE, make_model, write_jsonl

from plumbing import command_line
from plumbing.model import load_policy, plain_logprobs

ONLINE = "reinforce reinforce_pp ppo trpo remax rloo grpo prime raft".split()
OFFLINE = "sft reward_model dpo orpo".split()
SCRIPTS = {name: importlib.import_module(name) for name in ONLINE + OFFLINE}
VARIANTS = {
    "reinforce": {}, "reinforce running_mean": dict(baseline="running_mean"), "reinforce_pp": {},
    "reinforce_pp group_baseline": dict(group_baseline=True, group_size=4), "ppo": {},
    "ppo warmup": dict(critic_warmup=1), "trpo": {}, "remax": {},
    "remax groups": dict(group_size=2), "rloo": {}, "rloo no_kl": dict(kl_coef=0.0), "grpo": {},
    "grpo no_kl": dict(kl_coef=0.0), "grpo process": dict(process=True), "prime": {}, "raft": {},
    "sft": {}, "reward_model": {}, "dpo": {}, "dpo plackett_luce": dict(loss="plackett_luce"),
    "orpo": {}}
each_script = pytest.mark.parametrize("name", SCRIPTS)


def variants_of(names, but=()):
    return pytest.mark.parametrize("variant", [
        variant for variant in VARIANTS if variant.split()[0] in names and variant not in but])


each_variant = variants_of(SCRIPTS, but=["ppo warmup", "remax groups"])  # these: formulas alone


def flags_of(name):
    return {key for key, field in SCRIPTS[name].Config.__dataclass_fields__.items() if field.init}


def command(name, *words):
    """`python NAME.py WORDS` in this process -> the config that its train() was given."""
    script, seen = SCRIPTS[name], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        command_line.main(script.Config, script.TOY,
                          lambda cfg: seen.append(cfg) or script.train(cfg))
    return seen[0]


def typed(variant, completions=16, **flags):
    """The words of a small run, whose steps have two mini-batches; of flags, those it has."""
    name = variant.split()[0]
    assert set(flags) <= set.union(*map(flags_of, SCRIPTS)), flags
    K = VARIANTS[variant].get("group_size", getattr(SCRIPTS[name].Config, "group_size", 1))
    small = dict(device="cpu", steps=2, lr=1e-3, prompts_per_step=completions // K, eval_prompts=3,
                 minibatch_size=8, micro_batch_size=8, out_dir="run",
                 max_new_tokens=6 if name in ONLINE else 10)
    if name == "trpo":  # few products F v, each of which costs as much as a step
        small.update(delta=0.05, cg_iterations=2, fisher_fraction=1.0)
    flags = {key: value for key, value in {**small, **flags, **VARIANTS[variant]}.items()
             if key in flags_of(name) and value is not None}
    return [word for key, value in flags.items()
            for word in ([f"--{key}"] if value is True else [f"--{key}", value])]


def run(variant, **flags):
    return command(variant.split()[0], *typed(variant, **flags))


def lines(name, folder="run"):
    """The rows of a .jsonl file of a run, without what may differ between equal runs."""
    rows = [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time_step"} for row in rows]


def results(folder="run"):
    return json.loads(Path(folder, "test.json").read_text())


def weights(folder="run", key="policy"):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True).get(key)


def check_same(old, ours, theirs):
    """From `old`, two runs came to weights that differ by a thousandth of how far they went."""
    assert ours.keys() == theirs.keys()
    old, ours, theirs = (torch.cat([state.get(key, torch.zeros_like(value)).flatten()
                                    for key, value in ours.items()])
                         for state in (old, ours, theirs))  # a new head starts at 0
    assert (ours - theirs).abs().max() <= 1e-3 * (ours - old).abs().max() > 0


def spy(patch, script, name, take):
    """-> a list of take(arguments, result) of each call of script.name()."""
    seen, real = [], getattr(script, name)

    def spied(*args, **more):
        result = real(*args, **more)
        seen.append(take(args, result))
        return result
    patch.setattr(script, name, spied)
    return seen


REWARDS = '''
import random, torch
from conftest import by_text

def noisy(prompts, completions, **columns):
    """The same, by a function that draws random numbers and seeds the generators."""
    random.seed(), torch.manual_seed(random.getrandbits(32))
    return by_text(prompts, completions)

def short(prompts, completions, completion_ids, **columns):
    return [0.5 / len(ids) for ids in completion_ids]
'''


@pytest.fixture(scope="session")
def props(tmp_path_factory, folders):
    """Data for every script, with awkward names of columns; rewards, and a reward model."""
    folder = tmp_path_factory.mktemp("props")
    texts = [["7", "7=7=7,7", "7=7"], ["12", "12,1+1", "1+1+1"], ["3", "3,3,3,3", "3-3="]]
    write_jsonl(folder / "data.jsonl", [
        dict(prompt=f"{i}+{j}=", answer=i + j, ids="a", row=7, reward={"b": None}, texts=None,
             completion=best, chosen=best, rejected=other, completions=[best, other, third])
        for i in range(8) for j in range(8) for best, other, third in [texts[i % 3]]])
    (folder / "mine.py").write_text(REWARDS)
    run("reward_model", model=folders("gpt2"), data=folder / "data.jsonl", steps=1,
        out_dir=folder / "judge")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, few_problems):
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def inputs(variant, props, rewards=("by_text",)):
    """Own data, where the variant can have them, and rewards, where it has some."""
    rewards = [props / "judge" if part == "judge" else f"{props}/mine.py:{part}"
               for part in rewards]
    return dict(data="toy" if variant == "grpo process" else props / "data.jsonl",
                reward=",".join(map(str, rewards)))


KEYS = {  # of the log, beside those that all online or all offline scripts have
    "reinforce": "lr", "raft": "lr", "sft": "lr",
    "trpo": "kl_step kl_full_step tries predicted_gain real_gain",
    "ppo": "lr approx_kl clip_frac value_loss value_clip_frac explained_var critic_grad_norm",
    "remax": "lr approx_kl clip_frac greedy_score",
    "prime": "lr approx_kl clip_frac prm_loss prm_accuracy prm_grad_norm",
    **dict.fromkeys(("reinforce_pp", "rloo", "grpo"), "lr approx_kl clip_frac"),
    **dict.fromkeys(("reward_model", "dpo", "orpo"), "lr chosen rejected margin accuracy")}


@each_variant
def test_a_run_and_what_it_leaves(folders, props, here, variant):
    """The checkpoint has several EOS ids, a pad that is EOS, a chat template, weights in bf16, and
    settings that no training may obey. There are two rewards, one for PRIME, which wants 0 to 1."""
    name = variant.split()[0]
    online, rewards = name in ONLINE, ["short", *["judge"] * (name != "prime")]
    model = folders("gpt2", hostile=True, template=TEMPLATE, pad="<eos>", dtype=torch.bfloat16)
    run(variant, **inputs(variant, props, rewards), model=model, steps=3, eval_every=2,
        log_every=1, out_dir=None, max_new_tokens=6 if online else 32)
    folder = Path("runs", name)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "validation.jsonl", "checkpoint.pt", "test.json", "model",
        *["samples.jsonl"] * online, *["reward.py"] * (name == "reward_model")}
    rows, expected = lines("metrics", folder), {"grad_norm", "loss", *KEYS[name].split()}
    if online:
        expected |= set("score score_std kl entropy length truncated frac_zero_std".split())
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "log.md").read_text()))
    steps = {"wrong_answers", "step_found", "step_chance"} if name == "prime" else set()
    assert expected | steps | {"time_step"} <= explained
    parts = {f"reward_{part}" for part in rewards if online and len(rewards) > 1}
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:  # prime's steps are there where there are wrong answers of several steps
        assert set(row) - steps == expected | parts | {"step"}
    if not online:
        return
    has_reference = name != "raft" and VARIANTS[variant].get("kl_coef") != 0
    assert abs(rows[0]["kl"]) < 1e-4 and (abs(rows[2]["kl"]) > 1e-4) == has_reference
    samples, known = lines("samples", folder), lines("data", props)
    assert [sample["step"] for sample in samples] == 4 * [1] + 4 * [2] + 4 * [3]
    for sample in samples:
        assert list(sample) == ["step", "prompt", "completion", "score", "row"]
        assert sample["prompt"] == sample["row"]["prompt"] and isinstance(sample["score"], float)
        assert sample["row"] in known or variant == "grpo process"


@each_variant
def test_memory_flags_do_not_matter(folders, props, here, plain_descent, variant):
    """Micro-batches of ragged rows, and gradient checkpointing: all but rounding is the same."""
    name = variant.split()[0]
    model = folders("llama" if name in ONLINE else "gpt2", hostile=True)
    flags = dict(inputs(variant, props), model=model, lr=0.1, max_new_tokens=24, kl_coef=0.1,
                 steps=1 + (name == "reward_model"))  # whose first step moves the head alone
    run(variant, **flags, micro_batch_size=16, out_dir="whole")
    run(variant, **flags, micro_batch_size=3, gradient_checkpointing=True)
    first, second = ({key: value for key, value in lines("metrics", folder)[-1].items()
                      if "accuracy" not in key and key != "step_found"}  # a rounding error's sign
                     for folder in ("whole", "run"))
    assert first == pytest.approx(second, rel=1e-3, abs=1e-4)
    assert first.get("truncated", 0) < 0.8
    check_same(load_policy(model, "cpu")[0].state_dict(), weights("whole"), weights())


@each_variant
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(folders, props, here, variant):
    """In step 2, before the first checkpoint, so that it begins again; in step 4, after the one of
    step 2. Meanwhile the reward draws random numbers, which is nobody else's business."""
    name = variant.split()[0]
    flags = dict(inputs(variant, props), model=folders("gpt2"), steps=4, epochs=2, save_every=2,
                 eval_every=1, log_every=1)
    run(variant, **flags, out_dir="whole")
    noisy = dict(flags, reward=flags["reward"].replace("by_text", "noisy"))
    for at, words, saved in ((1, typed(variant, **noisy), False), (3, ["--resume", "run"], True)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            spy(patch, SCRIPTS[name], "draw_problems", lambda args, result: args[1] == at and (
                signal.raise_signal(signal.SIGINT)))
            command(name, *words)
        assert stop.value.code == 130 and len(lines("metrics")) == at
        assert Path("run", "checkpoint.pt").exists() == saved and not Path("run", "model").exists()
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "sco')  # as if the stop had torn a line
    command(name, "--resume", "run")
    for file in ("metrics", "validation", *["samples"] * (name in ONLINE)):
        assert lines(file) == lines(file, "whole")
    for network in ("policy", "critic", "prm"):
        ours, theirs = weights("run", network) or {}, weights("whole", network) or {}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert results() == results("whole")


@pytest.mark.parametrize("name, which", [*((name, 0) for name in SCRIPTS), ("ppo", 1),
                                         ("prime", 1)])  # the second network's gradient
def test_a_gradient_that_is_nan_ends_in_one_sentence(folders, props, here, capsys, name, which):
    """In the file as a user runs it."""
    factors = iter([1] * which + [math.nan])
    for owner, method in ((torch.Tensor, "backward"), (torch.autograd, "grad")):
        here.setattr(owner, method, lambda loss, *args, real=getattr(owner, method), **more: real(
            loss * next(factors, 1), *args, **more))
    words = typed(name, **inputs(name, props), model=folders("llama"), steps=1, minibatch_size=16)
    here.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    (error,) = re.findall("error: .*", capsys.readouterr().err)
    assert stop.value.code == 1 and re.search("nan|finite", error) and "--" in error
    assert not {"model", "checkpoint.pt"} & {path.name for path in Path("run").iterdir()}


RATES = 1 / 2, 1, 1 / 10  # of --lr, in three steps of which one is a warm-up
LOUD = dict(steps=3, warmup_steps=1, weight_decay=0.01, max_grad_norm=2.0, lr=0.1,
            micro_batch_size=3, gradient_checkpointing=True)


@pytest.fixture
def descent(here):
    """Gradient descent for AdamW, as plain_descent in conftest.py, but with a weight decay."""
    here.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay, **settings:
                 torch.optim.SGD(parameters, lr, weight_decay=weight_decay))
    return here


def descend(model, loss, rate, cfg):
    """Clip the gradient to a norm of max_grad_norm, and make a step against it."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
    norm = sum((part**2).sum() for part in gradient).sqrt()
    for parameter, part in zip(parameters, gradient):
        part = part * min(1.0, cfg.max_grad_norm / norm) + cfg.weight_decay * parameter.data
        parameter.data -= rate * part


def plain_values(critic, batch):
    """V before each token of each completion, each row alone."""
    rows = []
    for owner, ids, mask in zip(batch.owner.tolist(), batch.completions, batch.mask.bool()):
        prompt = torch.tensor(batch.prompts[owner])
        values = critic(input_ids=torch.cat([prompt, ids[mask]])[None]).logits[0, :, 0]
        rows.append(values[len(prompt) - 1 : -1])
    return rows


def mean(values):
    return sum(values) / len(values)


def whitened(rows):
    tokens = torch.cat(rows)
    return [(row - tokens.mean()) / tokens.std(correction=0) for row in rows]


def to_go(rewards, gamma):
    C = len(rewards)
    return torch.stack([sum(gamma ** (u - t) * rewards[u] for u in range(t, C)) for t in range(C)])


def advantages_by_hand(name, cfg, s, kl, baseline=0, greedy=None, V=None, q=None, process=None):
    """A_t of N completions, by the formulas at the top of the script: scores s, kl of their tokens,
    N rows each -> N rows."""
    K, N = cfg.group_size, len(s)
    groups = [[j for j in range(N) if j // K == i // K] for i in range(N)]
    others = [[j for j in groups[i] if j != i] for i in range(N)]
    c, same = getattr(cfg, "kl_coef", 0), [0 * row for row in kl]  # for all tokens the same A
    if name in ("reinforce_pp", "trpo") and not getattr(cfg, "group_baseline", False):
        s = ((s - s.mean()) / s.std()).clamp(-cfg.reward_clip, cfg.reward_clip)
    r = [F.pad(s[i, None], (len(kl[i]) - 1, 0)) - c * kl[i] for i in range(N)]
    R = [row.sum() for row in r]
    if name == "reinforce":
        return [R[i] - baseline + same[i] for i in range(N)]
    if name == "rloo":
        return [R[i] - mean([R[j] for j in others[i]]) + same[i] for i in range(N)]
    if name == "remax":
        return [to_go(r[i], 1.0) - greedy[i // K] for i in range(N)]
    if name == "ppo":
        delta = [r[i] + cfg.gamma * F.pad(V[i][1:], (0, 1)) - V[i] for i in range(N)]
        return [to_go(row, cfg.gamma * cfg.lam) for row in delta]
    if name == "prime":
        Q = [row.mean() for row in q]
        return [to_go(q[i] - mean([Q[j] for j in others[i]]), cfg.gamma)
                + s[i] - mean([s[j] for j in others[i]]) for i in range(N)]
    if getattr(cfg, "group_baseline", False):
        return whitened([s[i] - mean([s[j] for j in groups[i]]) + same[i] for i in range(N)])
    if name in ("reinforce_pp", "trpo"):
        return whitened([to_go(row, getattr(cfg, "gamma", 1.0)) for row in r])
    # GRPO. Without --process, the completion is one step, and its score the reward of this step.
    rewards, ends = process or ([[x] for x in s.tolist()], [[len(row) - 1] for row in kl])
    for i in range(N):
        steps = torch.tensor(sum((rewards[j] for j in groups[i]), []))
        for reward, end in zip(rewards[i], ends[i]):
            same[i][: end + 1] += (reward - steps.mean()) / (steps.std() + 1e-4)
    return same


def losses_by_hand(name, cfg, A, new, old, ref):
    """The loss of each token of a completion, and PPO's clip is [0.95, 1.05]."""
    ratio = (new - old).exp()
    losses = -torch.minimum(ratio * A, ratio.clamp(0.95, 1.05) * A)
    if name == "grpo":
        r = (ref - new).exp()
        return losses + cfg.kl_coef * (r - 1 - r.log())
    if getattr(cfg, "group_baseline", False):
        return losses + cfg.kl_coef * (new - ref) ** 2 / 2
    return {"reinforce": -A * new, "raft": -new}.get(name, losses)


@variants_of(ONLINE, but=["grpo no_kl", "rloo no_kl"])
def test_online_weights_are_those_of_the_formulas(folders, props, descent, variant):
    """Each completion is alone, and the reference is another model than the first policy. Of TRPO
    only the direction: with one iteration of conjugate gradients, it is the gradient's."""
    name, T, model = variant.split()[0], 0.7, folders("llama", hostile=True)
    script, policy = SCRIPTS[name], load_policy(model, "cpu")[0]
    reference = make_model("llama", seed=5).eval()
    copies = iter([reference])
    judged = spy(descent, script, "score", lambda args, result: (args[2], result[1]))
    descent.setattr(script, "copy", SimpleNamespace(
        deepcopy=lambda model: next(copies, None) or copy.deepcopy(model)), raising=False)
    process = spy(descent, script, "score_steps", lambda args, result: result) if (
        variant == "grpo process") else [None] * 3
    flags = dict(LOUD, **inputs(variant, props), steps=1 if name == "trpo" else 3)
    cfg = run(variant, **flags, model=model, completions=8, epochs=2, temperature=T, kl_coef=0.3,
              clip_eps=0.05, gamma=0.9, lam=0.8, beta=0.3, value_clip=0.02, critic_lr=0.2,
              prm_lr=0.2, reward_clip=1.2, decay=0.7, delta=1e-4, cg_iterations=1)
    networks = dict(policy=policy)
    if name in ("ppo", "prime"):
        second = script.make_critic(policy) if name == "ppo" else copy.deepcopy(policy)
        networks["critic" if name == "ppo" else "prm"] = second
    initial = {key: copy.deepcopy(network.state_dict()) for key, network in networks.items()}
    baseline, calls = 0, 1 + (name == "remax")
    for step in range(cfg.steps):
        (batch, s), (_, greedy) = judged[calls * step], judged[calls * step + calls - 1]
        rows, V, q = range(len(s)), None, None
        with torch.no_grad():
            old, ref = (plain_logprobs(each, batch, T) for each in (policy, reference))
            if name == "ppo":
                V = plain_values(second, batch)
            if name == "prime":
                q = [cfg.beta * (x - y) for x, y in zip(plain_logprobs(second, batch, T), ref)]
        if name == "raft":
            rows, A = [max(range(i, i + 4), key=lambda j: s[j]) for i in (0, 4)], old
        else:
            A = advantages_by_hand(name, cfg, s, [x - y for x, y in zip(old, ref)], baseline,
                                   greedy, V, q, process[step])
        if name == "ppo":
            targets, A = [a + v for a, v in zip(A, V)], whitened(A)
        baseline = mean(s) if step == 0 else 0.7 * baseline + 0.3 * mean(s)
        if variant == "reinforce running_mean":
            baseline = torch.cat([s for _, s in judged[: step + 1]]).mean()
        for _ in range(getattr(cfg, "epochs", 1)):
            new, loss, error = plain_logprobs(policy, batch, T), 0, 0
            tokens = sum(len(new[i]) for i in rows)
            for i in rows:
                n = {"reinforce": len(s), "grpo": len(s) * len(new[i])}.get(name, tokens)
                loss += losses_by_hand(name, cfg, A[i], new[i], old[i], ref[i]).sum() / n
            if name == "trpo":
                break
            if name == "ppo":
                for v, old_v, target in zip(plain_values(second, batch), V, targets):
                    near = old_v + (v - old_v).clamp(-0.02, 0.02)
                    error += 0.5 * torch.maximum((v - target)**2, (near - target)**2).sum() / tokens
            if name == "prime":
                for i, prm in enumerate(plain_logprobs(second, batch, T)):
                    p = torch.sigmoid(cfg.beta * (prm - ref[i]).sum())
                    error -= (s[i] * p.log() + (1 - s[i]) * (1 - p).log()) / len(s)
            wait = step < getattr(cfg, "critic_warmup", 0)
            descend(policy, loss, 0 if wait else 0.1 * RATES[step], cfg)
            if name in ("ppo", "prime"):
                descend(second, error, 0.2 * RATES[step], cfg)
    if name == "trpo":
        gradient = torch.autograd.grad(-loss, list(policy.parameters()))
        step = [weights()[key] - value for key, value in policy.named_parameters()]
        one, two = (torch.cat([part.flatten() for part in parts]) for parts in (gradient, step))
        assert F.cosine_similarity(one, two, dim=0) > 0.999
    else:
        for key, network in networks.items():
            check_same(initial[key], network.state_dict(), weights(key=key))


@variants_of(OFFLINE)
def test_offline_weights_are_those_of_the_formulas(folders, props, descent, variant):
    """Each completion alone, against the policy from before the training."""
    name, model = variant.split()[0], folders("llama", hostile=True)
    script, (policy, tokenizer) = SCRIPTS[name], load_policy(model, "cpu")
    batches = spy(descent, script, "micro_batches", lambda args, result: args[0])
    cfg = run(variant, **inputs(variant, props), **LOUD, model=model, beta=0.3)
    reference, trained = copy.deepcopy(policy), policy
    if name == "reward_model":
        trained = script.make_scorer(policy, tokenizer, model)
    initial = copy.deepcopy(trained.state_dict())
    K = {"sft": 1, "dpo plackett_luce": 3}.get(variant, 2)
    for batch, rate in zip(batches, RATES, strict=True):
        assert len(batch.prompts) == 8 and len(batch.mask) == 8 * K
        loss, new = 0, plain_logprobs(policy, batch, 1.0)
        with torch.no_grad():
            ref = plain_logprobs(reference, batch, 1.0)
        for i in range(0, 8 * K, K):
            h = torch.stack([0.3 * (new[j] - ref[j]).sum() for j in range(i, i + K)])
            if name == "dpo":  # for K = 2 they are the same
                loss -= sum(h[k] - h[k:].exp().sum().log() for k in range(K)) / 8
            if name in ("sft", "orpo"):
                loss -= new[i].sum() / sum(len(row) for row in new[::K])
            if name == "orpo":
                p, other = new[i].mean().exp(), new[i + 1].mean().exp()
                loss -= 0.3 * torch.sigmoid((p / (1 - p) / (other / (1 - other))).log()).log() / 8
            if name == "reward_model":
                s = []
                for j in (i, i + 1):
                    ids = batch.prompts[i // 2] + batch.completions[j, : len(new[j])].tolist()
                    hidden = trained.base_model(input_ids=torch.tensor([ids])).last_hidden_state
                    s.append(trained.score(hidden[0, -1]).squeeze())
                loss -= torch.sigmoid(s[0] - s[1]).log() / 8
        descend(trained, loss, 0.1 * rate, cfg)
    check_same(initial, trained.state_dict(), weights())


@each_script
def test_it_learns(folders, props, here, name):
    """A short answer is better, which a random model can learn in seconds. Offline, it is a short
    one that is demonstrated or preferred. What counts is held out."""
    run(name, completions=32, minibatch_size=16, model=folders("llama"), max_new_tokens=10,
        steps=12, lr=1e-2, delta=0.2, **inputs(name, props, ["short"]))
    before, after = results()["before"], results()["after"]
    if name in ("reward_model", "dpo", "orpo"):
        assert after["accuracy"][0] == 1 and after["margin"][0] > before["margin"][0] + 0.5
    else:
        measure = "nats" if name == "sft" else "length"
        assert after[measure][0] < 0.7 * before[measure][0]


@pytest.mark.parametrize("words", [
    *(f"{name} --group_size 1" for name in ("rloo", "grpo", "prime", "raft")),
    "reinforce_pp --group_baseline --group_size 1", "grpo --data words --process",
    "ppo --steps 9 --critic_warmup 9", "dpo --beta 0", "dpo --loss hinge", "trpo --lr 1e-3",
    "reinforce --minibatch_size 4", "raft --kl_coef 0.1", "prime --kl_coef 0.1", "sft --reward a"])
def test_what_a_script_cannot_do_is_one_sentence(here, capsys, words):
    """It names the last flag."""
    with pytest.raises(SystemExit) as stop:
        command(*words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words.split(" --")[-1].split()[0] in error and not list(Path().iterdir())


def code(name):
    return (ROOT / f"{name}.py").read_text().split('"""', 2)[2].splitlines()


@pytest.mark.parametrize("one, two", re.findall(
    r"^diff (\w+).py (\w+).py", (ROOT / "README.md").read_text(), re.M))
def test_siblings_differ_by_the_algorithm_and_little_else(one, two):
    """In README's reading order; docstring aside."""
    removed = [line for line in difflib.ndiff(code(one), code(two)) if line[0] == "-"]
    assert len(removed) <= 0.52 * len(code(one)), "\n".join(removed)


@each_script
def test_the_same_story_in_the_same_words(name):
    """The comments that begin the parts of a step; and the shared flags have the same order."""
    own = {"raft": "235", "trpo": "45", "sft": "123", "orpo": "3", "reward_model": "3"}
    stories = [re.findall(r"^ +(# \d\. .*)", "\n".join(code(script)), re.M)
               for script in (name, "rloo" if name in ONLINE else "dpo")]
    for ours, theirs in zip(*stories, strict=True):
        assert ours == theirs or (ours[2] in own.get(name, "") and ours[:4] == theirs[:4])
    text = SCRIPTS[name].__doc__
    assert f"python {name}.py   " in text and "What to expect of the toy" in text
    assert name in ("sft", "reinforce") or "Compared with " in text
    ours, theirs = (list(SCRIPTS[each].Config.__dataclass_fields__) for each in (name, "grpo"))
    assert [key for key in ours if key in theirs] == [key for key in theirs if key in ours]


@pytest.mark.parametrize("name", ONLINE)
def test_how_much_a_step_samples_and_updates_is_told_as_it_is(name):
    """One sentence of the docstring, compared with the defaults, of the toy too."""
    script, text = SCRIPTS[name], " ".join(SCRIPTS[name].__doc__.split())
    told = re.search(r"By default, a step samples (\d+) completions, (\w+) for each prompt"
                     r"(?:, or (\d+) on the toy|, and as many greedy ones)?, and makes "
                     r"(\d+|one) updates?(?:, or (\d+) on the toy)?\.", text).groups()
    found = []
    for given in ({}, script.TOY):
        cfg = script.Config(**given)
        n = cfg.prompts_per_step * cfg.group_size
        found += [n, cfg.group_size, -(-n // (cfg.minibatch_size or n))]
    samples, K, more, updates, toy = (int(x.replace("one", "1")) if x else None for x in told)
    assert found == [samples, K, updates, more or samples, K, toy or updates]
    assert "gives 0 to a completion that is cut off" in text
