"""The GPU benchmarks load without a GPU, explain themselves, and refuse to run with one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["gpu_sampling.py", "gpu_scoring.py"])
def test_without_a_gpu(name):
    # Everything it needs is hidden rather than absent, so that the test says the same on a machine with a GPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", str(BENCHMARKS / name)]
    done = subprocess.run(
        [*command, "--rounds", "1"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == f"{name} needs an NVIDIA GPU and torch with CUDA; none is available here."
