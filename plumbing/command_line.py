"""
The command line: what a user types -> the config of a script.

The defaults in a script's Config are the toy's. Those for a real model stand in its REAL, and one
rule makes them smaller on a CPU. A Config that is made in Python stands as it is.
"""
import argparse
import contextlib
import os
import sys
import textwrap

import torch
from transformers.hf_argparser import HfArgumentParser

from plumbing import toy
from plumbing.flags import fail, find_device
from plumbing.model import load_tokenizer
from plumbing.run import Run


class FlagHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help prints the script's docstring as it stands, and the default of every flag."""


class Screen:
    """stdout or stderr without errors: a closed pipe, or a character that the terminal cannot show,
    must not end a run.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


UNTYPED = object()  # the default of a flag while we ask which ones were typed


def main(config_class, real, train):
    """What `python SCRIPT.py ...` does: flags -> config -> train(config)."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    parser = HfArgumentParser(
        config_class, allow_abbrev=False, formatter_class=FlagHelp,
        description=sys.modules["__main__"].__doc__,
        epilog=describe_defaults(config_class, real))
    parser.error = lambda message: fail(f"{message}; see --help")
    flags, unknown = parser.parse_known_args()
    if unknown:
        fail(f"there is no flag {unknown[0]}; see --help")
    parser.set_defaults(**dict.fromkeys(vars(flags), UNTYPED))
    typed = {key: value for key, value in vars(parser.parse_args()).items() if value is not UNTYPED}
    for key, value in typed.items():
        if value == "":
            fail(f"--{key}: it is empty; give it a value, or leave it out")
    try:
        cfg = choose(config_class, typed, real)
        train(cfg)
    except RuntimeError as error:
        if "non-finite" in str(error):  # of clip_grad_norm_
            fail(f"in step {Run.step}, a gradient is nan or infinite; the last checkpoint, if any, "
                 "is kept; take a smaller --lr or --max_grad_norm", code=1)
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        fail(f"out of memory: halve --micro_batch_size (it is {cfg.micro_batch_size}), which "
             "changes no result, then the prompts of a step; the last checkpoint is kept", code=1)
    except KeyboardInterrupt:
        fail("the last checkpoint, if there is one, is kept", code=130)


def choose(config_class, typed, real):
    """A value for every flag: the one typed, else the default for the toy or for a real model.

    What decides is the model, not the data: whether its tokenizer is the toy's.
    """
    cfg, device = config_class(**typed), find_device(typed.get("device"))
    if cfg.model and not toy.is_toy(load_tokenizer(cfg.model)[0]):
        real, why = for_a_gpu(real), "defaults for a real model"
        if device == "cpu":
            real = for_a_cpu(config_class, real)
            why += " on a CPU, small because it is slow"
        chosen = {key: value for key, value in real.items() if key not in typed}
        cfg = config_class(**chosen, **typed)
        print(f"{why}: " + " ".join(f"{key}={value}" for key, value in chosen.items()))
    if hasattr(cfg, "group_size"):  # a step has as many completions as by default
        completions = cfg.prompts_per_step * config_class().group_size
        if getattr(cfg, "group_baseline", False) and "group_size" not in typed:
            cfg.group_size = 4
        K = max(1, cfg.group_size)  # if it is 0, check_ranges() says so
        if "prompts_per_step" not in typed:
            cfg.prompts_per_step = max(1, completions // K)
        if "minibatch_size" not in typed and cfg.minibatch_size:
            cfg.minibatch_size = max(K, min(cfg.minibatch_size, cfg.prompts_per_step * K))
    return cfg


def for_a_gpu(real):
    """A real model's defaults, where they differ from those in Config."""
    return {"data": "words", **real}


def for_a_cpu(config_class, real):
    """A real model's defaults -> those for a CPU: fewer, smaller steps, each ten times as far."""
    at_most = dict(steps=15, max_new_tokens=48, eval_prompts=64, prompts=32)
    small = for_a_gpu(real)
    for key, value in {**vars(config_class()), **real}.items():
        if value is None:  # no flag of this script
            continue
        if key in at_most:
            small[key] = min(at_most[key], value)
        elif key in ("prompts_per_step", "minibatch_size"):
            small[key] = value // 8
        elif key in ("lr", "critic_lr", "prm_lr"):
            small[key] = float(f"{10 * value:.2g}")
    return small


def describe_defaults(config_class, real):
    """The end of --help."""
    def written(values):
        return textwrap.fill(" ".join(f"--{key} {value}" for key, value in values.items()), 96,
                             initial_indent="    ", subsequent_indent="    ",
                             break_on_hyphens=False)
    return ("The defaults above are the toy's. Others for a real model on a GPU, and on a CPU:\n"
            f"{written(for_a_gpu(real))}\n\n{written(for_a_cpu(config_class, real))}")
