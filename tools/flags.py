"""
Write docs/flags.md, the page of flags, from the Config and the REAL of every script.

    python -m tools.flags
"""
import importlib
import typing
from dataclasses import fields
from pathlib import Path

from plumbing.command_line import for_a_cpu, for_a_gpu

SCRIPTS = ("sft", "reward_model", "reinforce", "reinforce_pp", "ppo", "trpo", "rloo", "grpo",
           "remax", "prime", "raft", "dpo", "orpo")
PAGE = Path(__file__).parents[1] / "docs" / "flags.md"

TEXT = """# What flags are there, and what are their defaults?

`python SCRIPT.py --help` lists the flags of a script. The table below lists those of all scripts.
`python -m tools.flags` writes this page. `-` and `_` are the same in flags.

Some defaults have three values: for the toy's model, for a real model on a GPU, and for a real
model on a CPU. A real model is one whose vocabulary is not the toy's, whatever `--data` is.
Its defaults are in `REAL` in each script. On a CPU, one rule makes them smaller: `for_a_cpu` in
[command_line.py](../plumbing/command_line.py). A run prints the values that were chosen. A `Config`
that is made in Python has the toy's defaults.

- With another `--group_size`, the number of completions in a step stays the same: the default of
  `--prompts_per_step` is adapted.
- With `--group_baseline`, `--group_size` is 4 by default, and `--reward_clip` and `--gamma` are not
  used.
- `--minibatch_size` is rounded down to whole groups. In raft.py it counts all sampled
  completions, not only the best ones.
- The learning rate falls linearly from its peak to a tenth of it.
- trpo.py does not use AdamW and has none of its flags.
- dpo.py, orpo.py and reward_model.py train for `--epochs` passes over the data, unless `--steps` is
  given.

| flag | meaning | scripts | default: toy / GPU / CPU |
|---|---|---|---|
{rows}

- `--compile` needs torch 2.11. It compiles each shape of a batch once, in half a minute. It gains
  nothing on a CPU.
- `--out_dir` must not hold a run already, except with `--resume`. If the default folder exists, the
  run goes to `runs/SCRIPT-2`, and so on.
- `--accuracy_filter` is 0.2 in PRIME's paper. With 0, no prompt is left out.

Wrong input gets one sentence and exit code 2, before a model is trained or weights are loaded. If a
reward does something wrong later, the run stops there. `trust_remote_code` is off, so a model that
needs code of its own is refused.
"""


def defaults(script):
    """{flag: its default for the toy, for a real model on a GPU, and on a CPU}."""
    toy = vars(script.Config())
    gpu = {**toy, **for_a_gpu(script.REAL)}
    cpu = {**toy, **for_a_cpu(script.Config, script.REAL)}
    return {flag: (toy[flag], gpu[flag], cpu[flag]) for flag in toy}


def written(values):
    """The three defaults as text; as one if they are the same."""
    texts = []
    for value in values:
        if value is None:
            texts.append("none")
        elif isinstance(value, bool):
            texts.append("on" if value else "off")
        else:
            texts.append(f"{value:g}" if isinstance(value, float) else str(value))
    return " / ".join(texts) if len(set(texts)) > 1 else texts[0]


def named(scripts):
    """Which scripts have a flag, or a default."""
    missing = [name for name in SCRIPTS if name not in scripts]
    if not missing:
        return "all"
    if len(missing) < len(scripts):
        return "all but " + ", ".join(missing)
    return ", ".join(scripts)


def rows():
    """The lines of the table: a flag that means two things has two."""
    found = {}  # (flag, meaning) -> {script: default}
    for name in SCRIPTS:
        script = importlib.import_module(name)
        values = defaults(script)
        for field in fields(script.Config):
            if field.init:
                meaning = field.metadata["help"]
                if typing.get_origin(field.type) is typing.Literal:
                    meaning += ": " + " or ".join(typing.get_args(field.type))
                key = field.name, meaning
                found.setdefault(key, {})[name] = written(values[field.name])
    first = list(dict.fromkeys(flag for flag, _ in found))
    for flag, meaning in sorted(found, key=lambda key: first.index(key[0])):
        scripts = {}  # default -> the scripts that have it
        for name, default in found[flag, meaning].items():
            scripts.setdefault(default, []).append(name)
        usual = max(scripts, key=lambda default: len(scripts[default]))
        cells = [usual] + [f"{', '.join(names)}: {default}"
                           for default, names in scripts.items() if default != usual]
        yield (f"| `--{flag}` | {meaning} | {named(list(found[flag, meaning]))} "
               f"| {'; '.join(cells)} |")


def page():
    return TEXT.format(rows="\n".join(rows()))


if __name__ == "__main__":
    PAGE.write_text(page())
