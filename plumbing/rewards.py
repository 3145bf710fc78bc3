"""
Rewards: how the policy's answers are judged.

A reward is a function that is called as TRL calls it, by keyword, and returns a list of floats:

    reward(prompts=..., completions=..., **columns)

Every argument is a list with one item per completion. Completions are text, without the EOS that
ended them, also where the data has messages (TRL passes messages there). The columns are those of
the data, None where a row has none, and two more:
    finished         True where the completion ended by itself, False where it was cut off
    completion_ids   its tokens, EOS included
"""
import copy
import os
import re
from fractions import Fraction
from pathlib import Path

import torch

from plumbing.flags import Failure, fail
from plumbing.rollout import to_texts

NUMBER = (r"[-+]?\d+/0*[1-9]\d*|"  # 1/2, or 1,234.5 with a comma only as in 1,234,567, or 1.5e3
          r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2})?")
UNIT = r"(?:[A-Za-z]{2,}|°?[mgshlLVWNJCF])(?:/[A-Za-z]+)?(?:\^?[23²³])?"
SCALE = (r"[\s*_]*(?:(?:(?i:hundred|thousand|[mb]illion|trillion|dozen|lakh|crore)(?:th)?s?|[bm]n|"
         r"k|K|M|B|\\?pi)(?![A-Za-z])|[π√百千万亿萬億]|\\sqrt)")
WORD = (r"(?:\{,\}|\\.|[A-Za-z\d/^*×÷±√π+\-_{}%°'’²³¹⁰-ⁿ¼-¾⅐-⅟]|"
        r"(?<=\d)[,:](?=\d)|(?<![A-Za-z])\.(?=\d)|(?<=[A-Za-z\d])\()+")
COMMA = r"(?:\{,\}|\\[,;:! ]|[ ~'’\u00a0\u2009\u202f])"
ASCII = str.maketrans("−－–‐‑‒＋，．٫٬⁄∕", "------+,..,//")
NOTATIONS = [  # what models write -> what NUMBER, UNIT and WORD know
    (rf"(?<![\d.,])\d{{1,3}}(?:{COMMA}\d{{3}})+(?!\d)",           # 9{,}500, 9 500 -> 9,500
     lambda found: re.sub(COMMA, ",", found[0])),
    (r"\^ *\{([^{}]*)\}", r"^\1"),                                # 10^{3} -> 10^3
    (r"[\u00a0\u2009\u202f]", " "),
    (r"(√|\\sqrt) +", r"\1"),
    (r"\\[()\[\]]|\\q?quad|\\[,;:! ](?!\d)", " "),                # \(5\) -> 5
    (r"\\(?:text|math|underline)\w*\{([^{}]*)\}", r"\1"),         # 5\text{ cm} -> 5 cm
    (r"([-+]?) *\\boxed\{([^{}]*)\}", r" \1\2 "),                 # \boxed{5} -> 5
    (r"\\times|\\cdot", "×"),
    (r"\^\{?\\circ\}?", "°"),
    (r"([-+]?)(?:\\?[$€£¥₹])+", r" \1"),                          # -$5 -> -5
    (r"(?<=[^\s\d]) *([-+]) +(?=[\d.])", r" \1"),                 # is - 5 -> is -5
    (r"(?:\b(?:minus|negative)|[负負])[ *_]*(?=[\d.])", " -"),      # minus 5 -> -5
    (r"-\(", "-"),                                                # -(5) -> -5
    (r"(?<=\d) *[·~] *(?=\d)", "×"),
    (r"(?<=\d) *(\*\*|[-+*/×÷±^x%]) *(?=\d)", r"\1"),             # 9 - 5 -> 9-5, which is not 5
    (r"(?<=\d) +: +(?=\d)", ":"),                                 # 12 : 30 -> 12:30
    (r"(?<=\d) +(?=\d+/\d)", "+")]                                # 2 1/2 -> 2+1/2
EQUATION = r"(?<!\d)(\d{1,9}) ?([+-]) ?(\d{1,9}) ?= ?(\d{1,9})(?!\d)"  # as toy.py writes them


def as_number(value):
    """"1,234.50", 1234.5, "1/2", "reasoning #### 42" -> exactly that number; None for no number."""
    text = str(value).rpartition("####")[2].strip().translate(ASCII)
    if len(text) < 300 and re.fullmatch(NUMBER, text):  # a float ends at 1e308
        return Fraction(text.replace(",", ""))


def find_number(text):
    """The last number of a text, read whole or not at all -> Fraction, or None.

    It is the last word with a digit, not counting those that begin with a letter (cm^2, x2). If
    that word is no number, with or without a unit (3-4, 10^3, 12:30, 0,5, 5 million), there is
    none: a part of it, or a number before it, would pay for a wrong answer.
    """
    text = text.translate(ASCII)
    for pattern, plain in NOTATIONS:
        text = re.sub(pattern, plain, text)
    for found in reversed(list(re.finditer(WORD, text))):
        word = found[0].lstrip("*_{}'").rstrip("*_{}'%°^\\")
        has_digit = any(char.isnumeric() for char in word)
        if not has_digit or (word[0].isalpha() and "(" not in word):
            continue
        number = re.fullmatch(f"({NUMBER})((?:{UNIT})?)", word)
        if number and not re.match(SCALE, number[2] + text[found.end():]):
            return as_number(number[1])
        return None


def last_number(prompts, completions, answer, finished, **columns):
    """1 if the last number of a finished completion equals the answer as a number, else 0.

    An answer that is a float is compared as a float: to 1/3, 0.3333333333333333 is equal.
    """
    def right(text, answer):
        number = find_number(text)
        if number is not None and isinstance(answer, float):
            return abs(number) < 1e300 and float(number) == answer
        return number is not None and number == as_number(answer)

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
        if name in rewards:
            fail(f"--reward {cfg.reward}: two are called {name}; rename one")
        function = load_reward(file, colon, name, cfg)
        rewards[name] = function
        if function is last_number:
            check_answers(problems)
        # Most mistakes in a reward show here already, before the model is loaded.
        judge(name, function, problems[:2], ["1", ""], [True, False], [[1], [1]])
    return rewards


def load_reward(file, colon, name, cfg):
    """One of ours, file.py:function, or the folder of a reward model -> a function."""
    if not colon and name in REWARDS:
        return REWARDS[name]
    from plumbing.reward_file import load_function, load_scorer  # here: most runs do not need it
    if colon:
        return load_function(file, name)
    folder = Path(os.path.expanduser(name))
    if not name or not folder.is_dir():
        fail(f"--reward {name}: there is no such reward; choose {', '.join(REWARDS)}, the "
             "folder of a reward model, or one of your own, file.py:function")
    return load_scorer(folder, cfg)


def check_answers(problems):
    """Refuse data in which last_number would find nothing to compare with."""
    answers = [problem["columns"].get("answer") for problem in problems]
    wrong = [answer for answer in answers if as_number(answer) is None]
    if wrong:
        fail(f"--reward last_number: {len(wrong)} of {len(problems)} answers are no number, "
             f"{str(wrong[0])[:100]!r} for one; mend the column answer of --data, or write a "
             "reward of your own, file.py:function")


def judge(name, reward, problems, texts, finished, completion_ids, when=""):
    """One reward's scores of texts[i] as an answer to problems[i] -> list of N floats."""
    # Everything is a copy, and each completion's its own: a reward may change what it is given.
    prompts = [copy.deepcopy(problem["prompt"]) for problem in problems]
    columns = {key: [copy.deepcopy(problem["columns"][key]) for problem in problems]
               for key in problems[0]["columns"] if key not in ("prompt", "prompts", "completions")}
    columns.update(finished=list(finished), completion_ids=[list(ids) for ids in completion_ids])
    try:
        values = reward(prompts=prompts, completions=list(texts), **columns)
    except Failure:  # of a learned reward: its sentence is out
        raise
    except (Exception, SystemExit) as error:
        from plumbing.reward_file import describe  # of which most runs need nothing
        fail(f"--reward {name}{when} raised {describe(error)}; it is called by keyword, with "
             f"prompts, completions, {', '.join(columns)}")
    try:
        values = [value.item() if hasattr(value, "item") else value for value in values]
        returned = f"{len(values)} scores"
    except Exception:  # None, a float, a table, ...
        returned = f"{values!s:.100}"
    if returned != f"{len(texts)} scores":
        fail(f"--reward {name}{when} returned {returned} for {len(texts)} completions; return a "
             "list with one number for each")
    for value, text, problem in zip(values, texts, problems):
        if not isinstance(value, (int, float)) or not -3e38 < value < 3e38:  # fp32; nan
            fail(f"--reward {name}{when} gave {str(value)[:100]} to the completion {text[:300]!r} "
                 f"of the prompt {str(problem['prompt'])[:300]!r}; return a finite number")
    return [float(value) for value in values]


def score(rewards, problems, batch, tokenizer, step=None):
    """Score a batch of completions, completion i as an answer to problems[i // K].

    -> texts (N strings), scores (N,), which are the sum of the rewards, and the mean of each reward
    as a dict for the log; it is empty if there is one reward only.
    """
    texts, owners = to_texts(tokenizer, batch), [problems[i] for i in batch.owner.tolist()]
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch.completions, batch.mask)]
    when = " in an evaluation" if step is None else f" in step {step + 1}"
    finished = batch.finished.tolist()
    each, means = {}, {}
    for name, reward in rewards.items():
        each[name] = torch.tensor(judge(name, reward, owners, texts, finished, ids, when))
    if len(each) > 1:
        means = {f"reward_{name}": scores.mean() for name, scores in each.items()}
    return texts, sum(each.values()).to(batch.mask.device), means
