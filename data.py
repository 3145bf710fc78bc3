"""
Prompts, rewards and evaluation: what the policy is asked, and how its answers are judged.

A problem is a dict with `prompt` and `answer` (text), whatever other columns a reward wants, and
`ids`, the prompt's tokens as the model sees them.
"""
import random
import re

import torch

from common import fail, masked_mean, require_finite, use_bf16
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
            text = tokenizer.apply_chat_template(messages, tokenize=False,
                                                 add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        problem["ids"] = [bos] + ids if wants_bos and ids[:1] != [bos] else ids
    return problems


def encode_completions(problems, tokenizer):
    """The demonstrations of SFT as token ids, each with its EOS: to stop is a decision as well."""
    texts = [problem["completion"] for problem in problems]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return [row + [tokenizer.eos_token_id] for row in ids]


def draw_problems(problems, step, n, seed):
    """The n problems of a step: pass after reshuffled pass, a function of seed and step alone."""
    chosen = []
    for i in range(step * n, (step + 1) * n):
        order, place = divmod(i, len(problems))
        if place == 0 or not chosen:
            shuffled = random.Random(f"{seed} {order}").sample(range(len(problems)), len(problems))
        chosen.append(problems[shuffled[place]])
    return chosen


# --------------------------------------------------------------------------------------------------
# Rewards have TRL's signature: (prompts, completions, **columns) -> list of float. Completions are
# plain text; beside the data's own columns, `finished` says whether each of them ended by itself.


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
    """The N completions as text, without padding and without the EOS that ended them."""
    lengths = (batch.mask.sum(1).long() - batch.finished.long()).tolist()
    rows = [ids[:length] for ids, length in zip(batch.completions.tolist(), lengths)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def score(reward, problems, batch, tokenizer, step=0):
    """Judge a batch; completion i answers problems[i // K] -> texts (a list of N), scores (N,)."""
    texts = decode(tokenizer, batch)
    rows = [problems[i] for i in batch.owner.tolist()]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "ids")}
    columns["finished"] = batch.finished.tolist()
    scores = torch.tensor(reward([row["prompt"] for row in rows], texts, **columns)).float()
    require_finite(scores.sum(), "score", step, texts, range(len(texts)), scores)
    return texts, scores.to(batch.mask.device)


# --------------------------------------------------------------------------------------------------
# Looking at a policy


def batch_stats(scores, kl, batch, group_size):
    """What the log says of a rollout batch: scores (N,), kl (N, C) -> dict of scalars."""
    # Groups whose scores are all equal teach nothing. Without groups, the batch is the group.
    groups = scores.view(-1, group_size if group_size > 1 else len(scores))
    return dict(
        score=scores.mean(), score_std=scores.std(correction=0),
        kl=torch.where(batch.mask.bool(), kl, 0).sum(1).mean(),  # nats per completion
        entropy=-masked_mean(batch.logprobs, batch.mask),        # E[-log pi(y_t)], nats per token
        length=batch.mask.sum(1).mean(), truncated=1 - batch.finished.float().mean(),
        frac_zero_std=(groups.amax(1) == groups.amin(1)).float().mean())


def check_first_step(step, policy, batch, scores, kl, cfg):
    """What must hold before the first update, else the run is not what it seems. Warns, goes on."""
    if step > 0:
        return
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
        print(f"warning: all {len(scores)} scores are {scores[0].item():g}, and equal scores teach "
              "nothing: is the task too hard, or --max_new_tokens too small?")
    if truncated > 0.5:
        print(f"warning: {truncated:.0%} of the completions were cut off before they ended; raise "
              "--max_new_tokens")


@torch.no_grad()
def evaluate(policy, tokenizer, problems, cfg):
    """Held-out exact match (last_number), at T = 1 and greedy -> {name: [value, low, high]}.

    low and high bound the 95 % interval. The draws come from a generator of their own, so that
    evaluating leaves the training run as it was.
    """
    generator = torch.Generator(policy.device).manual_seed(0)
    results = {"n": len(problems)}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        right, works, lengths = [], [], []
        for i in range(0, len(problems), cfg.minibatch_size):
            part = problems[i : i + cfg.minibatch_size]
            batch = sample(policy, tokenizer, [problem["ids"] for problem in part], 1,
                           cfg.max_new_tokens, temperature, generator)
            texts, scores = score(last_number, part, batch, tokenizer)
            right += scores.tolist()
            works += [float("=" in text) for text in texts]
            lengths += batch.mask.sum(1).tolist()
        results[name] = wilson(right)
        if name == "sampled":
            results["shows_work"] = wilson(works)
            margin = 1.96 * torch.tensor(lengths).std(unbiased=False).item() / len(lengths) ** 0.5
            mean = sum(lengths) / len(lengths)
            results["length"] = [mean, mean - margin, mean + margin]
    return results


def wilson(hits):
    """Share of ones in a list of zeros and ones, and Wilson's 95 % interval: [share, low, high]."""
    n, z2 = len(hits), 1.96**2
    share = sum(hits) / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    margin = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return [share, centre - margin, centre + margin]


def validate(run, step, policy, tokenizer, problems, cfg):
    """Every --eval_every steps: evaluate on validation problems, never on those of the test."""
    if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
        results = evaluate(policy, tokenizer, problems, cfg)
        run.write("validation.jsonl", step, **results)
        run.bar.write(f"step {step + 1}: validation, n = {results.pop('n')}: "
                      + ", ".join(f"{name} {value[0]:.3f}" for name, value in results.items()))


def report(before, after, folder):
    """The end of a run: the test problems before and after, and where everything is."""
    names = dict(sampled="exact match, sampled", greedy="exact match, greedy",
                 shows_work="shows its work", length="mean length (tokens)")
    print(f"\n{'test problems, n = ' + str(after['n']):24s}{'before':>8s} [95 % interval]      "
          f"{'after':>8s} [95 % interval]")
    for key, name in names.items():
        print(f"{name:24s}" + "     ".join("{:8.3f} [{:6.3f}, {:6.3f}]".format(*results[key])
                                           for results in (before, after)))
    print(f"\nThe trained model is in {folder / 'model'}, the log in {folder / 'metrics.jsonl'}.")
