"""The decoding rule as the generator applied it: temperature, then top-k, top-p, min-p, on float32 logits.

A test of "model A wrote this" that leaves the rule out rejects A's own output, so the law p is taken after the rule.
Reference: the warpers of transformers' generation, whose order, arithmetic and tie handling this repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_SORTED = 1 << 16  # logits sorted at once on a CPU: about 40 bytes each


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is drawn from the logits.

    Attributes
    ----------
    temperature
        Logits are divided by it, > 0.
    top_k
        Keep the k largest logits, >= 1, and every one that ties with the smallest of them; None keeps all.
    top_p
        Keep the likeliest candidates until their mass exceeds top_p, in (0, 1]; None keeps all. Of candidates that tie
        at the edge those stay that torch's sort of the whole row puts last, as in transformers on the same device.
    min_p
        Keep candidates with p >= min_p * max p, in [0, 1]; None keeps all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}. Greedy text has no law.")
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer >= 1 or None, got {self.top_k}. None keeps every candidate.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p}. None keeps every candidate.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1] or None, got {self.min_p}. None keeps every candidate.")

    @property
    def truncates(self) -> bool:
        """Whether any candidate may be removed; then a row's law needs the whole row before its first statistic."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1) or bool(self.min_p)


def warp(logits: torch.Tensor, decoding: Decoding, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after the decoding rule; removed candidates are -inf.

    Parameters
    ----------
    logits
        Floating, shape (n, V).
    targets
        int64, shape (n,): the one candidate of each row whose fate matters. Where others tie at the edge of top-p, as
        many of them stay as should, whichever they are: on a CPU that spares torch's slow sort. None: all matter.

    Returns
    -------
    float32, shape (n, V); `logits` itself if it is float32 and the rule changes nothing.

    Notes
    -----
    On a CPU rows are sorted a few at a time: beside a few arrays of the result's size, some 3 MB are needed, or one
    row's sort.
    """
    import torch

    logits = logits.float()
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    if decoding.top_k is not None:
        kth = torch.topk(logits, min(decoding.top_k, logits.shape[-1]))[0][..., -1, None]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if decoding.top_p is not None and decoding.top_p < 1:
        if logits.device.type != "cpu":
            logits = exact_nucleus(logits, decoding.top_p)
        else:
            found, edge = nucleus(logits, decoding.top_p)
            asked = ~edge.isnan() if targets is None else logits.gather(1, targets[:, None])[:, 0] == edge
            if asked.any():
                found[asked] = exact_nucleus(logits[asked], decoding.top_p)
            logits = found
    if decoding.min_p:
        probs = torch.softmax(logits, dim=-1)
        removed = probs < decoding.min_p * probs.amax(dim=-1, keepdim=True)
        # transformers keeps the first of the sorted row whatever happens; the maximum is never below min_p * itself.
        logits = logits.masked_fill(removed, -math.inf)
    return logits


def exact_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits after top-p alone, ties in the order of torch's sort: a fresh float32 tensor, shape (n, V)."""
    import torch

    out = torch.empty_like(logits)
    for rows in _pieces(logits):
        out[rows] = _mask_lowest(logits[rows], *torch.sort(logits[rows], dim=-1), top_p)[0]
    return out


def nucleus(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `exact_nucleus` by a faster sort, on a CPU, where ties go in ascending order of ids.

    Parameters
    ----------
    logits
        float32, shape (n, V).

    Returns
    -------
    logits
        float32, shape (n, V), a fresh tensor.
    edge
        float32, shape (n,): the logit of which some candidates stay and some go, as only torch's sort says; NaN where
        there is none.
    """
    import torch

    from assay.kernels.scoring.ascending import order

    out, edge = torch.empty_like(logits), torch.empty(len(logits))
    for rows in _pieces(logits):
        places = torch.from_numpy(order(logits[rows].contiguous().numpy()))
        ascending = logits[rows].gather(-1, places)
        out[rows], removed = _mask_lowest(logits[rows], ascending, places, top_p)
        count = removed.sum(dim=-1, keepdim=True)  # at most V - 1
        lowest, highest = ascending.gather(-1, count), ascending.gather(-1, (count - 1).clamp_min(0))
        edge[rows] = torch.where((lowest == highest) & (count > 0), lowest, torch.nan)[:, 0]
    return out, edge


def _pieces(logits: torch.Tensor) -> list[slice]:
    """All rows at once on a GPU; on a CPU as many as are sorted in bounded memory."""
    n, vocabulary = logits.shape
    step = max(1, _SORTED // vocabulary) if logits.device.type == "cpu" else max(1, n)
    return [slice(start, start + step) for start in range(0, n, step)]


def _mask_lowest(
    logits: torch.Tensor, ascending: torch.Tensor, order: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[..., -1:] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -math.inf), removed
