"""
RAFT (Dong et al., arXiv 2304.06767), also called best-of-K fine-tuning. The policy pi answers each
prompt x K times, a reward scores the completions, and the policy is trained on the best one by
supervised fine-tuning. Each step of the training does all of this.

    y*   = the completion with the highest score of the prompt's K completions
    loss = -mean_t log pi(y*_t | x, y*_<t)        over the tokens of all y* of a mini-batch

A prompt whose K scores are all equal has no best completion and is left out; frac_zero_std in the
log is the fraction of such prompts. (The paper keeps one of the K.) --minibatch_size counts all K
completions, so an update is made on minibatch_size / K of them at most.

By default, a step samples 256 completions, 4 for each prompt, and makes 2 updates, or 4 on the toy.
The reward last_number gives 0 to a completion that is cut off.

Compared with sft.py:
  - the policy writes the demonstrations itself, and a reward chooses them.
Compared with rloo.py:
  - there is no advantage. The best completion has the weight 1, however little better it is, and
    the others have the weight 0;
  - there is no ratio in the loss, and no KL and therefore no reference policy.

    python raft.py                                      the toy, no network: half a minute
    python raft.py --model Qwen/Qwen2.5-0.5B-Instruct   a real model, on one CUDA GPU

What to expect of the toy: asked 8+9-5=, it writes 12, or shows its work and writes 8+9=17,17-5=12.
Before the training, 0.6 of all answers to held-out problems are right, and half of all answers
show the work. After it, 0.91 of all are right, and nearly all show the work.
"""
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common import learning_rate, mini_batches
from plumbing.command_line import main
from plumbing.data import draw_problems, load_problems
from plumbing.flags import HfArg, OnlineConfig, check
from plumbing.model import load_policy
from plumbing.parallel import sum_gradients
from plumbing.rewards import load_rewards, score
from plumbing.rollout import micro_batches, sample, step_generator, token_logprobs
from plumbing.run import Run


@dataclass
class Config(OnlineConfig):  # more flags, such as --data and --lr, are in plumbing/flags.py
    epochs: int = HfArg(default=1, help="passes over the best completions of a step")


# The defaults above are for a real model on a GPU, these for the toy's model.
TOY = dict(steps=60, lr=2e-4, minibatch_size=64, micro_batch_size=64, max_new_tokens=32,
           eval_prompts=512)


def best_of_k(scores, group_size):
    """Scores (N,) -> (N / K,), for each group of K the row of its best completion.

    If several are best, it is the first of them.
    """
    groups = scores.view(-1, group_size)
    return torch.arange(0, len(scores), group_size, device=scores.device) + groups.argmax(dim=1)


def train(cfg):
    cfg = check(cfg, min_group=2)
    policy, tokenizer = load_policy(cfg.model, cfg.device)
    problems = load_problems(cfg, policy, tokenizer)
    rewards = load_rewards(cfg, problems.train + problems.validation + problems.test)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),  # short runs
                                  weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, "raft", policy, tokenizer, problems, rewards, optimizer=optimizer)

    for step in run.steps():
        # 1. Sample K completions of each prompt of this step from softmax(logits / temperature).
        # The completions of a prompt are neighbouring rows: prompt i has rows i K to i K + K - 1.
        generator = step_generator(cfg.seed, step)  # for the random numbers of this step
        step_problems = draw_problems(problems.train, step, cfg.prompts_per_step, cfg.seed)
        batch = sample(policy, tokenizer, [problem["ids"] for problem in step_problems],
                       cfg.group_size, cfg.max_new_tokens, cfg.temperature, generator)
        mask = batch.mask                                                        # (N, C)

        # 2. Score the completions.
        # score() returns texts, scores (N,) and, if there are several rewards, their means.
        texts, scores, reward_means = score(rewards, step_problems, batch, tokenizer)
        kl = torch.zeros_like(mask)  # for the log: without a reference, kl is 0

        # 3. Select the best completion of each group in which the scores differ.
        groups = scores.view(-1, cfg.group_size)
        best = best_of_k(scores, cfg.group_size)[groups.amax(1) > groups.amin(1)].cpu()  # rows

        # 4. Update, once per mini-batch. All tensors above are fixed; log-probs have a gradient
        # now. share (N, C) is the weight of each token in the loss.
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.steps, cfg.warmup_steps, cfg.lr)
        size = cfg.minibatch_size // cfg.group_size  # of each K rows, only one is left
        for minibatch in mini_batches(len(best), size, group_size=1, epochs=cfg.epochs,
                                      generator=generator):
            optimizer.zero_grad()
            share = mask / mask[best[minibatch]].sum()  # a mean over the tokens of the mini-batch
            for rows in micro_batches(batch, best[minibatch], cfg.micro_batch_size):
                losses = -token_logprobs(policy, batch, rows, cfg.temperature)   # (n, C)
                loss = (losses * share[rows]).sum()
                loss.backward()
                run.count(loss=loss)
            sum_gradients(policy)  # over the processes of torchrun
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
            run.end_minibatch(grad_norm=grad_norm)

        # 5. Log, and save when due. The loss only shows how sure the policy is of its own texts.
        run.log(step, step_problems, texts, scores, kl, batch, **reward_means)

    run.close()  # saves the model, and tests it on the test problems


if __name__ == "__main__":
    main(Config, TOY, train)
