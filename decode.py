"""
One more token for each completion: plainly, or as a CUDA graph. rollout.sample() is the loop.

To decode a token of a small model is a thousand little kernels, and on a GPU it takes longer to
launch them from Python than to run them. A CUDA graph, recorded once, launches them all at once,
but always on the same memory. So there every tensor keeps its place and its shape, the full width:
the column that is written is a tensor too, not a Python number, and the columns after it are
masked. The optimizer changes weights in place, and so a graph serves all steps of a training.

`owner` (n,) is the prompt of each completion, `valid` (B, P) says which prompt columns are real.
"""
import sys
import weakref

import torch
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
    """The plain way: columns are added one by one, and rows that have ended are dropped."""

    def __init__(self, forward, policy, cache, owner, valid, extra):
        self.forward, self.policy, self.width = forward, policy, valid.shape[1]
        self.cache = Cache(layers=[Buffer(layer, owner, extra) for layer in cache.layers])
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


# --------------------------------------------------------------------------------------------------
# On a GPU

GRAPHS = weakref.WeakKeyDictionary()  # policy -> {number of rows: its graph}; None: they don't work
LIMIT = 0.03  # how far the graph's probabilities may be from the plain way's; bf16 is noisy
WIDTH = 128  # widths are multiples of it, so that a longer prompt seldom needs a new graph


class FixedBuffer(DynamicLayer):
    """One layer's keys and values, (n, heads, W, d); what is written is the column `at` (1,)."""

    def __init__(self, layer, rows, width, at):
        super().__init__()
        self.at, self.is_initialized = at, True
        self.keys, self.values = (layer.values.new_zeros(rows, x.shape[1], width, x.shape[3])
                                  for x in (layer.keys, layer.values))

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.at, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values


class GraphDecoder:
    """The same with a fixed number of rows, of which none is dropped, and a fixed width."""

    def __init__(self, forward, policy, cache, rows, width):
        def new(*shape, dtype=torch.long):
            return torch.ones(shape, dtype=dtype, device=policy.device)

        self.at, self.tokens, self.valid = new(1), new(rows, 1), new(rows, width, dtype=torch.bool)
        self.cache = Cache(layers=[FixedBuffer(x, rows, width, self.at) for x in cache.layers])
        self.replay = record(lambda: forward(policy, self.tokens, self.valid, self.cache,
                                             at=self.at)[:, -1], policy.device)

    def begin(self, cache, owner, valid):
        """A new rollout: each completion gets its prompt's keys and values."""
        P = valid.shape[1]
        for mine, prompt in zip(self.cache.layers, cache.layers):
            mine.keys[:, :, :P] = prompt.keys.index_select(0, owner)
            mine.values[:, :, :P] = prompt.values.index_select(0, owner)
        self.valid[:, :P], self.valid[:, P:] = valid[owner], True
        self.at.fill_(P - 1)
        return self

    def __call__(self, tokens):
        self.at += 1
        self.tokens.copy_(tokens[:, None])
        return self.replay()

    def drop(self, rows, finished):
        return rows[:0] if finished.all() else rows


def record(step, device):
    """step(), a function of tensors that stay where they are -> a function that replays it."""
    # autocast keeps the bf16 copies of the weights that it makes; in a graph they would grow old.
    precision = torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), False)
    with torch.cuda.device(device), precision:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                step(), step()  # the libraries of CUDA take their memory when first used
                torch.cuda.set_sync_debug_mode("error")  # .item() and the like cannot be recorded
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            logits = step()

    def replay():
        graph.replay()
        return logits
    return replay


class Compared:
    """The first rollout with a graph: the plain way, while the graph has to say the same."""

    def __init__(self, policy, plain, graph):
        self.policy, self.plain, self.graph = policy, plain, graph
        self.drop, self.gaps = graph.drop, []

    def __call__(self, tokens):
        logits = self.plain(tokens)
        if self.graph:
            one, two = (x.float().softmax(-1) for x in (logits, self.graph(tokens)))
            self.gaps.append((one - two).abs().sum(-1).mean().item() / 2)
            gap = sum(self.gaps) / len(self.gaps)
            if not gap < LIMIT:
                refuse(self.policy, f"its probabilities are off by {gap:.2g}")
                self.graph = None
        return logits


def refuse(policy, reason):
    print(f"warning: decoding without a CUDA graph, which is slower: {reason}", file=sys.stderr)
    GRAPHS[policy] = None


def decoder(forward, policy, cache, owner, valid, extra):
    """What forwards the tokens of a rollout: on a GPU a graph, unless that has failed."""
    graph, reason = None, None
    if use_graphs(policy):
        graphs, rows = GRAPHS.setdefault(policy, {}), len(owner)
        width = -(-(valid.shape[1] + extra) // WIDTH) * WIDTH
        if rows in graphs and graphs[rows].valid.shape[1] >= width:
            return graphs[rows].begin(cache, owner, valid)
        graphs.pop(rows, None)  # its memory first
        try:
            graph = graphs[rows] = GraphDecoder(
                forward, policy, cache, rows, width).begin(cache, owner, valid)
        except Exception as error:  # a model that cannot be recorded, too little memory, ...
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        graphs.clear()  # after the except, or its traceback would hold their memory
        refuse(policy, reason)
    plain = Decoder(forward, policy, cache, owner, valid, extra)
    return Compared(policy, plain, graph) if graph else plain


def use_graphs(policy):
    return policy.device.type == "cuda" and GRAPHS.get(policy, {}) is not None
