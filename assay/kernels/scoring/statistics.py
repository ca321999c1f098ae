"""Per-token statistics of a next-token law p: what every test that uses a model's probabilities is built from.

S_v = -log p_v is the surprisal; its mean under p is the entropy, its variance the varentropy.
Reference: Cover and Thomas (2006), section 2.1; Kontoyiannis and Verdu (2014), arXiv:1212.2668 (varentropy).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DEFAULT_TILTS = (-1.0, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5)
"""Tilt s compares p with p at temperature 1 / (1 - s): 0.5, 0.67, 0.8, 0.89, 1.14, 1.33 and 2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStatistics:
    """Statistics of the law p that a model gives each token, after the decoding rule; natural logarithms throughout.

    Attributes
    ----------
    log_prob
        float64, shape (n,), in [-inf, 0]: log p of the token that came; -inf where the decoding rule forbids it.
    entropy
        float64, shape (n,), in [0, log V]: mean surprisal under p.
    varentropy
        float64, shape (n,), >= 0: variance of the surprisal under p.
    third_moment
        float64, shape (n,): third central moment of the surprisal under p.
    rank
        int64, shape (n,), in [1, V]: 1 + the number of candidates with a strictly larger logit; 0 where not scored.
    ties
        int64, shape (n,), in [0, V - 1]: other candidates with exactly the same logit. An average rank is
        rank + ties / 2.
    max_log_prob
        float64, shape (n,), in [-log V, 0]: log p of the likeliest candidate.
    tilts
        float64, shape (t,), each below 1: the grid of s.
    tilted_log_sums
        float64, shape (n, t): log sum_v p_v**(1 - s), over the candidates with p_v > 0. It is the cumulant generating
        function of the surprisal at s, so exp(s * S - tilted_log_sum) has mean 1 under p.
    cross_entropy
        float64, shape (n,), >= 0: -sum_v p_v log q_v where a second model's law q was given, else None. inf where q
        forbids what p allows.
    scored
        bool, shape (n,): False where the model makes no prediction (a first token with nothing before it). Every other
        array is NaN there, or 0 if of integers.
    """

    log_prob: Floats
    entropy: Floats
    varentropy: Floats
    third_moment: Floats
    rank: npt.NDArray[np.int64]
    ties: npt.NDArray[np.int64]
    max_log_prob: Floats
    tilts: Floats
    tilted_log_sums: Floats
    scored: npt.NDArray[np.bool_]
    cross_entropy: Floats | None = None

    def __len__(self) -> int:
        return len(self.log_prob)

    def rows(self, index: slice | npt.NDArray[Any]) -> TokenStatistics:
        """The statistics of the tokens at `index`, any numpy row index."""
        return TokenStatistics(**{name: value[index] for name, value in self._columns().items()}, tilts=self.tilts)

    def _columns(self) -> dict[str, npt.NDArray[Any]]:
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tilts"}
        return {name: value for name, value in named.items() if value is not None}


def empty(n: int, tilts: Floats, *, cross: bool = False) -> TokenStatistics:
    """Statistics of `n` tokens of which none is scored: arrays to fill in."""
    return TokenStatistics(
        **{name: np.full(n, np.nan) for name in ("log_prob", "entropy", "varentropy", "third_moment", "max_log_prob")},
        rank=np.zeros(n, dtype=np.int64),
        ties=np.zeros(n, dtype=np.int64),
        tilts=tilts,
        tilted_log_sums=np.full((n, len(tilts)), np.nan),
        scored=np.zeros(n, dtype=np.bool_),
        cross_entropy=np.full(n, np.nan) if cross else None,
    )


def fill(into: TokenStatistics, index: slice | npt.NDArray[Any], rows: TokenStatistics) -> None:
    """Write `rows` into the arrays of `into` at `index`."""
    source = rows._columns()
    for name, target in into._columns().items():
        target[index] = source[name]
