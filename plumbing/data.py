"""
Data: rows -> problems, and text -> tokens.

A problem is a dict of ours, so that no column of the data can be in its way:
    row           the row of the data, with None for a column that only other rows have
    prompt        text, or a list of messages {role, content}
    completions   the texts that are learned from, best first; [] where a script only samples
    ids, targets  tokens: the prompt as the model sees it, and each of the completions
"""
import json
import random
import re
import tempfile
import zlib
from collections import namedtuple
from pathlib import Path

from plumbing import toy
from plumbing.flags import fail

Problems = namedtuple("Problems", "train validation test")  # three lists
SIZES = dict(demonstration=(1,), pair=(2,), ranking=range(2, 1000))  # of `completions`


def load_problems(cfg, policy, tokenizer, wanted=None):
    """--data -> training, validation and test problems.

    wanted: demonstration, pair or ranking, which each training row must then have. A validation or
    test row may be a prompt alone, which the policy answers.
    """
    splits = read(cfg.data, cfg.eval_prompts, wanted)
    columns = dict.fromkeys(key for rows in splits.values() for row in rows for key in row)
    for split, rows in splits.items():
        needs = split == "train" or len(splits) == 1
        problems = [to_problem({**columns, **row}, wanted, needs,
                               f"--data {cfg.data}: row {number} of {split}")
                    for number, row in enumerate(rows, 1)]
        encode(problems, tokenizer, cfg.data)
        used = {token for row in problems for ids in (row["ids"], *row["targets"]) for token in ids}
        if needs and toy.is_toy(cfg.model) and tokenizer.unk_token_id in used:
            fail(f"--data {cfg.data}: the toy's model reads digits, + - = and comma; name --model")
        splits[split] = drop_unfit(problems, policy, cfg, split)
    splits = hold_out(splits, cfg.data)
    for split in ("validation", "test"):
        if len(splits[split]) > cfg.eval_prompts:
            splits[split] = random.Random(0).sample(splits[split], cfg.eval_prompts)
    if cfg.eval_every and not splits["validation"]:
        fail("--eval_every: the data has too few prompts to hold some out for it; leave it at 0")
    print(f"data {cfg.data}: " + ", ".join(f"{len(rows):,} {key}" for key, rows in splits.items()))
    return Problems(**splits)


def read(data, held_out, wanted=None):
    """toy, words, .jsonl file, folder or hub name -> {split: rows}."""
    if data == "toy" and wanted in ("pair", "ranking"):
        data = str(toy.PAIRS if wanted == "pair" else toy.RANKINGS)
    if data in toy.KINDS:
        sizes = dict(train=16384, validation=held_out, test=held_out)
        return {split: toy.problems(data, split, n) for split, n in sizes.items()}
    path, splits = Path(data), {}
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        if file.suffix in (".jsonl", ".json"):
            split = re.match("train|validation|test|", file.stem)[0] or "train"
            splits[split] = splits.get(split, []) + read_jsonl(file)
    if splits:
        return splits
    if any(path.rglob("*.csv")):
        fail(f"--data {data}: csv has no types; docs/data_and_rewards.md makes .jsonl of it")
    import datasets  # here, because it takes a second
    name, _, configuration = (data, "", "") if path.is_dir() else data.partition(":")
    try:
        with tempfile.TemporaryDirectory() as folder:  # the usual cache believes a file's time
            cache = dict(cache_dir=folder, keep_in_memory=True) if path.is_dir() else {}
            splits = datasets.load_dataset(name, configuration or None, **cache)
    except Exception as error:  # its cause says more than "An error occurred"
        fail(f"--data {data}: {str(error.__cause__ or error)[:300]}; name toy, words, a .jsonl "
             "file, a folder, or a name[:configuration] on the hub")
    known = ("train", "validation", "test") if "train" in splits else splits
    return {split: splits[split].to_list() for split in splits if split in known}


def read_jsonl(path):
    """One JSON object per line -> rows; empty lines are skipped."""
    rows, number = [], 0
    try:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            rows += [{**json.loads(line)}] if line.strip() else []
    except (OSError, ValueError, TypeError, RecursionError) as error:  # not UTF-8; not {...}; ...
        fail(f"--data {path}: line {number} is not a JSON object ({error})" if number else
             f"--data {path}: {error.strerror}; name a .jsonl file, or of other files the folder")
    return rows


def to_problem(row, wanted, needs, where):
    """What the columns of a row mean, the same for every script; all else is refused.

    prompt           `prompt`, or `question`
    demonstration    `completion`; or an `answer` of the form "reasoning #### 42", as in GSM8K
    pair             `chosen` and `rejected`, or `completions`, a list of two, best first
    ranking          `completions`, or `chosen` and `rejected`
    In a conversation, the last message is the completion, and what precedes it is the prompt.
    """
    answer = row["answer"] if re.search(r"####\s*\S+\s*\Z", str(row.get("answer"))) else None
    found = [row.get("completions"), [row.get("chosen"), row.get("rejected")],
             [row.get("completion")], [answer]]
    prompt = clean(row.get("question") if row.get("prompt") is None else row["prompt"])
    sizes = SIZES.get(wanted, range(1000 if prompt is None else 0))  # it may be in a conversation
    completions = next((texts for texts in found if isinstance(texts, list)
                        and len(texts) in sizes and None not in texts), [])
    texts = []
    for completion in map(clean, completions):
        if isinstance(completion, list):  # a conversation
            *before, last = completion
            if before and prompt in (None, before[-1]["content"]):
                prompt = before
            right = before in ([], prompt) and last["role"] == "assistant"
            completion = last["content"] if right else None
        if completion is None:
            fail(f"{where}: a completion must be text, or messages {{role, content}}: those of the "
                 "prompt, and one of the assistant")
        texts.append(completion)
    if prompt is None or (wanted and needs and not texts):
        there = ", ".join(key for key, value in row.items() if value is not None)
        fail(f"{where} has {there}; it must have a prompt (or question), text or messages {{role, "
             f"content}}{f', and a {wanted}' if wanted else ''}; docs/data_and_rewards.md says how")
    return dict(row=row, prompt=prompt, completions=texts if wanted else [])


def clean(value):
    """Text, or messages {role, content} without the keys that Arrow filled with None; else None."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = [{key: item for key, item in part.items() if item is not None} for part in value]
        texts = [clean(part.get(key)) for part in value for key in ("role", "content")]
        return value if all(isinstance(text, str) for text in texts) else None
    is_text = isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()
    return value if is_text else None  # JSON may hold half a letter


def drop_unfit(problems, policy, cfg, split):
    """Rows that are too long or have equal completions are left out and counted, never cut."""
    config = policy.config.get_text_config()
    room = getattr(config, "max_position_embeddings", 2**31) - cfg.max_new_tokens
    kept = [row for row in problems if len(row["ids"]) <= room
            and all(len(target) <= cfg.max_new_tokens for target in row["targets"])
            and len(set(map(tuple, row["targets"]))) == len(row["targets"])]
    if len(kept) < len(problems):
        print(f"dropped {len(problems) - len(kept)} of {len(problems)} rows of {split}: a prompt "
              f"above {room} tokens, a completion above {cfg.max_new_tokens}, or two equal ones")
    if not kept:
        fail(f"--data {cfg.data}: no row of {split} is left; change --max_new_tokens, or the data")
    if len({len(row["targets"]) for row in kept if row["targets"]}) > 1:
        fail(f"--data {cfg.data}: give all rankings of {split} the same number of completions")
    largest = max(max(row["ids"] + sum(row["targets"], [])) for row in kept)
    if largest >= policy.get_input_embeddings().num_embeddings:
        fail("--model: its tokenizer has tokens that the model lacks; replace the tokenizer")
    return kept


def hold_out(splits, data):
    """Make the test and validation rows that the data lacks -> {split: rows}.

    The prompt's checksum decides, so that no prompt lies in two splits: the eighth with the lowest
    ones is test, the next eighth validation. Of a handful of prompts, one is test.
    """
    rows = splits.pop("train", None) or (splits.popitem()[1] if len(splits) == 1 else [])
    sums = [zlib.crc32(str(row["prompt"]).encode()) for row in rows]
    order, eighth = sorted(set(sums)), len(set(sums)) // 8
    homes = dict.fromkeys(order[: max(2 * eighth, 1)], "validation") | dict.fromkeys(
        order[: max(eighth, 1)], "test")
    made = dict(train=[], validation=[], test=[])
    for row, number in zip(rows, sums):
        home = homes.get(number, "train")
        made["train" if home in splits else home].append(row)
    if not made["train"]:
        fail(f"--data {data}: give a split called train, or one of two or more different prompts")
    return made | splits


def encode(problems, tokenizer, data="the data"):
    """Add `ids`, the prompt through the chat template if there is one, and `targets`.

    A prompt begins with what the tokenizer puts before a text, if the template has not written it.
    A completion is tokenised apart from the prompt, so that the boundary between them is one
    between tokens, and it ends with one EOS: to stop is a decision too.
    """
    if not problems:
        return []
    eos, marked = re.escape(tokenizer.eos_token), tokenizer("a").input_ids
    before = marked[: marked.index(tokenizer("a", add_special_tokens=False).input_ids[0])]
    texts = [render(problem["prompt"], tokenizer, data) for problem in problems]
    for problem, ids in zip(problems, tokenizer(texts, add_special_tokens=False).input_ids):
        problem["ids"] = ids if ids[: len(before)] == before else before + ids
        if not problem["ids"]:
            fail(f"--data {data}: the prompt {problem['prompt']!r:.200} has no tokens; delete it")
        texts = [re.sub(rf"({eos}\s*)+\Z", "", text) for text in problem["completions"]]
        problem["targets"] = [ids + [tokenizer.eos_token_id] for ids in (
            tokenizer(texts, add_special_tokens=False).input_ids if texts else [])]
    return problems


def render(prompt, tokenizer, data):
    """Text or messages -> text with the marks of the chat template, the model to speak next.

    What the data has begun of the answer (a last message of the assistant) follows to the letter.
    """
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return prompt
    messages, begun = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt, ""
    if messages[-1]["role"] == "assistant":
        messages, begun = messages[:-1], messages[-1]["content"]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=True) + begun
    except Exception as error:  # templates raise what they like; a model may have none
        fail(f"--data {data}: the prompt {prompt!r:.200} is refused by the model's chat template "
             f"({' '.join(str(error).split())[:200]}); mend it, or choose a chat model")


def draw_problems(problems, step, n, seed):
    """The n problems of a step: pass after reshuffled pass, a function of seed and step alone."""
    chosen = []
    for i in range(step * n, (step + 1) * n):
        order, place = divmod(i, len(problems))
        if place == 0 or not chosen:
            shuffled = random.Random(f"{seed} {order}").sample(range(len(problems)), len(problems))
        chosen.append(problems[shuffled[place]])
    return chosen
