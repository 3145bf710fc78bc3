"""reward_model, dpo and orpo: in process, on tiny models and data that the tests make."""
import json
import math
import zlib
from pathlib import Path

import pytest
import torch

import dpo
import orpo
import reinforce_pp
import reward_model
from common import masked_mean
from conftest import CONFIGS, TEMPLATE, save_folder, to_problems, write_jsonl
from plumbing import preferences, rewards, rollout
from plumbing.model import load_policy
from plumbing.rollout import make_batch, token_logprobs
from test_command_line import metrics, same_weights, weights
from test_scripts import each_is_one_sentence, quick as quick_online, same_but_for_rounding

SCRIPTS = dict(reward_model=reward_model, dpo=dpo, orpo=orpo)
VARIANTS = [("reward_model", {}), ("dpo", {}), ("dpo", dict(loss="plackett_luce")), ("orpo", {})]
each_variant = pytest.mark.parametrize("name, variant", VARIANTS, ids=[
    " ".join([name, *variant.values()]) for name, variant in VARIANTS])
each_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def here(tmp_path, monkeypatch, few_problems):
    """Pairs of a longer and a shorter text, the shorter one preferred; rankings of 3."""
    monkeypatch.chdir(tmp_path)
    prompts = [f"{i}+{j}=" for i in range(10) for j in range(10)]
    texts = [["7", "7=7", "7=7=7,7"], ["12", "12,1", "1+1+1"], ["3", "3-3=", "3,3,3,3"]]
    write_jsonl("pairs.jsonl", [dict(prompt=p, chosen=texts[i % 3][0], rejected=texts[i % 3][2])
                                for i, p in enumerate(prompts)])
    write_jsonl("rankings.jsonl", [dict(prompt=p, completions=texts[i % 3])
                                   for i, p in enumerate(prompts)])
    write_jsonl("twos.jsonl", [dict(prompt=p, completions=texts[i % 3][:2])
                               for i, p in enumerate(prompts)])
    return monkeypatch


def quick(name, model, **flags):
    data = "rankings" if flags.get("loss") == "plackett_luce" else "pairs"
    return SCRIPTS[name].Config(**{**dict(
        model=model, data=f"{data}.jsonl", device="cpu", steps=2, minibatch_size=4,
        micro_batch_size=4, max_new_tokens=8, eval_prompts=4, lr=1e-3, out_dir="run"), **flags})


def train(name, *args, **flags):
    SCRIPTS[name].train(quick(name, *args, **flags))


@each_variant
def test_it_runs_and_leaves_what_the_others_leave(folders, here, capsys, name, variant):
    model = folders("llama", hostile=True, template=TEMPLATE)
    train(name, model, **variant, steps=3, eval_every=2)
    screen, folder = capsys.readouterr().out, Path("run")
    for word in (f"{name}: model=", "parameters on cpu", "before [95 % interval]", "validation",
                 "in right order, n = "):
        assert word in screen, word
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "validation.jsonl", "checkpoint.pt", "model", "test.json"}
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert sorted(row) == sorted("step chosen rejected margin accuracy grad_norm lr loss "
                                 "time_update time_step steps_per_s".split())
    test = json.loads((folder / "test.json").read_text())
    assert f"{test['after']['accuracy'][0]:.3f}" in screen
    assert ("length" in test["after"]) == (name != "reward_model")


@each_variant
def test_on_the_toy_its_own_answers_are_the_data(folders, here, name, variant):
    """Also held-out problems without a pair are asked; of the others, which is higher is measured.
    (Random weights are right too seldom: here a digit at the beginning is.)"""
    here.setattr(preferences, "last_number", lambda prompts, completions, *rest: [
        float(text[:1].isdigit()) for text in completions])
    train(name, folders("llama", text=True), **variant, data="toy", prompts=60, eval_prompts=50,
          steps=None)
    after = json.loads(Path("run/test.json").read_text())["after"]
    assert after["n"] == 50 and 0 < after["n_rated"] <= 25 and metrics("run")
    assert len(list(Path("runs/preferences").iterdir())) == 1


@each_variant
def test_resume_is_bit_for_bit(folders, here, name, variant):
    """Stopped in the fourth of five steps, it goes on from the second."""
    def broken(run, step, **numbers):
        if step == 3:
            raise SystemExit(1)
        real(run, step, **numbers)

    train(name, folders("gpt2"), **variant, steps=5, save_every=2, out_dir="whole")
    real = SCRIPTS[name].Run.end_step
    here.setattr(SCRIPTS[name].Run, "end_step", broken)
    with pytest.raises(SystemExit):
        train(name, folders("gpt2"), **variant, steps=5, save_every=2)
    here.setattr(SCRIPTS[name].Run, "end_step", real)
    train(name, folders("gpt2"), **variant, steps=5, save_every=2, resume=True)
    assert metrics("run") == metrics("whole") and same_weights("run", "whole")
    before, after = (json.loads(Path(f, "test.json").read_text()) for f in ("run", "whole"))
    assert before["before"] == after["before"] and before["after"] == after["after"]


@each_variant
def test_memory_flags_do_not_matter(folders, here, plain_descent, name, variant):
    model = folders("gpt2" if name == "reward_model" else "llama")  # one has dropout
    flags = dict(variant, steps=1, minibatch_size=8, lr=0.1)
    train(name, model, **flags, micro_batch_size=8, out_dir="whole")
    train(name, model, **flags, micro_batch_size=3, gradient_checkpointing=True)
    if name == "reward_model":  # its network has other weights than the policy
        assert metrics("run")[0] == pytest.approx(metrics("whole")[0], rel=1e-4, abs=1e-5)
        for one, two in zip(weights("run").values(), weights("whole").values(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    else:
        same_but_for_rounding(model, "whole", "run", but={"accuracy"})  # of margins near 0: a coin


@each_variant
def test_it_learns_what_is_preferred(folders, here, name, variant):
    """The shorter ones; on held-out prompts too."""
    train(name, folders("llama"), **variant, steps=30, lr=4e-3, minibatch_size=8, eval_prompts=99)
    test, rows = json.loads(Path("run/test.json").read_text()), metrics("run")
    assert test["after"]["accuracy"][0] == 1 and rows[-1]["accuracy"] > 0.9
    assert test["after"]["margin"][0] > test["before"]["margin"][0]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    if name != "reward_model":
        assert test["after"]["length"][0] < test["before"]["length"][0]


@each_variant
def test_epochs_are_passes_over_the_data(folders, here, name, variant):
    train(name, folders("llama"), **variant, steps=None, epochs=2, minibatch_size=16)
    prompts = [json.loads(row)["prompt"] for row in Path("pairs.jsonl").read_text().splitlines()]
    training = sum(zlib.crc32(prompt.encode()) % 8 > 1 for prompt in prompts)
    assert 60 < training < 90 and len(metrics("run")) == math.ceil(2 * training / 16)


KNOBS = dict(reward_model=[], dpo=[dict(beta=2.0)], orpo=[dict(beta=2.0)])


@each_script
def test_every_knob_does_something(folders, here, name):
    base = dict(steps=3)
    train(name, folders("llama"), **base, out_dir="base")
    knobs = [dict(warmup_steps=3), dict(weight_decay=0.5), dict(lr=1e-2), dict(max_grad_norm=1e-3),
             dict(seed=5), dict(minibatch_size=3), dict(max_new_tokens=7)]
    for i, knob in enumerate(knobs + KNOBS[name]):
        train(name, folders("llama"), **{**base, **knob}, out_dir=str(i))
        assert not same_weights("base", str(i)), knob
    known = {key for knob in knobs + KNOBS[name] for key in knob} | {
        "model", "data", "steps", "epochs", "prompts", "micro_batch_size", "log_every", "loss",
        "gradient_checkpointing", "compile", "eval_every", "eval_prompts", "save_every", "device",
        "out_dir", "resume"}
    assert known >= set(vars(quick(name, "x"))), "a flag without a test"


def test_a_ranking_of_two_is_a_pair_all_the_way(folders, here, plain_descent):
    """Of pairs both losses are the same; of three they are not."""
    for loss in ("bradley_terry", "plackett_luce"):
        for data in ("twos", "rankings") if loss == "plackett_luce" else ("twos",):
            train("dpo", folders("llama"), loss=loss, data=f"{data}.jsonl", steps=3,
                  out_dir=f"{loss} {data}")
    one, two, three = (metrics(f"{name}") for name in (
        "bradley_terry twos", "plackett_luce twos", "plackett_luce rankings"))
    for ours, theirs, other in zip(one, two, three):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
        assert ours["loss"] < other["loss"]


# ------------------------------------------------------------------------- what is peculiar to one

@pytest.mark.parametrize("kind, loss, expected", [
    ("pairs", "bradley_terry", math.log(2)), ("rankings", "plackett_luce", math.log(6))])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_dpo_begins_at_the_reference(folders, here, model, kind, loss, expected):
    train("dpo", folders(model), loss=loss)
    first, second = metrics("run")
    assert first["loss"] == pytest.approx(expected, abs=3e-6)  # sums of some -30 nats in fp32
    assert first["margin"] == pytest.approx(0, abs=3e-6)
    assert abs(second["margin"]) > 1e-4  # the reference stayed where it was


def test_held_out_margins_are_those_of_the_implicit_rewards(folders, here):
    """From the saved model and the initial one, pair by pair."""
    train("dpo", folders("llama"), steps=5, lr=1e-2, beta=0.7)
    cfg = quick("dpo", folders("llama"))
    test = dpo.load_preferences(cfg)[2]
    h = []
    for model in ("run/model", folders("llama")):
        policy = load_policy(model, "cpu")[0]
        h.append([[token_logprobs(policy, make_batch([row["ids"]], [target], "cpu"),
                                  torch.tensor([0]), 1.0).sum().item() for target in row["targets"]]
                  for row in test])
    h = 0.7 * (torch.tensor(h[0]) - torch.tensor(h[1]))
    found = json.loads(Path("run/test.json").read_text())
    assert found["before"]["margin"][0] == pytest.approx(0, abs=3e-6)
    assert found["after"]["margin"][0] == pytest.approx((h[:, 0] - h[:, 1]).mean().item(), abs=1e-4)
    assert abs(found["after"]["margin"][0]) > 0.1 and found["after"]["n_rated"] == len(test) > 2


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_orpo_is_sft_on_the_chosen_and_the_odds(folders, here, beta):
    """Three pairs per micro-batch; against each text alone, and without odds sft.py's line."""
    gradients, real = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, *args, **kwargs):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return real(parameters, *args, **kwargs)

    here.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    seen, real_batch = [], orpo.make_batch
    here.setattr(orpo, "make_batch", lambda *args: seen.append(real_batch(*args)) or seen[-1])
    train("orpo", folders("llama"), beta=beta, minibatch_size=8, micro_batch_size=3, steps=1)
    policy = load_policy(folders("llama"), "cpu")[0]
    rows = torch.arange(0, 16, 2)
    loss = -masked_mean(token_logprobs(policy, seen[0], rows, 1.0), seen[0].mask[rows])
    for i in range(0, 16, 2) if beta else ():
        p = [torch.stack([token_logprobs(policy, seen[0], torch.tensor([j]), 1.0)[0, t]
                          for t in range(int(seen[0].mask[j].sum()))]).mean().exp()
             for j in (i, i + 1)]
        odds = [one / (1 - one) for one in p]
        loss = loss - beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))) / 8
    loss.backward()
    ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], ours, rtol=1e-4, atol=1e-5)
    assert metrics("run")[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


# ------------------------------------------------------------------------------- the reward model

@pytest.mark.parametrize("name", CONFIGS)
def test_a_score_is_that_of_the_last_token(tmp_path, name):
    """Against each row alone, without padding; ids that equal pad and EOS inside the completion."""
    policy, tokenizer = load_policy(save_folder(tmp_path, name, pad="<eos>"), "cpu")
    model = reward_model.make_scorer(policy, tokenizer, name)
    torch.nn.init.normal_(model.score.weight)
    prompts, answers = [[5, 6, 7, 8], [9]], [[2, 7, 2], [6], [7, 8, 9, 5, 2], [2]]
    batch = make_batch(prompts, answers, "cpu")
    ours = rollout.all_scores(model, batch, 3)
    for i, answer in enumerate(answers):
        ids = torch.tensor([prompts[i // 2] + answer])
        alone = model.score(policy.base_model(input_ids=ids).last_hidden_state[:, -1])
        assert ours[i].item() == pytest.approx(alone.item(), abs=1e-4)
    assert ours.unique().numel() == 4


def test_a_reward_model_is_a_reward(folders, here, capsys):
    """Trained on GPT-2's tokens to like short answers; a Llama learns to please it (by what, as in
    life, is another question: answers cut short were not among the pairs)."""
    train("reward_model", folders("gpt2"), steps=20, lr=4e-3, minibatch_size=8, out_dir="judge")
    cfg = quick_online("reinforce_pp", folders("llama"), reward="judge")
    (learned,) = rewards.load_rewards(cfg, to_problems([dict(prompt="1+2=")] * 2)).values()
    values = learned(["1+2=", "1+2=", "1+2="], ["7", "7=7=7,7", "7"], [True, True, False])
    assert values[0] > values[1] and values[2] != values[0]  # cut short: without its EOS
    torch.testing.assert_close(values[:1], learned(["1+2="], ["7"], [True]), rtol=1e-4, atol=1e-4)
    reinforce_pp.train(quick_online("reinforce_pp", folders("llama"), prompts=32, steps=20, lr=4e-3,
                                    reward="judge", kl_coef=0.0, eval_prompts=16,
                                    max_new_tokens=12))
    test = json.loads(Path("run/test.json").read_text())
    assert test["after"]["score_sampled"][0] > test["before"]["score_sampled"][0] + 0.1
    assert "sampled" in test["after"]  # the true score, beside the model's


def test_a_text_too_long_for_the_reward_model_is_one_sentence(folders, here, capsys):
    train("reward_model", folders("gpt2"), out_dir="judge")
    cfg = quick_online("reinforce_pp", folders("llama"), reward="judge")
    loaded = rewards.load_rewards(cfg, to_problems([dict(prompt="1+2=")] * 2))
    (row,) = to_problems([dict(prompt="1+2=")])
    with pytest.raises(SystemExit):
        rewards.judge("judge", loaded["judge"], [row], ["7" * 5000], [True], [[1]])
    error = capsys.readouterr().err
    assert "--reward judge raised ValueError" in error and "--max_new_tokens" in error


def test_a_reward_model_starts_without_an_opinion(folders, here):
    train("reward_model", folders("llama"))
    first, *_ = metrics("run")
    assert first["loss"] == pytest.approx(math.log(2)) and first["margin"] == 0
    assert first["accuracy"] == 0.5


def test_a_reward_model_is_what_transformers_loads(folders, here):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    train("reward_model", folders("llama"), steps=3)
    model = AutoModelForSequenceClassification.from_pretrained("run/model")
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    assert model.config.num_labels == 1
    ids = tokenizer("1+2=3").input_ids + [tokenizer.eos_token_id]
    theirs = model(input_ids=torch.tensor([ids])).logits.item()  # one row, and pad is not EOS
    cfg = quick_online("reinforce_pp", folders("llama"), reward="run")
    (learned,) = rewards.load_rewards(cfg, to_problems([dict(prompt="1+2=")] * 2)).values()
    assert learned(["1+2="], ["3"], [True])[0] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("reward, words", [
    ("empty", ["--reward empty", "reward model", "reward_model.py"]),
    ("policy", ["--reward policy", "reward model", "score"])])
def test_what_is_no_reward_model_is_refused(folders, here, capsys, reward, words):
    Path("empty").mkdir()
    if reward == "policy":
        save_folder("policy")
    with pytest.raises(SystemExit) as stop:
        rewards.load_rewards(quick_online("reinforce_pp", folders("llama"), reward=reward),
                             to_problems([dict(prompt="1+2=")]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in error for word in words), error


def test_the_flawed_reward_pays_for_any_true_equation():
    texts = ["8+9=17,17-5=12", "12", "9-6=3,3+6=9,9-6=3,3+6=9", "8+9=18", "18+9=17", "8 + 9 = 17"]
    assert rewards.true_equations([""] * 6, texts) == [0.5, 0, 1, 0, 0, 0.25]


# ------------------------------------------------------------------------------------------ manners

BAD = [("--data nope.jsonl", ["--data", "nope.jsonl"]), ("--epochs 0", ["--epochs 0", "above 0"]),
       ("--learning_rate 1", ["no flag --learning_rate"]), ("--device tpu", ["--device tpu"]),
       ("--model no_model --data pairs.jsonl", ["--model", "no_model"]),
       ("--data columns.jsonl", ["columns.jsonl", "row 1 of train", "chosen and rejected"]),
       ("--data empty.jsonl", ["--data empty.jsonl", "empty"]),
       ("--data pairs.jsonl --resume", ["--resume", "no checkpoint"])]
OWN = dict(reward_model=[("--beta 1", ["no flag --beta"])],
           dpo=[("--loss hinge", ["--loss", "hinge", "plackett_luce"]),
                ("--beta 0", ["--beta 0", "0.1"]), ("--beta -1", ["--beta", "at least 0"]),
                ("--data rankings.jsonl", ["rankings.jsonl", "plackett_luce"])],
           orpo=[("--loss plackett_luce", ["no flag --loss"]),
                 ("--data rankings.jsonl", ["rankings.jsonl", "plackett_luce"])])


@each_script
def test_wrong_input_is_one_sentence(here, capsys, name):
    write_jsonl("columns.jsonl", [dict(prompt="1+1=", better="2", worse="3")] * 3)
    write_jsonl("empty.jsonl", [])
    each_is_one_sentence(BAD + OWN[name], SCRIPTS[name], here, capsys)
