"""
What the library `datasets` reads: a data set of the hub, or a folder of files -> rows.
"""
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
    import datasets  # here: at its import it reads whether the hub is to be asked
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
