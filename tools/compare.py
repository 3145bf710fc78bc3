"""
All scripts from one starting policy, on the same budget: the tables of docs/results.md.

    python -m tools.compare                                   the toy: 45 minutes on 2 cores
    python -m tools.compare --scripts rloo grpo --kl_coef 0   other flags go to every script

Each run is a process of its own, one after the other, in runs/compare. A run that is there already,
with the same flags, is not repeated, so that the same command goes on where it was stopped. All
runs start from the toy's policy, or from --model; a seed is the order of the prompts and all
sampling. ReMax spends half of its completions on greedy decoding. DPO and ORPO do not sample while
they learn: their completions are those that their data was made of.

The trained model of each run then answers each test problem eight times (tools/table.py). Two
scripts are compared by the share of right answers, seed by seed: a paired t interval over the
seeds.
"""
import argparse
import functools
import importlib
import itertools
import json
import math
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.data import read
from plumbing.flags import fail
from plumbing.rewards import read_number
from plumbing.run import read_log
from tools.table import solve

SCRIPTS = ("reinforce", "reinforce_pp", "trpo", "ppo", "remax", "rloo", "grpo", "prime", "raft",
           "dpo", "orpo")
PAIRS_OF = 1920 * 8  # completions that plumbing/toy_pairs/ is made of


def run(script, seed, flags):
    """Train and draw, unless that was done before -> what the run's folder says."""
    same = f"{zlib.crc32(' '.join(flags).encode()):08x}"
    folder = Path("runs", "compare", same, f"{script}-seed{seed}")
    if not (folder / "test.json").exists():
        command = [sys.executable, Path(__file__).parents[1] / f"{script}.py"]
        new = [*flags, "--seed", str(seed), "--out_dir", folder]
        command += ["--resume", folder] if (folder / "config.json").exists() else new
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"error: {script}.py failed: {done.stderr.strip()[-500:]}")
    test = json.loads((folder / "test.json").read_text())
    log = read_log(folder / "metrics.jsonl")
    cfg = json.loads((folder / "config.json").read_text())
    if "group_size" in cfg:  # of each prompt K samples, and ReMax's greedy completion
        completions = len(log) * cfg["prompts_per_step"] * (cfg["group_size"] + (script == "remax"))
    else:
        completions = PAIRS_OF
    solved = solve(folder, cfg["data"], cfg["eval_prompts"])["sampled"]
    measured = [row["kl"] for row in log[-5:]] if cfg.get("kl_coef") or script == "prime" else []
    return dict(completions=completions, before=test["before"]["sampled"][0], solved=solved,
                greedy=test["after"]["greedy"][0], length=test["after"]["length"][0],
                kl=sum(measured) / len(measured) if measured else None,
                seconds=sum(row["time_step"] for row in log))


@functools.cache
def t_quantile(level, degrees):
    """The t within which Student's distribution of so many degrees of freedom lies with P = level.

    With t = sqrt(degrees) * tan(angle), its density is proportional to cos(angle)^(degrees - 1).
    """
    angles = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angles.cos() ** (degrees - 1), angles)
    return degrees**0.5 * angles[1 + torch.searchsorted(mass / mass[-1], level)].tan().item()


def interval(values, level=0.95):
    """One number for each of S seeds -> the t interval of their mean, (low, high).

    The seed is the unit: problems and draws are not counted, because those of one run are not
    independent. So it says how much other seeds would differ on the same problems.
    """
    mean, error = values.mean().item(), values.std().item() / len(values) ** 0.5
    margin = t_quantile(level, len(values) - 1) * error
    return mean - margin, mean + margin


def line(script, runs, shares):
    """One row: means over the seeds, what each seed gave, and the seconds of the fastest run."""
    def mean(key):
        return sum(r[key] for r in runs) / len(runs)
    low, high = interval(shares)
    each = ", ".join(f"{share:.3f}" for share in shares)
    kl = "" if runs[0]["kl"] is None else f"{mean('kl'):.2f}"
    return (f"| {script}.py | {mean('completions'):,.0f} | {mean('before'):.3f} "
            f"| **{shares.mean():.3f}** ({each}) | {low:.3f}-{high:.3f} "
            f"| {mean('greedy'):.3f} | {kl} | {mean('length'):.1f} "
            f"| {min(r['seconds'] for r in runs):.0f} |")


def pairs(scripts, shares):
    """A table of the paired differences, best script first; shares (A scripts, S seeds)."""
    order = shares.mean(1).argsort(descending=True).tolist()
    count = len(scripts) * (len(scripts) - 1) // 2
    print(f"\nShare of right answers, row minus column, in thousandths: {count} comparisons.\n"
          "*: the 95 % t interval of the difference, paired by seed, excludes 0. **: so does the\n"
          f"interval at 100 - 5 / {count} %, which allows for the number of comparisons. Both are\n"
          "about other seeds on the same problems.\n")
    print("| | " + " | ".join(scripts[j] for j in order[1:]) + " |\n" + "|---" * len(order) + "|")
    for i, better in enumerate(order[:-1]):
        cells = [""] * i
        for worse in order[i + 1 :]:
            apart = shares[better] - shares[worse]  # (S,)
            stars = ""
            for level in (0.95, 1 - 0.05 / count):
                low, high = interval(apart, level)
                stars += "*" * (low > 0 or high < 0)
            cells.append(f"{1000 * apart.mean():+.0f}{stars}")
        print(f"| {scripts[better]} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5],
                        help="one run of each script for each")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, metavar="NAME",
                        help="of scripts, or of copies by tools.recipe; without .py")
    parser.add_argument("--data", help="as in the scripts; its answers must be numbers")
    args, flags = parser.parse_known_args()
    args.seeds, args.scripts = (list(dict.fromkeys(given)) for given in (args.seeds, args.scripts))
    if len(args.seeds) < 2:
        fail("--seeds: name two or more, because the intervals come from how much they differ")
    if args.data:
        flags += ["--data", args.data]
        rows = sum(read(args.data, 8).values(), [])
        if any(read_number(row.get("answer")) is None for row in rows):
            fail(f"--data {args.data}: not all rows have an answer that is a number, to compare by")
    for script in args.scripts:  # not after twenty minutes
        if not (Path(__file__).parents[1] / f"{script}.py").exists():
            fail(f"--scripts {script}: there is no {script}.py; python -m tools.recipe may make it")
        config = importlib.import_module(script).Config
        known = {field.name for field in fields(config) if field.init}  # trpo.py: no --lr
        for flag in (flag for flag in flags if flag.startswith("--")):
            name = flag[2:].partition("=")[0].replace("-", "_")
            if name in ("seed", "out_dir", "resume"):
                fail(f"{flag}: tools.compare chooses it for each run; --seeds names the seeds")
            if name not in known:
                fail(f"{flag}: {script}.py has no such flag; name --scripts that have it")
    found = {script: [] for script in args.scripts}
    bar = tqdm(itertools.product(args.seeds, args.scripts), dynamic_ncols=True,
               total=len(args.seeds) * len(args.scripts))
    for seed, script in bar:  # the scripts take turns: a busy hour of the machine hits all of them
        bar.set_description(f"{script}, seed {seed}")
        found[script].append(run(script, seed, flags))
    solved = torch.tensor([[r["solved"] for r in runs] for runs in found.values()]).double()
    shares = solved.mean((2, 3))  # (A scripts, S seeds)
    print("| script | completions | before | after: mean (each seed) | its 95 % interval | greedy "
          "| KL | length | seconds |\n" + "|---" * 9 + "|")
    for i, (script, runs) in enumerate(found.items()):
        print(line(script, runs, shares[i]))
    if len(found) > 1:
        pairs(list(found), shares)


if __name__ == "__main__":
    main()
