"""
Who gets the credit? The same four completions of one prompt, token by token, in the colours of what
each script does with them: docs/credit.svg.

    python -m tools.credit                    two minutes
    python -m tools.credit --out credit.svg

A colour is -d loss / d log-prob of the token, for one update on a batch of 64 prompts with four
completions each, composed of the scripts' own functions (tools/gradients.py). Blue: the token is
made more likely; red: less likely. All come from the toy's policy but the four, which are given.
The policy is as at the start, so the KL is 0. PPO's critic and PRIME's reward model have learned
for 60 steps, in which the policy stayed as it was.
"""
import argparse
import copy
import functools
import tempfile
from html import escape
from pathlib import Path

import torch

import ppo
import prime
from common import masked_mean, normalize_rewards
from dpo import dpo_loss
from grpo import process_advantages
from orpo import odds_ratio_loss
from plumbing import toy
from plumbing.data import draw_problems, encode, load_problems
from plumbing.model import load_policy
from plumbing.offline import make_batch
from plumbing.rewards import last_number, score
from plumbing.rollout import all_logprobs, sample, step_generator
from prime import implicit_rewards, prime_advantages
from raft import best_of_k
from tools import gradients
from tools.gradients import by_completion, by_token, clip_loss

K, PROMPT, COMPLETIONS = 4, "8+9-5=", ["8+9=17,17-5=12", "8+9=16,16-5=11", "12", "13"]
WHITE, BLUE, RED = (255, 255, 255), (33, 102, 172), (200, 60, 30)  # apart for the colour-blind too


def learn(script, steps):
    """What a second network has learned while the policy stayed as it was -> its weights."""
    name = "critic" if script is ppo else "prm"
    with tempfile.TemporaryDirectory() as folder:
        script.train(script.Config(**script.TOY | dict(lr=0.0, steps=steps, eval_prompts=1,
                                                       out_dir=f"{folder}/run")))
        state = torch.load(f"{folder}/run/checkpoint.pt", map_location="cpu", weights_only=True)
    return state[name]


def make_toy_batch(steps):
    """-> a Batch of tools/gradients.py, q (N, C), the advantages of --process (N, C)."""
    cfg = ppo.Config(**ppo.TOY, data="toy")
    policy, tokenizer = load_policy(None, "cpu")
    others = draw_problems(load_problems(cfg, policy, tokenizer).train, 0, 63, cfg.seed)
    ours = encode([dict(row=dict(answer="12"), prompt=PROMPT, completions=COMPLETIONS)], tokenizer)
    problems = ours + others
    sampled = sample(policy, tokenizer, [problem["ids"] for problem in problems], K,
                     cfg.max_new_tokens, 1.0, step_generator(cfg.seed, 0))
    ids = [row[:n].tolist() for row, n in zip(sampled.completions, sampled.mask.sum(1).int())]
    ids[:K] = ours[0]["targets"]
    batch = make_batch(sampled.prompts, ids, "cpu")
    batch.finished = sampled.finished | (torch.arange(len(ids)) < K)
    batch.logprobs = all_logprobs(policy, batch, 64, 1.0)
    greedy = sample(policy, tokenizer, sampled.prompts, 1, cfg.max_new_tokens, 0.0,
                    step_generator(cfg.seed, 0))
    texts, scores, _ = score(dict(right=last_number), problems, batch, tokenizer)
    greedy_scores = score(dict(right=last_number), problems, greedy, tokenizer)[1]

    critic, prm = ppo.make_critic(policy), copy.deepcopy(policy)
    critic.load_state_dict(learn(ppo, steps))
    prm.load_state_dict(learn(prime, steps))
    is_best = torch.zeros_like(scores)
    is_best[best_of_k(scores, K)] = 1.0
    is_best *= (scores.view(-1, K).std(dim=1) > 0).repeat_interleave(K)  # the others are left out
    b = gradients.Batch(
        batch.logprobs, batch.logprobs, batch.mask, 0 * batch.mask, scores,
        greedy_scores.repeat_interleave(K), scores.mean(), ppo.all_values(critic, batch, 64),
        normalize_rewards(scores, 5.0), is_best)
    q = implicit_rewards(all_logprobs(prm, batch, 64, 1.0), batch.logprobs, 0.05)
    steps = toy.score_steps(problems, batch, texts, scores)
    return b, q, process_advantages(*steps, batch.mask, K)


def pairs_loss(loss_of):
    """Of the four, completion 0 is compared with 1, and 2 with 3."""
    return lambda logprobs, b, K: loss_of(logprobs[:K], b.old_logprobs[:K], b.mask[:K])


def dpo(logprobs, ref_logprobs, mask):
    logps, ref_logps = (x.sum(dim=1).view(-1, 2).T for x in (logprobs, ref_logprobs))
    return dpo_loss(*logps, *ref_logps, beta=0.5)[0].mean()


def orpo(logprobs, ref_logprobs, mask):
    means = (logprobs.sum(dim=1) / mask.sum(dim=1)).view(-1, 2).T
    return 0.1 * odds_ratio_loss(*means).mean() - masked_mean(logprobs[::2], mask[::2])


def all_pushes(b, q, process):
    """-> {name: -d loss / d log-prob of the four completions (4, C)}."""
    def prime_loss(logprobs, b, K):
        return clip_loss(logprobs, b, prime_advantages(q, b.scores, b.mask, K))

    def sft(logprobs, b, K):
        return -(logprobs * by_token(b)).sum()
    losses = {
        "SFT on all four": sft, "REINFORCE": gradients.reinforce,
        "REINFORCE++": gradients.reinforce_pp,
        "REINFORCE++ --group_baseline": gradients.group_baseline,
        "PPO, lambda 1": functools.partial(gradients.ppo, lam=1.0),
        "PPO, lambda 0.95": gradients.ppo,
        "PPO, lambda 0": functools.partial(gradients.ppo, lam=0.0),
        "RLOO": gradients.rloo, "GRPO": gradients.grpo,
        "GRPO --process": gradients.grpo_parts(lambda scores, K: process, by_completion, 0.0),
        "ReMax": gradients.remax, "PRIME": prime_loss,
        "RAFT": gradients.raft, "DPO, two pairs": pairs_loss(dpo),
        "ORPO, two pairs": pairs_loss(orpo)}
    pushes = {}
    for name, loss in losses.items():
        logprobs = b.old_logprobs.clone().requires_grad_()
        pushes[name] = -torch.autograd.grad(loss(logprobs, b, K), logprobs)[0][:K]
    return pushes


def colour(value):
    """-1 red, 0 white, 1 blue."""
    end, part = (BLUE, value) if value > 0 else (RED, -value)
    return "#" + "".join(f"{round(w + (e - w) * part**0.7):02x}" for w, e in zip(WHITE, end))


def draw(pushes):
    """-> the picture, as the text of an SVG file. Each row has its own largest value."""
    cell, height, left, gap, top = 17, 20, 236, 18, 44
    texts = [[*text, "⏎"] for text in COMPLETIONS]
    starts = [left + sum(len(text) * cell + gap for text in texts[:i]) for i in range(K)]
    width, full = starts[-1] + len(texts[-1]) * cell + 12, top + len(pushes) * height + 12
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {full}" '
             f'width="{width}" font-family="sans-serif" font-size="13">',
             f'<rect width="{width}" height="{full}" rx="6" fill="#fff"/>']

    def write(x, y, text, **style):
        style = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        parts.append(f'<text x="{x}" y="{y}" fill="#222"{style}>{escape(text)}</text>')
    write(12, 17, f"asked {PROMPT}")
    for start, text, right in zip(starts, texts, (True, False) * 2):
        write(start, 17, "right" if right else "wrong", font_weight="bold")
        for j, symbol in enumerate(text):
            write(start + (j + 0.5) * cell, 36, symbol, text_anchor="middle",
                  font_family="monospace", font_size=14)
    for i, (name, rows) in enumerate(pushes.items()):
        y, largest = top + i * height, rows.abs().max().item()
        write(12, y + 14, name)
        for start, text, row in zip(starts, texts, rows.tolist()):
            for j, value in enumerate(row[: len(text)]):
                parts.append(f'<rect x="{start + j * cell}" y="{y}" width="{cell}" '
                             f'height="{height}" fill="{colour(value / largest)}" stroke="#ddd"/>')
    return "\n".join([*parts, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the critic and of PRIME's model")
    parser.add_argument("--out", default="docs/credit.svg", help="picture to write")
    args = parser.parse_args()
    pushes = all_pushes(*make_toy_batch(args.steps))
    Path(args.out).write_text(draw(pushes))
    for name, rows in pushes.items():
        print(f"{name:30s}" + "  ".join(" ".join(f"{100 * value / rows.abs().max().item():4.0f}"
              for value in row[: len(text) + 1]) for row, text in zip(rows.tolist(), COMPLETIONS)))


if __name__ == "__main__":
    main()
