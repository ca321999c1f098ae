"""Edits that a text may suffer after generation: substitute, delete, insert, paste. For power studies and the tour."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from assay.watermark.gumbel import token_ids

Ids = npt.NDArray[np.uint32]
Edit = Literal["substitute", "delete", "insert"]


def edit(tokens: npt.ArrayLike, kind: Edit, rate: float, vocabulary: int, rng: np.random.Generator) -> Ids:
    """A copy with a share of its tokens edited.

    Parameters
    ----------
    tokens
        Integers, shape (n,).
    kind
        "substitute" replaces tokens by uniform random ids, "delete" removes them, "insert" puts a random id
        before them.
    rate
        Share of tokens edited, in [0, 1]; round(rate * n) tokens chosen without replacement.
    vocabulary
        Random ids are below this, in [1, 4294967295].
    rng
        Source of the choices.

    Raises
    ------
    ValueError
        If rate, kind, vocabulary or an id is out of range.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}.")
    if not 1 <= vocabulary < 2**32:
        raise ValueError(f"vocabulary must be in [1, 4294967295], got {vocabulary}.")
    ids = token_ids(tokens)
    chosen = np.sort(rng.choice(len(ids), size=round(rate * len(ids)), replace=False))
    fresh = rng.integers(0, vocabulary, size=len(chosen), dtype=np.uint32)
    if kind == "substitute":
        out = ids.copy()
        out[chosen] = fresh
        return out
    if kind == "delete":
        return np.delete(ids, chosen)
    if kind == "insert":
        return np.insert(ids, chosen, fresh)
    raise ValueError(f"kind must be 'substitute', 'delete' or 'insert', got {kind!r}.")


def paste(tokens: npt.ArrayLike, host: npt.ArrayLike, at: int) -> Ids:
    """`tokens` put into `host` before position `at`, in [0, len(host)]."""
    outer = token_ids(host)
    if not 0 <= at <= len(outer):
        raise ValueError(f"at must be in [0, {len(outer)}], got {at}.")
    return np.concatenate([outer[:at], token_ids(tokens), outer[at:]])
