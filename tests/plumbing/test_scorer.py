"""The score of a reward model: padding, EOS, and the folder that is a reward."""
import pytest
import torch
from conftest import CONFIGS, TEMPLATE, save_folder, seeded, to_problems
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import reward_model
from plumbing import rewards
from plumbing.model import load_policy
from plumbing.offline import make_batch
from plumbing.scorer import all_scores, load_scorer


@pytest.mark.parametrize("name", CONFIGS)
def test_a_score_is_that_of_the_last_token(tmp_path, name):
    """As for each row alone, without padding; also where pad is the EOS, and ids equal it inside.
    Prompts of 4 and 1 tokens are padded on the left; one completion is cut off, one is the EOS."""
    policy, tokenizer = load_policy(save_folder(tmp_path, name, pad="<eos>"), "cpu")
    scorer = reward_model.make_scorer(policy, tokenizer, name)
    torch.nn.init.normal_(scorer.score.weight, generator=seeded())
    prompts, completions = [[5, 6, 2, 8], [9]], [[2, 7, 2], [6], [7, 8, 9, 5, 2], [2]]
    batch = make_batch(prompts, completions, "cpu")
    batch.completions[batch.mask == 0] = 2  # whatever lies there
    hidden = [policy.base_model(input_ids=torch.tensor([prompts[i // 2] + completion]))
              .last_hidden_state for i, completion in enumerate(completions)]
    alone = torch.cat([scorer.score(states[0, -1]) for states in hidden])
    assert len(alone.unique()) == 4 and alone.std() > 0.1
    torch.testing.assert_close(all_scores(scorer, batch, 3), alone, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def judge(folders, tmp_path_factory):
    """The run folder of a reward model of a tiny GPT-2, whose pad is the EOS."""
    folder = str(tmp_path_factory.mktemp("runs") / "judge")
    model = folders("gpt2", pad="<eos>", template=TEMPLATE)
    reward_model.train(reward_model.Config(**{**reward_model.TOY, **dict(
        model=model, steps=2, eval_prompts=8, device="cpu", out_dir=folder)}))
    return folder


def test_a_run_folder_is_a_reward_that_scores_as_transformers_does(judge, folders):
    """The saved model, alone with <bos>1+2=3<eos>, made by the template; cut off: without <eos>."""
    cfg = reward_model.Config(model=folders("llama"))
    cfg.reward = judge
    (learned,) = rewards.load_rewards(cfg, to_problems([dict(prompt="1+2=")] * 2)).values()
    model = AutoModelForSequenceClassification.from_pretrained(f"{judge}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{judge}/model")
    texts, finished, plain = ["3", "3", "1+2=3,3", ""], [True, False, True, False], []
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and model.config.num_labels == 1
    for text, done in zip(texts, finished):
        ids = tokenizer(f"<bos>1+2={text}{'<eos>' * done}", add_special_tokens=False).input_ids
        hidden = model.transformer(input_ids=torch.tensor([ids])).last_hidden_state
        plain.append(model.score(hidden[0, -1]).item())
    prompts = ["1+2", [dict(role="user", content="1+2")]] * 2
    assert learned(prompts, texts, finished, answer=["3"] * 4) == pytest.approx(plain, abs=1e-4)
    assert len(set(plain)) == 4 and max(map(abs, plain)) > 1e-3
    cut = model(input_ids=torch.tensor([tokenizer("<bos>1+2=3").input_ids])).logits
    assert cut.item() == pytest.approx(plain[1], abs=1e-4)  # its own forward, where no id is pad


def test_what_cannot_be_scored_is_one_sentence(judge, folders, tmp_path, capsys):
    """A text that is too long for the reward model, and folders that hold none."""
    row, learned, llama = to_problems([dict(prompt="1+2=")]), load_scorer(judge), folders("llama")
    for words, call, *given in (
            ("--max_new_tokens", rewards.judge, "judge", learned, row, ["7" * 5000], [True], [[1]]),
            (f"--reward {llama}", load_scorer, llama),
            (f"--reward {tmp_path}", load_scorer, tmp_path)):
        with pytest.raises(SystemExit) as stop:
            call(*given)
        error = capsys.readouterr().err.splitlines()[-1]  # before it, transformers shows a bar
        assert stop.value.code == 2 and error.startswith("error") and words in error
