"""remax.py: its advantages, and the gradient that they give."""
import exact_world as w
import pytest
import torch
from conftest import by_text
from oracle_cases import T, cases, check_padding, run_script, same

import common
import remax
from plumbing.rollout import sample, to_texts
from remax import remax_advantages


@pytest.mark.parametrize("x, y", cases("remax"))
def test_remax_advantages(x, y):
    kl = common.kl_estimate(T(x["logprobs"]), T(x["ref_logprobs"]))
    ours = remax_advantages(T(x["scores"]), T(x["greedy_scores"]), kl, T(x["mask"]), x["beta"])
    same(ours, y["advantages_gamma1"], x["mask"])


def test_padding_changes_nothing():
    scores, greedy = torch.arange(6).double(), torch.ones(6).double()
    check_padding(lambda mask, a, b, c: [remax_advantages(scores, greedy, a, mask, 0.1)])


def test_unbiased():
    """The baseline is the score of the greedy completion."""
    greedy = ()
    while len(greedy) < 3 and greedy[-1:] != (0,):
        greedy += (w.THETA[w.PREFIXES.index(greedy)].argmax().item(),)
    baseline = w.SCORES[w.SEQUENCES.index(greedy)].expand(15)
    A = remax_advantages(w.SCORES, baseline, w.KL, w.MASK, w.KL_COEF)
    w.check_unbiased(w.clip_losses(A))


def test_remax_compares_with_the_greedy_answer_to_the_same_prompt(monkeypatch, tmp_path,
                                                                  few_problems):
    """One greedy completion for each prompt, which is in no number of the log but greedy_score."""
    def spy(policy, tokenizer, prompts, K, longest, temperature, generator):
        batch = sample(policy, tokenizer, prompts, K, longest, temperature, generator)
        texts = to_texts(tokenizer, batch)
        drawn.append((K, temperature, list(zip(batch.owner.tolist(), texts))))
        return batch

    def spy_loss(logprobs, old_logprobs, advantages, clip_eps):
        seen.extend(advantages[:, 0].tolist())
        return common.ppo_clip_loss(logprobs, old_logprobs, advantages, clip_eps)

    drawn, seen = [], []
    monkeypatch.setattr(remax, "sample", spy)
    monkeypatch.setattr(remax, "ppo_clip_loss", spy_loss)
    (row,) = run_script(remax, monkeypatch, tmp_path / "run", by_text, group_size=2)
    (K, temperature, samples), (one, zero, greedy) = drawn
    assert (K, temperature, one, zero) == (2, 1.0, 1, 0) and len(greedy) == 4
    baseline = {owner: by_text([""], [text])[0] for owner, text in greedy}
    scores = by_text([""], [text for _, text in samples])
    A = [score - baseline[owner] for score, (owner, _) in zip(scores, samples)]
    assert 0 < sum(a != 0 for a in A)
    assert sorted(filter(None, seen)) == pytest.approx(sorted(filter(None, A)))  # 0: not forwarded
    assert row["score"] == pytest.approx(sum(scores) / 8)
    assert row["greedy_score"] == pytest.approx(sum(baseline.values()) / 4)
