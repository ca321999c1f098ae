"""Truncation without whole rows: the logits of each row that may survive, collected while the vocabulary is multiplied.

Under top-k a candidate below the k-th largest of those met so far cannot survive, under min-p one further below the
largest than -ln min_p: it is forgotten. What the rule then removes from the collected ones is what it removes from the
whole row, ties and all; top-p after top-k sees the same numbers in the same lanes, so that its sums have the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay._compiled import compiled
from assay.kernels.scoring.decoding import Decoding, nucleus, warp
from assay.kernels.scoring.head import Projection, blocks

_STEP = 64  # logits compared at once; a multiple of every vector's width in torch's own sums
_HELD = 1 << 20  # candidates held for all rows: 8 MiB of logits and ids
_LEAST_MIN_P, _REACHED = 0.01, 1024  # a smaller min-p keeps many candidates; room for so many
# Whether p >= min_p * max p is decided by float32 probabilities, in error by parts in 1e7, which a logit so far from
# the edge does not see.
_UNSURE = 1e-4


@dataclass(frozen=True, eq=False)
class Collected:
    """The candidates of n rows that may survive, in ascending order of ids.

    Attributes
    ----------
    values
        float32, shape (n, size): logits after temperature; -inf from `counts` on.
    ids
        int32, shape (n, size).
    counts
        int64, shape (n,): how many candidates of the row are held; -1 where more may survive than fit, or where what is
        held does not say which survive.
    """

    values: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    def rows(self, index: npt.NDArray[np.int64]) -> Collected:
        """The rows at `index`."""
        return Collected(self.values[index], self.ids[index], self.counts[index])


def rows_at_once(rule: Decoding, vocabulary: int, most: int) -> int:
    """Rows to collect for in one pass; 0 where whole rows are the better way: too many candidates may survive."""
    if rule.top_k is not None:
        few = 16 * rule.top_k <= vocabulary
    else:
        few = (rule.min_p or 0) >= _LEAST_MIN_P and rule.top_p in (None, 1)
    return min(most, _HELD // _size(rule)) if few else 0


def _size(rule: Decoding) -> int:
    return _STEP + (_REACHED if rule.top_k is None else 4 * rule.top_k)


@compiled(error_model="numpy")
def _collect(
    block: Any, offset: int, top_k: int, reach: float, values: Any, ids: Any, counts: Any, lowest: Any
) -> None:
    """Add the candidates offset, offset + 1, ... to what is held; `lowest` is what a row's candidates must reach.

    That is the `top_k`-th largest met so far, or, with `top_k` 0, the largest less `reach`.
    """
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
            if top_k == 0:
                for j in range(start, stop):
                    bound = max(bound, np.float32(block[i, j] - reach))
            if count + passed > size:
                if top_k > 0:
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


def collect(source: Projection, rule: Decoding) -> Collected:
    """Candidates of every row, on a CPU, that top-k, or else min-p, may keep after the temperature."""
    n, size = source.rows, _size(rule)
    reach = -math.log(rule.min_p or 1)
    values = np.empty((n, size), dtype=np.float32)
    ids = np.empty((n, size), dtype=np.int32)
    counts, lowest = np.zeros(n, dtype=np.int64), np.full(n, -np.inf, dtype=np.float32)
    for block in blocks(len(source.head.weight)):
        logits = source.logits(block)
        if rule.temperature != 1.0:
            logits.div_(rule.temperature)
        _collect(logits.numpy(), block.start, rule.top_k or 0, reach + _UNSURE, values, ids, counts, lowest)
    for i, count in enumerate(counts):
        values[i, max(count, 0) :] = -np.inf
    if rule.top_k is None:
        largest = values.max(axis=1, keepdims=True)
        edge = largest - reach
        at_edge = (values >= edge - _UNSURE) & (values <= edge + _UNSURE) & (values != largest)
        counts[at_edge.any(axis=1)] = -1
    return Collected(values, ids, counts)


@compiled()
def _spread(values: Any, ids: Any, count: int, out: Any) -> None:
    out[:] = -np.inf
    for i in range(values.shape[0]):
        for c in range(count):
            if values[i, c] != -np.inf:
                out[i, ids[i, c]] = values[i, c]


def whole_rows(held: Collected, decoding: Decoding, targets: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Whole rows after the rule, as `decoding.warp` gives them for the same targets.

    Parameters
    ----------
    held
        From `collect` for the same rule, no count negative.
    targets
        int64, shape (n,).
    out
        float32, shape (n, V): memory for the result.

    Returns
    -------
    float32, shape (n, V): `out`.
    """
    n, vocabulary = out.shape
    count = int(held.counts.max(initial=0))
    # torch sums a row in lanes. Held candidates keep theirs if what is left out in front, all -inf, is a whole number
    # of lanes: the row's length modulo the step must stay.
    length = max(1, count + (vocabulary - count) % _STEP)
    short = np.full((n, length), -np.inf, dtype=np.float32)
    short[:, :count] = held.values[:, :count]
    rows = warp(torch.from_numpy(short), Decoding(top_k=decoding.top_k))
    asked = torch.zeros(n, dtype=torch.bool)
    if decoding.top_p is not None and decoding.top_p < 1:
        likely, edge = nucleus(rows, decoding.top_p)
        target = np.where(held.ids[:, :count] == targets.numpy()[:, None], held.values[:, :count], -np.inf)
        asked = edge == torch.from_numpy(target.max(axis=1, initial=-np.inf))
        rows = torch.where(asked[:, None], rows, likely)
    rows = torch.where(asked[:, None], rows, warp(rows, Decoding(min_p=decoding.min_p)))
    _spread(rows.numpy(), held.ids, count, out.numpy())
    if asked.any():
        out[asked] = warp(out[asked], Decoding(top_p=decoding.top_p, min_p=decoding.min_p))
    return out
