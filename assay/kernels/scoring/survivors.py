"""Top-k without whole rows: the largest logits of each row, collected while the vocabulary is multiplied in blocks.

A candidate below the k-th largest of those met so far cannot survive and is forgotten. What top-k then removes from the
collected ones is what it removes from the whole row, ties and all; top-p after it sees the same numbers in the same
lanes, so that its sums have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay._compiled import compiled
from assay.kernels.scoring.decoding import Decoding, exact_nucleus, nucleus, warp
from assay.kernels.scoring.head import Projection, blocks

_STEP = 64  # logits compared at once; a multiple of every vector's width in torch's own sums
_HELD = 1 << 20  # candidates held for all rows: 8 MiB of logits and ids


@dataclass(frozen=True, eq=False)
class Collected:
    """The candidates of n rows that top-k may keep, in ascending order of ids.

    Attributes
    ----------
    values
        float32, shape (n, size): logits after temperature; -inf from `counts` on.
    ids
        int32, shape (n, size).
    counts
        int64, shape (n,): how many candidates of the row are held; -1 where more tie with the k-th than fit.
    """

    values: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    def rows(self, index: npt.NDArray[np.int64]) -> Collected:
        """The rows at `index`."""
        return Collected(self.values[index], self.ids[index], self.counts[index])


def rows_at_once(top_k: int, vocabulary: int, most: int) -> int:
    """Rows to collect for in one pass; 0 where so many candidates survive that whole rows are the better way."""
    return 0 if 16 * top_k > vocabulary else min(most, _HELD // _size(top_k))


def _size(top_k: int) -> int:
    return 4 * top_k + _STEP


@compiled(error_model="numpy")
def _collect(block: Any, offset: int, top_k: int, values: Any, ids: Any, counts: Any, lowest: Any) -> None:
    """Add the candidates offset, offset + 1, ... to what is held; `lowest` is what a row's candidates must reach."""
    size = values.shape[1]
    for i in range(block.shape[0]):
        count, bound = counts[i], lowest[i]
        for start in range(0, block.shape[1], _STEP):
            if count < 0:
                break
            stop = min(start + _STEP, block.shape[1])
            passed = 0
            for j in range(start, stop):  # a comparison that NaN passes: it must show in the row's statistics
                passed += not block[i, j] < bound
            if passed == 0:
                continue
            if count + passed > size:
                bound = np.partition(values[i, :count], count - top_k)[count - top_k]
                kept = 0
                for c in range(count):
                    if not values[i, c] < bound:
                        values[i, kept], ids[i, kept] = values[i, c], ids[i, c]
                        kept += 1
                count = kept if kept + _STEP <= size else -1
            if count >= 0:
                for j in range(start, stop):
                    if not block[i, j] < bound and block[i, j] != -np.inf:
                        values[i, count], ids[i, count] = block[i, j], offset + j
                        count += 1
        counts[i], lowest[i] = count, bound


def collect(source: Projection, top_k: int, temperature: float) -> Collected:
    """Candidates of every row, on a CPU, that top-k after the temperature may keep."""
    n, size = source.rows, _size(top_k)
    values = np.empty((n, size), dtype=np.float32)
    ids = np.empty((n, size), dtype=np.int32)
    counts, lowest = np.zeros(n, dtype=np.int64), np.full(n, -np.inf, dtype=np.float32)
    for block in blocks(len(source.head.weight)):
        logits = source.logits(block)
        if temperature != 1.0:
            logits.div_(temperature)
        _collect(logits.numpy(), block.start, top_k, values, ids, counts, lowest)
    for i, count in enumerate(counts):
        values[i, max(count, 0) :] = -np.inf
    return Collected(values, ids, counts)


@compiled()
def _spread(values: Any, ids: Any, count: int, out: Any) -> None:
    out[:] = -np.inf
    for i in range(values.shape[0]):
        for c in range(count):
            if values[i, c] != -np.inf:
                out[i, ids[i, c]] = values[i, c]


def whole_rows(held: Collected, decoding: Decoding, out: torch.Tensor) -> torch.Tensor:
    """Whole rows after the rule, as `decoding.warp` gives them.

    Parameters
    ----------
    held
        From `collect` for the same rule, no count negative.
    out
        float32, shape (n, V): memory for the result.

    Returns
    -------
    float32, shape (n, V): `out`, or a fresh tensor.
    """
    n, vocabulary = out.shape
    count = int(held.counts.max(initial=0))
    # torch sums a row in lanes. Held candidates keep theirs if what is left out in front, all -inf, is a whole number
    # of lanes: the row's length modulo the step must stay.
    length = max(1, count + (vocabulary - count) % _STEP)
    short = np.full((n, length), -np.inf, dtype=np.float32)
    short[:, :count] = held.values[:, :count]
    rows = warp(torch.from_numpy(short), Decoding(top_k=decoding.top_k))
    unsure = torch.zeros(n, dtype=torch.bool)
    if decoding.top_p is not None and decoding.top_p < 1:
        likely, unsure = nucleus(rows, decoding.top_p)
        rows = torch.where(unsure[:, None], rows, likely)
    _spread(rows.numpy(), held.ids, count, out.numpy())
    if unsure.any():
        out[unsure] = exact_nucleus(out[unsure], decoding.top_p or 1.0)
    return warp(out, Decoding(min_p=decoding.min_p))
