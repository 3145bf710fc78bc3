"""
The embedded world: chain arithmetic, and a language model small enough to learn it on a laptop.

    prompt       8+9-5-8-2=
    completion   8+9=17,17-5=12,12-8=4,4-2=2<eos>     shows its work
             or  2<eos>                               answers directly

The answer is the last number. `words` asks a pretrained model the same in English.
"""
import json
import os
import random
import re
import zlib
from pathlib import Path

KINDS = "toy", "words"
POLICY = Path(__file__).with_name("toy_policy")  # made by `python sft.py`
PAIRS = Path(__file__).with_name("toy_pairs")    # made by tools/make_pairs.py, as is toy_rankings
RANKINGS = Path(__file__).with_name("toy_rankings")


def is_toy(name):
    """Whether --model is the toy's: no name, or a folder whose tokenizer has the same tokens."""
    folder = Path(os.path.expanduser(name or POLICY))
    folder = folder / "model" if (folder / "model").is_dir() else folder
    try:
        files = [json.loads((place / "tokenizer.json").read_bytes()) for place in (folder, POLICY)]
        theirs, ours = ((file["model"]["vocab"], len(file["added_tokens"])) for file in files)
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or another kind of tokenizer
        return False
    return theirs == ours


def problems(kind, split, n):
    """n problems, always the same ones -> rows {prompt, answer, completion (a demonstration)}.

    kind: toy (symbols) or words (a question in English), both of 2 to 5 operands.
    split: test, validation or train, by the checksum of the chain, so that they never overlap.
    """
    rng, rows, seen = random.Random(f"{kind} {split}"), [], set()
    while len(rows) < n:
        operands = [rng.randint(0, 9) for _ in range(rng.randint(2, 5))]
        chain = [str(operands[0])] + [rng.choice("+-") + str(x) for x in operands[1:]]
        totals = [operands[0]]
        for term in chain[1:]:
            totals.append(totals[-1] + int(term))
        text = "".join(chain)
        home = {0: "test", 1: "validation"}.get(zlib.crc32(f"{text}=".encode()) % 8, "train")
        if home != split or min(totals) < 0:
            continue
        if split != "train" and text in seen:  # repeats would make a held-out interval too narrow
            continue
        seen.add(text)
        rows.append(make_row(kind, chain, totals, rng.random() < 0.5))
    return rows


def make_row(kind, chain, totals, show_work):
    steps = [f"{a}{term}={b}" for a, term, b in zip(totals, chain[1:], totals[1:])]
    completion = ",".join(steps) if show_work else str(totals[-1])
    if kind == "toy":
        return dict(prompt="".join(chain) + "=", answer=str(totals[-1]), completion=completion)
    spaced = re.sub(r"([+=-])", r" \1 ", "".join(chain))
    question = f"Calculate {spaced}. Write one short line per operation, and the result last."
    completion = re.sub(r"([+=-])", r" \1 ", completion).replace(",", "\n")
    return dict(prompt=question, answer=str(totals[-1]), completion=completion)


def check_steps(prompt, completion):
    """Is each step of a toy answer, which ends with a comma, exactly the next line of the work?

    -> [(end, right), ...]: the 0-based index of the step's last character, and 1.0 or 0.0.
    """
    total, *terms = re.findall(r"[+-]?\d+", prompt)
    expected = []
    for term in terms:
        expected.append(f"{total}{term}={int(total) + int(term)}")
        total = str(int(total) + int(term))
    steps = list(re.finditer(r"([^,]+),?", completion))
    return [(step.end() - 1, float(i < len(expected) and step[1] == expected[i]))
            for i, step in enumerate(steps)]


def score_steps(problems, batch, texts, scores):
    """Process supervision of the toy -> rewards of each completion's steps, and where they end.

    Two lists of N lists; an end is the 0-based index of the step's last token. The last step's
    reward is the outcome, scores (N,), and it ends with the EOS: to stop is an action too. A step
    before it is not right if it is the last line of the work, or repeating the result would pay.
    """
    step_rewards, step_ends = [], []
    for i, text in enumerate(texts):
        prompt = problems[batch.owner[i]]["prompt"]
        text = re.sub("<[a-z]+>", "?", text)  # a special token: now a character is a token
        steps, lines = check_steps(prompt, text)[:-1], len(re.findall("[+-]", prompt))
        rewards = [right * (j < lines - 1) for j, (_, right) in enumerate(steps)]
        step_rewards.append(rewards + [scores[i].item()])
        step_ends.append([end for end, _ in steps] + [int(batch.mask[i].sum()) - 1])
    return step_rewards, step_ends
