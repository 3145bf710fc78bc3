"""
The flags that all scripts share, what their numbers may be, and how a run is refused.
"""
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Optional

import torch
from transformers.hf_argparser import HfArg


@dataclass
class RunConfig:
    """The flags of every script, with defaults for the toy. REAL in each script has a real model's.
    """

    model: Optional[str] = HfArg(default=None, help="folder of a model or of a run, or name on the "
                                                    "hub; None: the toy's model")
    data: str = HfArg(default="toy", help="toy, words, or your own: a .jsonl file, a folder, or a "
                                          "name[:configuration] on the hub")
    steps: int = HfArg(default=60, help="training steps")
    lr: float = HfArg(default=2e-4, help="AdamW learning rate at its peak")
    warmup_steps: int = HfArg(default=0, help="steps in which the learning rate rises to its peak")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    minibatch_size: int = HfArg(default=64, help="completions per optimizer step")
    micro_batch_size: int = HfArg(default=64, help="completions per pass; changes no result")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory")
    max_new_tokens: int = HfArg(default=32, help="longest completion, in tokens")
    compile: bool = HfArg(default=False, help="sample with torch.compile; for a GPU")
    log_every: int = HfArg(default=5, help="steps between printed lines and kept samples")
    eval_every: int = HfArg(default=0, help="steps between evaluations on validation data; 0: none")
    eval_prompts: int = HfArg(default=512, help="held-out prompts per evaluation")
    save_every: int = HfArg(default=20, help="steps between checkpoints")
    seed: int = HfArg(default=1, help="seed of all random numbers")
    device: Optional[str] = HfArg(default=None, help="cpu or cuda; None: cuda if present")
    out_dir: Optional[str] = HfArg(default=None, help="folder of the run; None: runs/SCRIPT, "
                                                      "numbered if it exists")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in the folder of the run")
    data_checksum: Optional[int] = field(default=None, init=False)  # no flag: load_problems sets it


class Failure(SystemExit):
    """Raised by fail(), which has printed the reason."""


def fail(message, code=2):
    """Stop with one sentence, no traceback. Code 2: wrong input; 1: it happened on the way."""
    print("stopped:" if code == 130 else "error:", *str(message).splitlines(), file=sys.stderr)
    raise Failure(code)


# A number must be above 0, except where 0 has a meaning; and some have an upper end.
ZERO_IS_FINE = set("lr critic_lr prm_lr warmup_steps critic_warmup weight_decay eval_every seed "
                   "kl_coef reward_clip gamma lam decay beta damping accuracy_filter".split())
AT_MOST = dict(gamma=1, lam=1, decay=1, backtrack=1, fisher_fraction=1, accuracy_filter=0.5) | \
    dict.fromkeys(("max_grad_norm", "clip_eps", "value_clip", "reward_clip"), math.inf)


def check_ranges(cfg):
    """Every number among the flags."""
    for key, value in vars(cfg).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if key in ZERO_IS_FINE and not value >= 0:  # `not`, because nan is refused, too
            fail(f"--{key} {value}: it must be at least 0")
        if key not in ZERO_IS_FINE and not value > 0:
            fail(f"--{key} {value}: it must be above 0")
        highest = AT_MOST.get(key, 2**63 - 1)
        if value > highest:
            fail(f"--{key} {value}: it must be at most {highest}")
    if hasattr(cfg, "group_size"):
        check_groups(cfg)


def check_groups(cfg):
    """The completions of a prompt, and how many of them fit into a mini-batch."""
    K, batch = cfg.group_size, cfg.prompts_per_step * cfg.group_size
    compares = type(cfg)().group_size > 1 or getattr(cfg, "group_baseline", False)
    if compares and K == 1:
        fail("--group_size 1: completions of a prompt are compared with each other; take 4, say")
    if cfg.minibatch_size and not K <= cfg.minibatch_size <= batch:
        fail(f"--minibatch_size {cfg.minibatch_size}: it must be at least a group of --group_size "
             f"{K}, and at most the {batch} completions of a step (--prompts_per_step groups)")


def find_device(name):
    """--device, checked; None: a GPU if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(f"--device {name}: choose cpu or cuda")
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and number >= torch.cuda.device_count():
        fail(f"--device {name}: torch sees {torch.cuda.device_count() or 'no'} GPU on this "
             "machine; use --device cpu")
    return name
