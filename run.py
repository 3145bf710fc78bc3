"""
A run's folder: config.json, metrics.jsonl, samples.jsonl, checkpoint.pt, and its progress on screen.

Where an algorithm's script says run.steps(), run.lap(), run.log() and run.save(), this is all that
happens: counting, timing, one JSON line, one file. Nothing here touches the learning.
"""
import json
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from common import fail

# Flags that --resume lets differ from the run's own: where and how long it runs, and how often it reports.
MAY_CHANGE = {"steps", "device", "out_dir", "resume", "log_every", "eval_every", "save_every"}


def write_atomically(path, write):
    """Write to a neighbour, then rename: a kill at any moment leaves the old file or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


class Run:
    def __init__(self, cfg, name):
        self.cfg, self.first, self.stopping, self.times = cfg, 0, False, {}
        self.folder = find_folder(cfg, name)
        self.folder.mkdir(parents=True, exist_ok=True)
        cfg.out_dir = str(self.folder)
        text = json.dumps(asdict(cfg), indent=1)
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))
        print(f"{name}: " + " ".join(f"{k}={v}" for k, v in asdict(cfg).items()), flush=True)

    def steps(self):
        """Count the steps. Ctrl-C: finish this one, save it, say how to go on; again: stop at once."""
        def interrupt(signum, frame):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        handlers = {which: signal.signal(which, interrupt) for which in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.cfg.steps, initial=self.first, dynamic_ncols=True)
        for step in range(self.first, self.cfg.steps):
            self.mark = time.perf_counter()
            yield step
            self.bar.update()
            if self.stopping and step + 1 < self.cfg.steps:
                self.bar.close()
                fail(f"stopped after step {step + 1} of {self.cfg.steps}, which is saved; to go on: "
                     f"python {shlex.join(sys.argv)} --out_dir {self.folder} --resume", code=130)
        self.bar.close()
        for which, handler in handlers.items():
            signal.signal(which, handler)

    def lap(self, phase):
        """Book the seconds since the last lap as time_{phase} of this step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # GPU work is asynchronous: without this another phase would pay
        now = time.perf_counter()
        self.times[f"time_{phase}"], self.mark = now - self.mark, now

    def log(self, step, **metrics):
        """One JSON line a step; on screen the bar, and every --log_every steps a line."""
        metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()}
        total = sum(self.times.values())
        metrics.update(self.times, time_step=total, steps_per_s=1 / total)
        self.write("metrics.jsonl", step, **metrics)
        short = {k: f"{v:.3g}" for k, v in metrics.items() if not k.startswith("time")}
        self.bar.set_postfix({k: short[k] for k in ("score", "kl", "length", "loss") if k in short})
        if (step + 1) % self.cfg.log_every == 0:
            self.bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v}" for k, v in short.items()))

    def write(self, name, step, **fields):
        with open(self.folder / name, "a") as file:
            file.write(json.dumps({"step": step + 1, **fields}, ensure_ascii=False) + "\n")

    def save(self, step, **state):
        """checkpoint.pt, where it is due: every --save_every steps, at the last, and after Ctrl-C."""
        if self.stopping or (step + 1) % self.cfg.save_every == 0 or step + 1 == self.cfg.steps:
            state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
            state.update(step=step + 1, rng=(random.getstate(), torch.get_rng_state(), cuda))
            write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def load(self, **objects):
        """With --resume, checkpoint.pt into `objects` (all with load_state_dict); -> what it holds."""
        if not self.cfg.resume:
            return {}
        path = self.folder / "checkpoint.pt"
        state = torch.load(path, map_location="cpu", weights_only=False)
        for name, thing in objects.items():
            thing.load_state_dict(state[name])
        self.first = state["step"]
        random.setstate(state["rng"][0])
        torch.set_rng_state(state["rng"][1])
        if torch.cuda.is_available() and state["rng"][2]:
            torch.cuda.set_rng_state_all(state["rng"][2])
        for path in self.folder.glob("*.jsonl"):  # what came after the checkpoint will come again
            rows = [r for r in path.read_text().splitlines(True) if json.loads(r)["step"] <= self.first]
            write_atomically(path, lambda temporary: temporary.write_text("".join(rows)))
        return state


def find_folder(cfg, name):
    """--out_dir, or the first free one of runs/NAME, runs/NAME-2, ...; with --resume the last taken."""
    number, newest = 1, None
    while (folder := Path("runs", name if number == 1 else f"{name}-{number}")).exists():
        number, newest = number + 1, folder
    folder = Path(cfg.out_dir or (cfg.resume and newest) or folder)
    saved = (folder / "checkpoint.pt").exists()
    if cfg.resume and not saved:
        fail(f"--resume: there is no checkpoint in {folder}; name the folder of a run with --out_dir")
    if not cfg.resume and (saved or (folder / "model").exists()):
        fail(f"--out_dir: {folder} holds a run; add --resume to go on with it, or name another folder")
    if cfg.resume:
        before = json.loads((folder / "config.json").read_text())
        for key in sorted(before.keys() - MAY_CHANGE):
            if before[key] != getattr(cfg, key, None):
                fail(f"--{key} is {getattr(cfg, key, None)}, but the run to --resume in {folder} has "
                     f"{before[key]}: use its value, or start a new run in another --out_dir")
    return folder
