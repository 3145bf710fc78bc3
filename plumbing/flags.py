"""The flags that all scripts share, what they may be, and how a run is refused."""
import copy
import os
import sys
import time
from dataclasses import dataclass
from typing import Optional

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from plumbing.parallel import begin, rank
from plumbing.toy import KINDS, is_toy


@dataclass
class RunConfig:
    """The flags of every script. The defaults are for a real model on a GPU."""

    model: Optional[str] = HfArg(default=None, help="folder, run or hub name; None: the toy")
    data: Optional[str] = HfArg(default=None, help="toy, words, file, folder or hub name[:config]; "
                                "None: toy for the toy's model, else words")
    steps: int = HfArg(default=200, help="training steps")
    lr: float = HfArg(default=1e-6, help="AdamW learning rate at its peak")
    warmup_steps: int = HfArg(default=0, help="steps in which the learning rate rises to its peak")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    minibatch_size: int = HfArg(default=128, help="completions per optimizer step, at most")
    micro_batch_size: int = HfArg(default=8, help="completions per pass; changes no result")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory")
    max_new_tokens: int = HfArg(default=256, help="longest completion, in tokens")
    compile: bool = HfArg(default=False, help="sample with torch.compile; for a GPU")
    log_every: int = HfArg(default=5, help="steps between printed lines and kept samples")
    eval_every: int = HfArg(default=0, help="steps between evaluations on validation data; 0: none")
    eval_prompts: int = HfArg(default=256, help="held-out prompts per evaluation")
    save_every: int = HfArg(default=20, help="steps between checkpoints")
    seed: int = HfArg(default=1, help="seed of all random numbers")
    device: Optional[str] = HfArg(default=None, help="cpu or cuda; None: cuda if present")
    out_dir: Optional[str] = HfArg(default=None, help="new folder of the run; None: runs/SCRIPT")
    resume: Optional[str] = HfArg(default=None, help="folder of a run to go on with, by its flags")


@dataclass
class OnlineConfig(RunConfig):
    """The flags of every script that samples."""

    reward: str = HfArg(default="last_number", help="last_number, file.py:function or a reward "
                        "model's folder; several, with commas between, are added")
    prompts_per_step: int = HfArg(default=64, help="prompts of a step")
    group_size: int = HfArg(default=4, help="completions of each prompt, K")
    temperature: float = HfArg(default=1.0, help="sampling temperature; log-probs use it too")


def fail(message, code=2):
    """Stop with one sentence, no traceback. Code 2: wrong input; 1: it happened on the way."""
    if rank():  # mostly process 0 fails too, says so, and torchrun ends this one while it waits
        time.sleep(5)
        message = f"process {rank()}: {message}"
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)  # not into a bar
    sys.exit(code)


# A number must be above 0, except where 0 has a meaning; and some have an upper end.
ZERO_IS_FINE = set("lr critic_lr prm_lr warmup_steps critic_warmup weight_decay eval_every seed "
                   "kl_coef reward_clip gamma lam decay beta damping accuracy_filter".split())
AT_MOST = dict(gamma=1, lam=1, decay=1, backtrack=1, fisher_fraction=1, accuracy_filter=0.5)


def check(cfg, min_group=1):
    """Refuse what cannot work, before anything is loaded -> a copy of cfg to work with.

    In the copy, the device is found and paths are absolute. min_group: the smallest --group_size.
    """
    cfg = copy.copy(cfg)
    for key, value in vars(cfg).items():
        number = type(value) in (int, float)
        if value == "":
            fail(f"--{key}: it is empty; give it a value, or leave it out")
        if number and not (value > 0 or (value == 0 and key in ZERO_IS_FINE)):  # nan is refused
            fail(f"--{key} {value}: it must be {'at least' if key in ZERO_IS_FINE else 'above'} 0")
        if number and value > AT_MOST.get(key, value):
            fail(f"--{key} {value}: it must be at most {AT_MOST[key]}")
    if getattr(cfg, "group_size", min_group) < min_group:
        fail(f"--group_size {cfg.group_size}: it must be at least {min_group}, to compare answers")
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, dtype=torch.float64, device=cfg.device)  # the sampler needs fp64: no mps
        cfg.device = begin(cfg.device)
    except (RuntimeError, AssertionError, TypeError) as error:  # no such device; no CUDA; mps
        fail(f"--device {cfg.device}: {str(error).splitlines()[0]}; choose cpu or cuda")
    cfg.model = cfg.model and absolute(cfg.model)
    cfg.data = cfg.data or ("toy" if is_toy(cfg.model) else "words")
    cfg.data = cfg.data if cfg.data in KINDS else absolute(cfg.data)
    if hasattr(cfg, "reward"):
        cfg.reward = ",".join(split_rewards(cfg.reward))
    cfg.out_dir, cfg.resume = (name and os.path.abspath(os.path.expanduser(name))
                               for name in (cfg.out_dir, cfg.resume))
    if cfg.out_dir and not cfg.resume and os.path.lexists(cfg.out_dir):
        fail(f"--out_dir {cfg.out_dir}: it exists; name another, or --resume the run in it")
    return cfg


def absolute(name):
    """A file or folder that is there, with its whole path; any other name as it is."""
    path = os.path.abspath(os.path.expanduser(name))
    return path if os.path.exists(path) else name


def split_rewards(spec):
    """--reward -> its parts, with whole paths. A path may have commas if it is the only part."""
    file, colon, function = spec.strip().rpartition(":")
    if colon and "," not in function and os.path.exists(absolute(file)):
        return [f"{absolute(file)}:{function}"]
    if "," in spec and not os.path.exists(absolute(spec)):
        return [part for one in spec.split(",") for part in split_rewards(one)]
    return [absolute(spec.strip())]
