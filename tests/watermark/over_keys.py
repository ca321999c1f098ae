"""Many draws of one sampler: counts over keys, or over everything but the key, and their chi-square tests.

False-alarm rate of every check: FALSE_ALARM, seeds fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from assay.kernels import tilted_race
from assay.watermark.gumbel import unmarked_key
from assay.watermark.schemes import sampler_of as sampler

FALSE_ALARM = 1e-6


def random_words(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2**32, 8, dtype=np.uint32)


def log(law: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(law)


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of counts against a law. Cells expecting under 10 are joined; those of probability 0 must be empty."""
    expected = counts.sum() * law / law.sum()
    assert not counts[law == 0].any()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    if keep.sum() == 1:
        return 1.0
    return float(stats.chisquare(observed[keep], expected[keep]).pvalue)


def drawn_over_keys(config: Any, law: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Counts of n tokens of one law, each after its own context, under 20 random keys."""
    rng = np.random.default_rng(seed)
    rows, window = n // 20, getattr(config, "window", 1)
    counts = np.zeros(len(law), dtype=np.int64)
    for key in range(20):
        ids = np.arange(rows)[:, None] + np.array([10**6 * (key + 1)] * window)
        draw = sampler(config, random_words(rng), random_words(rng))
        counts += np.bincount(draw(ids, np.broadcast_to(log(law), (rows, len(law))), None), minlength=len(law))
    return counts


def drawn_under_one_key(config: Any, prf_key: np.ndarray, context: list[int], law: np.ndarray, n: int) -> np.ndarray:
    """Counts of n tokens of one law after one context; histories differ before it, and with them the race."""
    ids = np.column_stack([1000 + np.arange(n), np.tile(context, (n, 1))]).astype(np.int64)
    draw = sampler(config, prf_key, unmarked_key(b"over histories"))
    return np.bincount(draw(ids, np.broadcast_to(log(law), (n, len(law))), None), minlength=len(law))


def pairs_after_one_context(config: Any, law: np.ndarray, rows: int) -> np.ndarray:
    """Joint counts of two tokens drawn after the same context of one text, over contexts; needs window 1."""
    rng = np.random.default_rng(4)
    draw = sampler(config, random_words(rng), random_words(rng))
    log_weights = np.broadcast_to(log(law), (rows, len(law)))
    starts = 1000 + np.arange(rows)
    first = draw(starts[:, None], log_weights, None)
    second = draw(np.column_stack([starts, first, starts]), log_weights, None)
    return np.bincount(first * len(law) + second, minlength=len(law) ** 2)


def text_counts(config: Any, chain: np.ndarray, length: int, rows: int) -> np.ndarray:
    """Counts of whole texts of a Markov chain after the prompt [0], one key and one seed each."""
    rng = np.random.default_rng(6)
    counts = np.zeros(len(chain) ** length, dtype=np.int64)
    for _ in range(rows):
        draw = sampler(config, random_words(rng), random_words(rng))
        history = np.zeros((1, length + 1), dtype=np.int64)
        for t in range(length):
            history[0, t + 1] = draw(history[:, : t + 1], log(chain[history[0, t]])[None], None)[0]
        counts[np.ravel_multi_index(history[0, 1:], [len(chain)] * length)] += 1
    return counts


def text_law(chain: np.ndarray, length: int) -> np.ndarray:
    texts = itertools.product(range(len(chain)), repeat=length)
    return np.array([np.prod([chain[a, b] for a, b in itertools.pairwise((0, *text))]) for text in texts])


def without_the_rule_for_repeats(contexts: Callable[..., Any]) -> Callable[..., Any]:
    """The near-miss of a scheme without distortion: a context that was used before is used again."""

    def every_context_is_new(*arguments: Any) -> Any:
        found, kinds = contexts(*arguments)
        return found, np.where(kinds == tilted_race.REPEATED, tilted_race.NEW, kinds)

    return every_context_is_new


LAWS = {
    "peaked": np.array([0.0005, 0.97, 0.02, 0.009, 0.0005]),
    "flat": np.full(64, 1 / 64),
    "zeros": np.array([0.0, 0.3, 0.0, 0.0, 0.6, 0.1, 0.0]),
    "one": np.array([0.0, 0.0, 1.0]),
    "geometric": 0.5 ** np.arange(1, 30.0),
    "600 ids": np.random.default_rng(5).dirichlet(np.full(600, 0.1)),
}
