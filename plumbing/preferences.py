"""
Preferences: which completion of a prompt is the better one. For reward_model.py, dpo.py, orpo.py.

A row of --data is a pair or a ranking, in TRL's formats; texts may also be messages:

    {"prompt": ..., "chosen": ..., "rejected": ...}
    {"chosen": ..., "rejected": ...}                        the prompt is what both begin with
    {"prompt": ..., "completions": [best, ..., worst]}      for dpo.py --loss plackett_luce

A pair is a ranking of two: inside, each problem has `completions`, best first, and `targets`, their
token ids. For toy and words, where nobody has stated a preference, the policy is sampled before any
training, and its answers are judged by whether they are right.
"""
import inspect
import json
import random
import re
import shutil
import uuid
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import toy
from plumbing.data import encode, load_problems, read_jsonl, settle
from plumbing.flags import fail
from plumbing.model import load_policy, load_tokenizer, locate
from plumbing.rewards import last_number
from plumbing.rollout import make_batch, sample, step_generator, to_texts
from plumbing.run import check_writable

SAMPLES = 8  # completions of each prompt that preferences are made of
RANKED = 4   # completions in a ranking


def load_preferences(cfg, kind="pairs"):
    """--data -> training, validation and test problems; kind: pairs or rankings.

    For toy and words, validation and test contain every held-out prompt, even those without a pair.
    """
    if cfg.data in toy.KINDS:
        train, validation, test = load_problems(cfg, kind, make_preferences(cfg, kind))
        tokenizer = load_tokenizer(cfg.model)[0]
        validation = with_every_prompt("validation", validation, cfg, tokenizer)
        test = with_every_prompt("test", test, cfg, tokenizer)
    else:
        train, validation, test = load_problems(cfg, kind)
    problems = train + validation + test
    sizes = {len(problem["targets"]) for problem in problems if "targets" in problem}
    if len(sizes) > 1:
        fail(f"--data {cfg.data}: rankings of {min(sizes)} and of {max(sizes)} completions; give "
             "all the same number")
    return train, validation, test


def with_every_prompt(split, compared, cfg, tokenizer):
    """All problems of a split of toy or words; where one is in `compared`, with its completions."""
    pairs = {problem["prompt"]: problem for problem in compared}
    rows = toy.problems(cfg.data, split, cfg.eval_prompts)
    problems = encode(settle({split: rows}, cfg.data)[split], tokenizer)
    for problem in problems:
        if problem["prompt"] in pairs:
            pair = pairs[problem["prompt"]]
            problem.update(completions=pair["completions"], targets=pair["targets"])
    return problems


# --------------------------------------------------------------------------------------------------
# Where nobody has stated a preference


def make_preferences(cfg, kind):
    """toy or words -> {split: rows}, from runs/preferences, made now if they are not there yet."""
    recipe = (checksum_of_model(cfg.model), cfg.data, cfg.prompts, cfg.eval_prompts,
              cfg.max_new_tokens, cfg.seed, inspect.getsource(toy), Path(__file__).read_text())
    folder = Path("runs", "preferences", f"{cfg.data}-{zlib.crc32(repr(recipe).encode()):08x}")
    name = cfg.model or "the toy's policy"

    def make(temporary):
        print(f"making preferences: {SAMPLES} answers of {name} to each prompt, once")
        policy, tokenizer = load_policy(cfg.model, cfg.device)
        found = list(sample_answers(policy, tokenizer, cfg))
        temporary.mkdir(parents=True)
        for made, rows in dict(pairs=to_pairs(found), rankings=to_rankings(found)).items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(temporary, f"{made}.jsonl").write_text(text)
        print(f"kept in {folder}")
    make_once(folder, make)
    rows = read_jsonl(folder / f"{kind}.jsonl")
    splits = {split: [row for row in rows if row["split"] == split]
              for split in ("train", "validation", "test")}
    if not splits["train"]:
        fail(f"--data {cfg.data}: no {kind} could be made of what {name} answers: all is right, "
             "all is wrong, or all the same; take more --prompts, or another --model")
    return {split: rows for split, rows in splits.items() if rows}


def checksum_of_model(name):
    """Of the files of a model's folder; a name on the hub stands for itself."""
    where = locate(name)
    checksum = zlib.crc32(b"" if Path(where).is_dir() else where.encode())
    for path in sorted(path for path in Path(where).rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            while chunk := file.read(2**24):
                checksum = zlib.crc32(chunk, checksum)
    return checksum


def make_once(folder, make):
    """Unless it is there, let make(a temporary folder) fill it, and rename that: all, or nothing.

    What another process has made meanwhile is used.
    """
    if not folder.exists():
        check_writable(folder, "cannot keep", "run this in a folder that can be written into")
        temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            make(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sample_answers(policy, tokenizer, cfg):
    """-> yields each problem with its answers and their grades; those cut short are left out."""
    generator = step_generator(cfg.seed, "preferences")
    held_out = cfg.eval_prompts // 2  # enough to see whether held-out pairs are told apart
    sizes = dict(train=cfg.prompts, validation=held_out, test=held_out)
    problems = [dict(row, split=split) for split, n in sizes.items()
                for row in toy.problems(cfg.data, split, n)]
    for i in tqdm(range(0, len(problems), 64), "64 prompts", leave=False):
        part = encode(problems[i : i + 64], tokenizer)
        batch = sample(policy, tokenizer, [row["ids"] for row in part], SAMPLES,
                       cfg.max_new_tokens, 1.0, generator)
        texts, finished = to_texts(tokenizer, batch), batch.finished.tolist()
        for j, row in enumerate(part):
            ours = range(j * SAMPLES, (j + 1) * SAMPLES)
            yield ({key: row[key] for key in ("split", "prompt", "answer")},
                   [(texts[k], grade(row, texts[k], cfg.data)) for k in ours if finished[k]])


def grade(row, text, data):
    """1 for the right answer; of the toy also up to a half for the work that is shown and right."""
    right = last_number([row["prompt"]], [text], [row["answer"]], [True])[0]
    if data != "toy":
        return right
    steps = toy.check_steps(row["prompt"], text)
    return right + sum(step for _, step in steps) / len(re.findall("[+-]", row["prompt"])) / 2


def to_pairs(found):
    """A right answer is better than a wrong one; no answer is in two pairs."""
    for row, answers in found:
        right = [text for text, mark in answers if mark >= 1]
        wrong = [text for text, mark in answers if mark < 1]
        for chosen, rejected in zip(right, wrong):
            yield dict(row, chosen=chosen, rejected=rejected)


def to_rankings(found):
    """Of RANKED different answers, the higher grade first; those of one grade by chance."""
    for row, answers in found:
        marks = dict(answers)
        texts = list(marks)[:RANKED]
        random.Random(row["prompt"]).shuffle(texts)  # the likelier ones were sampled sooner
        if len(texts) == RANKED and len({marks[text] for text in texts}) > 1:
            yield dict(row, completions=sorted(texts, key=marks.get, reverse=True))


# --------------------------------------------------------------------------------------------------
# What a network thinks of them


def for_all_completions(measure, rows, cfg):
    """measure(batch) -> (N,), applied to the K `targets` of each of B rows -> (B, K)."""
    found = []
    for i in tqdm(range(0, len(rows), 64), "64 prompts", leave=False):
        part = rows[i : i + 64]
        batch = make_batch([row["ids"] for row in part], sum((row["targets"] for row in part), []),
                           cfg.device)
        found.append(measure(batch).view(len(part), -1))
    return torch.cat(found)
