"""
How fast is a step? The scripts beside TRL's trainers and model.generate, on the same work.

    python -m tools.bench                     1M parameters, one thread of a CPU: some 5 minutes
    python -m tools.bench --size 3M --rows rollout GRPO
    python -m tools.bench --size 0.5B --device cuda --prompts 64 --prompt_tokens 128 \\
                          --new_tokens 256 --micro_batch_size 16

All contenders run in this process, in turns, from the same random weights, on the same prompts, and
make the same number of completions and of new tokens. The first step of each turn is dropped;
medians are printed. What is timed is the scripts' own train(), without its run folder, and TRL's,
neither with vLLM nor compiled. TRL comes with requirements-dev.txt.
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import tempfile
import time
from collections import Counter
from functools import partial
from operator import itemgetter
from statistics import median
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from plumbing import rollout
from plumbing.data import Problems
from plumbing.flags import fail
from plumbing.rollout import step_generator, use_bf16

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
    "GRPO, KL": ("grpo", dict(kl_coef=0.04), "GRPO",
                 dict(beta=0.04, loss_type="grpo", use_bias_correction_kl=False)),
    "GRPO, 2 epochs": ("grpo", dict(kl_coef=0, epochs=2), "GRPO",
                       dict(beta=0.0, loss_type="grpo", num_iterations=2)),
    NATURAL: ("grpo", dict(kl_coef=0), "GRPO", dict(beta=0.0, loss_type="grpo")),
    "RLOO": ("rloo", dict(kl_coef=0.05), "RLOO", dict(beta=0.05)),
    "REINFORCE++": ("reinforce_pp", dict(kl_coef=0.05), None, {}),
    "PPO": ("ppo", dict(kl_coef=0.05), None, {}),
}


class Work:
    """What the contenders of a row share: policy, tokenizer, prompts, reward.

    Natural lengths: of 64 tokens one is the EOS, so that an untrained policy, of at most 128
    tokens, ends after 55 on average; the reward is 0 or 1, and some groups teach nothing;
    micro-batches have 16 rows. Elsewhere the EOS is a token that the model lacks.
    """

    def __init__(self, args, natural):
        self.args, self.natural = args, natural
        self.completions = args.prompts * args.group_size
        usual = math.gcd(16, self.completions) if natural else self.completions  # a divisor
        self.micro = args.micro_batch_size or usual
        self.longest = args.new_tokens * (2 if natural else 1)
        size = dict(SIZES[args.size], pad_token_id=0, eos_token_id=None, bos_token_id=None)
        size.update(vocab_size=64 if natural else size["vocab_size"])
        words = {f"w{i}": i for i in range(size["vocab_size"])}
        words["<eos>"] = words.pop("w1") if natural else len(words)
        words["<pad>"] = words.pop("w0")
        words = Tokenizer(models.WordLevel(words, "<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")
        torch.manual_seed(0)
        self.policy = transformers.AutoModelForCausalLM.from_config(
            QWEN(**size) if args.size == "0.5B" else LLAMA(**size)).eval()
        self.folder = tempfile.TemporaryDirectory()  # TRL loads its policy and reference from it
        self.policy.save_pretrained(self.folder.name)
        self.policy.to(args.device)
        lengths = [args.prompt_tokens * (8 - i % 4 * (not args.equal_prompts)) // 8
                   for i in range(args.prompts)]
        self.ids = [torch.randint(2, size["vocab_size"], (n,)).tolist() for n in lengths]
        self.texts = [" ".join(f"w{i}" for i in ids) for ids in self.ids]
        assert self.tokenizer(self.texts).input_ids == self.ids  # TRL gets the texts

    def reward(self, prompts, completions, completion_ids, **columns):
        values = [sum(ids) % 97 / 97 for ids in completion_ids]
        return [float(value > 0.8) if self.natural else value for value in values]


class Stopwatch:
    """Of each step: milliseconds in all and per phase, and new tokens."""

    def __init__(self, device):
        self.cuda, self.found = device.startswith("cuda"), []

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self):
        self.phases, self.tokens, self.begun = Counter(), 0, self.now()

    def stop(self):
        wall = self.now() - self.begun
        self.found.append(dict(
            ms=1e3 * wall, tokens=self.tokens, rollout=1e3 * self.phases["rollout"],
            logprobs=1e3 * self.phases["logprobs"],
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
    for step in range(steps):
        generator = step_generator(work.seed, step)
        clock.start()
        clock.sample(work.policy, work.tokenizer, work.ids, work.args.group_size, work.longest, 1.0,
                     generator)
        clock.stop()


def generate(work, steps, clock):
    ids, valid = (x.repeat_interleave(work.args.group_size, 0)
                  for x in rollout.pad_left(work.ids, work.args.device))
    plain = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=work.longest, pad_token_id=0,
        eos_token_id=work.tokenizer.eos_token_id)
    for _ in range(steps):
        clock.start()
        with rollout.precision(ids.device):
            out = clock.book("rollout", work.policy.generate)(
                input_ids=ids, attention_mask=valid.long(), generation_config=plain)
        clock.tokens += out[:, ids.shape[1]:].numel()
        clock.stop()


def ours(work, steps, clock, name, flags):
    """The script's train(), without its run folder, its evaluations, its loading and saving."""
    def log(step, problems, texts, scores, kl, batch, **metrics):
        json.dumps({key: float(value) for key, value in metrics.items()})

    args, script = work.args, importlib.import_module(name)
    cfg = script.Config(
        model="ours", data="ours", device=args.device, steps=steps, lr=1e-4, seed=work.seed,
        prompts_per_step=args.prompts, group_size=args.group_size, max_new_tokens=work.longest,
        minibatch_size=work.completions, micro_batch_size=work.micro, eval_prompts=1, **flags)

    def timed_steps():
        for step in range(steps):
            clock.start()
            yield step
            clock.stop()

    run = mock.Mock(steps=timed_steps, log=log)
    rows = [dict(prompt=text, ids=ids, row={}) for text, ids in zip(work.texts, work.ids)]
    instead = dict(Run=lambda *args, **kwargs: run, load_problems=lambda *_: Problems(rows, [], []),
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
    """TRL's train(); bf16 where ours has it, nothing recomputed: on a CPU its best settings."""
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
            save_strategy="no", logging_strategy="no", seed=work.seed, **settings)
        trainer(work.folder.name, work.reward, config, processing_class=work.tokenizer,
                train_dataset=datasets.Dataset.from_dict(dict(prompt=work.texts)),
                callbacks=[callback]).train()


# --------------------------------------------------------------------------------------------------
# The tables


def contenders(row):
    """-> {who: function (work, steps, clock)}."""
    script, flags, trainer, settings = ROWS[row]
    if not script:
        return dict(ours=our_rollout, generate=generate)
    found = dict(ours=partial(ours, name=script, flags=flags))
    if trainer and importlib.util.find_spec("trl"):
        found["TRL"] = partial(theirs, name=trainer, settings=settings)
    return found


def measure(args):
    """All contenders in turns -> {(row, who): [what the stopwatch found in each step]}."""
    works = {natural: Work(args, natural) for natural in {row == NATURAL for row in args.rows}}
    functions = {(row, who): f for row in args.rows for who, f in contenders(row).items()}
    found = {key: [] for key in functions}
    there, back = list(found), list(found)[::-1]  # so that nobody always comes after the same
    turns = [key for i in range(args.rounds) for key in (back if i % 2 else there)]
    for turn, (row, who) in enumerate(tqdm(turns, desc="turns")):
        work, clock = works[row == NATURAL], Stopwatch(args.device)
        work.seed = 1 + turn // len(found)  # others in each round
        transformers.set_seed(work.seed)  # for TRL's; ours seed themselves
        with contextlib.redirect_stdout(io.StringIO()):
            functions[row, who](work, args.steps + 1, clock)
        found[row, who] += clock.found[1:]
    for (row, who), steps in found.items():
        same = {args.prompts * args.group_size * args.new_tokens}
        assert row == NATURAL or {step["tokens"] for step in steps} == same, (row, who, steps)
    return found


def ratio(found, one, two, rounds, phase="ms"):
    """How many times the time of `two` is that of `one`: median and range of the rounds.

    Per token, because natural lengths are drawn, and differ.
    """
    if one not in found:
        return "-"
    size = len(found[one]) // rounds
    costs = [[sum(step[phase] for step in part) / sum(step["tokens"] for step in part)
              for part in (found[key][i : i + size] for i in range(0, size * rounds, size))]
             for key in (one, two)]
    ratios = [x / y for x, y in zip(*costs)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def show(found, rounds):
    print("| row | | ms | new tokens/s | rollout | log-probs | update, rest "
          "| rollout: generate / this | step: TRL / ours |\n" + "|---" * 9 + "|")
    for (row, who), steps in found.items():
        cells = [median(map(of, steps)) for of in (
            itemgetter("ms"), lambda step: 1e3 * step["tokens"] / step["ms"],
            *map(itemgetter, ("rollout", "logprobs", "update")))]
        last = ["-" if row == NATURAL else
                ratio(found, ("rollout", "generate"), (row, who), rounds, "rollout"),
                "-" if who != "ours" else ratio(found, (row, "TRL"), (row, who), rounds)]
        print(" | ".join([f"| {row}", who, *(f"{x:.0f}" for x in cells), *last]) + " |")
        if ROWS[row][2] and (row, "TRL") not in found:
            print(f"| {row} | TRL | not installed: pip install -r requirements-dev.txt |")
    pp, ppo = ("REINFORCE++", "ours"), ("PPO", "ours")
    if {pp, ppo} <= found.keys():
        print(f"\nPPO takes {ratio(found, ppo, pp, rounds)} times as long as REINFORCE++. TRL 1.16 "
              "has neither.")


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
    parser.add_argument("--equal_prompts", action="store_true", help="all of --prompt_tokens; "
                        "without it, some have 7, 6 or 5 eighths, and padding")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    for flag, value in vars(args).items():
        if type(value) is int and value < 1:
            fail(f"--{flag} {value}: it must be at least 1")
    if args.prompts * args.group_size % (args.micro_batch_size or 1):
        fail(f"--micro_batch_size {args.micro_batch_size}: it must divide the "
             f"{args.prompts * args.group_size} completions of a step")
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    show(measure(args), args.rounds)


if __name__ == "__main__":
    main()
