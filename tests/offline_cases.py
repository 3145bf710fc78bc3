"""What the tests share of the scripts that learn from completions in the data."""
import json
import warnings

import pytest

from plumbing.data import load_problems
from plumbing.model import load_policy, plain_logprobs
from plumbing.offline import make_batch


def short_run(script, folder, model, wanted, **flags):
    """One large step -> what is logged of it, test problems with completions, their numbers."""
    cfg = script.Config(**{**script.TOY, **dict(
        model=model, data="toy", device="cpu", steps=1, warmup_steps=0, minibatch_size=4,
        eval_prompts=8, lr=1e-2, out_dir=str(folder / "run")), **flags})
    script.train(cfg)
    test = load_problems(cfg, *load_policy(model, "cpu"), wanted)[2]
    log, results = ((folder / "run" / name).read_text() for name in ("metrics.jsonl", "test.json"))
    return json.loads(log), [row for row in test if row["targets"]], json.loads(results)["after"]


def target_logprobs(policy, problems):
    """log pi(y_t | x, y_<t), each completion alone -> for each problem, K tensors of (L,)."""
    targets = sum((problem["targets"] for problem in problems), [])
    batch = make_batch([problem["ids"] for problem in problems], targets, "cpu")
    rows, K = plain_logprobs(policy, batch, 1.0), len(targets) // len(problems)
    return [[row.detach() for row in rows[i : i + K]] for i in range(0, len(rows), K)]


PAIRS = [("8+9-5=", "8+9=17,17-5=12", "13"), ("1+2=", "3", "1+2=4"), ("7-3+4=", "8", "7-3=4,8")]


def trl_step(name, network, tokenizer, folder, settings=(), **more):
    """A step of TRL's DPOTrainer or RewardTrainer on PAIRS -> our batch, TRL's loss and gradient.

    TRL tokenises the texts itself, and its ids must be those of our batch.
    """
    trl = pytest.importorskip("trl", reason="an oracle for development: requirements-dev.txt")
    import datasets
    ids = [tokenizer(list(row), add_special_tokens=False).input_ids for row in PAIRS]
    batch = make_batch([row[0] for row in ids], [x + [2] for row in ids for x in row[1:]], "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL calls the cache by its old name
        config = getattr(trl, f"{name}Config")(
            output_dir=str(folder / "trl"), report_to="none", use_cpu=True, bf16=False,
            per_device_train_batch_size=len(PAIRS), gradient_checkpointing=False,
            disable_dropout=True, **dict(settings))
        rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in PAIRS]
        trainer = getattr(trl, f"{name}Trainer")(
            model=network, args=config, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), **more)
        theirs = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model.train(), theirs)
        loss.backward()
    assert {tuple(row[mask.bool()].tolist()) for row, mask in
            zip(theirs["input_ids"], theirs["attention_mask"])} == {
        tuple(batch.prompts[owner] + row[mask.bool()].tolist()) for owner, row, mask in
        zip(batch.owner.tolist(), batch.completions, batch.mask)}
    return batch, loss.item(), {key: p.grad for key, p in trainer.model.named_parameters()}
