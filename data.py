"""
Prompts: what the policy is asked.

A problem is a dict: `prompt` (text, or a list of messages), whatever other columns the data has (an
`answer`, say; they all reach the reward function), and `ids`, the prompt as the model sees it.
"""
import json
import random
import re
import zlib
from pathlib import Path

import toy
from common import fail
from model import ask_hub, load_tokenizer

# --------------------------------------------------------------------------------------------------
# From --data to problems


def load_problems(cfg, column=None, splits=None):
    """--data, or the rows of its splits -> training, validation and test problems.

    column: what they need beside the prompt: completion (of SFT), completions (best first).
    """
    tokenizer, context, words = load_tokenizer(cfg.model)
    splits = splits or read(cfg.data, cfg.eval_prompts)
    splits = {split: check_rows(rows, cfg.data, column) for split, rows in splits.items()}
    for rows in splits.values():
        encode(rows, tokenizer, f"--data {cfg.data}")
        if column:
            encode_completions(rows, tokenizer, column)
        used = set().union(*(sum(row.get("targets", []), row["ids"]) for row in rows))
        if max(used) >= words:
            fail(f"--model {cfg.model}: its tokenizer has tokens that the model lacks; replace it")
        if not cfg.model and tokenizer.unk_token_id in used:
            fail(f"--data {cfg.data}: the toy model knows only digits, + - = and comma; name a "
                 "--model that reads text")
    splits = hold_out(drop_long(splits, cfg, context), cfg.data)
    if cfg.eval_every and not splits["validation"]:
        fail("--eval_every: the data has too few prompts to hold some out for it; leave it at 0")
    for split in ("validation", "test"):
        if len(splits[split]) > cfg.eval_prompts:
            splits[split] = random.Random(0).sample(splits[split], cfg.eval_prompts)
    print(f"data {cfg.data}: " + ", ".join(f"{len(rows):,} {key}" for key, rows in splits.items()))
    return splits["train"], splits["validation"], splits["test"]


def read(data, held_out):
    """toy, words, .jsonl file, folder that `datasets` can load, hub name -> {split: rows}."""
    if data in toy.KINDS:
        sizes = dict(train=16384, validation=held_out, test=held_out)
        return {split: toy.problems(data, split, n) for split, n in sizes.items()}
    path = Path(data)
    if path.is_file() or path.suffix in (".jsonl", ".json") and not path.is_dir():
        return {"train": read_jsonl(path)}
    name, _, configuration = (data, "", "") if path.is_dir() else data.partition(":")
    if not Path(name).is_dir():
        ask_hub("--data", name, "dataset")
    import datasets  # here, because it takes a second, and the toy does not need it
    try:
        if any(Path(name, saved).exists() for saved in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, configuration or None)
        found = found if isinstance(found, dict) else {"train": found}
        wanted = ("train", "validation", "test") if "train" in found else found
        return {split: list(rows) for split, rows in found.items() if split in wanted}
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"--data {data}: {reason}; name toy, words, a .jsonl file, a folder that `datasets` "
             "can load, or a hub name[:configuration]")


def read_jsonl(path):
    """One JSON object per line -> rows; empty lines are skipped."""
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        fail(f"--data {path}: there is no such .jsonl file (of csv or parquet, name the folder)")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            rows += [{**json.loads(line)}] if line.strip() else []
        except (ValueError, TypeError, RecursionError) as error:  # not JSON; not UTF-8; no {...}
            fail(f"--data {path}: line {number} is not a JSON object ({error}); mend or delete it")
    return rows


def check_rows(rows, data, column=None):
    """Rows as they were found -> problems with `prompt`, and `column` if one is asked for."""
    if not rows:
        fail(f"--data {data}: it is empty; give it rows with a prompt each")
    found, problems = {key for row in rows for key in row}, [to_problem(row) for row in rows]
    for key in ("prompt", column) if column else ("prompt",):
        if not any(key in problem for problem in problems):
            fail(f"--data {data}: its columns are {', '.join(sorted(found))}; call one {key}")
        for number, problem in enumerate(problems, 1):
            value, answer = problem.get(key), key != "prompt"
            texts = value if key == "completions" and isinstance(value, list) else [value]
            if not texts or not all(is_text(text, answer) for text in texts):
                fail(f"--data {data}: the {key} of row {number} is {value!r:.100}; it must be "
                     "text, or messages {role, content} (of a completion: one, assistant)")
    return problems


def to_problem(row):
    """A `question` is a prompt; and of GSM8K's answers, "reasoning #### 42", 42 is the answer."""
    problem = dict(row)
    if problem.get("prompt") is None and "question" in row:
        problem["prompt"] = row["question"]
    if result := re.search(r"####\s*(\S+)\s*$", str(row.get("answer"))):
        problem.setdefault("completion", row["answer"])  # it may serve as a demonstration
        problem["answer"] = result[1]
    return problem


def is_text(value, answer=False):
    """Text, or a list of messages {role, content}? In an `answer`, one message of the assistant."""
    if isinstance(value, str):
        return value == value.encode("utf-8", "ignore").decode()  # JSON may hold half a letter
    return isinstance(value, list) and value != [] and all(
        isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in value
    ) and (not answer or [message["role"] for message in value] == ["assistant"])


def drop_long(splits, cfg, context):
    """Rows that do not fit are left out and counted, never cut: half a question is another one."""
    room = context - cfg.max_new_tokens
    why = (f"prompts above {room} tokens (context {context} - max_new_tokens {cfg.max_new_tokens}) "
           f"or completions above {cfg.max_new_tokens}")
    kept = {}
    for split, rows in splits.items():
        kept[split] = [row for row in rows if len(row["ids"]) <= room
                       and max(map(len, row.get("targets", [[]]))) <= cfg.max_new_tokens]
        if not kept[split]:
            fail(f"--data {cfg.data}: all {len(rows)} rows of {split} have {why}; change "
                 "--max_new_tokens, or the data")
        if len(kept[split]) < len(rows):
            print(f"dropped {len(rows) - len(kept[split])} of {len(rows)} rows of {split}: {why}")
    return kept


def hold_out(splits, data):
    """Make the test and validation rows that the data lacks -> {split: rows}.

    As in the toy, the prompt's checksum decides, so that no prompt lies in two splits: 0 of 8 is
    test, 1 validation. Of a handful of prompts, one is test and none validation.
    """
    if len(splits) == 1:  # whatever it is called
        splits = dict(train=sum(splits.values(), []))
    if "train" not in splits:
        fail(f"--data {data}: of its splits, {', '.join(splits)}, none is called train; rename one")
    rows, given = splits["train"], {key: splits[key] for key in splits if key != "train"}
    homes = {home: key for home, key in enumerate(("test", "validation")) if key not in given}
    made = {key: [] for key in ("train", *homes.values())}
    for row in rows:
        made[homes.get(checksum(row) % 8, "train")].append(row)
    if not made["train"] or not made.get("test", True):
        first = min(map(checksum, rows))
        made = dict(train=[row for row in rows if checksum(row) != first], validation=[],
                    test=[row for row in rows if checksum(row) == first])
    if not made["train"]:
        fail(f"--data {data}: it has only one prompt; give at least two, one of them is the test")
    return {**made, **given}


def checksum(row):
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return zlib.crc32(text.encode())


# --------------------------------------------------------------------------------------------------
# From text to tokens


def encode(problems, tokenizer, data="--data"):
    """Add `ids` to each problem: through the chat template if there is one; with one BOS or none.

    A rendered template mostly contains the BOS already, and tokenizers like to add a second.
    """
    bos = tokenizer.bos_token_id
    wants_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    texts = [render(problem["prompt"], tokenizer, data) for problem in problems]
    for problem, ids in zip(problems, tokenizer(texts, add_special_tokens=False).input_ids):
        problem["ids"] = [bos] + ids if wants_bos and ids[:1] != [bos] else ids
        if not problem["ids"]:
            fail(f"{data}: the prompt {problem['prompt']!r} has no tokens; delete it")
    return problems


def render(prompt, tokenizer, data):
    """Text or messages -> text with the marks of the chat template, the model to speak next."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt
        fail(f"{data}: the prompts are messages, but the model has no chat template; give it "
             "prompts that are text, or choose a chat model")
    begun = messages[-1]["role"] == "assistant"  # the data has begun the answer: go on with it
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not
                                             begun, continue_final_message=begun)
    except Exception as error:  # templates raise what they like: "roles must alternate", ...
        fail(f"{data}: the chat template refuses the prompt {prompt!r:.200} ({error}); mend it")


def encode_completions(problems, tokenizer, column="completion"):
    """Add `targets`: each completion's tokens and the EOS, because to stop is a decision as well.

    Tokenised apart from the prompt, so that the boundary between them is one between tokens.
    """
    texts = [row[column] if column == "completions" else [row[column]] for row in problems]
    flat = [text if isinstance(text, str) else text[0]["content"] for row in texts for text in row]
    ids = iter(tokenizer(flat, add_special_tokens=False).input_ids)
    for problem, row in zip(problems, texts):
        problem["targets"] = [next(ids) + [tokenizer.eos_token_id] for _ in row]
    return problems


def draw_problems(problems, step, n, seed):
    """The n problems of a step: pass after reshuffled pass, a function of seed and step alone."""
    chosen = []
    for i in range(step * n, (step + 1) * n):
        order, place = divmod(i, len(problems))
        if place == 0 or not chosen:
            shuffled = random.Random(f"{seed} {order}").sample(range(len(problems)), len(problems))
        chosen.append(problems[shuffled[place]])
    return chosen
