"""
A run: its folder (config.json, metrics.jsonl, samples.jsonl, validation.jsonl, checkpoint.pt,
test.json, model/) and its screen.

Where a script says run.open(), run.steps(), run.lap(), run.log(), run.show(), run.end_step() and
run.close(), files, times and evaluations are looked after. Nothing here learns.
"""
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.evaluation import evaluate, report
from plumbing.flags import check_ranges, fail, find_device
from plumbing.model import check_saving, checkpoint_activations, save_policy
from plumbing.rollout import compile_decoding, use_bf16

# What --resume lets differ from the run's own: where, how long and in how much memory it runs, how
# often it reports. The data's checksum is compared on its own, when the data has been read.
MAY_CHANGE = {"steps", "device", "out_dir", "resume", "log_every", "eval_every", "save_every",
              "micro_batch_size", "gradient_checkpointing", "compile", "data_checksum"}

LOGS = "metrics.jsonl", "samples.jsonl", "validation.jsonl"
QUIET = "score_std", "approx_kl", "ratio_max", "frac_zero_std", "lr"  # logged, not shown


handlers = {}  # of signals, from before the run, while it lasts


def restore_handlers():
    """At the end of a run; and in the processes that a reward forks, or nothing would end them."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    handlers.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=restore_handlers)


def write_atomically(path, write):
    """Write to a neighbour, then rename: whenever killed, it leaves a whole file, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        reason = str(error).splitlines()[0]
        fail(f"cannot write {path} ({reason}); what was there is kept; make room, and --resume",
             code=1)


def check_writable(folder, what, remedy):
    """Find out at the start if a folder can't be made, or written into, when it will be needed."""
    parent = folder
    try:
        parents = folder, *folder.absolute().parents
        parent = next(path for path in parents if path.exists() or path.is_symlink())
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        fail(f"{what} {folder}: cannot write into {parent} ({error.strerror}); {remedy}")


class Means:
    """What the log says of a step: numbers of its micro-batches and mini-batches, put together."""

    def __init__(self):
        self.sums, self.weights, self.parts, self.minibatches = {}, {}, {}, 0

    def add(self, weight, **scalars):
        """Of a micro-batch: means over what was forwarded; maxima for names that end in _max."""
        for name, value in scalars.items():
            value, before = torch.as_tensor(value).detach(), self.sums.get(name, 0)
            if name.endswith("_max"):
                self.sums[name] = max(before, value)
            else:
                self.sums[name] = before + weight * value
            self.weights[name] = self.weights.get(name, 0) + weight

    def add_parts(self, weight, **scalars):
        """Of a micro-batch: its part of a mini-batch's mean, to which what is not forwarded adds 0.
        """
        for name, value in scalars.items():
            self.parts[name] = self.parts.get(name, 0) + weight * torch.as_tensor(value).detach()

    def end_minibatch(self, **scalars):
        """Of a mini-batch."""
        self.minibatches += 1
        self.add(1, **scalars)

    def __call__(self):
        found = {}
        for name, total in self.sums.items():
            found[name] = total if name.endswith("_max") else total / self.weights[name]
        for name, total in self.parts.items():
            found[name] = total / self.minibatches
        return found


class Run:
    step = None  # the number of the one that is being made, for main()

    def __init__(self, cfg, name):
        """Refuse what cannot work before anything is trained; nothing is written yet."""
        cfg.device = find_device(cfg.device)
        check_ranges(cfg)
        if cfg.compile and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
            fail("--compile: it needs torch 2.11 or newer; leave it out")
        self.cfg, self.name, self.folder = cfg, name, find_folder(cfg, name)
        self.first, self.saved, self.stopping, self.times = 0, 0, False, {}
        self.command = ["python", *sys.argv]
        flags = (field.name for field in fields(cfg) if field.init)
        print(f"{name}: " + " ".join(f"{k}={getattr(cfg, k)}" for k in flags), flush=True)

    def open(self, policy, tokenizer, validation, test, rewards=None, rewards_of=None, **trained):
        """Make the folder; with --resume, load the checkpoint; look at the test problems.

        rewards, rewards_of: see evaluate(). trained: what else a checkpoint holds the state of, as
        optimizer=optimizer, critic=critic. -> {}, or with --resume the whole checkpoint.
        """
        self.folder = find_folder(self.cfg, self.name)  # again: loading may have taken a while
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cfg.out_dir = self.cfg.out_dir or str(self.folder)
        self.policy, self.tokenizer = policy, tokenizer
        self.trained = dict(policy=policy, **trained)
        check_saving(policy, tokenizer, self.folder)
        torch.use_deterministic_algorithms(policy.device.type == "cpu")  # to the last bit
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs 3 %, decides nothing
        if self.cfg.gradient_checkpointing:
            for thing in self.trained.values():
                if isinstance(thing, torch.nn.Module):
                    checkpoint_activations(thing)
        if self.cfg.compile:
            compile_decoding(policy)
        text = json.dumps(dict(script=self.name, **asdict(self.cfg)), indent=1)
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))
        size, how = sum(p.numel() for p in policy.parameters()), "in fp32"
        if policy.device.type == "cuda":
            how = "in bf16 over fp32 weights" if use_bf16(policy.device) else \
                "in fp32, because this GPU has no bf16"
        print(f"{policy.config.model_type} of {size:,} parameters on {policy.device}, computing "
              f"{how}, into {self.folder}", flush=True)
        self.validation, self.test = validation, test
        self.evaluate = lambda problems: evaluate(policy, tokenizer, problems, self.cfg, rewards,
                                                  rewards_of)
        state = self.load()
        self.before = state.get("before") or self.evaluate(test)
        return state

    def steps(self):
        """Count the steps. Ctrl-C: finish this one, save, say how to go on; again: stop at once."""
        def interrupt(signum, frame):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, interrupt)
        self.bar = tqdm(total=self.cfg.steps, initial=self.first, dynamic_ncols=True)
        try:
            for step in range(self.first, self.cfg.steps):
                Run.step, self.mark = step + 1, time.perf_counter()
                yield step
                self.bar.update()
                if self.stopping and self.saved == step + 1 < self.cfg.steps:
                    self.bar.close()
                    fail(f"after step {step + 1} of {self.cfg.steps}; to go on: {self.again()}",
                         code=130)
            self.bar.close()
        finally:
            restore_handlers()

    def again(self):
        """The command that goes on."""
        again = [*self.command]
        if Path(again[1]).stem == self.name and "--resume" not in again:
            if not {"--out_dir", "--out-dir"} & set(again):
                again += ["--out_dir", self.cfg.out_dir]
            again += ["--resume"]
        return shlex.join(again)

    def lap(self, phase):
        """Book the seconds since the last lap as time_{phase} of this step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # GPU work is asynchronous: else the next phase would pay
        now = time.perf_counter()
        self.times[f"time_{phase}"], self.mark = now - self.mark, now

    def log(self, step, **metrics):
        """One JSON line a step; on screen the bar, and every --log_every steps a line."""
        self.lap("update")  # the phase before this one, in every script
        metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()}
        total = sum(self.times.values())
        metrics["loss"] = metrics.pop("loss")  # last: everyone looks at it, and it says little
        metrics.update(self.times, time_step=total, steps_per_s=1 / total)
        self.write("metrics.jsonl", step, **metrics)
        short = {k: f"{v:.3g}" for k, v in metrics.items() if "time" not in k and k not in QUIET}
        self.bar.set_postfix({k: short[k] for k in ("score", "kl", "length", "loss") if k in short})
        if self.speaks(step):
            self.bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v}" for k, v in short.items()))

    def speaks(self, step):
        return (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps

    def show(self, step, problems, texts, scores, **more):
        """Every --log_every steps: some completions into samples.jsonl, the first on the screen."""
        if self.speaks(step):
            for i in range(0, len(texts), max(1, len(texts) // 4)):
                problem = problems[i * len(problems) // len(texts)]
                self.write("samples.jsonl", step, prompt=problem["prompt"], completion=texts[i],
                           score=scores[i].item(), **{key: value(i) for key, value in more.items()},
                           row=problem["row"])
            prompt, text = (t if len(t) < 300 else t[:300] + "..."
                            for t in (repr(problems[0]["prompt"]), repr(texts[0])))
            self.bar.write(f"    {prompt} -> {text} scores {scores[0].item():g}")

    def write(self, name, step, **fields):
        with open(self.folder / name, "a") as file:
            file.write(json.dumps({"step": step + 1, **fields}, default=str) + "\n")

    def end_step(self, step, **numbers):
        """A look at the validation problems, and checkpoint.pt, each when it is due.

        The checkpoint also keeps `numbers`; it is due every --save_every steps, at the last one,
        and after Ctrl-C.
        """
        done = step + 1
        if self.cfg.eval_every and done % self.cfg.eval_every == 0:
            results = self.evaluate(self.validation)
            self.write("validation.jsonl", step, **results)
            self.bar.write(f"step {done}: validation, n = {results.pop('n')}: "
                           + ", ".join(f"{name} {value[0]:.3f}" for name, value in results.items()
                                       if isinstance(value, list)))
        if self.stopping or done % self.cfg.save_every == 0 or done == self.cfg.steps:
            state = {name: thing.state_dict() for name, thing in self.trained.items()}
            state.update(step=done, before=self.before, **numbers)
            write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
            self.saved = done

    def close(self):
        """Save the model, and report how it fares on the test problems."""
        save_policy(self.policy, self.tokenizer, self.folder)
        report(self.before, self.evaluate(self.test), self.folder)

    def load(self):
        """-> {}; with --resume, checkpoint.pt, of which what has a state has been loaded.

        It holds no random numbers: those of a step are a function of seed and step.
        """
        if not self.cfg.resume:
            return {}
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, thing in self.trained.items():
                thing.load_state_dict(state[name])
            self.first = state["step"]
        except Exception:  # of zip, of pickle, of other shapes, ...
            fail(f"--resume: {path} is torn, or not of this model; start anew in another --out_dir")
        if self.first > self.cfg.steps:
            fail(f"--steps {self.cfg.steps}: this run has made {self.first} already; ask for more")
        for name in LOGS:
            if (self.folder / name).exists():
                self.cut_log(self.folder / name)
        return state

    def cut_log(self, path):
        """Remove what was logged after the checkpoint: those steps will be made again."""
        kept = ""
        for row in path.read_text().splitlines(keepends=True):
            if row.endswith("\n") and json.loads(row)["step"] <= self.first:
                kept += row
        write_atomically(path, lambda temporary: temporary.write_text(kept))


def find_folder(cfg, name):
    """--out_dir, or the first free of runs/NAME, runs/NAME-2, ...; with --resume the last saved."""
    number, free, last_saved = 1, Path("runs", name), None
    while free.exists():
        if (free / "checkpoint.pt").exists():
            last_saved = free
        number += 1
        free = Path("runs", f"{name}-{number}")
    if cfg.out_dir:
        folder = Path(os.path.expanduser(cfg.out_dir))
    elif cfg.resume and last_saved:
        folder = last_saved
    else:
        folder = free
    check_writable(folder, "--out_dir", "name another")
    if cfg.resume:
        check_same(cfg, folder, name)
    elif folder.exists() and {path.name for path in folder.iterdir()} - {"config.json"}:
        fail(f"--out_dir: {folder} is not empty; name another, or --resume the run in it, if it is "
             "one that has saved a checkpoint")
    return folder


def check_same(cfg, folder, name):
    """Refuse to --resume a run that is not there, or with flags that would make it another one."""
    if not (folder / "checkpoint.pt").exists():
        fail(f"--resume: there is no checkpoint in {folder}; name a run's folder with --out_dir")
    try:
        before = json.loads((folder / "config.json").read_text())
        script = before.pop("script", name)
    except (OSError, ValueError, TypeError, AttributeError):
        fail(f"--resume: {folder / 'config.json'} is torn; start anew in another --out_dir")
    fixed = sorted(before.keys() - MAY_CHANGE)
    if script != name or not all(hasattr(cfg, key) for key in fixed):
        fail(f"--resume: another script made {folder}, as its config.json says; use that one")
    for key in fixed:
        if before[key] != getattr(cfg, key):
            fail(f"--{key} is {getattr(cfg, key)}, but {before[key]} in {folder}, which "
                 "you --resume: repeat its whole command, or start anew in another --out_dir")
    if cfg.data_checksum not in (None, before.get("data_checksum")):
        fail(f"--data {cfg.data}: these are other rows than those that {folder}, which you "
             "--resume, has learned from; bring them back, or start anew in another --out_dir")
