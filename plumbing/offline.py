"""
What the scripts share that learn from completions in the data: sft.py, reward_model.py, dpo.py and
orpo.py.
"""
import torch
from tqdm import tqdm

from plumbing.evaluation import interval
from plumbing.rollout import Batch


def make_batch(prompts, completions, device):
    """Given texts as lists of token ids, EOS included, K for each of the prompts -> Batch."""
    width, K = max(map(len, completions)), len(completions) // len(prompts)
    ids = torch.tensor([c + [0] * (width - len(c)) for c in completions], dtype=torch.long)
    mask = torch.tensor([[1.0] * len(c) + [0.0] * (width - len(c)) for c in completions])
    owner = torch.arange(len(prompts), device=device).repeat_interleave(K)
    return Batch(prompts, owner, ids.to(device), mask.to(device))


def preference_stats(rewards, n):
    """For the log: rewards (B, K) of K completions, the best one first -> dict of scalars.

    The best is compared with each of the others: accuracy is how often its reward is higher; a tie
    is half. Differences below 1e-5 are rounding errors of equal rewards, such as those of DPO
    before the training. These are means over n prompts, of which the B are a part.
    """
    best, others = rewards[:, :1].detach(), rewards[:, 1:].detach()
    margin = best - others
    right = (margin > 1e-5).float() + 0.5 * (margin.abs() <= 1e-5)
    parts = dict(chosen=best, rejected=others, margin=margin, accuracy=right)
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
    return {key: interval([row[key].item() for row in found]) for key in ("accuracy", "margin")}
