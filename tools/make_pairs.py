"""
Pairs or rankings of a policy's own answers, for reward_model.py, dpo.py and orpo.py.

    python -m tools.make_pairs --model Qwen/Qwen2.5-0.5B-Instruct --data times.jsonl --out_dir mine
    python -m tools.make_pairs --out_dir plumbing/toy_pairs      how the toy's pairs were made: 15 s
    python -m tools.make_pairs --out_dir plumbing/toy_rankings --rankings \\
        --reward tools/make_pairs.py:shown_work                   and its rankings

The policy gives --group_size answers to each prompt, and --reward scores them. A pair is an answer
that scores above the middle between the prompt's highest and lowest score, and one that does not;
no answer is in two pairs. A ranking has four different answers, best first; where scores are equal,
the order is by chance. Answers that were cut off are left out.

The folder gets train.jsonl, validation.jsonl and test.jsonl. A held-out prompt has at most one pair
or ranking. Without one, it is a row by itself, whose answers are still evaluated.
"""
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from plumbing.command_line import main
from plumbing.data import load_problems
from plumbing.flags import HfArg, OnlineConfig, check, fail
from plumbing.model import load_policy
from plumbing.rewards import last_number, load_rewards, score
from plumbing.rollout import sample, step_generator
from plumbing.toy import check_steps


@dataclass
class Config(OnlineConfig):
    prompts: int = HfArg(default=1024, help="training prompts that are answered, at most")
    group_size: int = HfArg(default=8, help="answers to each prompt")
    rankings: bool = HfArg(default=False, help="rankings of four instead of pairs")


TOY = dict(prompts=1920, max_new_tokens=32, eval_prompts=512)


def shown_work(prompts, completions, answer, finished, **columns):
    """A reward for the toy: 1 for the right answer, up to a half for shown work that is right."""
    right = last_number(completions, answer, finished)
    return [score + sum(step for _, step in check_steps(prompt, text))
            / len(re.findall("[+-]", prompt)) / 2
            for score, prompt, text in zip(right, prompts, completions)]


def to_pairs(scored):
    """[(text, score), ...] -> [{chosen, rejected}, ...]."""
    scores = [score for _, score in scored]
    middle = (max(scores, default=0) + min(scores, default=0)) / 2
    better = [text for text, score in scored if score > middle]
    worse = [text for text, score in scored if score <= middle]
    return [dict(chosen=chosen, rejected=rejected) for chosen, rejected in zip(better, worse)]


def to_rankings(scored, prompt):
    """[(text, score), ...] -> [{completions}]; [] if there are no four, or all score the same."""
    scores = dict(scored)
    texts = list(scores)[:4]
    random.Random(str(prompt)).shuffle(texts)  # the likelier ones were sampled sooner
    if len(texts) < 4 or len({scores[text] for text in texts}) == 1:
        return []
    return [dict(completions=sorted(texts, key=scores.get, reverse=True))]


def make(cfg):
    cfg = check(cfg, min_group=2)
    if not cfg.out_dir:
        fail("--out_dir: name the folder that gets the pairs")
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    folder, generator = Path(cfg.out_dir), step_generator(cfg.seed, "preferences")
    folder.mkdir(parents=True)
    for split, part in problems._asdict().items():
        lines = []
        part = part[: cfg.prompts] if split == "train" else part
        for i in tqdm(range(0, len(part), 64), f"{split}, 64 prompts"):
            asked = part[i : i + 64]
            batch = sample(policy, tokenizer, [problem["ids"] for problem in asked],
                           cfg.group_size, cfg.max_new_tokens, cfg.temperature, generator)
            texts, scores, _ = score(rewards, asked, batch, tokenizer)
            answers = list(zip(texts, scores.tolist(), batch.finished.tolist()))
            for j, problem in enumerate(asked):
                ours = answers[j * cfg.group_size : (j + 1) * cfg.group_size]
                scored = [(text, score) for text, score, finished in ours if finished]
                row = {key: value for key, value in problem["row"].items()
                       if key not in ("completion", "completions", "chosen", "rejected")}
                found = to_rankings(scored, problem["prompt"]) if cfg.rankings else to_pairs(scored)
                if split != "train":
                    found = found[-1:] or [{}]
                lines += [json.dumps({**row, **pair}, default=str) + "\n" for pair in found]
        if not lines:
            fail("no two answers to a prompt were scored differently; take another --model or data")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    print(f"{folder} is ready for --data")


if __name__ == "__main__":
    main(Config, TOY, make)
