"""
Looking at a policy: what the log says of a step, and how it fares on held-out problems.
"""
import json
import sys
from pathlib import Path

import torch

from common import kl_estimate, masked_mean
from plumbing import toy
from plumbing.rewards import as_number, last_number, score
from plumbing.rollout import (all_logprobs, make_batch, sample, step_generator, to_texts,
                              token_logprobs, use_bf16)


def batch_stats(scores, kl, batch, group_size):
    """What the log says of a rollout batch: scores (N,), kl (N, C) -> dict of scalars."""
    # Groups whose scores are all equal: where the group is the baseline, they teach nothing.
    # Without groups, the batch is the group.
    groups = scores.view(-1, group_size if group_size > 1 else len(scores))
    return dict(
        score=scores.mean(), score_std=scores.std(correction=0),
        kl=torch.where(batch.mask.bool(), kl, 0).sum(1).mean(),  # nats per completion
        entropy=-masked_mean(batch.logprobs, batch.mask),        # E[-log pi(y_t)], nats per token
        length=batch.mask.sum(1).mean(), truncated=1 - batch.finished.float().mean(),
        frac_zero_std=(groups.amax(1) == groups.amin(1)).float().mean())


def ratio_stats(logprobs, old_logprobs, mask):
    """For the log, how far the policy moved from the one that sampled: all (N, C) -> scalars."""
    logprobs = logprobs.detach()
    approx_kl = masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask)  # nats per token
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0).exp()
    return dict(approx_kl=approx_kl, ratio_max=ratio.max())


def preference_stats(rewards):
    """For the log: rewards (B, K) of K completions, the best one first -> dict of scalars.

    The best against each of the others: accuracy is how often its reward is higher; a tie is half.
    """
    best, others = rewards[:, :1].detach(), rewards[:, 1:].detach()
    right = (best > others).float() + 0.5 * (best == others)
    return dict(chosen=best.mean(), rejected=others.mean(), margin=(best - others).mean(),
                accuracy=right.mean())


def check_first_step(policy, batch, scores, kl, cfg):
    """What must hold before the first update, else the run is not what it seems. Warns, goes on."""
    with torch.no_grad():
        rows = torch.arange(len(scores))[: cfg.micro_batch_size]
        logprobs = token_logprobs(policy, batch, rows, cfg.temperature)
    gap = (logprobs - batch.logprobs[rows]).exp().sub(1).abs()
    worst, limit = gap.max().item(), 1e-4
    if use_bf16(batch.mask.device):  # single tokens are off by some percent, without bias
        worst, limit = masked_mean(gap, batch.mask[rows]).item(), 0.05
    kl, truncated = masked_mean(kl, batch.mask).item(), 1 - batch.finished.float().mean().item()
    if worst > limit:
        print(f"warning: before any update, the ratio of policy to sampler is off by {worst:.2g}: "
              "the log-prob pass and the sampler disagree about this model")
    if abs(kl) > limit:
        print(f"warning: before any update, the KL to the reference is {kl:.2g} a token, not 0: "
              "the policy did not start as the reference")
    if scores.max() == scores.min():
        print(f"warning: all {len(scores)} scores are {scores[0].item():g}, which may leave "
              "nothing to learn: is the task too hard, or --max_new_tokens too small?")
    if truncated > 0.5:
        print(f"warning: {truncated:.0%} of the completions were cut off before they ended; raise "
              "--max_new_tokens")


@torch.no_grad()
def evaluate(policy, tokenizer, problems, cfg, rewards=None, rewards_of=None):
    """How the policy fares on held-out problems -> {name: [value, low, high]}, 95 % intervals.

    Sampled at temperature 1, and greedy: the exact match (last_number) where all answers are
    numbers, and the rewards where they say something else. Without rewards, the completions in the
    data are measured: minus their log-prob in nats (SFT), or, where the best one of K comes first,
    whether rewards_of(problems) -> (B, K) is highest for it. Every evaluation uses the same random
    numbers and has its own generator, so it does not change the run.
    """
    results = {"n": len(problems)}
    if policy.can_generate():  # a reward model cannot
        exact_match, judges = {"last_number": last_number}, {}
        if all(as_number(problem["columns"].get("answer")) is not None for problem in problems):
            judges["exact"] = exact_match
        if rewards and rewards != exact_match:
            judges["score"] = rewards
        generator = step_generator(0, "evaluation")
        sampled = look(policy, tokenizer, problems, cfg, judges, 1.0, generator)
        greedy = look(policy, tokenizer, problems, cfg, judges, 0.0, generator)
        if "exact" in judges:
            results["sampled"] = wilson(sampled["exact"])
            results["greedy"] = wilson(greedy["exact"])
        if "score" in judges:
            results["score_sampled"] = interval(sampled["score"])
            results["score_greedy"] = interval(greedy["score"])
        if cfg.data in toy.KINDS:
            results["shows_work"] = wilson(["=" in text for text in sampled["texts"]])
        results["length"] = interval(sampled["lengths"])
    rows = [problem for problem in problems if "targets" in problem]
    if rows and rewards is None:
        results.update(offline(policy, rows, cfg, rewards_of))
    return results


def offline(policy, rows, cfg, rewards_of):
    """What evaluate() says of the completions in the data."""
    if rewards_of is None:
        batch = make_batch([row["ids"] for row in rows], [row["targets"][0] for row in rows],
                           policy.device)
        logprobs = all_logprobs(policy, batch, cfg.micro_batch_size, 1.0)
        return {"nats": interval((-logprobs.sum(1)).tolist())}
    found = [preference_stats(rewards[None]) for rewards in rewards_of(rows)]
    return {"n_rated": len(rows), "accuracy": wilson([row["accuracy"].item() for row in found]),
            "margin": interval([row["margin"].item() for row in found])}


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
    n, z2 = len(hits), 1.96**2
    share = sum(hits) / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    margin = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return [share, centre - margin, centre + margin]


def interval(values):
    """Mean of N numbers, and its bootstrapped 95 % interval: [mean, low, high].

    Of 1,000 means of N numbers that are drawn from these, with replacement, by a fixed seed.
    """
    values, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
    n = len(values)
    draws = [torch.randint(n, (n,), generator=generator) for _ in range(1000)]
    means = torch.stack([values[drawn].mean() for drawn in draws])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [values.mean().item(), low, high]


def report(before, after, folder):
    """The end of a run: the test problems before and after, also as test.json; and where all is."""
    names = dict(sampled="exact match, sampled", greedy="exact match, greedy",
                 score_sampled="score, sampled", score_greedy="score, greedy",
                 shows_work="shows its work", length="mean length (tokens)",
                 nats="nats per demonstration", margin="margin",
                 accuracy=f"in right order, n = {after.get('n_rated')}")
    print(f"\n{'test problems, n = ' + str(after['n']):24s}{'before':>8s} [95 % interval]      "
          f"{'after':>8s} [95 % interval]")
    for key, name in names.items():
        if key in after:
            cells = ["{:8.3f} [{:6.3f}, {:6.3f}]".format(*found[key]) for found in (before, after)]
            print(f"{name:24s}" + "     ".join(cells))
    results = dict(before=before, after=after, peak_memory=peak_memory())
    Path(folder, "test.json").write_text(json.dumps(results, indent=1))
    peak = results["peak_memory"]
    memory = f"Peak memory: {peak / 1e9:.2f} GB. " if peak else ""
    print(f"\n{memory}The trained model is in {folder / 'model'}, the log in "
          f"{folder / 'metrics.jsonl'}.")


def peak_memory():
    """The most bytes that tensors took on the GPU; without one, that this process took.

    0 on Windows, where Python's library cannot tell.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource  # here, because Windows has no such module
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in kilobytes
