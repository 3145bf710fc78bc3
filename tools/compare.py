"""
All scripts from one starting policy, on the same budget: the table of docs/results.md.

    python -m tools.compare --seeds 1 2 3                     the toy: about 20 minutes on 2 cores
    python -m tools.compare --scripts rloo grpo --kl_coef 0   other flags go to every script

Each run is a process of its own, one after the other, in runs/compare; one that is there already,
with the same flags, is not repeated. All start from the toy's policy, or from --model; a seed is
the order of the prompts and all sampling. ReMax spends half of its completions on greedy decoding.
DPO and ORPO sample nothing while they learn: theirs are those that their data was made of.
"""
import argparse
import importlib
import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path

from plumbing.flags import fail
from plumbing.preferences import SAMPLES

SCRIPTS = ("reinforce", "reinforce_pp", "trpo", "ppo", "remax", "rloo", "grpo", "prime", "raft",
           "dpo", "orpo")


def run(script, seed, flags):
    """Train, unless that was done before -> what the run's folder says."""
    same = f"{zlib.crc32(' '.join(flags).encode()):08x}"
    folder = Path("runs", "compare", same, f"{script}-seed{seed}")
    if not (folder / "test.json").exists():
        print(f"{script}, seed {seed}: {folder}", file=sys.stderr)
        command = [sys.executable, Path(__file__).parents[1] / f"{script}.py", *flags]
        command += ["--seed", str(seed), "--out_dir", folder]
        if (folder / "checkpoint.pt").exists():
            command.append("--resume")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before there was anything to keep
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"error: {script}.py failed; what it printed is above")
    test = json.loads((folder / "test.json").read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (before, *_), after = test["before"]["sampled"], test["after"]["sampled"]
    seconds = [sum(row.get(key, 0) for row in log)
               for key in ("time_sample", "time_score", "time_update")]
    cfg = json.loads((folder / "config.json").read_text())
    if "group_size" in cfg:  # of each prompt K samples, and ReMax's greedy completion
        completions = len(log) * cfg["prompts_per_step"] * (cfg["group_size"] + (script == "remax"))
    else:
        completions = cfg["prompts"] * SAMPLES
    reference = cfg.get("kl_coef") or script == "prime"
    measured = [row["kl"] for row in log[-5:]] if reference else []
    return dict(completions=completions, before=before, after=after[0], low=after[1], high=after[2],
                greedy=test["after"]["greedy"][0], length=test["after"]["length"][0],
                kl=sum(measured) / len(measured) if measured else None, seconds=seconds,
                memory=test["peak_memory"] / 1e6)


def line(script, runs):
    """One row: means over the seeds, and what each seed gave."""
    def mean(key):
        return sum(r[key] for r in runs) / len(runs)
    each = ", ".join(f"{r['after']:.3f}" for r in runs)
    sample, score, update = (sum(r["seconds"][i] for r in runs) / len(runs) for i in range(3))
    kl = "" if runs[0]["kl"] is None else f"{mean('kl'):.2f}"
    return (f"| {script}.py | {mean('completions'):,.0f} | {mean('before'):.3f} "
            f"| **{mean('after'):.3f}** ({each}) | {mean('low'):.3f}-{mean('high'):.3f} "
            f"| {mean('greedy'):.3f} | {kl} | {mean('length'):.1f} | {sample:.0f} | {score:.0f} "
            f"| {update:.0f} | {mean('memory'):.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME")
    args, flags = parser.parse_known_args()
    for script in args.scripts:  # not after twenty minutes
        config = importlib.import_module(script).Config
        known = {field.name for field in fields(config) if field.init}  # trpo.py: no --lr
        for flag in (flag for flag in flags if flag.startswith("--")):
            if flag[2:].partition("=")[0].replace("-", "_") not in known:
                fail(f"{flag}: {script}.py has no such flag; name --scripts that have it")
    found = {script: [] for script in args.scripts}
    for seed in args.seeds:  # the scripts take turns: a busy hour of the machine hits all of them
        for script in args.scripts:
            found[script].append(run(script, seed, flags))
    print("| script | completions | before | after: mean (each seed) | its 95 % interval | greedy "
          "| KL | length | s sampling | s scoring | s updating | peak MB |\n" + "|---" * 12 + "|")
    for script, runs in found.items():
        print(line(script, runs))


if __name__ == "__main__":
    main()
