"""Strategy matrices of jax-privacy for prefix sums, for `benchmarks/privacy_continual.py --jax-privacy PYTHON`.

    PYTHON benchmarks/privacy_continual_jax.py FOLDER HORIZON

Runs in an interpreter that has jax-privacy 2.x and needs nothing of Assay. Each Toeplitz strategy C is built twice, so
that the second time is free of compilation, and its first column is written to FOLDER/NAME.npz with both CPU times.
Errors are computed by the caller, for both libraries alike.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax_privacy
import numpy as np

jax.config.update("jax_enable_x64", True)  # its optimiser of BLT asks for it

BANDS = 64


def main() -> None:
    from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz

    folder, horizon = Path(sys.argv[1]), int(sys.argv[2])

    def blt(buffers: int) -> Any:
        found = buffered_toeplitz.optimize(n=horizon, error="max", min_buffers=buffers, max_buffers=buffers)
        return found.toeplitz_coefs(horizon)

    builds: dict[str, Callable[[], Any]] = {
        "square root": lambda: toeplitz.optimal_max_error_strategy_coefs(horizon),
        "BLT, 3 buffers": lambda: blt(3),
        "BLT, 5 buffers": lambda: blt(5),
    }
    if horizon <= 2**10:  # each step of its fit solves a system of T equations
        builds[f"banded, {BANDS}"] = lambda: toeplitz.optimize_banded_toeplitz(
            horizon, BANDS, reduction_fn=jax.numpy.max
        )
    for name, build in builds.items():
        seconds = []
        for _ in range(2):
            began = time.process_time()
            found = np.asarray(build())
            seconds.append(time.process_time() - began)
        np.savez(folder / f"{name}.npz", c=found, seconds=seconds, version=jax_privacy.__version__)
        print(name, found.shape, seconds, flush=True)


if __name__ == "__main__":
    main()
