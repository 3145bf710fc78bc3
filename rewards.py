"""
Rewards: how the policy's answers are judged.

A reward is a function with TRL's signature, (prompts, completions, **columns) -> list of floats, in
which every argument is a list with one item per completion. Completions are text, without the EOS
that ended them, also where the data has messages (TRL passes messages there). The columns are those
of the data, and two more:
    finished         True where the completion ended by itself, False where it was cut off
    completion_ids   its tokens, EOS included
"""
import bisect
import functools
import importlib.util
import itertools
import re
import sys
import traceback
from decimal import Decimal
from pathlib import Path

import torch

import toy
from common import fail
from scorer import load_scorer

NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"  # a comma only as in 1,234,567
EQUATION = r"(?<!\d)(\d+) ?([+-]) ?(\d+) ?= ?(\d+)(?!\d)"  # as toy.py writes them


def as_number(value):
    """"1,234.50" or 1234.5 -> exactly that number; None for what is no number."""
    text = str(value).strip()
    if type(value) in (int, float) or re.fullmatch(NUMBER, text):
        return Decimal(text.replace(",", ""))


def last_number(prompts, completions, answer, finished, **columns):
    """1 if the last number of a finished completion equals the answer as a number, else 0."""
    def right(completion, answer):
        numbers = re.findall(NUMBER, completion)
        return bool(numbers) and as_number(numbers[-1]) == as_number(answer)

    return [float(done and right(text, target))
            for text, target, done in zip(completions, answer, finished)]


def true_equations(prompts, completions, **columns):
    """0.25 for each true equation. Flawed on purpose: it means to pay for work that is shown, and
    the policy learns to write as many as fit, 9-6=3,3+6=9,9-6=3,3+6=9,... Length hacking.
    """
    return [0.25 * sum(int(a) + int(sign + b) == int(c) for a, sign, b, c in
                       re.findall(EQUATION, text)) for text in completions]


REWARDS = {"last_number": last_number, "true_equations": true_equations}


def load_rewards(cfg, problems):
    """--reward, its parts with commas between -> {name: function}, each tried once."""
    rewards = {}
    for spec in cfg.reward.split(","):
        file, colon, name = spec.strip().rpartition(":")
        if not colon and name not in REWARDS and not (name and Path(name).is_dir()):
            fail(f"--reward {name}: there is no such reward; choose {', '.join(REWARDS)}, the "
                 "folder of a reward model, or one of your own, file.py:function")
        if name in rewards:
            fail(f"--reward {cfg.reward}: two are called {name}; rename one")
        rewards[name] = function = load_function(file, name) if colon else \
            REWARDS.get(name) or load_scorer(Path(name), cfg)
        if function is last_number:
            wrong = [row.get("answer") for row in problems if as_number(row.get("answer")) is None]
            if wrong:
                fail(f"--reward last_number: {len(wrong)} of {len(problems)} answers are no "
                     f"number, {str(wrong[0])[:100]!r} for one; mend the column answer of --data, "
                     "or write a reward of your own, file.py:function")
        # Most mistakes in a reward show here already, and not after the warm-up.
        judge(name, function, problems[:2], ["1", ""], [True, False], [[1], [1]])
    return rewards


def load_function(file, name):
    """The function `name` of the Python file."""
    if not Path(file).is_file() or Path(file).suffix != ".py":
        fail(f"--reward {file}:{name}: there is no Python file {file}; write file.py:function")
    path = str(Path(file).resolve())
    if path not in sys.modules:  # a file of several rewards runs once
        sys.path.append(str(Path(path).parent))  # what lies beside it can be imported, as always
        spec = importlib.util.spec_from_file_location(path, path)
        sys.modules[path] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[path])
        except (Exception, SystemExit) as error:
            fail(f"--reward {file}:{name}: {describe(error)}; mend the file")
    module = sys.modules[path]
    if not callable(getattr(module, name, None)):
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        fail(f"--reward {file}:{name}: there is no function {name} in {file}, but "
             f"{', '.join(found) or 'none at all'}")
    return getattr(module, name)


def describe(error):
    """What happened below our call, and where."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) or not frames:  # names its line itself; or did not get there
        return text
    return f"{text} (line {frames[-1].lineno} of {Path(frames[-1].filename).name})"


def judge(name, reward, rows, texts, finished, completion_ids, when=""):
    """One reward's scores of texts[i] as an answer to rows[i] -> list of N floats."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys
               if key not in ("prompt", "ids", "prompts", "completions")}  # two are arguments
    columns.update(finished=list(finished), completion_ids=[list(ids) for ids in completion_ids])
    try:  # on copies: it may change what it is given
        values = reward([row["prompt"] for row in rows], list(texts), **columns)
    except (Exception, SystemExit) as error:
        fail(f"--reward {name}{when} raised {describe(error)}; it is called with prompts, "
             f"completions and, as **columns, {', '.join(columns)}")
    try:
        values = [value.item() if hasattr(value, "item") else value for value in values]
    except Exception:  # None, a float, a table, ...
        fail(f"--reward {name}{when} returned {str(values)[:100]}; return a list of numbers")
    if len(values) != len(texts):
        fail(f"--reward {name}{when} returned {len(values)} scores for {len(texts)} completions; "
             "return a list with one number for each")
    for value, text, row in zip(values, texts, rows):
        if not isinstance(value, (int, float)) or not -3e38 < value < 3e38:  # fp32; nan
            fail(f"--reward {name}{when} gave {str(value)[:100]} to the completion {text[:300]!r} "
                 f"of the prompt {str(row['prompt'])[:300]!r}; return a finite number")
    return [float(value) for value in values]


def decode(tokenizer, batch):
    """The N completions as text, without padding and without the EOS that ended them."""
    lengths = (batch.mask.sum(1).long() - batch.finished.long()).tolist()
    rows = [ids[:length] for ids, length in zip(batch.completions.tolist(), lengths)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def score(rewards, problems, batch, tokenizer, step=None):
    """Judge a batch of completions, completion i as an answer to problems[i // K].

    -> texts (N strings), scores (N,) summed over the rewards, and of several each one's mean.
    """
    texts, rows = decode(tokenizer, batch), [problems[i] for i in batch.owner.tolist()]
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch.completions, batch.mask)]
    when = " in an evaluation" if step is None else f" in step {step + 1}"
    each = {name: torch.tensor(judge(name, reward, rows, texts, batch.finished.tolist(), ids, when))
            for name, reward in rewards.items()}
    means = {f"reward_{name}": scores.mean() for name, scores in each.items()}
    return texts, sum(each.values()).to(batch.mask.device), means if len(each) > 1 else {}


def score_steps(problems, batch, texts, scores, tokenizer):
    """Process supervision of the toy -> rewards of each completion's steps, and where they end.

    Two lists of N lists; an end is the 0-based index of the step's last token. The last step's
    reward is the outcome, scores (N,), and it ends with the completion, EOS included: to stop is an
    action too. A step before it can be right only if it is not the last line of the work, or it
    would pay to say the result once more.
    """
    length = functools.cache(lambda i: len(tokenizer.decode([i], skip_special_tokens=True)))
    step_rewards, step_ends = [], []
    for i, text in enumerate(texts):
        size = int(batch.mask[i].sum())
        ids = batch.completions[i, : size - int(batch.finished[i])].tolist()
        reach = list(itertools.accumulate(map(length, ids)))  # characters up to and with token t
        if reach and reach[-1] != len(text):  # tokens that decode otherwise alone: bytes, spaces
            reach = [len(tokenizer.decode(ids[: t + 1], skip_special_tokens=True))
                     for t in range(len(ids))]
        prompt = problems[batch.owner[i]]["prompt"]
        steps, lines = toy.check_steps(prompt, text)[:-1], len(re.findall("[+-]", prompt))
        step_rewards.append([right * (j < lines - 1) for j, (_, right) in enumerate(steps)])
        step_ends.append([bisect.bisect_right(reach, end) for end, _ in steps] + [size - 1])
        step_rewards[i].append(scores[i].item())
    return step_rewards, step_ends
