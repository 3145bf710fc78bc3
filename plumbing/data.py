"""
Data: rows -> problems, and text -> tokens.

A problem is a dict of ours, so that no column of the data can be in its way:
    row           the row of the data, with None for a column that only other rows have
    prompt        text, or a list of messages {role, content}
    completions   the texts that are learned from, best first; [] where a script only samples
    ids, targets  tokens: the prompt as the model sees it, and each of the completions

What the columns of a row mean, the same for every script:
    prompt           `prompt`, or `question`
    demonstration    `completion`; or an `answer` of the form "reasoning #### 42", as in GSM8K
    pair             `chosen` and `rejected`, or `completions`, a list of two, best first
    ranking          `completions`, or `chosen` and `rejected`
If these are conversations, a last message is the completion, and what precedes it is the prompt, or
the prompt's column is, if nothing does. All else is refused.
"""
import json
import random
import re
import tempfile
import zlib
from itertools import combinations
from pathlib import Path

from plumbing import toy
from plumbing.flags import fail

SIZES = dict(demonstration=(1,), pair=(2,), ranking=range(2, 1000))  # of `completions`
NEEDED = dict(demonstration="completion", pair="chosen and rejected", ranking="completions")


def load_problems(cfg, policy, tokenizer, wanted=None):
    """--data -> training, validation and test problems.

    wanted: demonstration, pair or ranking, where completions are learned from. Training rows must
    have them. A validation or test row may be a prompt alone, which the policy then answers.
    """
    splits = read(cfg.data, cfg.eval_prompts, wanted)
    columns = dict.fromkeys(key for rows in splits.values() for row in rows for key in row)
    for split, rows in splits.items():
        problems = []
        for number, row in enumerate(rows, 1):
            where = f"--data {cfg.data}: row {number} of {split}"
            problems.append(to_problem({**columns, **row}, wanted, split == "train", where))
        splits[split] = drop_unfit(encode(problems, tokenizer, cfg.data), policy, cfg, split)
    splits = hold_out(splits, cfg.data)
    if cfg.eval_every and not splits["validation"]:
        fail("--eval_every: the data has too few prompts to hold some out for it; leave it at 0")
    for split in ("validation", "test"):
        if len(splits[split]) > cfg.eval_prompts:
            splits[split] = random.Random(0).sample(splits[split], cfg.eval_prompts)
    print(f"data {cfg.data}: " + ", ".join(f"{len(rows):,} {key}" for key, rows in splits.items()))
    return splits["train"], splits["validation"], splits["test"]


# --------------------------------------------------------------------------------------------------
# From files to rows


def read(data, held_out, wanted=None):
    """toy, words, .jsonl file, folder or hub name -> {split: rows}."""
    if data == "toy" and wanted in ("pair", "ranking"):
        data = str(toy.PAIRS if wanted == "pair" else toy.RANKINGS)
    if data in toy.KINDS:
        sizes = dict(train=16384, validation=held_out, test=held_out)
        return {split: toy.problems(data, split, n) for split, n in sizes.items()}
    path, splits = Path(data), {}
    if path.suffix in (".jsonl", ".json") and not path.is_dir():
        return dict(train=read_jsonl(path))
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else []:
        name = re.match("(train|validation|test|)", file.stem)[0]
        splits.setdefault(name or "train", []).extend(read_jsonl(file))
    return splits or read_dataset(data)


def read_jsonl(path):
    """One JSON object per line -> rows; empty lines are skipped."""
    rows = []
    try:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                rows.append({**json.loads(line)})
    except OSError as error:
        fail(f"--data {path}: {error.strerror}; name a .jsonl file, or of other files the folder")
    except (ValueError, TypeError, RecursionError) as error:  # not JSON; not UTF-8; no {...}
        fail(f"--data {path}: line {number} is not a JSON object ({error}); mend or delete it")
    return rows


def read_dataset(data):
    """What the library `datasets` reads: other files in a folder, or a data set of the hub."""
    name, _, configuration = (data, "", "") if Path(data).is_dir() else data.partition(":")
    import datasets  # here, because it takes a second
    try:
        if any(Path(name, saved).exists() for saved in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
            return to_rows(found if isinstance(found, dict) else dict(train=found))
        if not Path(name).is_dir():
            return to_rows(datasets.load_dataset(name, configuration or None))
        with tempfile.TemporaryDirectory() as cache:  # the usual one goes by the time of a file
            return to_rows(datasets.load_dataset(name, cache_dir=cache))
    except Exception as error:
        error = error.__cause__ or error  # "An error occurred", says the one around it
        fail(f"--data {data}: {' '.join(str(error).split())[:300]}; name toy, words, a .jsonl "
             "file, a folder, or a name[:configuration] on the hub")


def to_rows(found):
    """The splits of `datasets` -> {split: rows}, those called train, validation and test."""
    wanted = ("train", "validation", "test") if "train" in found else found
    return {split: list(found[split].with_format(None)) for split in found if split in wanted}


# --------------------------------------------------------------------------------------------------
# From rows to problems


def to_problem(row, wanted, needs, where):
    """The rules at the top of this file. needs: refuse a row that lacks what is wanted."""
    answer = row["answer"] if re.search(r"####\s*\S+\s*\Z", str(row.get("answer"))) else None
    found = [[row.get("chosen"), row.get("rejected")], row.get("completions"),
             [row.get("completion")], [answer]]
    prompt = clean(row.get("question") if row.get("prompt") is None else row["prompt"])
    sizes = SIZES.get(wanted, range(1000 if prompt is None else 0))  # it may be in a conversation
    completions = next((texts for texts in found if isinstance(texts, list)
                        and len(texts) in sizes and None not in texts), [])
    there = ", ".join(key for key, value in row.items() if value is not None)
    if needs and wanted and not completions:
        fail(f"{where} has {there}; it must have {NEEDED[wanted]}")
    texts = []
    for completion in map(clean, completions):
        if isinstance(completion, list):  # a conversation
            *before, last = completion
            if before and prompt in (None, before[-1]["content"]):
                prompt = before
            if before not in ([], prompt) or last["role"] != "assistant":
                fail(f"{where}: the prompt and one message of the assistant is what a conversation "
                     "must be; cut it, or delete the row")
            completion = last["content"]
        if completion is None:
            fail(f"{where}: a completion is neither text nor messages {{role, content}}; mend it")
        texts.append(completion)
    if prompt is None:
        fail(f"{where} has {there}; it must have a prompt (or question), text or messages {{role, "
             "content}; from texts that begin with it, it has to be cut")
    return dict(row=row, prompt=prompt, completions=texts if wanted else [])


def clean(value):
    """Text, or messages {role, content} without the keys that Arrow filled with None; else None."""
    if isinstance(value, str):  # JSON may hold half a letter
        return value if value == value.encode("utf-8", "ignore").decode() else None
    if not isinstance(value, list) or not value or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            and isinstance(clean(message.get("content")), str) for message in value):
        return None
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def drop_unfit(problems, policy, cfg, split):
    """Rows that are too long or have equal completions are left out and counted, never cut.

    Where a model's positions change beyond a length (LongRoPE), that length is its context.
    """
    config = policy.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = (getattr(config, "max_position_embeddings", None),
               rope.get("original_max_position_embeddings"))
    room = min(length for length in (*lengths, 2**31) if length) - cfg.max_new_tokens
    kept = [problem for problem in problems if len(problem["ids"]) <= room
            and max(map(len, problem["targets"]), default=0) <= cfg.max_new_tokens
            and all(one != other for one, other in combinations(problem["completions"], 2))]
    why = (f"dropped {len(problems) - len(kept)} of {len(problems)} rows of {split}: their prompt "
           f"has more than {room} tokens (context - max_new_tokens), or a completion more than "
           f"{cfg.max_new_tokens}, or two completions are equal")
    if not kept:
        fail(f"--data {cfg.data}: {why}; change --max_new_tokens, or the data")
    if len(kept) < len(problems):
        print(why)
    if max(max(row["ids"] + sum(row["targets"], [])) for row in kept) >= (
            policy.get_input_embeddings().num_embeddings):
        fail("--model: its tokenizer has tokens that the model lacks; replace the tokenizer")
    return kept


def hold_out(splits, data):
    """Make the test and validation rows that the data lacks -> {split: rows}.

    As in the toy, the prompt's checksum decides, so that no prompt lies in two splits: 0 of 8 is
    test, 1 validation. Of a handful of prompts, one is test and none validation.
    """
    if len(splits) == 1:  # whatever it is called
        splits = dict(train=[*splits.values()][0])
    if "train" not in splits:
        fail(f"--data {data}: of its splits, {', '.join(splits)}, none is called train; rename one")
    rows = splits["train"]
    sums = [zlib.crc32(json.dumps(row["prompt"], sort_keys=True).encode()
                       if isinstance(row["prompt"], list) else row["prompt"].encode())
            for row in rows]
    homes = [toy.split_of(number) for number in sums]
    if "test" not in splits and not {"train", "test"} <= set(homes):
        homes = ["test" if number == min(sums) else "train" for number in sums]
    homes = ["train" if home in splits else home for home in homes]
    if "train" not in homes:
        fail(f"--data {data}: it has only one prompt; give at least two, one of them is the test")
    made = {split: [row for row, home in zip(rows, homes) if home == split]
            for split in ("train", "test", "validation")}
    return {**made, **splits, "train": made["train"]}


# --------------------------------------------------------------------------------------------------
# From text to tokens


def encode(problems, tokenizer, data="the data"):
    """Add `ids`, the prompt through the chat template if there is one, and `targets`.

    A prompt begins with what the tokenizer puts before a text, if the template has not written it.
    A completion is tokenised apart from the prompt, so that the boundary between them is one
    between tokens, and it ends with one EOS: to stop is a decision too.
    """
    eos, marked = tokenizer.eos_token, tokenizer("a").input_ids
    before = marked[: marked.index(tokenizer("a", add_special_tokens=False).input_ids[0])]
    texts = [render(problem["prompt"], tokenizer, data) for problem in problems]
    for problem, ids in zip(problems, tokenizer(texts, add_special_tokens=False).input_ids):
        problem["ids"] = ids if ids[: len(before)] == before else before + ids
        if not problem["ids"] or ("<unk>" == tokenizer.unk_token and tokenizer.unk_token_id in ids):
            fail(f"--data {data}: the prompt {problem['prompt']!r:.200} is empty, or the tokenizer "
                 "does not know all its characters; the toy's knows digits, + - = and comma")
    texts = [text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text
             for problem in problems for text in problem["completions"]]
    targets = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else ())
    for problem in problems:
        problem["targets"] = [next(targets) + [tokenizer.eos_token_id]
                              for _ in problem["completions"]]
    return problems


def render(prompt, tokenizer, data):
    """Text or messages -> text with the marks of the chat template, the model to speak next.

    What the data has begun of the answer (a last message of the assistant) follows to the letter.
    """
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return prompt
    messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    begun = ""
    if messages[-1]["role"] == "assistant":
        begun, messages = messages[-1]["content"], messages[:-1]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=True) + begun
    except Exception as error:  # templates raise what they like: "roles must alternate", ...
        reason = " ".join(str(error).split())[:200]  # also if the model has no template
        fail(f"--data {data}: the prompt {prompt!r:.200} is refused by the model's chat template "
             f"({reason}); mend it, or choose a chat model")


def draw_problems(problems, step, n, seed):
    """The n problems of a step: pass after reshuffled pass, a function of seed and step alone."""
    chosen = []
    for i in range(step * n, (step + 1) * n):
        order, place = divmod(i, len(problems))
        if place == 0 or not chosen:
            shuffled = random.Random(f"{seed} {order}").sample(range(len(problems)), len(problems))
        chosen.append(problems[shuffled[place]])
    return chosen
