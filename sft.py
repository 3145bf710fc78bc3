"""
SFT
"""
from dataclasses import dataclass
from typing import Optional
from pathlib import Path
import torch

import toy
from common import (HfArg, Means, RunConfig, fail, fill, learning_rate, main, masked_mean, require_finite, seed_everything)
from data import decode, draw_problems, encode, evaluate, report
from rollout import load_policy, make_batch, micro_batches, mini_batches, save_policy, token_logprobs
from run import Run


@dataclass
class Config(RunConfig):
    pass


TOY = dict(steps=1200, lr=4e-3, minibatch_size=64, micro_batch_size=32, max_new_tokens=32, eval_prompts=512)
HUB = dict(steps=200, lr=1e-5, minibatch_size=64, micro_batch_size=8, max_new_tokens=256, eval_prompts=256)
HUB_ON_CPU = dict(HUB, steps=10, minibatch_size=8, max_new_tokens=64, eval_prompts=16)


def warm_start(seed):
    folder = Path(f"runs/warm/{seed}")
    if not (folder / "model").exists():
        train(Config(seed=seed, device="cpu", out_dir=str(folder), warmup_steps=20, log_every=100))
    return str(folder)


def train(cfg):
    fill(cfg, TOY, HUB, HUB_ON_CPU)
    run = Run(cfg, "sft")
    if not cfg.model:
        policy, tokenizer = toy.make_model(cfg.seed), toy.make_tokenizer()
    else:
        policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = encode(toy.problems(cfg.data, "train", 65536), tokenizer)
    held_out = encode(toy.problems(cfg.data, "test", cfg.eval_prompts), tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay)
    seed_everything(cfg.seed)
    state = run.load(policy=policy, optimizer=optimizer)
    before = state.get("before") or evaluate(policy, tokenizer, held_out, cfg.max_new_tokens, 512)
    for step in run.steps():
        asked = draw_problems(problems, step, cfg.minibatch_size, cfg.seed)
        comps = [tokenizer(p["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for p in asked]
        batch = make_batch([p["ids"] for p in asked], comps, cfg.device)
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        for mini in mini_batches(len(comps), cfg.minibatch_size, 1, 1):
            optimizer.zero_grad()
            for rows, share in micro_batches(mini, batch.mask, cfg.micro_batch_size):
                logprobs = token_logprobs(policy, batch, rows, 1.0)
                loss = -masked_mean(logprobs, batch.mask[rows])
                (loss * share).backward()
                stats.add(share, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
        run.lap("update")
        run.log(step, grad_norm=grad_norm, **stats())
        run.save(step, policy=policy, optimizer=optimizer, before=before)
    save_policy(policy, tokenizer, run.folder)
    report(before, evaluate(policy, tokenizer, held_out, cfg.max_new_tokens, 512), len(held_out))


if __name__ == "__main__":
    main(Config, train)
