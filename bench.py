"""
How fast is a step? The scripts beside TRL's trainers and model.generate, on the same work.

    python bench.py                     1M parameters, one thread of a CPU: some 5 minutes
    python bench.py --size 3M --rows rollout GRPO
    python bench.py --size 0.5B --device cuda --prompts 64 --prompt_tokens 128 --new_tokens 256 \\
                    --micro_batch_size 16

All contenders run in this process, in turns, from the same random weights, on the same prompts, and
make the same number of completions and of new tokens. The first step of each turn is dropped;
medians are printed. What is timed is the scripts' own train(), with a stopwatch in the place of its
run folder, and TRL's own train(). TRL comes with requirements-dev.txt; without it, its rows say so.
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.util
import io
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

import rollout
from common import fail, seed_everything, use_bf16

LLAMA, QWEN = transformers.LlamaConfig, transformers.Qwen2Config
SIZES = {
    "1M": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
               num_key_value_heads=2, vocab_size=512),
    "3M": dict(hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6,
               num_key_value_heads=2, vocab_size=512),
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
                 tie_word_embeddings=True),  # Qwen2.5-0.5B
}

# Row: a script and its flags; the trainer of TRL 1.16 that does the same, and its flags.
NATURAL = "GRPO, natural lengths"
ROWS = {
    "rollout": (None, {}, None, {}),
    "GRPO": ("grpo", dict(kl_coef=0), "GRPO", dict(beta=0.0, loss_type="grpo")),
    "GRPO, KL": ("grpo", dict(kl_coef=0.04), "GRPO", dict(beta=0.04, loss_type="grpo")),
    "GRPO, 2 epochs": ("grpo", dict(kl_coef=0, epochs=2), "GRPO",
                       dict(beta=0.0, loss_type="grpo", num_iterations=2)),
    NATURAL: ("grpo", dict(kl_coef=0), "GRPO", dict(beta=0.0, loss_type="grpo")),
    "RLOO": ("rloo", dict(kl_coef=0.05), "RLOO", dict(beta=0.05)),
    "REINFORCE++": ("reinforce_pp", dict(kl_coef=0.05), None, {}),
    "PPO": ("ppo", dict(kl_coef=0.05), None, {}),
}


class Work:
    """What the contenders of a row share: policy, tokenizer, prompts, reward.

    Natural lengths: of 64 tokens one is the EOS, so that an untrained policy ends after 64 on
    average; the reward is 0 or 1, and some groups teach nothing; prompts are ragged; micro-batches
    have 16 rows. Elsewhere nothing ends a completion.
    """

    def __init__(self, args, natural):
        self.args, self.natural = args, natural
        self.completions = args.prompts * args.group_size
        self.micro = args.micro_batch_size or min(self.completions, 16 if natural else 10**9)
        self.longest = args.new_tokens * (2 if natural else 1)
        size = dict(SIZES[args.size], pad_token_id=0, eos_token_id=1, bos_token_id=None)
        size.update(vocab_size=64 if natural else size["vocab_size"])
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size["vocab_size"])}, "w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")
        torch.manual_seed(0)
        self.policy = transformers.AutoModelForCausalLM.from_config(
            QWEN(**size) if args.size == "0.5B" else LLAMA(**size)).eval()
        self.folder = tempfile.TemporaryDirectory()  # TRL loads its policy and reference from it
        self.policy.save_pretrained(self.folder.name)
        self.policy.to(args.device)
        lengths = [args.prompt_tokens * (8 - i % 4 * natural) // 8 for i in range(args.prompts)]
        self.ids = [torch.randint(2, size["vocab_size"], (n,)).tolist() for n in lengths]
        self.texts = [" ".join(f"w{i}" for i in ids) for ids in self.ids]

    def reward(self, prompts, completions, completion_ids, **columns):
        values = [sum(ids) % 5 for ids in completion_ids]
        return [float(value == 4 if self.natural else value) for value in values]


class Stopwatch:
    """Of each step: milliseconds in all, of the CPU, per phase; new tokens; peak of the memory."""

    proc = Path("/proc/self")

    def __init__(self, device):
        self.cuda, self.found = device.startswith("cuda"), []
        gc.collect()
        if self.proc.exists():
            ctypes.CDLL(None).malloc_trim(0)  # what was freed, back to the system
        self.rest = self.memory(reset=True)

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, reset=False):
        """Peak since the last reset, in MB: of tensors on a GPU, else of the process, on Linux."""
        if self.cuda:
            if reset:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated() / 1e6
        if not self.proc.exists():
            return float("nan")
        if reset:
            (self.proc / "clear_refs").write_text("5")
        return int((self.proc / "status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    def start(self):
        self.phases, self.tokens = Counter(), 0
        self.memory(reset=True)
        self.begun = self.now(), time.process_time()

    def stop(self):
        wall, cpu = self.now() - self.begun[0], time.process_time() - self.begun[1]
        self.found.append(dict(
            ms=1e3 * wall, cpu=1e3 * cpu, tokens=self.tokens, memory=self.memory() - self.rest,
            rollout=1e3 * self.phases["rollout"], logprobs=1e3 * self.phases["logprobs"],
            update=1e3 * (wall - self.phases.total())))  # the rest

    def book(self, phase, function):
        """function, but its time counts as that phase's."""
        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.phases[phase] += self.now() - start
            return result
        return timed

    def sample(self, *args, **kwargs):
        batch = self.book("rollout", rollout.sample)(*args, **kwargs)
        self.tokens += int(batch.mask.sum())
        return batch


# --------------------------------------------------------------------------------------------------
# The contenders


def our_rollout(work, steps, clock):
    for _ in range(steps):
        clock.start()
        clock.sample(work.policy, work.tokenizer, work.ids, work.args.group_size, work.longest, 1.0)
        clock.stop()


def generate(work, steps, clock):
    ids, valid = (x.repeat_interleave(work.args.group_size, 0)
                  for x in rollout.pad_left(work.ids, work.args.device))
    plain = transformers.GenerationConfig(
        do_sample=True, top_k=0, min_new_tokens=work.longest, max_new_tokens=work.longest,
        eos_token_id=1, pad_token_id=0)
    for _ in range(steps):
        clock.start()
        with rollout.precision(ids.device):
            out = clock.book("rollout", work.policy.generate)(
                input_ids=ids, attention_mask=valid.long(), generation_config=plain)
        clock.tokens += out[:, ids.shape[1]:].numel()
        clock.stop()


def ours(work, steps, clock, name, flags):
    """The script's train(), without its run folder, its evaluations, its loading and saving."""
    args, script = work.args, importlib.import_module(name)
    cfg = script.Config(
        model="ours", data="ours", device=args.device, steps=steps, lr=1e-4, eval_prompts=1,
        prompts_per_step=args.prompts, group_size=args.group_size, max_new_tokens=work.longest,
        minibatch_size=work.completions, micro_batch_size=work.micro, **flags)

    def timed_steps():
        for step in range(steps):
            clock.start()
            yield step
            clock.stop()

    run = mock.Mock(steps=timed_steps, load=lambda **objects: dict(before={}))
    problems = [dict(prompt=text, ids=ids) for text, ids in zip(work.texts, work.ids)]
    instead = dict.fromkeys(("evaluate", "validate", "report", "save_policy"), mock.Mock())
    instead.update(Run=lambda *_: run, load_problems=lambda *_: (problems, [], []),
                   load_rewards=lambda *_: dict(ours=work.reward), sample=clock.sample,
                   load_policy=lambda *_: (copy.deepcopy(work.policy), work.tokenizer))
    for key in {"all_logprobs", "all_values"} & vars(script).keys():
        instead[key] = clock.book("logprobs", getattr(script, key))
    with mock.patch.multiple(script, **instead):
        script.train(cfg)


def timed_trainer(name, clock, updates):
    """TRL's trainer, and a callback, that tell the clock of each step of so many updates."""
    import trl

    class Trainer(getattr(trl, f"{name}Trainer")):
        def _generate_single_turn(self, *args):
            found = clock.book("rollout", super()._generate_single_turn)(*args)
            clock.tokens += sum(map(len, found[0] if isinstance(found, tuple) else found))
            return found

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            function = super()._get_per_token_logps_and_entropies
            if not torch.is_grad_enabled():
                function = clock.book("logprobs", function)
            return function(*args, **kwargs)

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % updates == 0:
                clock.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % updates == 0:
                clock.stop()

    return Trainer, Steps()


def theirs(work, steps, clock, name, settings):
    """TRL's train(); bf16 where ours has it, nothing recomputed: its best settings for this."""
    import datasets
    import trl
    updates = settings.get("num_iterations", 1)
    trainer, callback = timed_trainer(name, clock, updates)
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(trl, f"{name}Config")(
            folder, per_device_train_batch_size=work.micro, max_steps=steps * updates,
            gradient_accumulation_steps=work.completions // work.micro,
            num_generations=work.args.group_size, max_completion_length=work.longest,
            temperature=1.0, top_k=0, learning_rate=1e-4, use_cpu=not clock.cuda,
            bf16=use_bf16(torch.device(work.args.device)), gradient_checkpointing=False,
            model_init_kwargs=dict(dtype="float32"), disable_tqdm=True, report_to="none",
            save_strategy="no", logging_strategy="no",
            generation_kwargs={} if work.natural else dict(min_new_tokens=work.longest), **settings)
        trainer(work.folder.name, work.reward, config, processing_class=work.tokenizer,
                train_dataset=datasets.Dataset.from_dict(dict(prompt=work.texts)),
                callbacks=[callback]).train()


# --------------------------------------------------------------------------------------------------
# The tables


def measure(args):
    """All contenders in turns -> {(row, contender): [what the stopwatch found in each step]}."""
    works = {natural: Work(args, natural) for natural in {row == NATURAL for row in args.rows}}
    found = {}
    for row in args.rows:
        script, _, trainer, _ = ROWS[row]
        found[row, "ours"] = []
        if not script:
            found[row, "generate"] = []
        elif trainer and importlib.util.find_spec("trl"):
            found[row, "TRL"] = []
    for row, who in tqdm(list(found) * args.rounds, desc="turns"):
        script, flags, trainer, settings = ROWS[row]
        work, clock, steps = works[row == NATURAL], Stopwatch(args.device), args.steps + 1
        seed_everything(1, args.device)
        torch.use_deterministic_algorithms(who == "ours" and args.device == "cpu")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
            if not work.natural:  # no token is an EOS (and TRL has min_new_tokens)
                stack.enter_context(mock.patch.object(rollout, "eos_ids", lambda *_: [-1]))
            if who == "TRL":
                theirs(work, steps, clock, trainer, settings)
            elif script:
                ours(work, steps, clock, script, flags)
            else:
                (our_rollout if who == "ours" else generate)(work, steps, clock)
        found[row, who] += clock.found[1:]
    for (row, who), steps in found.items():
        same = {args.prompts * args.group_size * args.new_tokens}
        assert row == NATURAL or {step["tokens"] for step in steps} == same, (row, who, steps)
    return found


def show(found):
    def middle(key, of):
        return median(map(of, found[key])) if key in found else float("nan")

    print("| row | | ms | CPU ms | new tokens/s | rollout | log-probs | update | peak MB "
          "| generate / rollout | TRL / ours |\n" + "|---" * 11 + "|")
    for row, who in found:
        ms, cpu, tokens, *parts = (middle((row, who), lambda step: step[key]) for key in (
            "ms", "cpu", "tokens", "rollout", "logprobs", "update", "memory"))
        per_token = middle((row, who), lambda step: step["ms"] / step["tokens"])  # natural: differs
        generated = float("nan") if row == NATURAL else middle(
            ("rollout", "generate"), lambda step: step["ms"]) / parts[0]
        theirs = middle((row, "TRL"), lambda step: step["ms"] / step["tokens"]) / per_token
        cells = [f"{x:.0f}" for x in (ms, cpu, 1e3 / per_token, *parts)]
        cells += [f"{x:.2f}" for x in (generated, theirs if who == "ours" else float("nan"))]
        print(f"| {row} | {who} | " + " | ".join(cells).replace("nan", "-") + " |")
        if ROWS[row][2] and (row, "TRL") not in found:
            print(f"| {row} | TRL | not installed: pip install -r requirements-dev.txt |")
    pp, ppo = (middle((row, "ours"), lambda step: step["ms"]) for row in ("REINFORCE++", "PPO"))
    if pp == pp and ppo == ppo:
        print(f"\nA step of REINFORCE++ takes {pp / ppo:.2f} of PPO's time (the notes: 42 h / "
              "60 h, 0.70). TRL 1.16 has neither.")


def correctness(args):
    """Beside the speed: sampler, passes and gradient against their definitions."""
    work = Work(args, natural=True)
    policy, prompts = work.policy, work.ids[:2]
    batch = rollout.sample(policy, work.tokenizer, prompts, args.group_size, work.longest, 1.0)
    valid = batch.mask.bool()
    plain = torch.cat(rollout.plain_logprobs(policy, batch, 1.0))
    shared = rollout.token_logprobs(policy, batch, torch.arange(len(valid)), 1.0)[valid]
    weights, gradients = torch.randn(len(plain), device=plain.device), []
    for logprobs in (plain, shared):
        policy.zero_grad()
        (logprobs * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    print(f"\nAgainst a forward of each row alone, log-probs differ by at most "
          f"{(batch.logprobs[valid] - plain).abs().max():.1e} in the sampler and "
          f"{(shared - plain).abs().max():.1e} in the shared-prompt pass, whose gradient is off by "
          f"{(gradients[1] - gradients[0]).norm() / gradients[0].norm():.1e} (relative norm).")
    logits, n = 2 * torch.randn(64, device=args.device), 200_000
    tokens, _ = rollout.draw(logits.expand(n, -1), 1.0)
    expected = n * logits.softmax(-1)
    chi2 = ((torch.bincount(tokens, minlength=64) - expected) ** 2 / expected).sum()
    print(f"{n:,} draws from 64 tokens: chi-square {chi2:.0f}, at 63 degrees of freedom (103 would "
          "be passed once in 1000 times).")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--size", choices=SIZES, default="1M", help="parameters")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=", ".join(ROWS))
    for flag, value, text in (
            ("prompts", 4, "prompts of a step"), ("group_size", 8, "completions of a prompt"),
            ("prompt_tokens", 64, "tokens of a prompt"), ("new_tokens", 64, "of a completion"),
            ("micro_batch_size", None, "rows of a pass; without it all, or 16 of natural lengths"),
            ("rounds", 5, "turns of each contender"), ("steps", 2, "measured steps of a turn"),
            ("threads", 1, "of the CPU")):
        parser.add_argument(f"--{flag}", type=int, default=value, help=text)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    for flag, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            fail(f"--{flag} {value}: it must be at least 1")
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    show(measure(args))
    correctness(args)


if __name__ == "__main__":
    main()
