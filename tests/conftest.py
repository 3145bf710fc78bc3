"""Tiny models and helpers of all tests. No network; PAPER_CUDA=1: see paper_cuda/device.py."""
import functools
import json
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]  # for the tests in folders too

if os.environ.get("PAPER_CUDA"):
    sys.path.insert(0, str(TESTS / "paper_cuda"))
    import device  # before torch
    device.install()

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: beside others, one thread is faster
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from plumbing import data, model, toy  # noqa: E402
from plumbing.toy_model import make_tokenizer  # noqa: E402

RECIPES = [path.stem for path in (ROOT / "recipes").glob("*.diff")]
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))  # but for copies by tools.recipe
           if path.stem not in ("common", "sample", *RECIPES)
           and not path.stem.endswith(tuple(f"_{name}" for name in RECIPES))]
PLAIN = dict(vocab_size=18, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
ROPE = dict(**PLAIN, intermediate_size=64, num_key_value_heads=2)
CONFIGS = {  # windows of 4 are shorter than every test sequence; dropout is on where there is one
    "llama": lambda: transformers.LlamaConfig(**ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**ROPE, use_sliding_window=True, sliding_window=4,
                                              max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**ROPE, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **ROPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "mistral": lambda: transformers.MistralConfig(**ROPE, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=18, n_embd=32, n_layer=2, n_head=4,
                                            n_positions=64),
    "opt": lambda: transformers.OPTConfig(**PLAIN, ffn_dim=64, max_position_embeddings=64,
                                          word_embed_proj_dim=32, dropout=0.1, layerdrop=0.1),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**PLAIN, intermediate_size=64,
                                                   max_position_embeddings=64, hidden_dropout=0.1),
    "phi3": lambda: transformers.Phi3Config(**ROPE, sliding_window=4, pad_token_id=0),
}
HOSTILE = dict(top_k=2, temperature=0.3, repetition_penalty=1.5, do_sample=False,
               eos_token_id=[2, 7])
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}={% endif %}")


def make_model(name, scale=0.3, seed=0):
    """Random weights large enough that an error in a mask or a position shows."""
    config = CONFIGS[name]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    torch.manual_seed(seed)
    policy = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return policy


def save_folder(folder, name="llama", hostile=False, template=None, dtype=torch.float32,
                pad="<pad>", text=False, **kwargs):
    """A model folder as from the hub -> its path. With text, its tokenizer is not the toy's."""
    policy, tokenizer = make_model(name, **kwargs).to(dtype), make_tokenizer()
    if text:
        tokenizer.add_tokens(["<more>"])
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if hostile:
        (Path(folder) / "generation_config.json").write_text(json.dumps(HOSTILE))
    return str(folder)


def write_jsonl(path, rows):
    """-> the path as a string."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pytest_collection_modifyitems(items):
    """Only TRL may use the old name of the cache; the warning's text is all that tells it."""
    for item in items:
        if "trl" not in item.path.name and "bench" not in item.path.name:
            item.add_marker(pytest.mark.filterwarnings("error:.*past_key_values"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """folders("gpt2", hostile=True, ...) makes a model folder once and remembers it."""
    return functools.cache(lambda name, **kwargs: save_folder(
        tmp_path_factory.mktemp(name), name, **kwargs))


@pytest.fixture(params=["llama", "gpt2"])
def policy(request):
    """The two kinds of positions: rotary, and absolute with dropout (off, as loading does)."""
    return make_model(request.param).eval()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def few_problems(monkeypatch):
    """At most 300 problems of each split: making and encoding 16,384 takes longer than a test."""
    read = data.read
    monkeypatch.setattr(toy, "problems", lambda kind, split, n: [
        dict(row) for row in toy_problems(kind, split, min(n, 300))])
    monkeypatch.setattr(data, "read", lambda *arguments: {
        split: rows[:300] for split, rows in read(*arguments).items()})


toy_problems = functools.cache(toy.problems)


def to_problems(rows, tokenizer=None, wanted=None):
    """Rows of data -> problems, encoded where there is a tokenizer."""
    columns = dict.fromkeys(key for row in rows for key in row)
    problems = [data.to_problem({**columns, **row}, wanted, True, "the data") for row in rows]
    return data.encode(problems, tokenizer) if tokenizer else problems


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(before, after):
    """The share of the weights that differ between two model folders or run folders."""
    auto = transformers.AutoModelForCausalLM
    old, new = (model.load(auto, "--model", str(folder))[0].state_dict()
                for folder in (before, after))
    return torch.cat([(old[key] != new[key]).flatten() for key in old]).float().mean()


def by_text(prompts, completions, **columns):
    """A reward from 0 to 1 that differs for different texts."""
    return [sum(ord(char) * 31**i for i, char in enumerate(text)) % 997 / 996
            for text in completions]


@pytest.fixture
def plain_descent(monkeypatch):
    """Gradient descent instead of AdamW, which makes a full step of a gradient of rounding errors:
    what two runs have in common is then what their gradients have in common."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **settings: torch.optim.SGD(
        parameters, lr))
