"""
One run on several processes: torchrun --standalone --nproc_per_node 8 grpo.py --model ...

The passes are split, and the mathematics is repeated. Every process holds the whole batch, so each
computes advantages, shares and the log for itself, the same as the others. Three things are split:
sampling, where each process answers every WORLD-th prompt; passes without gradient; and the rows of
a mini-batch. `share` sums to 1 over all processes together, so gradients only have to be added up.

Files and the screen belong to process 0. It also calls the rewards, which may draw numbers or ask a
server, and hands the scores on. Without torchrun, there is one process, and nothing is sent.
"""
import atexit
import os
import sys

import torch


def rank():
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world():
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def begin(device):
    """Meet the other processes -> this one's device. nccl is for GPUs, gloo for CPUs."""
    if world() == 1:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def add_up(*tensors):
    """Replace each tensor by its sum over the processes. Bits are the same in all of them."""
    if world() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def sum_gradients(*networks):
    """After the backward passes of a mini-batch: the gradients of all rows, not of ours alone."""
    if world() > 1:
        weights = [p for network in networks for p in network.parameters() if p.requires_grad]
        for p in weights:  # a process without rows has no gradient, but takes part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        works = [torch.distributed.all_reduce(p.grad, async_op=True) for p in weights]
        for work in works:
            work.wait()


def from_first(function, *arguments):
    """function(*arguments), called by process 0 alone -> its result, for all."""
    found = [function(*arguments) if rank() == 0 else None]
    if world() > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def gather(value):
    """-> what each process has, in a list."""
    found = [value] * world()
    if world() > 1:
        torch.distributed.all_gather_object(found, value)
    return found
