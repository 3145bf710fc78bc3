"""SFT: its loss by oracle, and what it measures of demonstrations."""
import pytest
import torch
from offline_cases import short_run, target_logprobs
from oracle_cases import T, cases

import sft
from plumbing.model import load_policy
from plumbing.rollout import pick


@pytest.mark.parametrize("x, y", cases("sft_loss"))
def test_sft_loss(x, y):
    labels = torch.tensor(x["labels"])[:, 1:]
    mask = (labels != -100).double()
    losses = -pick(T(x["logits"])[:, :-1], labels.clamp(min=0), 1.0)
    assert (losses * mask / mask.sum()).sum().item() == pytest.approx(y["loss"], abs=1e-6)


def test_held_out_demonstrations_are_measured_in_nats_each(folders, tmp_path, few_problems):
    _, test, found = short_run(sft, tmp_path, folders("llama"), "demonstration")
    trained = load_policy(tmp_path / "run", "cpu")[0]
    nats = [-row.sum().item() for row, in target_logprobs(trained, test)]
    assert found["nats"][0] == pytest.approx(sum(nats) / 8, rel=1e-4)
