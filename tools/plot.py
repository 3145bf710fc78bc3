"""
Learning curves of one or several runs. Needs matplotlib: pip install matplotlib.

    python -m tools.plot runs/ppo runs/grpo --keys score length kl --out curves.svg
    python -m tools.plot runs/ppo --validation --keys sampled length

The first shows what metrics.jsonl says of training problems. The second shows what validation.jsonl
says of held-out problems, with 95 % intervals, if the run had --eval_every.
"""
import argparse
import os
from pathlib import Path

from plumbing.flags import fail
from plumbing.run import read_log


def read(folder, name):
    """The rows of a run's log, without lines that a crash has torn."""
    path = Path(folder, name)
    if not path.exists():
        fail(f"{path}: there is no such file; name folders of runs"
             + " with --eval_every" * (name == "validation.jsonl"))
    return read_log(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--keys", nargs="+", default=["score", "length", "kl"], help="what to draw")
    parser.add_argument("--validation", action="store_true", help="of held-out problems")
    parser.add_argument("--out", default="curves.svg", help="picture to write: svg, png or pdf")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        fail("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, len(args.keys), figsize=(3.6 * len(args.keys), 2.8), squeeze=False)
    for run in args.runs:
        rows = read(run, "validation.jsonl" if args.validation else "metrics.jsonl")
        known = ", ".join(rows[0]) if rows else "nothing yet"
        for key, axis in zip(args.keys, axes[0]):
            if not rows or key not in rows[0]:
                fail(f"--keys {key}: {run} logs {known}")
            label = f"\u200b{run}"  # matplotlib hides labels that begin with _
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            if args.validation and key != "n":  # the value, and its interval
                values, low, high = zip(*values)
                axis.fill_between(steps, low, high, alpha=0.2)
            axis.plot(steps, values, label=label)
            axis.set(title=key, xlabel="step")
            axis.grid(alpha=0.3)
    if len(args.runs) > 1:
        axes[0][0].legend(fontsize=8)
    pyplot.tight_layout()
    pyplot.savefig(os.path.expanduser(args.out))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
