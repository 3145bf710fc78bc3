"""The command line: what a user types -> the config of a script; and how a run that fails ends."""
import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch
from transformers.hf_argparser import HfArgumentParser

from plumbing.flags import fail
from plumbing.parallel import rank
from plumbing.run import Run
from plumbing.toy import is_toy


def main(config_class, toy_defaults, train):
    """What `python SCRIPT.py ...` does: flags -> config -> train(config)."""
    for name in ("stdout", "stderr"):  # one may be closed, or lack a character
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    parser = HfArgumentParser(config_class, allow_abbrev=False,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description=sys.modules["__main__"].__doc__)
    parser.error = lambda message: fail(f"{message}; see --help")
    for action in parser._actions[1:]:
        toy = f"; toy: {toy_defaults[action.dest]}" if action.dest in toy_defaults else ""
        action.help = f"{action.help} (default: {action.default}{toy})".replace("%", "%%")
    typed = parser.parse_args()
    if typed.resume:
        parser.set_defaults(**read_config(typed.resume, config_class))
    elif is_toy(typed.model):
        parser.set_defaults(**toy_defaults)
    cfg = config_class(**vars(parser.parse_args()))
    try:
        train(cfg)
    except KeyboardInterrupt:
        fail("stopped", code=130)
    except OSError as error:  # a full disk, a screen that was closed
        fail(error, code=1)
    except RuntimeError as error:
        if "gloo/transport" in str(error) or "NCCL" in str(error):
            fail(f"another process has ended, or is not reached: {str(error)[:200]}", code=1)
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        fail(f"out of memory: halve --micro_batch_size {cfg.micro_batch_size}, which changes no "
             "result, then the prompts of a step", code=1)
    finally:
        if Run.unfinished and rank() == 0:
            print(f"to go on from the last checkpoint: python {shlex.quote(sys.argv[0])} --resume "
                  f"{shlex.quote(Run.unfinished)}", file=sys.stderr)


def read_config(folder, config_class):
    """The flags of the run in a folder, which are the defaults of --resume."""
    try:
        saved = json.loads(Path(os.path.expanduser(folder), "config.json").read_text())
        del saved["script"], saved["checksum"]  # run.py looks at these
        config_class(**saved)
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"--resume {folder}: no config.json of a run of this script is in it ({error})")
    return saved
