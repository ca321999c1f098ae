"""Small laws whose every statistic is a plain sum, for tests by complete enumeration."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from assay.kernels.scoring.statistics import DEFAULT_TILTS, TokenStatistics


def statistics_of(laws: np.ndarray, tokens: np.ndarray, tilts: tuple[float, ...] = DEFAULT_TILTS) -> TokenStatistics:
    """Statistics of tokens under laws of shape (n, K), by their definitions in float64."""
    p, grid, n = np.asarray(laws, dtype=np.float64), np.array(tilts), len(tokens)
    inside = p > 0
    surprisal = np.where(inside, -np.log(np.where(inside, p, 1.0)), 0.0)
    entropy = np.sum(p * surprisal, axis=1)
    centred = np.where(inside, surprisal - entropy[:, None], 0.0)
    with np.errstate(divide="ignore"):
        log_prob = np.log(p[np.arange(n), tokens])
    return TokenStatistics(
        log_prob=log_prob,
        entropy=entropy,
        varentropy=np.sum(p * centred**2, axis=1),
        third_moment=np.sum(p * centred**3, axis=1),
        rank=1 + np.sum(p > p[np.arange(n), tokens][:, None], axis=1),
        ties=np.sum(p == p[np.arange(n), tokens][:, None], axis=1) - 1,
        max_log_prob=np.log(np.max(p, axis=1)),
        tilts=grid,
        tilted_log_sums=np.array(
            [[np.log(np.sum(row[row > 0] ** (1 - s))) for s in grid] for row in p], dtype=np.float64
        ).reshape(n, len(grid)),
        scored=np.ones(n, dtype=np.bool_),
    )


@functools.cache
def law_after(history: tuple[int, ...], seed: int, size: int) -> np.ndarray:
    """A skewed law that depends on the whole history."""
    return np.random.default_rng([seed, size, *history, 99]).dirichlet(np.full(size, 0.6))


def all_texts(length: int, size: int, seed: int) -> Iterator[tuple[tuple[int, ...], np.ndarray, float]]:
    """Every text of a history-dependent model: its tokens, its laws (length, size), and its probability."""
    for tokens in itertools.product(range(size), repeat=length):
        laws = np.array([law_after(tokens[:i], seed, size) for i in range(length)])
        yield tokens, laws, float(np.prod(laws[np.arange(length), tokens]))
