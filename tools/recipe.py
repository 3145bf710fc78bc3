"""
Newer algorithms as differences: recipes/NAME.diff changes one script. docs/recipes.md lists them.

    python -m tools.recipe gspo         writes gspo.py, a patched copy of grpo.py, and shows it
    python -m tools.recipe lora         writes grpo_lora.py
    python -m tools.recipe lora rloo    merges the same change into another script: rloo_lora.py
    python -m tools.recipe --refresh    after a script has changed, makes all differences anew

`git apply recipes/gspo.diff` changes the script itself. A new recipe: change a script, then type
`git diff grpo.py > recipes/NAME.diff` and `git checkout grpo.py`, write some lines on what it is
above the difference, which git ignores, and call --refresh.
"""
import argparse
import difflib
import re
import subprocess
import tempfile
from pathlib import Path

from plumbing.flags import fail

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r'(Run\(cfg, ")(\w+)"')  # of the run, and so of the copy
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.diff"))}


def parts(name):
    """-> the text on top, the name of the script that is changed, the difference."""
    text, mark, difference = RECIPES[name].read_text().partition("--- a/")
    return text.partition("diff --git")[0], difference.partition(".py\n")[0], mark + difference


def split(source):
    """-> a script's docstring, and its code."""
    docstring, mark, code = source[3:].partition('"""')
    return source[:3] + docstring + mark, code


def apply(name):
    """-> the script with the recipe's changes; None if they do not fit."""
    _, script, difference = parts(name)
    with tempfile.TemporaryDirectory() as folder:  # in a repository, git would look from its top
        path = Path(folder, f"{script}.py")
        path.write_text((ROOT / path.name).read_text())
        done = subprocess.run(["git", "apply"], cwd=folder, input=difference, text=True,
                              stderr=subprocess.DEVNULL)
        return None if done.returncode else path.read_text()


def merge(name, other):
    """-> another script with the recipe's changes of code, as git merges; None if they conflict."""
    changed = apply(name)
    if changed is None:
        return None
    sources = [(ROOT / f"{script}.py").read_text() for script in (other, parts(name)[1])]
    sources.append(changed)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, kind) for kind in ("ours", "base", "theirs")]
        for path, source in zip(paths, sources):  # the line that all three have in another way:
            path.write_text(NAME.sub(rf'\1{other}_{name}"', split(source)[1]))
        done = subprocess.run(["git", "merge-file", "-p", *paths], capture_output=True, text=True)
    return None if done.returncode else split(sources[0])[0] + done.stdout


def difference(old, new, script):
    """A unified diff of two texts of a script, as git writes it."""
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True),
                                        f"a/{script}.py", f"b/{script}.py"))


def refresh(name):
    """Make the difference anew -> what was done, None if it does not fit any more."""
    text, script, old = parts(name)
    changed = apply(name)
    if changed is None:
        return None
    new = difference((ROOT / f"{script}.py").read_text(), changed, script)
    RECIPES[name].write_text(text + new)
    return "as it was" if new == old else "made anew"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=", ".join(RECIPES))
    parser.add_argument("script", nargs="?", help="another script to change")
    parser.add_argument("--refresh", action="store_true", help="make all differences anew")
    args = parser.parse_args()
    if args.refresh:
        found = {name: refresh(name) for name in RECIPES}
        for name, done in found.items():
            why = f"needs a hand: it does not fit {parts(name)[1]}.py as it is now"
            print(f"recipes/{name}.diff: {done or why}")
        raise SystemExit(None in found.values())
    if args.name not in RECIPES:
        fail(f"{args.name}: choose one of {', '.join(RECIPES)}, or --refresh")
    text, script, shown = parts(args.name)
    other = re.sub(r"\.py$", "", args.script or script)
    if not (ROOT / f"{other}.py").exists():
        fail(f"{other}.py: there is no such script")
    changed = apply(args.name) if other == script else merge(args.name, other)
    if changed is None:
        fail(f"recipes/{args.name}.diff does not fit {other}.py; change it by hand")
    path = ROOT / f"{NAME.search(changed)[2]}.py"
    if path.exists() and path.read_text() != changed:
        fail(f"{path}: it is there, and has been changed; move it away")
    path.write_text(changed)
    print(text + (shown if other == script else difference(
        (ROOT / f"{other}.py").read_text(), changed, other)))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
