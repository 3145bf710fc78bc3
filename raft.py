"""
RAFT (Dong et al., arXiv 2304.06767), or best-of-K fine-tuning; the notes call it RAHF, which is the
name of another method. Sample K completions of each prompt, keep the best, do SFT on it, repeat.
Differs from sft.py: the policy writes the demonstrations itself, and a reward chooses them.

    y*   = argmax of the scores of the K completions y_1, ..., y_K of a prompt
    loss = -mean_t log pi(y*_t | x, y*_<t)        over the tokens of all y* of a mini-batch

Against the online siblings: no advantage, no ratio and here no KL. The best completion becomes more
likely, however little better it is, and no completion is pushed down. Where all scores of a prompt
are equal, none is the best: the prompt is left out (the paper keeps one), and frac_zero_std counts
how many were.

    python raft.py                                      the toy, no network: half a minute
    python raft.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it answers 12, or shows its work, 8+9=17,17-5=12. At first,
0.6 of the held-out answers are right and half show the work; at the end, 0.9 and nearly all.
"""
from dataclasses import dataclass

import torch

from common import learning_rate, mini_batches
from common import masked_mean
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.evaluation import batch_stats, check_first_step, ratio_stats
from plumbing.flags import HfArg, RunConfig
from plumbing.model import load_policy
from plumbing.rewards import load_rewards, score
from plumbing.rollout import micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Means, Run


@dataclass
class Config(RunConfig):  # the rest is in plumbing/flags.py: --steps, --lr, --minibatch_size, ...
    reward: str = HfArg(default="last_number", help="name, file.py:function or folder; a,b: sum")
    prompts_per_step: int = HfArg(default=64, help="prompts per rollout batch")
    group_size: int = HfArg(default=4, help="completions per prompt, K")
    temperature: float = HfArg(default=1.0, help="of the sampling, and of all log-probs with it")
    epochs: int = HfArg(default=1, help="passes over the best of each batch")


# The defaults above are the toy's. These are a real model's on a GPU; on a CPU they are smaller.
REAL = dict(steps=200, lr=1e-6, minibatch_size=128, micro_batch_size=8, max_new_tokens=256,
            eval_prompts=256)


def best_of_k(scores, group_size):
    """Scores (N,) of groups of K -> (N / K,), the index in the batch of each group's best.

    The first of them if several are best.
    """
    groups = scores.view(-1, group_size)
    return torch.arange(0, len(scores), group_size, device=scores.device) + groups.argmax(dim=1)


def train(cfg):
    run = Run(cfg, "raft")
    problems, validation, test = load_problems(cfg)
    rewards = load_rewards(cfg, problems + validation + test)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    run.open(policy, tokenizer, validation, test, rewards, optimizer=optimizer)

    for step in run.steps():
        # 1. Sample: K completions of each prompt of this step, from softmax(logits / temperature).
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        asked = draw_problems(problems, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in asked], cfg.group_size,
                       cfg.max_new_tokens, cfg.temperature, generator)
        old_logprobs, mask = batch.logprobs, batch.mask  # N completions, C tokens; mask 0: padding
        run.lap("sample")

        # 2. Score: what each completion earned.
        texts, scores, each = score(rewards, asked, batch, tokenizer, step)      # scores: (N,)
        kl = torch.zeros_like(mask)  # not measured: nothing here needs a reference
        if step == 0:
            check_first_step(policy, batch, scores, kl, cfg)  # warns if the setup looks wrong
        run.lap("score")

        # 3. Select the best of each group, where there is one.
        groups = scores.view(-1, cfg.group_size)
        best = best_of_k(scores, cfg.group_size)[groups.amax(1) > groups.amin(1)].cpu()

        # 4. Update, once per mini-batch. by_token, by_row weight its micro-batches, for a mean over
        # tokens or over completions; both sum to 1.
        stats = Means()
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        size = cfg.minibatch_size // cfg.group_size  # the best of as many as a sibling's mini-batch
        for minibatch in mini_batches(len(best), size, group_size=1, epochs=cfg.epochs,
                                      generator=generator):
            optimizer.zero_grad()
            for rows, by_token, by_row in micro_batches(batch, best[minibatch],
                                                        cfg.micro_batch_size):
                old, m = old_logprobs[rows], mask[rows]                          # R rows of each
                logprobs = token_logprobs(policy, batch, rows, cfg.temperature)  # (R, C)
                loss = -masked_mean(logprobs, m)
                stats.add(by_token, **ratio_stats(logprobs, old, m))
                stats.add_parts(by_token, clip_frac=0.0)  # nothing is clipped
                (loss * by_token).backward()
                stats.add_parts(by_token, loss=loss)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm,
                                                       error_if_nonfinite=True)
            optimizer.step()
            stats.end_minibatch(grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"])

        # 5. Log. The loss is low from the start, because the policy has written this itself.
        run.log(step, **batch_stats(scores, kl, batch, cfg.group_size), **each,
                **{"loss": 0.0, **stats()})
        run.show(step, asked, texts, scores)
        run.end_step(step)  # validation, checkpoint, when due

    run.close()  # saves the model, and reports how it fares on the test problems


if __name__ == "__main__":
    main(Config, REAL, train)
