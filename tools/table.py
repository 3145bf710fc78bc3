"""
Finished runs, side by side: each model answers the same held-out problems several times.

    python -m tools.table runs/real/sft runs/real/*-seed1    pass@1, pass@8, greedy, ... of each run
    python -m tools.table runs/grpo runs/rloo                any runs, whatever they learned from

pass@1 is the share of right answers, and pass@8 the share of problems of which at least one of
eight answers is right. The 95 % intervals are over the problems. They say what other problems would
give for the same models; another seed makes another model, which may differ by more. The last
column is paired by problem: this run minus the first one, so name the start of all runs first.

What a model answered is kept in its run's folder, as solved.json, and not asked again.
"""
import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path
from statistics import mean

import torch

from plumbing.data import load_problems
from plumbing.evaluation import interval, look
from plumbing.flags import fail
from plumbing.model import load_policy
from plumbing.rewards import last_number
from plumbing.rollout import step_generator
from plumbing.run import read_log

DRAWS = 8  # sampled answers to each problem


def solve(folder, data, n):
    """The model of a run answers n test problems -> dict of lists, also kept in solved.json.

    sampled: for each problem, DRAWS zeros and ones; greedy: for each, one; texts and lengths: of
    the sampled answers.
    """
    file, asked = folder / "solved.json", dict(data=data, n=n)
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.items() >= asked.items():
        return found
    saved = json.loads((folder / "config.json").read_text())
    script = importlib.import_module(saved.pop("script"))
    del saved["checksum"]
    cfg = script.Config(**saved | dict(data=data, eval_prompts=n))
    with contextlib.redirect_stdout(sys.stderr):  # the table is all that goes to stdout
        policy, tokenizer = load_policy(str(folder), cfg.device)
        problems = load_problems(cfg, policy, tokenizer).test
    judges, generator = {"exact": {"last_number": last_number}}, step_generator(0, "compare")
    sampled = look(policy, tokenizer, problems, cfg, judges, 1.0, generator, DRAWS)
    greedy = look(policy, tokenizer, problems, cfg, judges, 0.0, generator)
    found = dict(asked, sampled=torch.tensor(sampled["exact"]).view(-1, DRAWS).int().tolist(),
                 greedy=greedy["exact"], texts=sampled["texts"], lengths=sampled["lengths"])
    file.write_text(json.dumps(found))
    del policy
    torch.cuda.empty_cache()  # for the next run, which may be another process
    return found


def line(folder, found, first):
    """One row of the table: what the model answered, and what the log says."""
    log = read_log(folder / "metrics.jsonl")
    logged = [row["kl"] for row in log[-5:] if row.get("kl")]  # 0: it was not measured
    right = torch.tensor(found["sampled"]).double()            # (n, DRAWS)
    cells = [folder.name, "**{:.3f}** [{:.3f}, {:.3f}]".format(*interval(right.mean(1).tolist())),
             f"{right.amax(1).mean():.3f}", f"{mean(found['greedy']):.3f}",
             f"{mean(['=' in text for text in found['texts']]):.2f}",
             f"{mean(found['lengths']):.1f}", f"{mean(logged):.2f}" if logged else "",
             f"{sum(row['time_step'] for row in log):.0f}"]
    if first:
        apart = right.mean(1) - torch.tensor(first["sampled"]).double().mean(1)
        cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(apart.tolist())))
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--data", default="words", help="as in the scripts; answers are numbers")
    parser.add_argument("--eval_prompts", type=int, default=256, help="test problems, at most")
    args = parser.parse_args()
    runs = [folder for folder in args.runs if (folder / "test.json").exists()
            and json.loads((folder / "config.json").read_text())["script"] != "reward_model"]
    if not runs:
        fail(f"{args.runs[0]}: none of these is the folder of a policy's finished run")
    print("| run | pass@1 | pass@8 | greedy | shows work | length | KL | seconds "
          "| minus the first |\n" + "|---" * 9 + "|")
    first = None
    for folder in runs:
        found = solve(folder, args.data, args.eval_prompts)
        print(line(folder, found, first), flush=True)
        first = first or found


if __name__ == "__main__":
    main()
