"""sample.py: the answers are those that the training would sample, side by side, with scores."""
import io
import itertools
import sys

import pytest
import torch
from conftest import TEMPLATE, save_folder

import sample
from plumbing.data import encode
from plumbing.model import load_policy
from plumbing.rollout import sample as rollout_sample
from plumbing.rollout import to_texts


@pytest.fixture
def ask(monkeypatch, capsys):
    """A function (words of the command line, standard input) -> the printed lines."""
    def ask(*words, given=""):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        sample.main()
        lines = capsys.readouterr().out.splitlines()
        names = list(itertools.takewhile(lambda line: line.startswith("  "), lines))
        assert names
        return lines[len(names) :]
    return ask


def expected(folder, prompts, n, temperature, seed):
    policy, tokenizer = load_policy(folder, "cpu")
    problems = encode([dict(prompt=prompt, completions=[]) for prompt in prompts], tokenizer)
    batch = rollout_sample(policy, tokenizer, [problem["ids"] for problem in problems], n, 9,
                           temperature, torch.Generator().manual_seed(seed))
    return [text + ("" if done else " [cut off]")
            for text, done in zip(to_texts(tokenizer, batch), batch.finished)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_answers_are_those_of_the_training(ask, tmp_path, template):
    """Whatever the checkpoint's generation_config asks for; through the chat template."""
    folder = save_folder(tmp_path / "model", template=template, hostile=True)
    prompts, flags = ["8+9-5=", "1+2="], ["--model", tmp_path, "--max_new_tokens", 9]
    for n, temperature, seed in ((2, 0.7, 3), (1, 0.0, 1)):
        texts = expected(folder, prompts, n, temperature, seed)
        wanted = [line for i, prompt in enumerate(prompts)
                  for line in [prompt, *(f"  {text}".rstrip() for text in texts[n * i :][:n])]]
        more = ["--n", n, "--temperature", temperature, "--seed", seed]
        assert ask(*prompts, *flags, *more) == wanted
        assert ask(*flags, *more, given="\n".join(prompts) + "\n") == wanted


def test_two_models_stand_side_by_side_with_scores(ask, tmp_path):
    """The toy's policy works without --model; long texts are wrapped in their column."""
    (tmp_path / "r.py").write_text("def size(completions, **columns):\n"
                                   "    return [float(len(text)) for text in completions]\n")
    one = ask("8+9-5-8-2=", "--temperature", 0, "--reward", f"{tmp_path}/r.py:size")
    answer, _, score = one[1].strip().partition("   (scores ")
    assert one[0] == "8+9-5-8-2=" and score == f"{len(answer)})"
    two = ask("8+9-5-8-2=", "--temperature", 0, "--compare", save_folder(tmp_path / "model"),
              "--max_new_tokens", 60)
    left, right = (list(part) for part in zip(*((line[:52], line[52:]) for line in two[1:])))
    assert left[0].strip() == answer and not "".join(left[1:]).strip()
    texts = expected_long(tmp_path / "model")
    assert "".join(part.strip() for part in right) == texts.replace(" ", "")


def expected_long(folder):
    policy, tokenizer = load_policy(str(folder), "cpu")
    batch = rollout_sample(policy, tokenizer, [tokenizer("8+9-5-8-2=").input_ids], 1, 60, 0.0, None)
    return to_texts(tokenizer, batch)[0] + ("" if batch.finished[0] else "[cut off]")


@pytest.mark.parametrize("words, word", [
    (["1=", "--n", "0"], "--n"), (["1=", "--temperature", "-1"], "--temperature"),
    (["1=", "--max_new_tokens", "200"], "128"), ([], "prompt"),
    (["1=", "--model", "nowhere"], "nowhere"), (["1=", "--reward", "last_number"], "last_number")])
def test_what_cannot_be_asked_is_one_sentence(ask, capsys, words, word):
    with pytest.raises(SystemExit) as stop:
        ask(*words)
    assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]
