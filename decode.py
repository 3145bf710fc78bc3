"""
One more token for each completion, while rollout.sample() loops.

`owner` (n,) is the prompt of each completion, `valid` (B, P) says which prompt columns are real.
"""
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer


class Buffer(DynamicLayer):
    """One layer's keys and values, (n, heads, W, d), in memory taken once and written in place.

    Under autocast, rotary keys come in fp32: they are kept in bf16, in which attention wants them.
    """

    def __init__(self, layer, owner, extra):
        super().__init__()
        self.length, self.is_initialized = layer.keys.shape[2], True
        self.keys, self.values = (
            F.pad(x.to(layer.values.dtype).index_select(0, owner), (0, 0, 0, extra))
            for x in (layer.keys, layer.values))

    def update(self, keys, values, *args, **kwargs):
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self):
        return self.length


class Decoder:
    """Columns are added one by one, and rows that have ended are dropped."""

    def __init__(self, forward, policy, cache, owner, valid, extra):
        self.forward, self.policy, self.width = forward, policy, valid.shape[1]
        layers = [Buffer(cache.layers.pop(0), owner, extra) for _ in range(len(cache.layers))]
        self.cache = Cache(layers=layers)  # pop: each prompt layer is freed when it is copied
        # All completion columns count as real: those after a row's EOS are never read.
        self.valid = F.pad(valid[owner], (0, extra), value=True)

    def __call__(self, tokens):
        """The tokens just drawn (n,) -> logits of the next (n, V)."""
        self.width += 1
        valid = self.valid[:, : self.width]
        return self.forward(self.policy, tokens[:, None], valid, self.cache)[:, -1]

    def drop(self, rows, finished):
        """Forward no rows that have ended, once they are a quarter -> the rows left."""
        alive = (~finished[rows]).nonzero().flatten()
        if len(alive) > 0.75 * len(rows):
            return rows
        self.cache.reorder_cache(alive)
        self.valid = self.valid[alive]
        return rows[alive]
