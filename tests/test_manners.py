"""Wrong input: one sentence that names flag and remedy, exit code 2, nothing trained, nothing lost.

Each kind in this process, on reinforce_pp.py; those that need an environment of their own (whether
the hub may be asked is settled once per process) in a subprocess.
"""
import http.server
import json
import os
import sys
import threading
from pathlib import Path
from subprocess import run

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reinforce_pp
import sft
from conftest import ROOT, save_folder, write_jsonl
from plumbing import model as model_py, toy
from plumbing.flags import find_device
from test_scripts import each_is_one_sentence

ONLINE = dict(HF_HUB_OFFLINE="0")
KINDS = {  # name: (flags, words of the sentence, more environment); {} is the folder of props
    "unknown flag": ("--learning_rate 1", ["no flag --learning_rate", "--help"]),
    "abbreviated flag": ("--temp 1", ["no flag --temp", "--help"]),
    "no number": ("--steps many", ["--steps", "many", "--help"]),
    "no whole number": ("--steps 1.5", ["--steps", "1.5", "--help"]),
    "temperature 0": ("--temperature 0", ["--temperature 0", "above 0"]),
    "temperature negative": ("--temperature -1", ["--temperature -1", "above 0"]),
    "steps 0": ("--steps 0", ["--steps 0", "above 0"]),
    "lr negative": ("--lr -0.1", ["--lr -0.1", "at least 0"]),
    "lr nan": ("--lr nan", ["--lr nan", "at least 0"]),
    "clip negative": ("--clip_eps -0.2", ["--clip_eps -0.2", "above 0"]),
    "reward clip negative": ("--reward_clip -1", ["--reward_clip -1", "at least 0"]),
    "max_new_tokens 0": ("--max_new_tokens 0", ["--max_new_tokens 0", "above 0"]),
    "kl negative": ("--kl_coef -1", ["--kl_coef -1", "at least 0"]),
    "gamma": ("--gamma 1.5", ["--gamma 1.5", "at most 1"]),
    "mini-batch 0": ("--minibatch_size 0", ["--minibatch_size 0", "above 0"]),
    "micro-batch 0": ("--micro_batch_size 0", ["--micro_batch_size 0", "above 0"]),
    "group 0": ("--group_size 0", ["--group_size 0", "above 0"]),
    "eval_prompts 0": ("--eval_prompts 0", ["--eval_prompts 0", "above 0"]),
    "mini-batch above the batch": ("--prompts_per_step 4 --group_size 2 --minibatch_size 9",
                                   ["--minibatch_size 9", "8 completions", "--group_size"]),
    "group of one": ("--group_baseline --group_size 1", ["--group_size 1", "take 4"]),
    "no model": ("--model {}/nope", ["--model", "nope", "no such folder"]),
    "not on the hub": ("--model someone/nothing", ["--model someone/nothing", "folder", "hub"],
                       dict(ONLINE, HF_ENDPOINT="{hub}")),
    "no network": ("--model someone/nothing", ["--model someone/nothing", "cannot be reached",
                                               "HF_ENDPOINT"],
                   dict(ONLINE, HF_ENDPOINT="http://127.0.0.1:9")),
    "no folder of a model": ("--model {}/empty",
                             ["--model", "config.json", "AutoModelForCausalLM"]),
    "encoder and decoder": ("--model {}/t5", ["--model", "t5 is no causal language model"]),
    "a classifier": ("--model {}/classifier", ["--model", "LlamaForSequenceClassification",
                                               "CausalLM"]),
    "broken config.json": ("--model {}/broken", ["--model", "config.json", "not a valid JSON"]),
    "code of its own": ("--model {}/code", ["--model", "code of its own", "choose"]),
    "quantised": ("--model {}/quantised", ["--model", "quantised", "choose"]),
    "an unknown layer": ("--model {}/chunked", ["--model", "chunked_attention", "choose"]),
    "no EOS": ("--model {}/no_eos", ["--model", "EOS", "tokenizer_config.json"]),
    "a tokenizer too large": ("--model {}/few_words", ["--model", "tokenizer", "lacks"]),
    "weights that are missing": ("--model {}/headless", ["--model", "lm_head.weight"]),
    "weights that are torn": ("--model {}/torn", ["--model", "deserializing"]),
    "weights of another shape": ("--model {}/wide", ["--model", "of the wrong shape"]),
    "unfinished run as model": ("--model {}/taken", ["--model", "--resume"]),
    "data that is empty text": ("--data=", ["--data", "empty", "leave it out"]),
    "empty model": ("--model=", ["--model", "empty", "leave it out"]),
    "huge seed": ("--seed 99999999999999999999", ["--seed", "at most"]),
    "lr infinite": ("--lr inf", ["--lr inf", "at most"]),
    "data as csv": ("--data {}/a.csv", ["--data", "a.csv", "folder"]),
    "no data": ("--data {}/nope.jsonl", ["--data", "nope.jsonl", "no such"]),
    "no data on the hub": ("--data some/set:main", ["--data some/set", "on the hub"],
                           dict(ONLINE, HF_ENDPOINT="{hub}")),
    "no network for data": ("--data some/set:main", ["--data some/set:main", "reach", ".jsonl"],
                            dict(ONLINE, HF_ENDPOINT="http://127.0.0.1:9")),
    "empty data": ("--data {}/empty.jsonl", ["--data", "empty.jsonl", "rows"]),
    "not JSON": ("--data {}/torn.jsonl", ["--data", "torn.jsonl", "line 3", "JSON"]),
    "not an object": ("--data {}/list.jsonl", ["--data", "line 1", "not a JSON object"]),
    "other columns": ("--data {}/columns.jsonl", ["--data", "has target, text",
                                                  "must have a prompt"]),
    "prompt that is no text": ("--data {}/number.jsonl", ["--data", "row 2 of train",
                                                          "prompt is 7", "must be text"]),
    "no column for the reward": ("--data {}/bare.jsonl", ["--reward last_number", "answer"]),
    "prompts all too long": ("--data {}/sums.jsonl --max_new_tokens 127", ["--data", "--max_new"]),
    "words for the toy": ("--data words", ["--data words", "--model"]),
    "words for the toy, named": (f"--model {toy.POLICY} --data words",
                                 ["--data words", "digits"]),
    "no reward": ("--reward nope", ["--reward nope", "last_number", "file.py:function"]),
    "no reward file": ("--reward {}/nope.py:f", ["--reward", "nope.py", "file.py:function"]),
    "no reward function": ("--reward {}/rewards_.py:f", ["--reward", "no function f", "few"]),
    "syntax error": ("--reward {}/torn_.py:f", ["--reward", "SyntaxError", "line 1"]),
    "too few scores": ("--reward {}/rewards_.py:few", ["--reward few", "1 scores for 2"]),
    "score nan": ("--reward {}/rewards_.py:nan", ["--reward nan", "completion '1'", "finite"]),
    "score no number": ("--reward {}/rewards_.py:text", ["--reward text", "good", "number"]),
    "reward that exits": ("--reward {}/exit_.py:f", ["--reward", "SystemExit"]),
    "taken": ("--out_dir {}/taken", ["--out_dir", "not empty", "--resume"]),
    "a file in the way": ("--out_dir {}/sums.jsonl/run", ["--out_dir", "cannot write"]),
    "a file as folder": ("--out_dir {}/sums.jsonl", ["--out_dir", "cannot write"]),
    "not writable": ("--out_dir /proc/run", ["--out_dir /proc/run", "cannot write"]),
    "nothing to resume": ("--resume", ["--resume", "no checkpoint", "--out_dir"]),
    "resume another": ("--out_dir {}/taken --resume --lr 1", ["--lr is 1.0", "0.5", "--resume"]),
    "a link to nowhere": ("--out_dir {}/dangling/run", ["--out_dir", "cannot write"]),
    "resume a torn one": ("--out_dir {}/torn_run --resume", ["--resume", "config.json is torn"]),
    "resume another script": ("--out_dir {}/other_run --resume", ["--resume", "another script"]),
    "no GPU": ("--device cuda", ["--device cuda", "--device cpu"], dict(CUDA_VISIBLE_DEVICES="")),
    "no such device": ("--device tpu", ["--device tpu", "cpu or cuda"]),
}


def lay_out(folder):
    """The props: models mostly without weights, so that nobody can load them, bad data, rewards."""
    for name in ("t5", "classifier", "broken", "code", "no_eos", "few_words", "headless", "torn",
                 "wide", "quantised", "chunked"):
        weights = Path(save_folder(folder / name)) / "model.safetensors"
        if name == "headless":
            state = load_file(weights)
            del state["lm_head.weight"]
            save_file(state, weights, metadata=dict(format="pt"))
        elif name == "torn":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif name != "wide":
            weights.unlink()
    transformers.T5Config(d_model=8, num_layers=1, num_heads=1).save_pretrained(folder / "t5")
    for name, change in dict(classifier=dict(architectures=["LlamaForSequenceClassification"]),
                             code=dict(model_type="new", auto_map=dict(AutoConfig="a.B")),
                             few_words=dict(vocab_size=10), wide=dict(hidden_size=64),
                             quantised=dict(quantization_config=dict(quant_method="gptq", bits=4)),
                             chunked=dict(layer_types=["full_attention", "chunked_attention"])
                             ).items():
        config = folder / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    (folder / "broken" / "config.json").write_text('{"model_type": "llama", ')
    settings = folder / "no_eos" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    (folder / "empty").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken" / "checkpoint.pt").write_text("precious")
    (folder / "taken" / "config.json").write_text(json.dumps({"lr": 0.5}))
    for name, config in (("torn_run", "[1]"), ("other_run", '{"beta": 1}')):
        (folder / name).mkdir()
        (folder / name / "checkpoint.pt").touch()
        (folder / name / "config.json").write_text(config)
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "a.csv").write_text("prompt,answer\n1+1=,2\n")
    (folder / "empty.jsonl").touch()
    good = [dict(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(30)]
    write_jsonl(folder / "sums.jsonl", good)
    (folder / "torn.jsonl").write_text('{"prompt": "1+1="}\n\n{"prompt": "2+')
    write_jsonl(folder / "list.jsonl", [["1+1=", "2"]])
    write_jsonl(folder / "columns.jsonl", [dict(text="1+1=", target="2")])
    write_jsonl(folder / "number.jsonl", [good[0], dict(prompt=7, answer="8"), good[1]])
    write_jsonl(folder / "bare.jsonl", [dict(prompt=row["prompt"]) for row in good])
    (folder / "torn_.py").write_text("def f(:")
    (folder / "exit_.py").write_text("import sys\nsys.exit(0)")
    (folder / "rewards_.py").write_text(
        "def few(prompts, completions, **columns): return [1.0]\n"
        "def nan(prompts, completions, **columns): return [float('nan')] * len(prompts)\n"
        "def text(prompts, completions, **columns): return ['good'] * len(prompts)\n")


class Nothing(http.server.BaseHTTPRequestHandler):
    """A hub on which there is nothing."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def props(tmp_path_factory):
    """The folder of props, in which nothing may change."""
    folder = tmp_path_factory.mktemp("props")
    lay_out(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    yield folder
    assert before == {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if len(row) == 2])
def test_wrong_input_is_one_sentence_and_loses_nothing(
        props, tmp_path, monkeypatch, capsys, few_problems, kind):
    flags, words = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: pytest.fail("it begins to train"))
    each_is_one_sentence([(flags.format(props), words)], reinforce_pp, monkeypatch, capsys)


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if len(row) == 3])
def test_and_in_an_environment_of_its_own(tmp_path, kind):
    flags, words, more = KINDS[kind]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_address[1]}"
    more = {key: value.replace("{hub}", hub) for key, value in more.items()}
    done = run([sys.executable, str(ROOT / "reinforce_pp.py"), *flags.split()], cwd=tmp_path,
               capture_output=True, text=True, timeout=120, env={**os.environ, **more})
    server.shutdown()
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.rglob("*"))


def test_it_is_said_at_once(tmp_path, monkeypatch, capsys):
    """A hub that accepts the call and never answers, or refuses it: one question, no retries."""
    questions = []

    def ask(self, name, **kwargs):
        questions.append(kwargs["timeout"])
        raise ConnectionError

    monkeypatch.setattr(model_py.huggingface_hub.HfApi, "repo_info", ask)
    monkeypatch.setattr(model_py.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(SystemExit):
        model_py.load_tokenizer("someone/nothing")
    assert questions == [10] and "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    ("--lr -1", ["--lr -1.0"]), ("--minibatch_size 0", ["--minibatch_size 0"]),
    ("--data {}/sums.jsonl", ["completion", "answer, prompt"]),
    ("--model {}/no_eos", ["EOS"]), ("--out_dir {}/taken", ["not empty"]),
    ("--clip_eps 1", ["no flag --clip_eps"]), ("--resume", ["no checkpoint"])])
def test_sft_has_the_same_manners(
        props, tmp_path, monkeypatch, capsys, few_problems, flags, words):
    monkeypatch.chdir(tmp_path)
    each_is_one_sentence([(flags.format(props), words)], sft, monkeypatch, capsys)


def test_a_second_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "cuda:0", "cpu"):
        assert find_device(device) == device
    for device in ("cuda:1", "cuda:x", "cpu:1"):
        with pytest.raises(SystemExit) as stop:
            find_device(device)
        assert stop.value.code == 2 and device in capsys.readouterr().err
