"""
A reward model: transformers' sequence classifier with one label, on a language model's backbone.

    s(x, y) = w^T h        h: the last layer's output at the last token of prompt x, completion y

reward_model.py trains one; of a run of it, every online script takes the folder as its --reward.
"""
import copy

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common import fail
from data import encode, encode_completions
from model import check_config, remove_dropout
from rollout import inputs, make_batch, pad_left, precision, recomputes


def make_scorer(policy, tokenizer, name):
    """The policy's backbone with a new head. It starts at 0: no opinion yet."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        scorer.base_model.load_state_dict(policy.base_model.state_dict())
        torch.nn.init.zeros_(scorer.score.weight)
    except (ValueError, AttributeError, RuntimeError):  # no such class, head, or backbone
        fail(f"--model {name}: transformers has no sequence classifier for {config.model_type} "
             "with a head called score; choose another model")
    if scorer.config.pad_token_id is None:  # for transformers' own forward, which we do not use
        scorer.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return remove_dropout(scorer).to(policy.device)


def sequence_scores(scorer, batch, rows):
    """s(x, y) of completions `rows` (R,) -> (R,), fp32, with gradient.

    The last token is known from the mask. The classifier's own forward looks for the last id that
    is not pad: where pad is the EOS, that is the token before it.
    """
    scorer.train(recomputes(scorer))
    prompt_ids, valid = pad_left([batch.prompts[i] for i in batch.owner[rows].tolist()],
                                 batch.mask.device)
    mask = batch.mask[rows, : int(batch.mask[rows].sum(1).max())].bool()
    ids = torch.where(mask, batch.completions[rows, : mask.shape[1]], 0)
    ids = torch.cat([prompt_ids, ids], 1)
    valid = torch.cat([valid, mask], 1)
    with precision(ids.device):
        hidden = scorer.base_model(**inputs(scorer, ids, valid), use_cache=False).last_hidden_state
    scorer.eval()
    last = valid.cumsum(1).argmax(1)  # the first column with the full count
    hidden = hidden[torch.arange(len(rows), device=ids.device), last]            # (R, d)
    return scorer.score(hidden.float()).squeeze(-1)


@torch.no_grad()
def all_scores(scorer, batch, micro_batch_size):
    """s(x, y) of all completions, without gradient -> (N,)."""
    rows = torch.arange(len(batch.mask), device=batch.mask.device).split(micro_batch_size)
    return torch.cat([sequence_scores(scorer, batch, part) for part in rows])


def load_scorer(folder, cfg):
    """The folder of a run of reward_model.py, or of such a model -> a reward, like any other."""
    inside = str(folder / "model" if (folder / "model").is_dir() else folder)
    transformers.utils.logging.set_verbosity_error()
    try:
        scorer, info = AutoModelForSequenceClassification.from_pretrained(
            inside, dtype=torch.float32, num_labels=1, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(inside, trust_remote_code=False)
        missing = [*info["missing_keys"], *info["mismatched_keys"]]
    except Exception as error:  # no model, a torn file, ...
        missing = (str(error).strip() or type(error).__name__).splitlines()[:1]
    if missing:
        fail(f"--reward {folder}: no reward model can be loaded from it ({missing[0]}); name the "
             "folder of a finished run of reward_model.py")
    check_config("--reward", folder, scorer.config)
    remove_dropout(scorer).to(cfg.device).requires_grad_(False)

    def learned(prompts, completions, finished, **columns):
        rows = [dict(prompt=prompt, completion=text) for prompt, text in zip(prompts, completions)]
        rows = encode_completions(encode(rows, tokenizer), tokenizer)
        targets = [row["targets"][0] if done else row["targets"][0][:-1]  # cut short: without EOS
                   for row, done in zip(rows, finished)]
        batch = make_batch([row["ids"] for row in rows], targets, cfg.device)
        longest = max(len(row["ids"]) + len(target) for row, target in zip(rows, targets))
        if longest > (context := getattr(scorer.config, "max_position_embeddings", longest)):
            raise ValueError(f"{longest} tokens, but it can read {context}: lower --max_new_tokens")
        return all_scores(scorer, batch, cfg.micro_batch_size).tolist()
    return learned
