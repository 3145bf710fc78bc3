"""
Completions that the data has and that are compared: for reward_model.py, dpo.py and orpo.py.
"""
import torch
from tqdm import tqdm

from plumbing.evaluation import interval, wilson
from plumbing.rollout import make_batch


def preference_stats(rewards, n):
    """For the log: rewards (B, K) of K completions, the best one first -> dict of scalars.

    The best is compared with each of the others: accuracy is how often its reward is higher; a tie
    is half. These are means over n prompts, of which the B are a part.
    """
    best, others = rewards[:, :1].detach(), rewards[:, 1:].detach()
    right = (best > others).float() + 0.5 * (best == others)
    parts = dict(chosen=best, rejected=others, margin=best - others, accuracy=right)
    return {name: part.mean(dim=1).sum() / n for name, part in parts.items()}


def for_all_completions(measure, problems, cfg):
    """measure(batch) -> (N,), applied to the K `targets` of each of B problems -> (B, K)."""
    found = []
    for i in tqdm(range(0, len(problems), 64), "64 prompts", leave=False):
        part = problems[i : i + 64]
        batch = make_batch([row["ids"] for row in part], sum((row["targets"] for row in part), []),
                           cfg.device)
        found.append(measure(batch).view(len(part), -1))
    return torch.cat(found)


def held_out_stats(rewards):
    """For the table before and after: (B, K), as above -> {name: [value, low, high]}."""
    found = [preference_stats(row[None], 1) for row in rewards]
    return {"n_rated": len(found), "accuracy": wilson([row["accuracy"].item() for row in found]),
            "margin": interval([row["margin"].item() for row in found])}
