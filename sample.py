"""Ask a model. It answers as in training: from softmax(logits / T), through its chat template.

    python sample.py "8+9-5=" "6-2+0-3="                        the toy's policy
    python sample.py --model runs/reinforce_pp --n 4 "8+9-5="   a trained model, four answers
    python sample.py --compare runs/reinforce_pp "8+9-5="       before and after, side by side"""
import itertools
import sys
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch

from plumbing.data import encode
from plumbing.flags import fail
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import sample, to_texts


def answer(policy, tokenizer, prompts, args):
    """-> for each prompt, a list of its n answers; with --reward, each with its score."""
    problems = [dict(row={}, prompt=prompt, completions=[]) for prompt in prompts]
    ids = [problem["ids"] for problem in encode(problems, tokenizer)]
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", 2**31)
    if max(map(len, ids)) + args.max_new_tokens > context:
        fail(f"--max_new_tokens: with the longest prompt, they are more than {context} tokens")
    batch = sample(policy, tokenizer, ids, args.n, args.max_new_tokens, args.temperature,
                   torch.Generator().manual_seed(args.seed))
    ends = ["" if done else " [cut off]" for done in batch.finished]
    if args.reward:
        scores = score(load_rewards(args, problems), problems, batch, tokenizer)[1].tolist()
        ends = [f"{end}   (scores {value:.3g})" for end, value in zip(ends, scores)]
    texts = [text + end for text, end in zip(to_texts(tokenizer, batch), ends)]
    return [texts[i : i + args.n] for i in range(0, len(texts), args.n)]


def show(*texts, width=100):
    """Print texts side by side, each in a column of its own."""
    column = width // len(texts) - 2
    columns = [[part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""]]
               for text in texts]
    for parts in itertools.zip_longest(*columns, fillvalue=""):
        print("  " + "  ".join(part.ljust(column) for part in parts).rstrip())


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="if there is none: lines of standard input")
    parser.add_argument("--model", help="folder, run or hub name; None: the toy's policy")
    parser.add_argument("--compare", help="another model, whose answers stand beside")
    parser.add_argument("--reward", help="one that needs no column of the data: shows the scores")
    parser.add_argument("--n", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest tokens")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling")
    args = parser.parse_args()
    if min(args.n, args.max_new_tokens) < 1 or args.temperature < 0:
        fail("--n and --max_new_tokens must be above 0, --temperature at least 0")
    names = [args.model, args.compare] if args.compare else [args.model]
    models = [load_policy(name, "cuda" if torch.cuda.is_available() else "cpu") for name in names]
    prompts = args.prompts or sys.stdin.read().splitlines() or fail("there is no prompt")
    show(*[str(name or "the toy's policy") for name in names])
    for prompt, *each in zip(prompts, *(answer(*model, prompts, args) for model in models)):
        print(prompt)
        for texts in zip(*each):
            show(*texts)


if __name__ == "__main__":
    main()
