import sys
import json
from pathlib import Path
import pytest
import torch
from conftest import moved
from plumbing import run as runs, rollout
from test_every_script import ONLINE, SCRIPTS, VARIANTS, inputs, lines, props, run  # noqa: F401

PAPER = sys.modules.get("device")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
each_variant = pytest.mark.parametrize("variant", VARIANTS)

@pytest.fixture
def here(tmp_path, monkeypatch, few_problems):
    monkeypatch.chdir(tmp_path)
    return monkeypatch

@each_variant
def test_a(folders, props, here, variant, capsys):
    model, marks, log = folders("gpt2"), [], runs.Run.log
    here.setattr(runs.Run, "log", lambda *args, **more: marks.append(
        PAPER and dict(PAPER.SYNCS)) or log(*args, **more))
    run(variant, device="cuda", model=model, **inputs(variant, props), max_new_tokens=6 if variant.split()[0] in ONLINE else 32)
    with capsys.disabled(): print(variant, sum(marks[1].values())-sum(marks[0].values()), {k: v-marks[0].get(k,0) for k,v in marks[1].items()})

@each_variant
def test_b(folders, props, here, plain_descent, variant):
    here.setattr(rollout, "use_bf16", lambda device: False)
    found = []
    for device in "cuda", "cpu":
        run(variant, device=device, model=folders("llama"), **inputs(variant, props), lr=0.3, gradient_checkpointing=device=="cuda", out_dir=device, max_new_tokens=6 if variant.split()[0] in ONLINE else 32)
        test = json.loads(Path(device, "test.json").read_text())
        found.append([*lines("metrics", device), {k: v for p in ("before", "after") for k, v in test[p].items()}])
    print(found)
    for one, two in zip(*found):
        assert {k: v for k, v in one.items()} == pytest.approx(two, rel=1e-4, abs=1e-5)
