"""
Rewards: how the policy's answers are judged. A reward is called by keyword, as in TRL:

    reward(prompts=..., completions=..., finished=..., completion_ids=..., **columns)

Every argument is a list with one item per completion, and it returns a list of floats. Completions
are text, finished is False where one was cut off, and columns are the other columns of the data.
"""
import contextlib
import copy
import importlib.util
import math
import os
import re
import runpy
import sys
import traceback
from decimal import Decimal
from pathlib import Path

import torch

from plumbing.flags import fail, split_rewards
from plumbing.parallel import from_first, rank
from plumbing.rollout import to_texts

NUMBER = re.compile(r"(?:\\boxed{|[\\$€£*_`'\"([{,~≈])*"  # marks, the number, marks
                    r"([-+−]?\\?[$€£]?(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+))"
                    r"[\\$€£*_`'\")\]},.;:!?%°]*")
OTHERS = set("minus negative plus times over x hundred thousand million billion trillion dozen "
             "pi π \\pi ¼ ½ ¾".split())  # beside one of these, it is another number


def read_number(text):
    """"-1,234.50", "$5.", "**\\boxed{42}**" -> that number; None for a text that is no number."""
    found = NUMBER.fullmatch(str(text).rpartition("####")[2].strip())
    return found and Decimal(re.sub(r"[^\d.-]", "", found[1].replace("−", "-")))


def last_number(completions, answer, finished, **columns):
    """1 if the last number of a finished completion equals the answer as a number, else 0.

    The last word with a digit is read, whole, if it follows =, a new line or a word of letters:
    nothing is paid for a part of 3-4, 10^3, 9 500, 3 - 4 or 5 million.
    """
    def right(text, answer):
        text = re.sub(r"</?\w+>", "\n", text)  # <think>, <answer>
        words = ["=", *re.findall(r"[=\n]|[^\s=#]+", text), "\n"]
        plain = [re.sub(r"[^\w\\]", "", word).lower() for word in words]
        at = max((i for i, word in enumerate(words) if re.search(r"\d", word)), default=0)
        alone = words[at - 1] in "=\n" or plain[at - 1].isalpha()
        alone = alone and not OTHERS & {plain[at - 1], plain[at + 1]}
        number = read_number(words[at]) if alone else None
        if number is not None and isinstance(answer, float) and answer % 1:  # 0.1 in 32 bits, 1/3
            return math.isclose(number, answer, rel_tol=1e-7)
        return number is not None and number == read_number(answer)

    return [float(done and right(text, target))
            for text, target, done in zip(completions, answer, finished)]


def load_rewards(cfg, problems):
    """--reward, its parts with commas between -> {name: function}, each tried once."""
    rewards = {}
    for part in split_rewards(cfg.reward):
        file, _, name = part.rpartition(":")
        if part == "last_number":
            answers = [problem["row"].get("answer") for problem in problems]
            wrong = [str(answer)[:100] for answer in answers if read_number(answer) is None]
            if wrong:
                fail(f"--reward last_number: {len(wrong)} of {len(problems)} answers are no number "
                     f"({wrong[0]!r}); mend the column answer, or write a reward of your own")
            function = last_number
        elif rank():  # process 0 alone has what it asks
            name, function = part, None
        elif Path(part, "reward.py").is_file():  # reward_model.py has written it
            name, function = Path(part).name, runpy.run_path(f"{part}/reward.py").get("score")
        elif Path(file).is_file():
            function = load_function(Path(file), name)
        else:
            fail(f"--reward {part}: choose last_number, the folder of a finished run of "
                 "reward_model.py, or a function of your own, file.py:function")
        if name in rewards:
            fail(f"--reward {cfg.reward}: two are called {name}; rename one")
        rewards[name] = function
        from_first(judge, name, function, problems[:2], ["1", ""], [True, False], [[1], [1]])
    return rewards


def load_function(path, name):
    """The function `name` of a Python file, read anew, as a module that a pool can import."""
    sys.path.append(str(path.parent))
    try:
        known = importlib.util.find_spec(path.stem)
        if not (known and known.origin and path.samefile(known.origin)):
            raise ImportError(f"another module is called {path.stem}; rename the file")
        sys.modules[path.stem] = module = importlib.util.module_from_spec(known)
        with contained():
            exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
        return getattr(module, name)
    except (Exception, SystemExit) as error:
        fail(f"--reward {path}:{name}: {error!r}")


@contextlib.contextmanager
def contained():
    """What a reward does to the current folder, the dtype or gradients is undone after it."""
    folder, dtype = os.getcwd(), torch.get_default_dtype()
    try:
        with torch.no_grad():
            yield
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)


def judge(name, reward, problems, texts, finished, completion_ids):
    """One reward's scores of texts[i] as an answer to problems[i] -> list of N floats."""
    # Everything is a copy, and each completion's its own: a reward may change what it is given.
    rows = [copy.deepcopy(problem["row"] | dict(prompt=problem["prompt"])) for problem in problems]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns.update(prompts=columns.pop("prompt"), completions=list(texts),
                   finished=list(finished), completion_ids=[list(ids) for ids in completion_ids])
    try:
        with contained():
            values = reward(**columns)
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fail(f"--reward {name} raised {error!r} in line {last.lineno} of {last.filename}; it is "
             f"called by keyword, with {', '.join(columns)}")
    try:
        scores = [float(value) for value in values]
    except Exception:  # None, or a list with None in it; a coroutine; ...
        scores = []
    if len(scores) != len(texts) or not all(-3e38 < score < 3e38 for score in scores):
        fail(f"--reward {name} returned {str(values)[:200]} for {len(texts)} completions, "
             f"{texts[0][:100]!r} for one; return a list with one finite number for each")
    return scores


def score(rewards, problems, batch, tokenizer):
    """Score a batch of completions, completion i as an answer to problems[i // K].

    -> texts (N strings), scores (N,), which are the sum of the rewards, and for the log a dict with
    the mean of each reward, empty if there is only one.
    """
    texts, owners = to_texts(tokenizer, batch), [problems[i] for i in batch.owner.tolist()]
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch.completions, batch.mask)]
    each = {name: torch.tensor(from_first(judge, name, reward, owners, texts,
                                          batch.finished.tolist(), ids),
                               dtype=torch.float64)  # or .1 + .6 + .1 + .2 would be above 1
            for name, reward in rewards.items()}
    means = {f"reward_{name}": scores.mean() for name, scores in each.items() if len(each) > 1}
    return texts, sum(each.values()).float().to(batch.mask.device), means
