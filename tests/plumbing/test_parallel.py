"""plumbing/parallel.py: two processes do what one does. They meet by gloo, on this machine."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import ROOT, save_folder, write_jsonl
from safetensors.torch import load_file

from plumbing import parallel

SMALL = ["--device", "cpu", "--eval_prompts", 3, "--log_every", 1, "--save_every", 1]
TASK = ["--data", "sums.jsonl", "--reward", "r.py:varied"]
ONLINE = ["--prompts_per_step", 3, "--max_new_tokens", 6]
BATCHES = ["--minibatch_size", 8, "--micro_batch_size", 3, "--lr", "1e-3", *ONLINE]
PAIRS = ["--minibatch_size", 5, "--micro_batch_size", 2, "--max_new_tokens", 12, "--lr", "1e-3"]
FLAGS = dict(
    grpo=["--epochs", 2, *BATCHES], rloo=BATCHES, prime=BATCHES, raft=BATCHES, remax=BATCHES,
    reinforce_pp=["--group_size", 2, *BATCHES], ppo=["--critic_lr", "1e-3", *BATCHES],
    reinforce=["--lr", "1e-3", "--micro_batch_size", 2, "--group_size", 2, *ONLINE],
    trpo=["--delta", 0.01, "--cg_iterations", 2, "--group_size", 3, "--micro_batch_size", 2,
          *ONLINE],
    sft=PAIRS, dpo=PAIRS, orpo=PAIRS, reward_model=PAIRS)

REWARDS = '''
import os, random, torch

def varied(completions, **columns):
    """Of the text, and hardly two the same: equal scores would leave rounding errors alone."""
    return [min(1.0, len(set(text)) / 20 + len(text) / 100) for text in completions]

def noisy(completions, **columns):
    """It draws numbers, and is called in one process alone: it notes in which."""
    with open(f"called-{os.getpid()}", "a") as file:
        file.write("x")
    return [len(set(text)) + random.random() + torch.rand(1).item() for text in completions]

def broken(completions, **columns):
    if len(completions) > 2:
        raise ValueError("no more")
    return [0.0] * len(completions)

def slow(completions, **columns):
    import time
    if len(completions) > 2:
        open("judging", "w").close()
        time.sleep(60)
    return [0.0] * len(completions)
'''


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*arguments, processes=2, code=0):
    """`python ARGUMENTS` in so many processes, as torchrun starts them -> what each has written."""
    port = str(free_port())
    started = [warm.start(arguments, Path.cwd(), f"screen{rank}", dict(
        TORCHELASTIC_RUN_ID="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1") if processes > 1 else {})
        for rank in range(processes)]
    while any(process.is_alive() for process in started):
        time.sleep(0.02)
        if any(process.exitcode for process in started):  # torchrun then ends the others
            time.sleep(0.5)
            for process in started:
                process.terminate()
    for process in started:
        process.join()
    screens = [Path(f"screen{rank}").read_text() for rank in range(processes)]
    assert started[0].exitcode == code, "\n".join(screens)
    return screens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("parallel") / "model")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text(REWARDS)
    sums = [(a, b) for a in range(10) for b in range(a)]
    write_jsonl("sums.jsonl", [dict(prompt=f"{a}+{b}=", answer=a + b) for a, b in sums])
    write_jsonl("pairs.jsonl", [dict(prompt=f"{a}+{b}=", completion=f"{a}+{b}={a + b}",
                                     chosen=f"{a}+{b}={a + b}", rejected=str(a)) for a, b in sums])


def lines(name, folder):
    rows = [json.loads(line) for line in Path(folder, name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time_step"} for row in rows]


def weights(folder):
    state = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["policy"]
    return torch.cat([value.flatten() for value in state.values()])


def check_same(one, two, before):
    """The same samples and tables; log and weights up to rounding."""
    if Path(one, "samples.jsonl").exists():
        for row, other in zip(lines("samples.jsonl", one), lines("samples.jsonl", two)):
            assert row.pop("score") == pytest.approx(other.pop("score"), abs=1e-6) and row == other
    rows, others = lines("metrics.jsonl", one), lines("metrics.jsonl", two)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for key in row:
            assert row[key] == pytest.approx(other[key], rel=5e-3, abs=2e-5), key
    first, second, start = (weights(one), weights(two), before)
    assert (first - second).norm() <= 1e-2 * (first - start).norm() > 0


def start_of(folder, model):
    """The weights that a run began with, in the order of its checkpoint; a new head is 0."""
    old = load_file(f"{model}/model.safetensors")
    state = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["policy"]
    return torch.cat([old.get(key, torch.zeros_like(value)).flatten()
                      for key, value in state.items()])


@pytest.mark.parametrize("name", FLAGS)
def test_two_processes_do_what_one_does(name, model):
    """Three prompts do not divide by two; the mini-batches of three neither."""
    flags = [ROOT / f"{name}.py", "--model", model, "--steps", 2, *SMALL, *FLAGS[name],
             *(["--data", "pairs.jsonl"] if FLAGS[name] is PAIRS else TASK)]
    run(*flags, "--out_dir", "one", processes=1)
    screens = run(*flags, "--out_dir", "two")
    check_same("one", "two", start_of("one", model))
    assert "step 2" in screens[0] and "step" not in screens[1]
    assert Path("two/model/config.json").exists() and Path("two/test.json").exists()


def test_a_process_without_rows_takes_part_and_one_alone_asks_the_reward(model):
    """One prompt. The reward draws random numbers; both have its scores."""
    flags = [ROOT / "grpo.py", "--model", model, *TASK, "--steps", 2, *SMALL, *BATCHES,
             "--prompts_per_step", 1, "--reward", "r.py:noisy"]
    run(*flags, "--out_dir", "one", processes=1)
    called = set(Path().glob("called-*"))
    run(*flags, "--out_dir", "two")
    assert len(set(Path().glob("called-*")) - called) == 1
    check_same("one", "two", start_of("one", model))


def test_a_run_goes_on_with_another_number_of_processes(model):
    flags = [ROOT / "rloo.py", "--model", model, *TASK, *SMALL, *BATCHES]
    run(*flags, "--steps", 3, "--warmup_steps", 100, "--out_dir", "one", processes=1)
    for steps, processes in ((1, 2), (2, 1), (3, 2)):  # the schedule follows --steps: it is flat
        place = ["--resume", "two"] if steps > 1 else ["--out_dir", "two"]
        run(*flags, "--steps", steps, "--warmup_steps", 100, *place, processes=processes)
    check_same("one", "two", start_of("two", model))


def test_lora_on_two_processes(model):
    """The recipe, with a stand-in for peft that is called otherwise."""
    from test_recipes import PEFT

    from tools import recipe
    Path("stand_in.py").write_text(PEFT)
    Path("grpo_lora.py").write_text(recipe.apply("lora").replace("import peft",
                                                                 "import stand_in as peft"))
    flags = ["grpo_lora.py", "--model", model, *TASK, "--steps", 2, *SMALL, *BATCHES]
    run(*flags, "--out_dir", "one", processes=1)
    run(*flags, "--out_dir", "two")
    one, two = (lines("metrics.jsonl", folder) for folder in ("one", "two"))
    assert abs(one[0]["kl"]) < 1e-5
    for row, other in zip(one, two):
        assert row == {key: pytest.approx(other[key], rel=5e-3, abs=2e-5) for key in row}


@pytest.mark.parametrize("flags, words, code", [
    *[(["--device", "cuda"], "--device cuda", 2)] * (not torch.cuda.is_available()),
    (["--steps", "-1"], "--steps -1", 2), (["--temp", 1], "--temp", 2),
    (["--reward", "r.py:broken"], "no more", 2), (["--lr", "1e30"], "smaller --lr", 1)])
def test_what_fails_is_said_once(model, flags, words, code):
    screens = run(ROOT / "grpo.py", "--model", model, *TASK, "--steps", 2, *SMALL, *BATCHES,
                  *flags, code=code)
    said = [line for screen in screens for line in screen.splitlines() if "error:" in line]
    assert len(said) == 1 and words in said[0] and "Traceback" not in "".join(screens)


def test_weights_that_differ_end_the_run(model):
    """Process 1 starts with other weights: after the first step the processes compare them."""
    code = ("import os, sys, torch, grpo; from plumbing.command_line import main\n"
            "real = grpo.load_policy\n"
            "def load(*args):\n"
            "    policy, tokenizer = real(*args)\n"
            "    policy.lm_head.weight.data += 1e-6 * int(os.environ['RANK'])\n"
            "    return policy, tokenizer\n"
            "grpo.load_policy = load\n"
            "main(grpo.Config, grpo.TOY, grpo.train)")
    screens = run("-c", code, "--model", model, *TASK, "--steps", 2, *SMALL, *BATCHES, code=1)
    assert "step 1: the processes have come to different weights" in screens[0]


def test_the_bench_takes_turns():
    screens = run("-m", "tools.bench_processes", "--rounds", 1, "--prompts", 3, "--new_tokens", 4)
    one, two = screens[0].splitlines()[-2:]
    assert one.startswith("| 1 |") and two.startswith("| 2 |") and not screens[1]


def torchrun(*arguments, **settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **settings)


def test_torchrun_itself_fails_with_one_sentence_and_ends_at_ctrl_c(model):
    flags = [ROOT / "grpo.py", "--model", model, *TASK, "--steps", 2, *SMALL, *BATCHES]
    process = torchrun(*flags, "--reward", "r.py:broken", "--out_dir", "broken")
    screen = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and screen.count("error: --reward broken") == 1, screen
    process = torchrun(*flags, "--reward", "r.py:slow", "--out_dir", "slow",
                       start_new_session=True)
    while not Path("judging").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    screen = process.communicate(timeout=30)[0]
    assert process.returncode and screen.count("error: stopped") == 1, screen
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("something is left of it")


def test_alone_nothing_is_started():
    """Without torchrun there is no process group, whatever SLURM or a user has set."""
    assert (parallel.rank(), parallel.world()) == (0, 1) and parallel.begin("cpu") == "cpu"
    tensor = torch.ones(2)
    parallel.add_up(tensor), parallel.sum_gradients(torch.nn.Linear(2, 2))
    assert tensor.tolist() == [1, 1] and parallel.gather(3) == [3]
    assert parallel.from_first(lambda x: x + 1, 1) == 2
    assert not torch.distributed.is_initialized()
