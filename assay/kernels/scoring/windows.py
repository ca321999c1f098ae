"""How documents become model calls: overlapping windows, then batches of windows of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """One piece of a document as the model reads it.

    Attributes
    ----------
    document
        Index of the document.
    inputs
        int64, shape (length,): the ids the model reads.
    first
        First of the input positions whose prediction counts; all later ones count too.
    targets
        int64, shape (length - first,): the ids predicted there.
    place
        Index of targets[0] in the document.
    """

    document: int
    inputs: Ids
    first: int
    targets: Ids
    place: int


def cut(document: int, context: Ids, ids: Ids, window: int, stride: int) -> Iterator[Window]:
    """Windows of `window` tokens every `stride` tokens over context + ids; each token of `ids` is predicted once.

    A token is predicted in the first window that reaches it, so a token past the first window has at least
    window - stride tokens before it. A first token without context is not predicted.
    """
    sequence = np.concatenate([context, ids])
    readable = len(sequence) - 1  # the last token is only ever predicted
    start = counted = 0
    wanted = max(len(context) - 1, 0)  # input position whose prediction is the first token of the document
    while counted < readable:
        end = min(start + window, readable)
        first = max(counted, wanted)
        if first < end:
            targets = sequence[first + 1 : end + 1]
            yield Window(document, sequence[start:end], first - start, targets, first + 1 - len(context))
        counted = end
        start += stride


def longest_first(windows: Iterable[Window]) -> list[Window]:
    """Windows of like length side by side; a batch that does not fit into memory then shows at the start of a run."""
    return sorted(windows, key=lambda window: -len(window.inputs))


def batch_end(windows: Sequence[Window], start: int, token_budget: int) -> int:
    """End of the batch that starts at `start`: at most `token_budget` tokens, padding included, at least one window."""
    longest = len(windows[start].inputs)
    return min(start + max(1, token_budget // longest), len(windows))
