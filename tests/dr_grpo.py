"""Dr. GRPO (arXiv 2503.20783) in two functions, for grpo.py: no division by std, none by length."""
import torch


def dr_grpo_advantages(scores, group_size):
    """score - mean of its group: (N,) -> (N,). A std would favour groups with one odd answer."""
    groups = scores.view(-1, group_size)
    groups = groups - groups[:, :1]  # changes nothing, but makes equal scores exactly 0
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def constant_mean(values, mask, length):
    """Sum / (N * length), the same `length` always: (N, C) -> scalar. Dr. GRPO: no length bias."""
    return torch.where(mask.bool(), values, 0).sum() / (len(mask) * length)
