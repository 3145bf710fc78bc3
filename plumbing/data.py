"""
Prompts: what the policy is asked.

A problem is a dict of ours, so that no column of the data can be in its way:
    row           the row of the data, as it was found
    columns       all columns of the data set, None where the row has none; rewards get them
    prompt        text, or a list of messages
    completion, completions    None, or what the row says of an answer: to_problem()
    ids, targets  tokens: the prompt as the model sees it, and each completion that is learned from
"""
import json
import os
import random
import re
import zlib
from itertools import combinations, takewhile
from pathlib import Path

from plumbing import toy
from plumbing.flags import fail
from plumbing.model import load_tokenizer

# --------------------------------------------------------------------------------------------------
# From --data to problems


def load_problems(cfg, wanted=None, splits=None):
    """--data, or the rows of its splits -> training, validation and test problems.

    wanted, beside the prompt: completion, pairs or rankings.
    """
    tokenizer, context, vocab_size, stop = load_tokenizer(cfg.model)
    known_only = toy.is_toy(tokenizer) and splits is None  # what it has sampled may hold <unk>
    splits = splits or read(cfg.data, cfg.eval_prompts)
    cfg.data_checksum = checksum([*splits.values()])  # a run is not resumed on other data
    splits = settle(splits, cfg.data, wanted)
    for rows in splits.values():
        encode(rows, tokenizer, f"--data {cfg.data}")
        if wanted:
            column = "completion" if wanted == "completion" else "completions"
            encode_completions(rows, tokenizer, column, stop)
        used = set()
        for row in rows:
            used.update(row["ids"], *row.get("targets", []))
        if max(used) >= vocab_size:
            fail(f"--model {cfg.model}: its tokenizer has tokens that the model lacks; replace it")
        if known_only and tokenizer.unk_token_id in used:
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
    data = os.path.expanduser(data)
    path = Path(data)
    named_as_file = path.suffix in (".jsonl", ".json") and not path.is_dir()
    if path.is_file() or named_as_file:
        return {"train": read_jsonl(path)}
    from plumbing.hub_data import load  # here, because few runs need it
    return load(data)


def read_jsonl(path):
    """One JSON object per line -> rows; empty lines are skipped."""
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        fail(f"--data {path}: there is no such .jsonl file (of csv or parquet, name the folder)")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                rows.append({**json.loads(line)})
        except (ValueError, TypeError, RecursionError) as error:  # not JSON; not UTF-8; no {...}
            fail(f"--data {path}: line {number} is not a JSON object ({error}); mend or delete it")
    return rows


NEEDED = dict(
    prompt="a prompt (or question; or chosen and rejected that begin alike, and no other text)",
    completion="a completion",
    pairs="chosen and rejected (rankings are for dpo.py --loss plackett_luce)",
    rankings="completions, a list, best first, or chosen and rejected")


def settle(splits, data, wanted=None):
    """{split: rows as they were found} -> {split: problems}; a row that lacks something is refused.

    wanted, beside the prompt: completion, pairs or rankings.
    """
    columns = list(dict.fromkeys(key for rows in splits.values() for row in rows for key in row))
    settled = {split: [] for split in splits}
    for split, rows in splits.items():
        if not rows:
            fail(f"--data {data}: it is empty; give it rows with a prompt each")
        for number, row in enumerate(rows, 1):
            problem, where = to_problem(row, columns), f"--data {data}: row {number} of {split}"
            check_parts(problem, wanted, where)
            if wanted not in ("pairs", "rankings") or is_comparison(problem):
                check_texts(problem, wanted, where)
                settled[split].append(problem)
        left_out = len(rows) - len(settled[split])
        if left_out:
            why = (f"dropped {left_out} of {len(rows)} rows of {split}: two completions are the "
                   "same, or one is of several messages")
            if not settled[split]:
                fail(f"--data {data}: {why}; none is left")
            print(why)
    return settled


def to_problem(row, columns):
    """What the columns of a row mean, the same for every script -> a problem.

    prompt        the column, or `question`; in a conversation, what chosen and rejected both begin
                  with; in texts too, if no other column holds text, which may be what is meant
    completion    the column, or an answer of the form "reasoning #### 42", as GSM8K has them
    completions   chosen and rejected, or the column, best first
    """
    prompt = row.get("question") if row.get("prompt") is None else row["prompt"]
    completion, completions = row.get("completion"), row.get("completions")
    if completion is None and re.search(r"####\s*\S+\s*\Z", str(row.get("answer"))):
        completion = row["answer"]
    if row.get("chosen") is not None and row.get("rejected") is not None:
        others = (key for key in columns if key not in ("chosen", "rejected"))
        asked = any(key in ("prompt", "question") or is_text(row.get(key)) for key in others)
        prompt, completions = to_pair(prompt, row["chosen"], row["rejected"], not asked)
    return dict(row=row, columns={key: row.get(key) for key in columns}, prompt=prompt,
                completion=completion, completions=completions)


def to_pair(prompt, chosen, rejected, split_texts=False):
    """-> prompt, [chosen, rejected]; without a prompt, they begin with it (texts if split_texts).

    Conversations that both repeat the prompt are cut after it.
    """
    kinds = {type(chosen), type(rejected)}
    splittable = kinds == {list} or (kinds == {str} and split_texts)
    if prompt is None and splittable:
        prompt, pair = split_prompt(chosen, rejected)
        return prompt or None, pair
    if kinds != {list}:
        return prompt, [chosen, rejected]
    if isinstance(prompt, list):
        n = len(prompt) if chosen[: len(prompt)] == prompt else 0
    else:  # text: the conversation may begin with a system message
        contents = [message.get("content") for message in chosen if isinstance(message, dict)]
        n = contents.index(prompt) + 1 if prompt in contents else 0
    if chosen[:n] != rejected[:n]:
        return prompt, [chosen, rejected]
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


def check_parts(problem, wanted, where):
    """Refuse a row in which a part is missing."""
    texts = problem["completions"]
    several = isinstance(texts, list) and len(texts) > 1
    there = dict(prompt=problem["prompt"] is not None, completion=problem["completion"] is not None,
                 pairs=several and len(texts) == 2, rankings=several)
    for part in ("prompt", wanted) if wanted else ("prompt",):
        if not there[part]:
            found = sorted(key for key, value in problem["row"].items() if value is not None)
            fail(f"{where} has {', '.join(found)}; it must have {NEEDED[part]}")


def is_comparison(problem):
    """Whether the completions differ, and each is what follows a prompt in one turn."""
    texts = problem["completions"]
    if any(isinstance(text, list) and len(text) > 1 for text in texts):
        return False
    return all(one != other for one, other in combinations(texts, 2))


def check_texts(problem, wanted, where):
    """Refuse a row in which a part is no text."""
    texts = [problem["completion"]] if wanted == "completion" else problem["completions"]
    named = [("prompt", problem["prompt"])]
    named += [("completion", text) for text in texts] if wanted else []
    for name, value in named:
        if not is_text(value, answer=name == "completion"):
            fail(f"{where}: its {name} is {value!r:.100}; it must be text, or messages {{role, "
                 "content} (of a completion: one, assistant)")


def is_text(value, answer=False):
    """Text, or a list of messages {role, content}? In an `answer`, one message of the assistant."""
    if isinstance(value, str):
        return value == value.encode("utf-8", "ignore").decode()  # JSON may hold half a letter
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if not isinstance(message, dict):
            return False
        if not is_text(message.get("role")) or not is_text(message.get("content")):
            return False
    return not answer or [message["role"] for message in value] == ["assistant"]


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
        (rows,) = splits.values()
        splits = dict(train=rows)
    if "train" not in splits:
        fail(f"--data {data}: of its splits, {', '.join(splits)}, none is called train; rename one")
    given = dict(splits)
    rows = given.pop("train")
    made = {name: [] for name in ("train", "test", "validation") if name not in given}
    for row in rows:
        home = toy.split_of(checksum(row["prompt"]))
        made[home if home in made else "train"].append(row)
    if not made["train"] or made.get("test") == []:
        first = min(checksum(row["prompt"]) for row in rows)
        made["train"] = [row for row in rows if checksum(row["prompt"]) != first]
        made["test"] = [row for row in rows if checksum(row["prompt"]) == first]
        made["validation"] = []
    if not made["train"]:
        fail(f"--data {data}: it has only one prompt; give at least two, one of them is the test")
    return {**made, **given}


def checksum(value):
    """Of a text, or of lists and dicts; of dates, pictures and so on, it takes the repr."""
    text = value if isinstance(value, str) else json.dumps(
        value, sort_keys=True, default=lambda other: re.sub(" at 0x[0-9A-Fa-f]+", "", repr(other)))
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
    """Text or messages -> text with the marks of the chat template, the model to speak next.

    What the data has begun of the answer (a last message of the assistant) follows to the letter.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return prompt
    begun = ""
    if messages[-1]["role"] == "assistant":
        begun, messages = messages[-1]["content"], messages[:-1]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=True) + begun
    except Exception as error:  # templates raise what they like: "roles must alternate", ...
        reason = " ".join(str(error).split())[:200]  # also if the model has no template
        fail(f"{data}: the prompt {prompt!r:.200} is refused by the model's chat template "
             f"({reason}); mend it, or choose a chat model")


def encode_completions(problems, tokenizer, column="completion", stop=()):
    """Add `targets`: each completion's tokens, with one EOS at the end: to stop is a decision too.

    Tokenised apart from the prompt, so that the boundary between them is one between tokens.
    stop: what may stand for the EOS where the data has it written out.
    """
    texts = [row[column] if column == "completions" else [row[column]] for row in problems]
    flat = [text if isinstance(text, str) else text[0]["content"] for row in texts for text in row]
    ids = iter(tokenizer(flat, add_special_tokens=False).input_ids)
    for problem, row in zip(problems, texts):
        problem["targets"] = [end_once(next(ids), {tokenizer.eos_token_id, *stop}, tokenizer)
                              for _ in row]
    return problems


def end_once(ids, stop, tokenizer):
    """Tokens of a completion -> the same up to the EOS that ends it, which is added if need be.

    An EOS in the data ends it if nothing comes after it but white space and more of its kind.
    """
    for i, token in enumerate(ids):
        if token in stop:
            rest = [other for other in ids[i:] if other not in stop]
            if not tokenizer.decode(rest).strip():
                return ids[: i + 1]
    return ids + [tokenizer.eos_token_id]


def draw_problems(problems, step, n, seed):
    """The n problems of a step: pass after reshuffled pass, a function of seed and step alone."""
    chosen = []
    for i in range(step * n, (step + 1) * n):
        order, place = divmod(i, len(problems))
        if place == 0 or not chosen:
            shuffled = random.Random(f"{seed} {order}").sample(range(len(problems)), len(problems))
        chosen.append(problems[shuffled[place]])
    return chosen
