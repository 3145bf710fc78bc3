"""
A run: its folder (config.json, metrics.jsonl, samples.jsonl, validation.jsonl, checkpoint.pt,
test.json, model/) and its screen. Nothing here learns.
"""
import json
import math
import shutil
import time
import zlib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.evaluation import batch_stats, evaluate, report
from plumbing.flags import fail
from plumbing.parallel import from_first, gather, rank, world
from plumbing.rollout import compile_decoding, use_bf16


class Run:
    unfinished = None  # the folder of a run that has begun and not ended, for main()

    def __init__(self, cfg, name, policy, tokenizer, problems, rewards=None, measure=None,
                 **trained):
        """Make the folder; with --resume, load the checkpoint; look at the test problems.

        rewards, measure: see evaluate(). trained: what else a checkpoint holds the state of, such
        as optimizer=optimizer. It also holds `kept`, for numbers of a script's own.
        """
        self.cfg, self.name, self.policy, self.tokenizer = cfg, name, policy, tokenizer
        self.trained, self.first = dict(policy=policy, **trained), 0
        self.before, self.kept = None, {}
        checksum = checksum_of(policy, problems)
        self.folder = self.find(cfg.resume, checksum) if cfg.resume else from_first(
            self.make, cfg.out_dir)
        flags = {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.init}
        config = dict(flags, script=name, out_dir=None, resume=None, checksum=checksum)
        self.replace("config.json", lambda path: path.write_text(json.dumps(config, indent=1)))
        Run.unfinished = str(self.folder)
        for thing in self.trained.values():
            if cfg.gradient_checkpointing and isinstance(thing, torch.nn.Module):
                getattr(thing, "activation_checkpointing_enable",  # its name since 5.24
                        thing.gradient_checkpointing_enable)()
        if cfg.compile:
            compile_decoding(policy)
        print(f"{name}: " + " ".join(f"{key}={value}" for key, value in flags.items()))
        print(f"{policy.config.model_type} of {policy.num_parameters():,} parameters on "
              f"{policy.device}, computing in {'bf16' if use_bf16(policy.device) else 'fp32'} over "
              f"fp32 weights, into {self.folder}", flush=True)
        _, self.validation, self.test = problems
        self.evaluate = lambda split: evaluate(policy, tokenizer, split, cfg, rewards, measure)
        self.before = self.before or self.evaluate(self.test)

    def make(self, out_dir):
        """A new folder: --out_dir, or the first free of runs/NAME, runs/NAME-2, ..."""
        numbered = [f"runs/{self.name}", *(f"runs/{self.name}-{n}" for n in range(2, 10_000))]
        for name in [out_dir] if out_dir else numbered:
            folder = Path(name).absolute()
            try:
                folder.mkdir(parents=True)  # fails if it exists, or another process is faster
                return folder
            except OSError as error:
                if out_dir or not folder.exists():
                    fail(f"--out_dir {folder}: {error.strerror}; name another")

    def find(self, folder, checksum):
        """The folder to --resume, and in it the checkpoint, if there is one yet."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            if (config["script"], config["checksum"]) != (self.name, checksum):
                fail(f"--resume {folder}: {config['script']}.py made this run, from other data or "
                     "another model than there is now; start anew")
            if (folder / "checkpoint.pt").exists():
                state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
                for key, thing in self.trained.items():
                    thing.load_state_dict(state[key])
                self.first, self.before, self.kept = (state[k] for k in ("step", "before", "kept"))
            for path in folder.glob("*.jsonl") if rank() == 0 else ():  # what is made again goes
                rows = [row for row in read_log(path) if self.first and row["step"] <= self.first]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        except Exception as error:  # of json, of zip, of pickle, of other shapes, ...
            fail(f"--resume {folder}: {error!r:.300}; start anew")
        if self.cfg.steps and self.first > self.cfg.steps:
            fail(f"--steps {self.cfg.steps}: this run has made {self.first} already; ask for more")
        return folder

    def steps(self):
        """Count the steps, from the one after the checkpoint."""
        with tqdm(total=self.cfg.steps, initial=self.first, dynamic_ncols=True,
                  disable=rank() > 0) as self.bar:
            if not self.first:
                self.validate(0)
            for step in range(self.first, self.cfg.steps):
                self.sums, self.minibatches, self.begun = Counter(), 0, time.perf_counter()
                yield step
                self.bar.update()

    def count(self, **parts):
        """Of a micro-batch: its part of each number of the mini-batch, for the log."""
        for key, value in parts.items():
            self.sums[key] += value.detach() if torch.is_tensor(value) else value

    def end_minibatch(self, **scalars):  # numbers that all processes have
        self.count(**{key: value / world() for key, value in scalars.items()})
        self.minibatches += 1

    def log(self, step, problems=None, texts=None, scores=None, kl=None, batch=None, **metrics):
        """The end of a step: write the log; show, evaluate and save when it is due.

        The numbers of count() become means over the step's mini-batches.
        """
        cfg, done = self.cfg, step + 1
        if scores is not None:
            metrics = batch_stats(scores, kl, batch, cfg.group_size) | metrics
        parts = {key: float(value / max(1, self.minibatches)) for key, value in self.sums.items()}
        totals = Counter()
        for part in gather(parts):  # of each process
            totals.update(part)
        metrics.update(totals)
        if "optimizer" in self.trained:
            metrics["lr"] = self.trained["optimizer"].param_groups[0]["lr"]
        metrics["loss"] = metrics.pop("loss", 0.0)  # last: everyone looks at it; it says little
        metrics = {key: float(value) for key, value in metrics.items()}
        for key, value in metrics.items():
            if not math.isfinite(value):
                fail(f"step {done}: {key} is {value}; take a smaller --lr or --max_grad_norm", 1)
        metrics["time_step"] = time.perf_counter() - self.begun
        self.write("metrics.jsonl", done, **metrics)
        quiet = "score_std", "approx_kl", "frac_zero_std", "lr", "time_step"  # not on screen
        short = {key: f"{value:.3g}" for key, value in metrics.items() if key not in quiet}
        self.bar.set_postfix({k: short[k] for k in ("score", "kl", "length", "loss") if k in short})
        if done % cfg.log_every == 0 or done == cfg.steps:
            self.bar.write(f"step {done}: " + ", ".join(f"{k} {v}" for k, v in short.items()))
            for i in range(0, len(texts or []), max(1, len(texts or []) // 4)):
                problem = problems[i * len(problems) // len(texts)]
                self.write("samples.jsonl", done, prompt=problem["prompt"], completion=texts[i],
                           score=scores[i].item(), row=problem["row"])
                if i == 0:
                    self.bar.write(f"    {problem['prompt']!r:.300} -> {texts[0]!r:.300} scores "
                                   f"{scores[0].item():g}")
        if step == 0 and metrics.get("score_std") == 0:
            self.bar.write("warning: all scores are equal; is the task too hard?")
        if step == 0 and metrics.get("truncated", 0) > 0.5:
            self.bar.write("warning: most completions were cut off; raise --max_new_tokens")
        self.validate(done)
        saves = done % cfg.save_every == 0 or done == cfg.steps
        if world() > 1 and (saves or step == self.first):
            if len(set(gather(checksum_of(self.policy)))) > 1:
                fail(f"step {done}: the processes have come to different weights; start anew", 1)
        if saves:
            if not all(weights.isfinite().all() for weights in self.policy.parameters()):
                fail(f"step {done} made weights nan or infinite; take a smaller --lr", code=1)
            state = {key: thing.state_dict() for key, thing in self.trained.items()}
            state.update(step=done, before=self.before, kept=self.kept)
            self.replace("checkpoint.pt", lambda path: torch.save(state, path))

    def validate(self, done):
        """If it is due, look at the validation problems: after 0 steps, and each --eval_every."""
        if not self.cfg.eval_every or done % self.cfg.eval_every:
            return
        results = self.evaluate(self.validation)
        self.write("validation.jsonl", done, **results)
        means = [f"{key} {value[0]:.3f}" for key, value in results.items() if key != "n"]
        self.bar.write(f"step {done}: validation, n = {results['n']}: {', '.join(means)}")

    def write(self, name, step, **fields):
        if rank():
            return
        with open(self.folder / name, "a") as file:
            file.write(json.dumps({"step": step, **fields}, default=str) + "\n")

    def replace(self, name, write):
        """Write a neighbour, then rename it: whenever killed, what was there is kept."""
        if rank():
            return
        path = (self.folder / name).resolve()  # what a link points to
        new = path.with_name(f"{path.name}.new")
        try:
            write(new)
            if path.is_dir():
                shutil.rmtree(path)
            new.replace(path)
        except Exception as error:  # torch and safetensors have their own errors for a full disk
            fail(f"cannot write {path} ({str(error).splitlines()[0]}); make room", code=1)

    def close(self):
        """Save the model, and report how it fares on the test problems."""
        self.replace("model", lambda path: [thing.save_pretrained(path)
                                            for thing in (self.policy, self.tokenizer)])
        report(self.before, self.evaluate(self.test), self.folder)
        Run.unfinished = None


def checksum_of(policy, problems=()):
    """Of the prompts and the weights that a run begins with: it is not resumed with others."""
    checksum = 0
    for row in sum(problems, []):
        checksum = zlib.crc32(repr((row["ids"], row["targets"])).encode(), checksum)
    for weights in policy.parameters():
        checksum = zlib.crc32(weights.detach().cpu().numpy().tobytes(), checksum)
    return checksum


def read_log(path):
    """The rows of a run's .jsonl file, without lines that a crash has torn."""
    lines = Path(path).read_text(errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]
