"""
Prompts, rewards and evaluation: what the policy is asked, and how its answers are judged.

A problem is a dict with `prompt` and `answer` (text), whatever other columns a reward wants, and
`ids`, the prompt's tokens as the model sees them.
"""
import random
import re

import torch

from common import fail, masked_mean, require_finite
from rollout import sample, token_logprobs


def encode(problems, tokenizer):
    """Add `ids` to each problem: through the chat template if there is one; with one BOS or none.

    A rendered template mostly contains the BOS already, and tokenizers like to add a second.
    """
    bos = tokenizer.bos_token_id
    wants_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    for problem in problems:
        text = problem["prompt"]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        problem["ids"] = [bos] + ids if wants_bos and ids[:1] != [bos] else ids
    return problems


def draw_problems(problems, step, n, seed):
    """The n problems of a step: one reshuffled pass after another, a function of seed and step alone."""
    chosen = []
    for i in range(step * n, (step + 1) * n):
        order, place = divmod(i, len(problems))
        if place == 0 or not chosen:
            shuffled = random.Random(f"{seed} {order}").sample(range(len(problems)), len(problems))
        chosen.append(problems[shuffled[place]])
    return chosen


# --------------------------------------------------------------------------------------------------
# Rewards: (prompts, completions, **columns) -> list of float, TRL's signature. Besides the data's own
# columns, `finished` says of each completion whether it ended by itself. Completions are plain text.


def last_number(prompts, completions, answer, finished, **columns):
    """1 if the last number of a finished completion equals the answer as a number, else 0."""
    def right(completion, answer):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
        return bool(numbers) and float(numbers[-1]) == float(answer)

    return [float(done and right(text, target))
            for text, target, done in zip(completions, answer, finished)]


REWARDS = {"last_number": last_number}


def load_reward(name):
    if name not in REWARDS:
        fail(f"--reward {name}: there is no such reward; choose from {', '.join(REWARDS)}")
    return REWARDS[name]


def decode(tokenizer, batch):
    """The N completions as text, without EOS and padding."""
    rows = [ids[mask].tolist() for ids, mask in zip(batch.completions, batch.mask.bool())]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def score(reward, problems, texts, batch, step=0):
    """The reward of each completion; problem i // K goes with completion i -> (N,) fp32."""
    rows = [problems[i] for i in batch.owner.tolist()]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "ids")}
    scores = reward([row["prompt"] for row in rows], texts, finished=batch.finished.tolist(), **columns)
    scores = torch.tensor(scores, dtype=torch.float32)
    require_finite(scores, "the score", step, texts)
    return scores.to(batch.mask.device)


# --------------------------------------------------------------------------------------------------
# Looking at a policy


def batch_stats(scores, kl, batch, group_size):
    """What the log says of a rollout batch: scores (N,), kl (N, C) -> dict of scalars."""
    # Groups whose scores are all equal teach nothing. Without groups, the batch is the group.
    groups = scores.view(-1, group_size if group_size > 1 else len(scores))
    return dict(
        score=scores.mean(), score_std=scores.std(), kl=torch.where(batch.mask.bool(), kl, 0).sum(1).mean(),
        entropy=-masked_mean(batch.logprobs, batch.mask),  # E[-log pi(y_t)], nats per token
        length=batch.mask.sum(1).mean(), truncated=1 - batch.finished.float().mean(),
        frac_zero_std=(groups.amax(1) == groups.amin(1)).float().mean())


def check_first_step(policy, batch, scores, kl, temperature, micro_batch_size):
    """What must hold before the first update, or the run is not what it seems. Warns, goes on."""
    rows = torch.arange(min(micro_batch_size, len(batch.mask)), device=batch.mask.device)
    with torch.no_grad():
        gap = token_logprobs(policy, batch, rows, temperature) - batch.logprobs[rows]
    gap = gap.exp().sub(1).abs()
    bf16 = batch.mask.is_cuda  # there only the mean is meaningful: single tokens differ by 5 %
    if not (masked_mean(gap, batch.mask[rows]) < 0.05 if bf16 else gap.max() < 1e-4):
        print(f"warning: ratio of policy to sampler is off by up to {gap.max():.1g} before any update; "
              "the sampler and the log-prob pass should agree")
    if not masked_mean(kl, batch.mask).abs() < (1e-2 if bf16 else 1e-4):
        print(f"warning: KL to the reference is {masked_mean(kl, batch.mask):.2g} a token before any "
              "update; it should be 0")
    if scores.max() == scores.min():
        print(f"warning: all {len(scores)} scores are {scores[0].item():g}: nothing can be learned from "
              "them; is the task too hard, or the reward blind?")
    if batch.finished.float().mean() < 0.5:
        print(f"warning: {1 - batch.finished.float().mean():.0%} of the completions were cut off before "
              "their EOS, and score nothing; raise --max_new_tokens")


def evaluate(policy, tokenizer, problems, max_new_tokens, batch_size):
    """Held-out exact match (last_number), sampled at T = 1 and greedy -> {name: (value, low, high)}.

    The interval is the 95 % one: Wilson's for shares, normal for the mean length. Draws from a
    generator of its own, so that evaluating leaves the training run as it was.
    """
    generator = torch.Generator(policy.device).manual_seed(0)
    results = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        right, works, lengths = [], [], []
        for i in range(0, len(problems), batch_size):
            part = problems[i : i + batch_size]
            batch = sample(policy, tokenizer, [p["ids"] for p in part], 1, max_new_tokens, temperature,
                           generator)
            texts = decode(tokenizer, batch)
            right += score(last_number, part, texts, batch).tolist()
            works += [float("=" in text) for text in texts]
            lengths += batch.mask.sum(1).tolist()
        results[f"{name} exact match"] = wilson(right)
        if name == "sampled":
            mean, std = torch.tensor(lengths).mean().item(), torch.tensor(lengths).std().item()
            margin = 1.96 * std / len(lengths) ** 0.5
            results["shows its work"] = wilson(works)
            results["mean length"] = (mean, mean - margin, mean + margin)
    return results


def wilson(hits):
    """Share of ones in a list of 0 and 1, and its 95 % interval (Wilson 1927) -> (share, low, high)."""
    n, z = len(hits), 1.96
    p = sum(hits) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, centre - margin, centre + margin


def report(before, after, n):
    """Print the held-out results side by side."""
    print(f"\nheld-out problems, n = {n}    before [95 % interval]      after [95 % interval]")
    for name in after:
        cells = [f"{value:6.3f} [{low:6.3f}, {high:6.3f}]" for value, low, high in (before[name], after[name])]
        print(f"{name:24s}  " + "    ".join(cells))
