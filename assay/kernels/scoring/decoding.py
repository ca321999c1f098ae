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
        at the edge those with the highest ids stay, which is what transformers' sort does on a CPU.
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


def warp(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Logits after the decoding rule; removed candidates are -inf.

    Parameters
    ----------
    logits
        float32, shape (n, V).

    Returns
    -------
    float32, shape (n, V); `logits` itself if the rule changes nothing.
    """
    import torch

    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    if decoding.top_k is not None:
        kth = torch.topk(logits, min(decoding.top_k, logits.shape[-1]))[0][..., -1, None]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if decoding.top_p is not None and decoding.top_p < 1:
        ascending, order = torch.sort(logits, descending=False)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - decoding.top_p
        removed[..., -1:] = False
        logits = logits.masked_fill(removed.scatter(1, order, removed), -math.inf)
    if decoding.min_p:
        probs = torch.softmax(logits, dim=-1)
        removed = probs < decoding.min_p * probs.amax(dim=-1, keepdim=True)
        # transformers keeps the first of the sorted row whatever happens; the maximum is never below min_p * itself.
        logits = logits.masked_fill(removed, -math.inf)
    return logits
