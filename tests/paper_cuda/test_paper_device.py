"""The tests of test_cuda.py on the CUDA device made of paper, in a process of their own."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HEADERS = Path(torch.__file__).parent / "include/ATen/detail/CUDAHooksInterface.h"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda.py"),
    pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler, g++"),
    pytest.mark.skipif(not HEADERS.exists(), reason="this torch came without its headers"),
    pytest.mark.skipif(not torch.compiled_with_cxx11_abi(),
                       reason="this torch, 2.6, was built with the old ABI of C++")]


def test_on_paper():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         Path(__file__).with_name("test_cuda.py")],
        env=dict(os.environ, PAPER_CUDA="1", OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
