"""
The scores of a reward model: with gradient, for reward_model.py; and as a reward, for the scripts
that sample.
"""
import torch
from transformers import AutoModelForSequenceClassification

from plumbing.data import encode
from plumbing.model import load
from plumbing.offline import make_batch
from plumbing.rollout import inputs, pad_left, precision, recomputes

REWARD = '''# This file makes the folder a reward: --reward FOLDER
from pathlib import Path

from plumbing.scorer import load_scorer

score = load_scorer(Path(__file__).parent)
'''


def sequence_scores(scorer, batch, rows):
    """s(x, y) = w^T h of completions `rows` (n,), by a sequence classifier -> (n,), with gradient.

    h is the last layer's output at the last token, which is known from the mask. The classifier's
    own forward looks for the last id that is not pad: where pad is the EOS, the token before it.
    """
    scorer.train(recomputes(scorer))
    prompt_ids, valid = pad_left([batch.prompts[i] for i in batch.owner[rows].tolist()],
                                 batch.mask.device)
    mask = batch.mask[rows, : int(batch.mask[rows].sum(1).max())].bool()
    ids = torch.where(mask, batch.completions[rows, : mask.shape[1]], 0)
    ids = torch.cat([prompt_ids, ids], 1)
    valid = torch.cat([valid, mask], 1)
    with precision(ids.device):
        hidden = scorer.base_model(**inputs(ids, valid), use_cache=False).last_hidden_state
    scorer.eval()
    last = valid.cumsum(1).argmax(1)  # the first column with the full count
    hidden = hidden[torch.arange(len(rows), device=ids.device), last]            # (R, d)
    return scorer.score(hidden.float()).squeeze(-1)


@torch.no_grad()
def all_scores(scorer, batch, micro_batch_size):
    """s(x, y) of all completions, without gradient -> (N,)."""
    rows = torch.arange(len(batch.mask), device=batch.mask.device).split(micro_batch_size)
    return torch.cat([sequence_scores(scorer, batch, part) for part in rows])


def load_scorer(folder, micro_batch_size=64):
    """The folder of a run of reward_model.py, or of such a model -> a reward, like any other."""
    scorer, tokenizer = load(AutoModelForSequenceClassification, "--reward", folder, num_labels=1)
    scorer.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)

    def learned(prompts, completions, finished, **columns):
        rows = encode([dict(prompt=prompt, completions=[text])
                       for prompt, text in zip(prompts, completions)], tokenizer)
        targets = [row["targets"][0] if done else row["targets"][0][:-1]  # cut short: without EOS
                   for row, done in zip(rows, finished)]
        longest = max(len(row["ids"]) + len(target) for row, target in zip(rows, targets))
        if longest > getattr(scorer.config, "max_position_embeddings", longest):
            raise ValueError(f"{longest} tokens are more than it can read: lower --max_new_tokens")
        batch = make_batch([row["ids"] for row in rows], targets, scorer.device)
        return all_scores(scorer, batch, micro_batch_size).tolist()
    return learned
