"""
Learning curves of one or several runs, from their metrics.jsonl. Needs matplotlib, which is in
requirements-dev.txt and nowhere else. Or, without it, the implicit reward of every token of a wrong
answer in a run of prime.py: of those with most steps in samples.jsonl, the one with the lowest sum.

    python -m tools.plot runs/ppo runs/grpo --keys score length kl --out curves.svg
    python -m tools.plot runs/prime --tokens --out tokens.svg
"""
import argparse
import html
import json
import os
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


def tokens(folder):
    """-> an SVG: the prompt, then each token in a box, blue if its reward is above 0, red below."""
    path = Path(folder, "samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    wrong = [row for row in rows if row["score"] == 0 and "token_rewards" in row]
    if not wrong:
        sys.exit(f"error: --tokens: no wrong answer with token_rewards in {path}; name a run of "
                 "prime.py")
    row = max(wrong, key=lambda row: (row["completion"].count(","),
                                      -sum(q for _, q in row["token_rewards"])))
    largest = max(abs(q) for _, q in row["token_rewards"]) or 1.0
    prompt, x = html.escape(str(row["prompt"])), 14 + 9 * len(str(row["prompt"]))
    parts = [f'<text x="8" y="24" font-size="15">{prompt}</text>']
    for token, q in row["token_rewards"]:
        width = 10 + max(9 * len(token), 26)
        parts += [f'<rect x="{x}" y="6" width="{width}" height="44" stroke="#bbb" fill="'
                  f'{"#2166ac" if q > 0 else "#b2182b"}" fill-opacity="{abs(q) / largest:.2f}"/>',
                  f'<text x="{x + 5}" y="24" font-size="15">{html.escape(token)}</text>',
                  f'<text x="{x + 3}" y="44" font-size="9">{q:+.3f}</text>']
        x += width
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{x + 8}" height="56" '
            'font-family="monospace"><rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def draw(args):
    """One panel for each of --keys, one line in it for each run."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--keys", nargs="+", default=["score", "length", "kl"], help="what to draw")
    parser.add_argument("--tokens", action="store_true", help="token rewards instead of curves")
    parser.add_argument("--out", default="curves.svg", help="picture to write: svg, png or pdf")
    args = parser.parse_args()
    args.out = os.path.expanduser(args.out)
    if args.tokens:
        Path(args.out).write_text(tokens(args.runs[0]))
    else:
        draw(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
