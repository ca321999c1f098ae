"""Results column by column, so that millions of documents fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class Identity(NamedTuple):
    """What names one result: id, place in the input, and the key found."""

    doc_id: str
    file: str | None
    row: int | None
    scheme: str | None = None


@dataclass(frozen=True)
class ResultColumns:
    """Results column by column, so that millions of documents fit; arrays have shape (documents,).

    `sources` and `key_ids` are names; `source_codes` and `key_codes` (int64) point into them, key code -1: no key.
    `identify` returns the identities of the rows asked for.
    """

    statistic: Floats
    log_pvalue: Floats
    log_evalue: Floats
    n_tokens: Integers
    n_scored: Integers
    n_repeats_dropped: Integers
    sources: Sequence[str]
    source_codes: Integers
    key_ids: Sequence[str]
    key_codes: Integers
    identify: Callable[[Sequence[int]], Sequence[Identity]]


def most_certain(log_pvalue: Floats, log_evalue: Floats, count: int) -> list[int]:
    """The rows with the smallest p-values, ties by larger e-value, then by row; at most `count`."""
    rows = np.arange(len(log_pvalue))
    if 0 < count < len(rows):
        rows = np.flatnonzero(log_pvalue <= np.partition(log_pvalue, count - 1)[count - 1])
    order = np.lexsort((rows, -log_evalue[rows], log_pvalue[rows]))
    return [int(i) for i in rows[order[:count]]]
