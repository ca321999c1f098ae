"""Edits do what they say: how many tokens change, what stays, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from assay.watermark.edits import edit, paste


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_sizes(rate: float) -> None:
    ids = np.arange(1000, 1200)
    rng = np.random.default_rng(0)
    changed = round(rate * 200)
    substituted = edit(ids, "substitute", rate, 500, rng)
    assert np.sum(substituted != ids) == changed  # ids below 500 never equal the old ones
    deleted = edit(ids, "delete", rate, 500, rng)
    assert len(deleted) == 200 - changed
    assert np.all(np.isin(deleted, ids))
    inserted = edit(ids, "insert", rate, 500, rng)
    assert len(inserted) == 200 + changed
    np.testing.assert_array_equal(inserted[inserted >= 1000], ids)


def test_edits_are_reproducible_and_leave_the_input_alone() -> None:
    ids = np.arange(50, dtype=np.uint32)
    before = ids.copy()
    first = edit(ids, "substitute", 0.5, 9, np.random.default_rng(3))
    second = edit(ids, "substitute", 0.5, 9, np.random.default_rng(3))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(ids, before)


def test_paste() -> None:
    np.testing.assert_array_equal(paste([7, 8], [1, 2, 3], 1), [1, 7, 8, 2, 3])
    np.testing.assert_array_equal(paste([7], [1], 1), [1, 7])
    with pytest.raises(ValueError, match=r"at must be in \[0, 1\], got 2"):
        paste([7], [1], 2)


def test_bad_arguments() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
        edit([1], "delete", 1.5, 9, rng)
    for vocabulary in (0, 2**32):
        with pytest.raises(ValueError, match=r"vocabulary must be in \[1, 4294967295\]"):
            edit([1], "insert", 0.5, vocabulary, rng)
    for tokens in ([-1], [2**32], [1.5]):
        with pytest.raises(ValueError, match="tokens must be"):
            edit(tokens, "delete", 0.5, 9, rng)
        with pytest.raises(ValueError, match="tokens must be"):
            paste([1], tokens, 0)
    with pytest.raises(ValueError, match="kind must be"):
        edit([1], "swap", 0.5, 9, rng)  # type: ignore[arg-type]
