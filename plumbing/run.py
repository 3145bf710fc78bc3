"""
A run: its folder (config.json, metrics.jsonl, samples.jsonl, validation.jsonl, checkpoint.pt,
test.json, model/) and its screen. Nothing here learns.
"""
import json
import os
import shutil
import time
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.evaluation import batch_stats, evaluate, report
from plumbing.flags import fail
from plumbing.rollout import compile_decoding, use_bf16

QUIET = "score_std", "approx_kl", "frac_zero_std", "lr", "time_step"  # logged, not shown


class Run:
    unfinished = None  # the folder of a run that has begun and not ended, for main()

    def __init__(self, cfg, name, policy, tokenizer, problems, rewards=None, measure=None,
                 **trained):
        """Make the folder; with --resume, load the checkpoint; look at the test problems.

        problems: those of training, validation and test. rewards, measure: see evaluate().
        trained: what else a checkpoint holds the state of, as optimizer=optimizer, critic=critic.
        A script may put numbers of its own into self.kept, which a checkpoint holds too.
        """
        self.cfg, self.name, self.policy, self.tokenizer = cfg, name, policy, tokenizer
        self.trained = dict(policy=policy, **trained)
        self.first, self.before, self.kept = 0, None, {}
        checksum = checksum_of(policy, problems)
        self.folder = self.find(cfg.resume, checksum) if cfg.resume else self.make(cfg.out_dir)
        Run.unfinished = str(self.folder)
        config = dict(asdict(cfg), script=name, out_dir=None, resume=None, checksum=checksum)
        self.replace("config.json", lambda path: path.write_text(json.dumps(config, indent=1)))
        for thing in self.trained.values():
            if cfg.gradient_checkpointing and isinstance(thing, torch.nn.Module):
                thing.gradient_checkpointing_enable()
        if cfg.compile:
            compile_decoding(policy)
        print(f"{name}: " + " ".join(f"{key}={value}" for key, value in asdict(cfg).items()))
        print(f"{policy.config.model_type} of {policy.num_parameters():,} parameters on "
              f"{policy.device}, computing in {'bf16' if use_bf16(policy.device) else 'fp32'} over "
              f"fp32 weights, into {self.folder}", flush=True)
        _, self.validation, self.test = problems
        self.evaluate = lambda held_out: evaluate(policy, tokenizer, held_out, cfg, rewards, measure)
        self.before = self.before or self.evaluate(self.test)

    def make(self, out_dir):
        """--out_dir, or the first free of runs/NAME, runs/NAME-2, ..."""
        number, folder = 1, Path(out_dir or f"runs/{self.name}").absolute()
        while True:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()  # fails if another process was faster
                return folder
            except FileExistsError as error:
                if out_dir or not os.path.lexists(folder):
                    fail(f"--out_dir {folder}: {error.strerror}; name another")
                number += 1
                folder = folder.with_name(f"{self.name}-{number}")
            except OSError as error:
                fail(f"--out_dir {folder}: {error.strerror}; name a folder that can be written into")

    def find(self, folder, checksum):
        """The folder to --resume, and in it the checkpoint, if there is one yet."""
        folder = Path(folder).expanduser().absolute()
        try:
            config = json.loads((folder / "config.json").read_text())
            if config["script"] != self.name or config["checksum"] != checksum:
                raise ValueError(f"it was made by {config['script']}.py, or from other data or "
                                 "another model than those that are there now")
            if (folder / "checkpoint.pt").exists():
                state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
                for key, thing in self.trained.items():
                    thing.load_state_dict(state[key])
                self.first, self.before, self.kept = (state[k] for k in ("step", "before", "kept"))
        except Exception as error:  # of json, of zip, of pickle, of other shapes, ...
            fail(f"--resume {folder}: {type(error).__name__}: {error}; start anew, into another "
                 "--out_dir")
        if self.first > self.cfg.steps:
            fail(f"--steps {self.cfg.steps}: this run has made {self.first} already; ask for more")
        for path in folder.glob("*.jsonl"):  # what was logged after the checkpoint is made again
            rows = [row for row in path.read_text().splitlines(keepends=True) if row[-1] == "\n"]
            path.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.first))
        return folder

    def steps(self):
        """Count the steps. On a CPU, the same run gives the same weights, to the last bit."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.policy.device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs 3 %, decides nothing
        try:
            with tqdm(total=self.cfg.steps, initial=self.first, dynamic_ncols=True) as self.bar:
                for step in range(self.first, self.cfg.steps):
                    self.sums, self.minibatches = Counter(), 0
                    self.begun = time.perf_counter()
                    yield step
                    self.bar.update()
        finally:
            torch.use_deterministic_algorithms(before)

    def count(self, **parts):
        """Of a micro-batch: its part of each number of the mini-batch, for the log."""
        for key, value in parts.items():
            self.sums[key] += value.detach() if torch.is_tensor(value) else value

    def end_minibatch(self, **scalars):
        self.count(**scalars)
        self.minibatches += 1

    def log(self, step, problems=None, texts=None, scores=None, kl=None, batch=None, **metrics):
        """The end of a step: one JSON line; what is shown, looked at and saved when it is due.

        The numbers of count() are means over the step's mini-batches. On screen there is the bar,
        and every --log_every steps a line, with a prompt and a completion where there are some.
        """
        due = (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps
        if scores is not None:
            metrics = batch_stats(scores, kl, batch, self.cfg.group_size) | metrics
        metrics.update({key: value / max(1, self.minibatches) for key, value in self.sums.items()})
        if "optimizer" in self.trained:
            metrics["lr"] = self.trained["optimizer"].param_groups[0]["lr"]
        metrics["loss"] = metrics.pop("loss", 0.0)  # last: everyone looks at it; it says little
        metrics = {key: float(value) for key, value in metrics.items()}
        metrics["time_step"] = time.perf_counter() - self.begun
        self.write("metrics.jsonl", step, **metrics)
        short = {key: f"{value:.3g}" for key, value in metrics.items() if key not in QUIET}
        self.bar.set_postfix({k: short[k] for k in ("score", "kl", "length", "loss") if k in short})
        if due:
            self.bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v}" for k, v in short.items()))
        if due and texts:
            for i in range(0, len(texts), max(1, len(texts) // 4)):
                problem = problems[i * len(problems) // len(texts)]
                self.write("samples.jsonl", step, prompt=problem["prompt"], completion=texts[i],
                           score=scores[i].item(), row=problem["row"])
            self.bar.write(f"    {problems[0]['prompt']!r:.300} -> {texts[0]!r:.300} scores "
                           f"{scores[0].item():g}")
        if step == 0 and scores is not None and scores.max() == scores.min():
            print(f"warning: all {len(scores)} scores are {scores[0].item():g}, which may leave "
                  "nothing to learn: is the task too hard, or --max_new_tokens too small?")
        if step == 0 and metrics.get("truncated", 0) > 0.5:
            print(f"warning: {metrics['truncated']:.0%} of the completions were cut off before they "
                  "ended; raise --max_new_tokens")
        if self.cfg.eval_every and (step + 1) % self.cfg.eval_every == 0:
            results = self.evaluate(self.validation)
            self.write("validation.jsonl", step, **results)
            self.bar.write(f"step {step + 1}: validation, n = {results.pop('n')}: " + ", ".join(
                f"{key} {value[0]:.3f}" for key, value in results.items()
                if isinstance(value, list)))
        if (step + 1) % self.cfg.save_every == 0 or step + 1 == self.cfg.steps:
            state = {key: thing.state_dict() for key, thing in self.trained.items()}
            state.update(step=step + 1, before=self.before, kept=self.kept)
            self.replace("checkpoint.pt", lambda path: torch.save(state, path))

    def write(self, name, step, **fields):
        with open(self.folder / name, "a") as file:
            file.write(json.dumps({"step": step + 1, **fields}, default=str) + "\n")

    def replace(self, name, write):
        """Write a neighbour, then rename it: whenever killed, it leaves all of the old or the new.
        """
        path = (self.folder / name).resolve()  # what a link points to
        new, old = (path.with_name(f"{path.name}.{end}") for end in ("new", "old"))
        try:
            write(new)
            if path.is_dir():
                path.rename(old)
            new.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            fail(f"cannot write {path} ({str(error).splitlines()[0]}); what was there is kept; make "
                 "room", code=1)

    def close(self):
        """Save the model, and report how it fares on the test problems."""
        if not all(parameter.isfinite().all() for parameter in self.policy.parameters()):
            fail("the last update made weights nan or infinite; take a smaller --lr", code=1)
        self.replace("model", lambda path: (self.policy.save_pretrained(path),
                                            self.tokenizer.save_pretrained(path)))
        report(self.before, self.evaluate(self.test), self.folder)
        Run.unfinished = None


def checksum_of(policy, problems):
    """Of the weights and the prompts of a run, which is not resumed with others."""
    checksum = 0
    for row in [row for part in problems for row in part]:
        checksum = zlib.crc32(repr((row["ids"], row["targets"])).encode(), checksum)
    for parameter in policy.parameters():
        checksum = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy(),
                              checksum)
    return checksum
