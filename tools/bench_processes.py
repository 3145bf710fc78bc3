"""
What more processes bring: the phases of a step of GRPO, by one process and by all of them.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m tools.bench_processes --size 3M

One process and all of them take turns, on the same model, prompts and random numbers. While one
works alone, the others wait. A time is the median over the rounds; the first round is dropped.
`all_reduce` is the sum of the gradients, with the wait for the process that comes last.
"""
import argparse
import os
import time
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from torch.nn.utils import clip_grad_norm_

from grpo import group_advantages, grpo_loss
from plumbing.parallel import begin, rank, sum_gradients, world
from plumbing.rollout import all_logprobs, micro_batches, sample, step_generator, token_logprobs
from tools.bench import SIZES

PHASES = "sample", "reference", "update", "all_reduce", "optimizer"


def step(policy, ref_model, optimizer, prompts, args):
    """One step of GRPO with a KL, on made-up scores -> seconds of each phase."""
    times, begun = {}, time.perf_counter()

    def lap(phase):
        nonlocal begun
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        times[phase], begun = time.perf_counter() - begun, time.perf_counter()

    nothing = SimpleNamespace(eos_token_id=policy.config.vocab_size)  # is never drawn
    batch = sample(policy, nothing, prompts, args.group_size, args.new_tokens, 1.0,
                   step_generator(1, "bench"))
    lap("sample")
    ref_logprobs = all_logprobs(ref_model, batch, args.micro_batch_size, 1.0)
    lap("reference")
    n, mask = len(batch.mask), batch.mask
    advantages = group_advantages((torch.arange(n) % 3.0).to(mask), args.group_size)
    optimizer.zero_grad()
    for rows in micro_batches(batch, torch.arange(n), args.micro_batch_size):
        logprobs = token_logprobs(policy, batch, rows, 1.0)
        losses, _ = grpo_loss(logprobs, batch.logprobs[rows], ref_logprobs[rows], advantages[rows],
                              0.2, 0.04)
        (losses * mask[rows] / mask.sum()).sum().backward()
    lap("update")
    sum_gradients(policy)
    lap("all_reduce")
    clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    lap("optimizer")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1M", help="of the model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = begin(args.device)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[args.size], eos_token_id=None, bos_token_id=None)
    policy, ref_model = (transformers.LlamaForCausalLM(config).to(device).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
    prompts = torch.randint(config.vocab_size, (args.prompts, args.prompt_tokens)).tolist()
    found = {1: [], world(): []}
    for _ in range(args.rounds + 1):
        for processes in found:
            if processes == 1 and rank() == 0:
                with mock.patch.dict(os.environ, WORLD_SIZE="1"):
                    found[1].append(step(policy, ref_model, optimizer, prompts, args))
            elif processes > 1:
                found[processes].append(step(policy, ref_model, optimizer, prompts, args))
            if world() > 1:
                torch.distributed.barrier()
    if rank() == 0:
        print(f"| ms, {args.size} | " + " | ".join([*PHASES, "step"]) + " |\n" + "|---" * 7 + "|")
        for processes, rounds in found.items():
            cells = [median(1000 * times[phase] for times in rounds[1:]) for phase in PHASES]
            cells.append(median(1000 * sum(times.values()) for times in rounds[1:]))
            print(f"| {processes} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
