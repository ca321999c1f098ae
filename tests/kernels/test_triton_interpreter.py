"""Starts the Triton tests in Triton's interpreter, which must be chosen before its kernels are imported."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="the package triton is not installed")

FILES = ["test_triton_sampling.py", "test_triton_statistics.py", "test_torch_race.py"]
TRITON = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
NUMPY = tuple(int(part) for part in np.__version__.split(".")[:2])


@pytest.mark.skipif(
    TRITON < (3, 7) and NUMPY >= (2, 4), reason="Triton's interpreter before 3.7 fails with numpy 2.4 and later"
)
def test_in_the_interpreter():
    # Triton's own imports and the interpreter's numpy use may warn; that is not what is tested.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*command, *(str(Path(__file__).with_name(name)) for name in FILES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 25
    assert len(re.findall("SKIPPED", done.stdout)) <= 1  # the law of the sampler, which needs a GPU's speed
