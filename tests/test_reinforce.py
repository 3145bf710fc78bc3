"""reinforce.py: its baselines, its loss, and the gradient that they give."""
import pytest
import torch
from exact_world import KL, KL_COEF, SCORES, check_unbiased
from oracle_cases import T, cases, same

import reinforce


@pytest.mark.parametrize("x, y", cases("reinforce_baseline"))
def test_moving_baselines(x, y):
    batches, ema, (mean, count) = [T(batch) for batch in x["reward_batches"]], None, (0.0, 0)
    for i, scores in enumerate(batches):
        assert float(ema or 0) == pytest.approx(y["ema_first_batch_init"]["baseline_used"][i])
        assert float(mean) == pytest.approx(y["running_mean"]["baseline_used"][i])
        ema = reinforce.ema_baseline(ema, scores, x["decay"])
        mean, count = reinforce.running_mean_baseline(mean, count, scores)
    assert float(ema) == pytest.approx(y["ema_first_batch_init"]["final"])
    assert float(mean) == pytest.approx(torch.cat(batches).mean().item())
    assert count == sum(map(len, batches))


@pytest.mark.parametrize("x, y", cases("loss_aggregation"))
def test_reinforce_loss(x, y):
    """With log-probs for losses and A = -1, it is the mean over completions of a sum of losses."""
    mask = T(x["mask"])
    losses = reinforce.reinforce_loss(T(x["loss_per_token"]), -torch.ones(len(mask)).double())
    same((losses * mask / len(mask)).sum(), y["seq_mean_token_sum"])


@pytest.mark.parametrize("baseline", [
    None, reinforce.ema_baseline(reinforce.ema_baseline(None, SCORES[:4], 0.9), SCORES[4:8], 0.9),
    reinforce.running_mean_baseline(*reinforce.running_mean_baseline(0.0, 0, SCORES[:4]),
                                    SCORES[4:8])[0]], ids=["first batch", "ema", "running_mean"])
def test_unbiased(baseline):
    """A baseline of past batches, whatever its value, does not change the expected gradient."""
    A = SCORES - KL_COEF * KL.sum(1) - (baseline or 0)
    check_unbiased(lambda logprobs, rows: reinforce.reinforce_loss(logprobs, A[rows]))
