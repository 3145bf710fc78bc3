"""
A reward of the user's own: file.py:function, under settings of its own; or the folder of a run of
reward_model.py.
"""
import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
import traceback
import zlib
from pathlib import Path

import torch
import transformers

from plumbing.data import encode, encode_completions
from plumbing.flags import fail
from plumbing.model import check_config, remove_dropout
from plumbing.rollout import all_scores, make_batch


def load_function(file, name):
    """The function `name` of the Python file."""
    path = Path(os.path.abspath(os.path.expanduser(file)))
    if not path.is_file() or path.suffix != ".py":
        fail(f"--reward {file}:{name}: there is no Python file {file}; write file.py:function")
    module_name = importable_name(path)
    settings = kept_settings.setdefault(module_name, {})
    try:
        with own_settings(settings):
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        fail(f"--reward {file}:{name}: {describe(error)}; mend the file")
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        fail(f"--reward {file}:{name}: there is no function {name} in {file}, but "
             f"{', '.join(found) or 'none at all'}")

    def reward(**arguments):
        with own_settings(settings):
            return function(**arguments)
    return reward


def importable_name(path):
    """A name under which `import` finds a file, here and in the processes that a reward starts.

    Its own; or, where another module has that name (common.py, json.py, two files of one name),
    that of a file in a temporary folder which runs this one.
    """
    folder, name = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.append(folder)  # its neighbours can be imported, too
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(name)
        if found and found.origin and Path(found.origin).resolve() == path.resolve():
            return name
    except (ImportError, ValueError):  # a name with a dot; __main__
        pass
    name = f"reward_{zlib.crc32(str(path).encode()):08x}"
    Path(temporary_folder(), f"{name}.py").write_text(
        f"__file__ = {str(path)!r}\n"
        "exec(compile(open(__file__, 'rb').read(), __file__, 'exec'))\n", encoding="utf-8")
    importlib.invalidate_caches()
    return name


@functools.cache
def temporary_folder():
    folder = tempfile.mkdtemp()
    sys.path.append(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


SETTINGS = {torch.is_grad_enabled: torch.set_grad_enabled,
            torch.get_default_dtype: torch.set_default_dtype,
            torch.get_default_device: torch.set_default_device,
            torch.get_float32_matmul_precision: torch.set_float32_matmul_precision,
            torch.get_num_threads: torch.set_num_threads,
            torch.are_deterministic_algorithms_enabled: torch.use_deterministic_algorithms,
            os.getcwd: os.chdir}
kept_settings = {}  # of each file of rewards


@contextlib.contextmanager
def own_settings(theirs):
    """A reward runs under settings of its own, `theirs`: those it was loaded under, as it changed
    them. Else it would find gradients in the training, and none in an evaluation.
    """
    def change(settings):
        for get, value in settings.items():
            if get() != value:
                SETTINGS[get](value)

    ours = {get: get() for get in SETTINGS}
    change(theirs)
    try:
        yield
    finally:
        theirs.update((get, get()) for get in SETTINGS)
        change(ours)


def describe(error):
    """What happened in a reward's file, and where."""
    ours = __file__, str(Path(__file__).with_name("rewards.py"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename not in ours and not frame.filename.startswith("<frozen")]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) or not frames:  # names its line itself; or did not get there
        return text
    return f"{text} (line {frames[-1].lineno} of {Path(frames[-1].filename).name})"


def load_scorer(folder, cfg):
    """The folder of a run of reward_model.py, or of such a model -> a reward, like any other."""
    inside = str(folder / "model" if (folder / "model").is_dir() else folder)
    transformers.utils.logging.set_verbosity_error()
    try:
        scorer, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            inside, dtype=torch.float32, num_labels=1, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(inside, trust_remote_code=False)
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
        context = getattr(scorer.config, "max_position_embeddings", longest)
        if longest > context:
            raise ValueError(f"{longest} tokens, but it can read {context}: lower --max_new_tokens")
        return all_scores(scorer, batch, cfg.micro_batch_size).tolist()
    return learned
