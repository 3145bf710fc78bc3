"""
Data of the user's own: a folder or a data set of the hub -> rows; and pairs -> prompt and
completions, in the forms in which people have them.
"""
import re
from itertools import takewhile
from pathlib import Path

import torch

from plumbing.flags import fail
from plumbing.model import ask_hub


def load(data):
    """A folder that `datasets` can load, or a hub name[:configuration] -> {split: rows}."""
    path = Path(data)
    name, _, configuration = (data, "", "") if path.is_dir() else data.partition(":")
    if not Path(name).is_dir():
        ask_hub("--data", name, "dataset")
    import datasets  # here, because it takes a second, and pairs do not need it
    try:
        if any(Path(name, saved).exists() for saved in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, configuration or None)
        found = found if isinstance(found, dict) else {"train": found}
        wanted = ("train", "validation", "test") if "train" in found else found
        return {split: to_rows(table) for split, table in found.items() if split in wanted}
    except Exception as error:
        error = error.__cause__ or error  # "An error occurred", says the one around it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fail(f"--data {data}: {reason}; name toy, words, a .jsonl file, a folder that `datasets` "
             "can load, or a hub name[:configuration]")


def to_rows(table):
    """A split of `datasets` -> rows.

    `datasets` gives 0.1 in a column of 32 bits as 0.10000000149011612. A row has the shortest
    decimal that rounds to it.
    """
    def written(value, kind):
        decimals = (float(f"{value:.{digits}g}") for digits in range(1, 17))
        return next((decimal for decimal in decimals
                     if torch.tensor(decimal, dtype=kind).item() == value), value)

    kinds = {key: dict(float32=torch.float32, float16=torch.float16).get(
        getattr(feature, "dtype", None)) for key, feature in table.features.items()}
    return [{key: written(value, kinds[key]) if kinds[key] and isinstance(value, float) else value
             for key, value in row.items()} for row in table.with_format(None)]


def to_pair(prompt, chosen, rejected, split_texts=False):
    """-> prompt, [chosen, rejected]; without a prompt, they begin with it (texts if split_texts).

    Conversations that both repeat the prompt are cut after it.
    """
    pair, kinds = [chosen, rejected], {type(chosen), type(rejected)}
    if prompt is None and (kinds == {list} or kinds == {str} and split_texts):
        prompt, pair = split_prompt(*pair)
        return prompt or None, pair
    if kinds != {list}:
        return prompt, pair
    if isinstance(prompt, list):
        n = len(prompt) if chosen[: len(prompt)] == prompt else 0
    else:  # text: the conversation may begin with a system message
        contents = [message.get("content") for message in chosen if isinstance(message, dict)]
        n = contents.index(prompt) + 1 if prompt in contents else 0
    if chosen[:n] != rejected[:n]:
        return prompt, pair
    return chosen[:n] or prompt, [chosen[n:], rejected[n:]]


def split_prompt(chosen, rejected):
    """Two texts, or lists of messages, that begin alike -> the beginning, and the two rests.

    Texts are not cut inside a word, which may be one token, nor after a space, which tokenizers
    take for the beginning of the next.
    """
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
    if isinstance(chosen, str):
        inside = any(re.match(r"\w\w", text[max(n - 1, 0):]) for text in (chosen, rejected))
        n = re.search(r"\s?\w*\Z" if inside else r"\s?\Z", chosen[:n]).start()
    return chosen[:n], [chosen[n:], rejected[n:]]
