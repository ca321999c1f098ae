"""The model-free test on many documents at once: what every scheme's `documents_test` gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class DocumentStatistics:
    """A model-free test on many documents; every array has shape (documents,).

    Attributes
    ----------
    statistic, log_pvalue, log_evalue
        float64; see `TestResult`.
    n_tokens, n_scored, n_repeats_dropped
        int64.
    """

    statistic: npt.NDArray[np.float64]
    log_pvalue: npt.NDArray[np.float64]
    log_evalue: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.int64]
    n_scored: npt.NDArray[np.int64]
    n_repeats_dropped: npt.NDArray[np.int64]


def by_document(
    positions: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    window: int,
    row: Callable[[int, int], tuple[float, float, float]],
) -> DocumentStatistics:
    """A test that takes documents one by one.

    Parameters
    ----------
    positions
        int64, shape (k,), ascending: the counted tokens of documents end to end.
    offsets
        int64, shape (documents + 1,).
    window
        How many tokens of a document stand before the first that can count.
    row
        `(a, b) -> (statistic, log p-value, log e-value)` of the document whose counted tokens are numbers a .. b - 1.
    """
    bounds = np.searchsorted(positions, offsets).tolist()
    rows = np.array([row(a, b) for a, b in pairwise(bounds)], dtype=np.float64).reshape(-1, 3)
    n_tokens, n_scored = np.diff(offsets), np.diff(bounds)
    return DocumentStatistics(
        statistic=rows[:, 0],
        log_pvalue=rows[:, 1],
        log_evalue=rows[:, 2],
        n_tokens=n_tokens,
        n_scored=n_scored,
        n_repeats_dropped=np.maximum(0, n_tokens - window) - n_scored,
    )
