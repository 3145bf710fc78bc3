"""The reward model: its loss by oracle, its head, TRL; held-out pairs."""
import copy
import math

import pytest
import torch
from conftest import make_model, seeded
from offline_cases import short_run, trl_step
from oracle_cases import T, cases, same, same_gradient
from transformers import AutoModelForSequenceClassification, BertConfig, BertLMHeadModel

import reward_model
from plumbing.offline import make_batch
from plumbing.scorer import all_scores, sequence_scores
from reward_model import bradley_terry_loss, make_scorer


@pytest.mark.parametrize("x, y", cases("reward_model_loss"))
def test_bradley_terry_loss(x, y):
    chosen, rejected = (T(x[name]).requires_grad_() for name in ("chosen", "rejected"))
    loss = bradley_terry_loss(chosen, rejected).mean()
    loss.backward()
    same(loss.detach(), y["loss"])
    same(chosen.grad, y["grad_chosen"])
    same(rejected.grad, y["grad_rejected"])


def test_nothing_overflows_when_a_preference_is_sure():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry_loss(chosen, -chosen.detach())
    losses.sum().backward()
    assert losses.tolist() == [0, 2e4] and chosen.grad.tolist() == [0, -1]


def test_held_out_margins_are_those_of_scores(folders, tmp_path, few_problems):
    """The score is w^T h at the last token, of the sequence alone. At first all scores are 0."""
    log, test, found = short_run(reward_model, tmp_path, folders("llama"), "pair")
    assert log["loss"] == pytest.approx(math.log(2)) and log["accuracy"] == 0.5
    assert log["margin"] == 0 and "length" not in found  # it cannot write
    scorer, margins = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model"), []
    for problem in test:
        ids = [torch.tensor([problem["ids"] + target]) for target in problem["targets"]]
        a, b = (scorer.score(scorer.model(input_ids=x).last_hidden_state[0, -1]) for x in ids)
        margins.append((a - b).item())
    assert found["margin"][0] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert found["accuracy"][0] == sum(margin > 0 for margin in margins) / len(margins)


def test_a_network_without_such_a_head_is_refused(tokenizer, capsys):
    policy = BertLMHeadModel(BertConfig(vocab_size=18, hidden_size=32, num_hidden_layers=1,
                                        num_attention_heads=4, is_decoder=True))
    with pytest.raises(SystemExit):
        make_scorer(policy, tokenizer, "bert")
    error = capsys.readouterr().err
    assert "--model bert" in error and "head" in error


@pytest.mark.parametrize("pad, known", [("<eos>", None), ("<pad>", 0)])
def test_transformers_reads_the_score_where_we_do(tokenizer, pad, known):
    """Also where the pad token is the EOS, or has the id 0: at the EOS, and not before it."""
    tokenizer.pad_token = pad
    scorer = make_scorer(make_model("llama"), tokenizer, "policy").eval()
    torch.nn.init.normal_(scorer.score.weight, generator=seeded())
    batch = make_batch([[5, 6, 7], [8]], [[9, 10, 2], [11, 2]], "cpu")
    assert scorer.config.pad_token_id == known
    for i, ids in enumerate(([5, 6, 7, 9, 10, 2], [8, 11, 2])):
        alone = scorer(input_ids=torch.tensor([ids])).logits.item()
        assert all_scores(scorer, batch, 2)[i].item() == pytest.approx(alone, abs=1e-5)


def test_trl_has_the_same_loss_and_gradient(tokenizer, tmp_path):
    scorer = make_scorer(make_model("llama", scale=0.1).eval(), tokenizer, "policy")
    torch.nn.init.normal_(scorer.score.weight, generator=seeded())
    batch, loss, gradient = trl_step("Reward", copy.deepcopy(scorer), tokenizer, tmp_path)
    scores = sequence_scores(scorer, batch, torch.arange(6)).view(-1, 2)
    ours = bradley_terry_loss(*scores.T).mean()
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-5)
    same_gradient(scorer, gradient)
