"""Which code computes the PRF: numpy while little was asked for, compiled code after that; the words never differ."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from assay.kernels import dedup, prf

CALL = "prf.words_of(np.zeros(8, np.uint32), np.arange(60, dtype=np.uint32), np.arange(4, 60), 4)"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (CALL, False),
        (f"for _ in range(300): {CALL}", True),
        ("prf.load_compiled()", True),
    ],
)
def test_compiled_code_is_loaded_once_it_pays(program: str, expected: bool) -> None:
    code = f"import sys, numpy as np\nfrom assay.kernels import prf\n{program}\nprint('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


def test_backends_give_the_same_words_and_first_occurrences() -> None:
    rng = np.random.default_rng(11)
    key = rng.integers(0, 2**32, 8, dtype=np.uint32)
    ids = rng.integers(0, 5, 300, dtype=np.uint32)  # few tokens: many repeats
    positions = np.arange(3, 300)
    by_numpy = prf.words_of(key, ids, positions, 3, backend="numpy")
    np.testing.assert_array_equal(by_numpy, prf.words_of(key, ids, positions, 3, backend="numba"))
    assert np.any(by_numpy != prf.words_of(key, ids, positions, 2, backend="numba"))  # near-miss: another window
    offsets = np.array([0, 120, 120, 300])
    first = dedup.first_occurrences_numpy(ids, offsets, 4)
    np.testing.assert_array_equal(first, dedup.first_occurrences_numba(ids, offsets, 4))
    assert 0 < np.sum(first) < len(ids) - 9


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda'"):
        prf.words_of(np.zeros(8, np.uint32), np.zeros(4, np.uint32), np.array([3]), 2, backend="cuda")  # type: ignore[arg-type]
