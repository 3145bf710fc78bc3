"""
Looking at a policy: what the log says of a step, and how it fares on held-out problems.
"""
import json
from pathlib import Path

import torch

from common import kl_estimate, masked_mean
from plumbing import toy
from plumbing.parallel import rank
from plumbing.rewards import last_number, read_number, score
from plumbing.rollout import sample, step_generator, to_texts


def batch_stats(scores, kl, batch, group_size):
    """What the log says of a rollout batch: scores (N,), kl (N, C) -> dict of scalars."""
    # Without groups, the batch is the group. Groups of equal scores often teach nothing.
    groups = scores.view(-1, group_size if group_size > 1 else len(scores))
    return dict(
        score=scores.mean(), score_std=scores.std(correction=0),
        kl=(kl * batch.mask).sum(1).mean(),                      # nats per completion
        entropy=-masked_mean(batch.logprobs, batch.mask),        # E[-log pi(y_t)], nats per token
        length=batch.mask.sum(1).mean(), truncated=1 - batch.finished.float().mean(),
        frac_zero_std=(groups.amax(1) == groups.amin(1)).float().mean())


def approx_kl(logprobs, old_logprobs, share):
    """For the log, how far the policy moved from the one that sampled: (n, C) -> nats per token."""
    return (kl_estimate(old_logprobs, logprobs.detach(), "k3") * share).sum()


@torch.no_grad()
def evaluate(policy, tokenizer, problems, cfg, rewards=None, measure=None):
    """How the policy fares on held-out problems -> {name: [value, low, high]}, 95 % intervals.

    Sampled at temperature 1, and greedy: the exact match where all answers are numbers, rewards
    that say something else, and what measure() says of completions in the data. All evaluations use
    the same random numbers, from a generator of their own.
    """
    results = {"n": len(problems)}
    if policy.can_generate():  # a reward model cannot
        exact_match, judges = {"last_number": last_number}, {}
        if all(read_number(problem["row"].get("answer")) is not None for problem in problems):
            judges["exact"] = exact_match
        if rewards and rewards != exact_match:
            judges["score"] = rewards
        generator = step_generator(0, "evaluation")
        sampled = look(policy, tokenizer, problems, cfg, judges, 1.0, generator)
        greedy = look(policy, tokenizer, problems, cfg, judges, 0.0, generator)
        if "exact" in judges:
            results.update(sampled=wilson(sampled["exact"]), greedy=wilson(greedy["exact"]))
        if "score" in judges:
            results.update(score_sampled=interval(sampled["score"]),
                           score_greedy=interval(greedy["score"]))
        if cfg.data in toy.KINDS:
            results["shows_work"] = wilson(["=" in text for text in sampled["texts"]])
        results["length"] = interval(sampled["lengths"])
    rows = [problem for problem in problems if problem["targets"]]
    return results | measure(rows) if measure and rows else results


def look(policy, tokenizer, problems, cfg, judges, temperature, generator, group_size=1):
    """K completions of each problem -> lists of N: texts, lengths, and each judge's scores."""
    found = {name: [] for name in ("texts", "lengths", *judges)}
    for i in range(0, len(problems), 64):  # always 64: the same random numbers in every script
        part = problems[i : i + 64]
        batch = sample(policy, tokenizer, [problem["ids"] for problem in part], group_size,
                       cfg.max_new_tokens, temperature, generator)
        found["texts"] += to_texts(tokenizer, batch)
        found["lengths"] += batch.mask.sum(1).tolist()
        for name, rewards in judges.items():
            found[name] += score(rewards, part, batch, tokenizer)[1].tolist()
    return found


def wilson(hits):
    """Share of ones in a list of zeros and ones, and Wilson's 95 % interval: [share, low, high]."""
    n, z, share = len(hits), 1.96, sum(hits) / len(hits)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z * (share * (1 - share) / n + z**2 / (4 * n * n)) ** 0.5 / (1 + z**2 / n)
    return [share, centre - margin, centre + margin]


def interval(values):
    """Mean of N numbers, and its 95 % interval by the normal distribution: [mean, low, high]."""
    values = torch.tensor(values, dtype=torch.float64)
    mean, margin = values.mean().item(), 1.96 * values.std(correction=0).item() / len(values) ** 0.5
    return [mean, mean - margin, mean + margin]


def report(before, after, folder):
    """The end of a run: the test problems before and after, also as test.json; and where all is."""
    names = dict(sampled="exact match, sampled", greedy="exact match, greedy",
                 score_sampled="score, sampled", score_greedy="score, greedy",
                 shows_work="shows its work", length="mean length (tokens)",
                 nats="nats per demonstration", margin="margin", accuracy="pairs in right order")
    print(f"\n{'test problems, n = ' + str(after['n']):24s}{'before':>8s} [95 % interval]      "
          f"{'after':>8s} [95 % interval]")
    for key, name in names.items():
        if key in after:
            cells = ["{:8.3f} [{:6.3f}, {:6.3f}]".format(*found[key]) for found in (before, after)]
            print(f"{name:24s}" + "     ".join(cells))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0  # of tensors
    results = dict(before=before, after=after, peak_memory=peak)
    if rank() == 0:
        Path(folder, "test.json").write_text(json.dumps(results, indent=1))
    print(f"\nPeak GPU memory: {peak / 1e9:.2f} GB." if peak else "")
    print(f"The trained model is in {folder / 'model'}, the log in {folder / 'metrics.jsonl'}.")
