"""TRL's DPOTrainer, ORPOTrainer and RewardTrainer as oracles: same weights and pairs, same loss and
gradient. TRL tokenises the texts itself, and the ids must be ours."""
import copy

import pytest
import torch

from conftest import make_model
from dpo import dpo_loss
from orpo import odds_ratio_loss
from plumbing import toy
from plumbing.rollout import make_batch, sequence_scores, token_logprobs
from reward_model import bradley_terry_loss, make_scorer
from test_trl import nudge, same_gradient

trl = pytest.importorskip("trl", reason="an oracle for development: requirements-dev.txt")
datasets = pytest.importorskip("datasets")

PAIRS = [("8+9-5=", "8+9=17,17-5=12", "13"), ("1+2=", "3", "1+2=4"), ("7-3+4=", "8", "7-3=4,8")]
BETA = 0.3


@pytest.fixture(params=["llama", "gpt2"])
def pairs(request, tmp_path):
    """-> policy, its reference, our batch, and a function that makes one of TRL's trainers and its
    only batch."""
    tokenizer = toy.make_tokenizer()
    policy = make_model(request.param, scale=0.1).eval()
    for module in policy.modules():  # GPT-2: no dropout, in TRL neither
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ref_model = copy.deepcopy(policy)
    nudge(policy)
    ids = [tokenizer(list(row), add_special_tokens=False).input_ids for row in PAIRS]
    batch = make_batch([row[0] for row in ids], [x + [2] for row in ids for x in row[1:]], "cpu")

    def make(trainer_class, config_class, model, **more):
        config = config_class(output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True,
                              per_device_train_batch_size=len(PAIRS), bf16=False,
                              gradient_checkpointing=False, disable_dropout=True,
                              **more.pop("settings", {}))
        rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in PAIRS]
        trainer = trainer_class(model=model, args=config, processing_class=tokenizer,
                                train_dataset=datasets.Dataset.from_list(rows), **more)
        trainer.model.train()
        return trainer, next(iter(trainer.get_train_dataloader()))
    return policy, ref_model, batch, tokenizer, make


def sequences(ids, mask):
    return {tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask)}


def ours(batch):
    return {tuple(batch.prompts[owner] + ids[mask.bool()].tolist()) for owner, ids, mask in
            zip(batch.owner.tolist(), batch.completions, batch.mask)}


def test_dpo(pairs):
    policy, ref_model, batch, _, make = pairs
    trainer, theirs = make(trl.DPOTrainer, trl.DPOConfig, copy.deepcopy(policy),
                           ref_model=copy.deepcopy(ref_model), settings=dict(beta=BETA))
    assert sequences(theirs["input_ids"], theirs["attention_mask"]) == ours(batch)
    loss = trainer.compute_loss(trainer.model, theirs)
    loss.backward()
    rows = torch.arange(6)
    logps = token_logprobs(policy, batch, rows, 1.0).sum(1).view(-1, 2)
    with torch.no_grad():
        ref_logps = token_logprobs(ref_model, batch, rows, 1.0).sum(1).view(-1, 2)
    mine = dpo_loss(*logps.T, *ref_logps.T, BETA)[0].mean()
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5)
    assert abs(mine.item() - 0.6931) > 0.01
    same_gradient(policy, {name: p.grad for name, p in trainer.model.named_parameters()})


def test_reward_model(pairs, tmp_path):
    policy, _, batch, tokenizer, make = pairs
    scorer = make_scorer(policy, tokenizer, "policy")
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(0))
    trainer, theirs = make(trl.RewardTrainer, trl.RewardConfig, copy.deepcopy(scorer))
    assert sequences(theirs["input_ids"], theirs["attention_mask"]) == ours(batch)
    loss = trainer.compute_loss(trainer.model, theirs)
    loss.backward()
    mine = bradley_terry_loss(*sequence_scores(scorer, batch, torch.arange(6)).view(-1, 2).T).mean()
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5)
    same_gradient(scorer, {name: p.grad for name, p in trainer.model.named_parameters()})


def test_orpo(pairs):
    """TRL's NLL is of prompt and completion, ours of the completion: so that part is its own."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    policy, _, _, _, make = pairs
    trainer, theirs = make(ORPOTrainer, ORPOConfig, copy.deepcopy(policy),
                           settings=dict(beta=BETA))
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, theirs)
    loss.backward()
    prompts, completions, nll, tokens = [], [], 0, 0
    for i in range(len(PAIRS)):
        for name in ("chosen", "rejected"):
            ids, labels = theirs[f"{name}_input_ids"][i], theirs[f"{name}_labels"][i]
            ids = ids[theirs[f"{name}_attention_mask"][i].bool()].tolist()
            done = int((labels != -100).sum())
            completions.append(ids[-done:])
            if name == "chosen":
                prompts.append(ids[:-done])
                x = torch.tensor([ids])
                nll = nll + policy(input_ids=x, labels=x).loss * (len(ids) - 1)
                tokens += len(ids) - 1
    assert all(row[-1] == 2 for row in completions)
    batch = make_batch(prompts, completions, "cpu")
    logprobs = token_logprobs(policy, batch, torch.arange(6), 1.0)
    mean_logps = (logprobs.sum(1) / batch.mask.sum(1)).view(-1, 2)
    mine = nll / tokens + BETA * odds_ratio_loss(*mean_logps.T).mean()
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5)
    same_gradient(policy, {name: p.grad for name, p in trainer.model.named_parameters()})
