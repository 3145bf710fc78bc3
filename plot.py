"""
Learning curves of one or several runs, from their metrics.jsonl. Needs matplotlib, which is in
requirements-dev.txt and nowhere else.

    python plot.py runs/reinforce_pp runs/reinforce_pp-2 --keys score length kl --out curves.svg
"""
import argparse
import json
import sys
from pathlib import Path


def read(folder):
    """-> {key: ([step, ...], [value, ...])} of a run folder."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        sys.exit(f"error: there is no {path}; name folders of runs")
    curves = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for key in row:
            steps, values = curves.setdefault(key, ([], []))
            steps.append(row["step"])
            values.append(row[key])
    return curves


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--keys", nargs="+", default=["score", "length", "kl"], help="what to draw")
    parser.add_argument("--out", default="curves.svg", help="picture to write: svg, png or pdf")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: drawing needs matplotlib: pip install -r requirements-dev.txt")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {folder: read(folder) for folder in args.runs}
    _, axes = pyplot.subplots(1, len(args.keys), figsize=(3.6 * len(args.keys), 2.8), squeeze=False)
    for key, axis in zip(args.keys, axes[0]):
        for folder, curves in runs.items():
            if key not in curves:
                sys.exit(f"error: --keys {key}: {folder} logs {', '.join(curves)}")
            axis.plot(*curves[key], label=Path(folder).name, linewidth=1.2)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0][0].legend(fontsize=8)
    pyplot.tight_layout()
    pyplot.savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
