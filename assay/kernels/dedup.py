"""First occurrences of n-grams within each document, exact: token ids are compared, never hashes alone.

A repeated (context, token) has the same PRF word again; counting it twice would break the null law of every test.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words

_NUMPY_TOKENS = 50_000
_COMPILED = "assay.kernels.dedup_numba"


def first_occurrences(ids: Words, offsets: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.bool_]:
    """Which positions end an n-gram that their document has not shown before.

    Parameters
    ----------
    ids
        uint32, shape (n,): the documents' token ids end to end.
    offsets
        int64, shape (documents + 1,): document d is ids[offsets[d]:offsets[d + 1]].
    width
        n-gram length, >= 1. Positions with fewer than width - 1 tokens before them in their document are False.

    Returns
    -------
    bool, shape (n,).

    Notes
    -----
    Linear time. numpy for small inputs, numba (an open-addressing table per document) for large ones and once it is
    loaded; same answer.
    """
    if len(ids) > _NUMPY_TOKENS or _COMPILED in sys.modules:
        return first_occurrences_numba(ids, offsets, width)
    return first_occurrences_numpy(ids, offsets, width)


def first_occurrences_numpy(ids: Words, offsets: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.bool_]:
    """Reference implementation of `first_occurrences`: sort the n-grams of each document."""
    first = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in pairwise(offsets):
        if stop - start >= width:
            grams = np.lib.stride_tricks.sliding_window_view(ids[start:stop], width)
            _, where = np.unique(grams, axis=0, return_index=True)
            first[start + width - 1 + where] = True
    return first


def first_occurrences_numba(ids: Words, offsets: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.bool_]:
    """As `first_occurrences_numpy`, in linear time."""
    from assay.kernels import dedup_numba

    first = np.zeros(len(ids), dtype=np.bool_)
    longest = int(np.max(np.diff(offsets), initial=0))
    # Twice the n-grams of the longest document, rounded up to a power of two: the table is at most half full.
    table = np.empty(1 << max(4, (2 * longest - 1).bit_length()), dtype=np.int64)
    dedup_numba.mark_first(ids, offsets, width, table, first)
    return first
