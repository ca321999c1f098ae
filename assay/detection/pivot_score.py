"""The least-favourable score: a model-free test of Gumbel pivots that is best at low entropy, with an exact p-value.

If no token has probability above 1 - delta, the log-likelihood ratio of the least favourable such law is the score with
the best worst-case power. Reference: Li, Ruan, Wang, Long and Su (2024), arXiv:2404.01245, section 3 (Gumbel-max).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from assay.detection.convolution import Counts, log_sum_sf, word_score_law
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.gumbel import Pivots

Floats = npt.NDArray[np.float64]

NULL = "the text was written without knowledge of the key"
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its PRF.",
    "Each distinct (context, token) counts once, at its first place.",
    "delta was chosen without looking at the result; a wrong one costs power, never validity.",
)
LEVELS = 1024
"""Levels that the score is rounded down to before it is summed."""


def least_favourable_law(delta: float) -> Floats:
    """Probabilities of the least favourable law with none above 1 - delta: as many 1 - delta as fit, and the rest.

    Parameters
    ----------
    delta
        In [0.001, 0.999].

    Raises
    ------
    ValueError
        If delta is out of range.
    """
    if not 0.001 <= delta <= 0.999:
        raise ValueError(f"delta must be in [0.001, 0.999], got {delta}.")
    top = 1.0 - delta
    full = int(1.0 / top * (1.0 + 1e-12))
    rest = 1.0 - full * top
    return np.array([top] * full + ([rest] if rest > 1e-9 else []))


def least_favourable_scores(words: Words, delta: float) -> Floats:
    """log of the likelihood ratio of each word: sum_x u^(1/p_x - 1), p the least favourable law, averaged over a cell.

    Guarantee: exp of the score has mean exactly 1 under the null, and the score does not increase with the word.

    Parameters
    ----------
    words
        uint32, any shape.
    delta
        In [0.001, 0.999].

    Returns
    -------
    float64, same shape.
    """
    p, copies = np.unique(least_favourable_law(delta), return_counts=True)
    # U lies in the cell [1 - (x + 1) / 2**32, 1 - x / 2**32]; under the mark P(U <= u) is sum p u^(1/p).
    high = 1.0 - words.astype(np.float64) * 2.0**-32
    with np.errstate(divide="ignore"):
        log_high = np.log1p(-words.astype(np.float64) * 2.0**-32)
        log_shrink = np.log1p(-(2.0**-32) / high)  # -inf in the last cell, which begins at 0
    parts = [
        math.log(count * share) + log_high / share + np.log(-np.expm1(log_shrink / share))
        for share, count in zip(p, copies, strict=True)
    ]
    out: Floats = np.logaddexp.reduce(parts) + 32.0 * math.log(2.0)
    return out


def least_favourable_test(pivots: Pivots, *, delta: float = 0.1) -> TestResult:
    """The model-free test with the least-favourable score, rounded down to a lattice, with an exact p-value.

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text.
    Where every token of a marked text has probability at most 1 - delta, no model-free sum has a better worst case.

    Parameters
    ----------
    pivots
        The document's pivots.
    delta
        In [0.001, 0.999]: how far the largest probability stays below 1. Small values suit low entropy.

    Returns
    -------
    TestResult; its e-value is the product of the likelihood ratios.

    Raises
    ------
    ValueError
        If delta is out of range.

    Notes
    -----
    The p-value is that of the rounded score, whose law is known exactly: rounding costs power, one part in 1,024 of
    the score's range, and no validity.
    """
    unit, levels, probabilities = _law(delta)
    scores = least_favourable_scores(pivots.words, delta)
    observed = int(np.floor(scores / unit).astype(np.int64).sum())
    n = len(scores)
    return TestResult(
        test="gumbel-least-favourable",
        statistic=observed * unit,
        log_pvalue=log_sum_sf(levels[None, :], probabilities[None, :], observed, counts=[n]),
        log_evalue=float(scores.sum()),
        n_tokens=pivots.n_tokens,
        n_scored=n,
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


@lru_cache(maxsize=16)
def _law(delta: float) -> tuple[float, Counts, Floats]:
    """Size of a level, the levels and their null probabilities: a pure function of delta."""
    ends = least_favourable_scores(np.array([0, 2**32 - 1], dtype=np.uint32), delta)
    unit = float(ends[0] - ends[1]) / LEVELS
    levels, probabilities = word_score_law(lambda words: least_favourable_scores(words, delta), unit)
    levels.setflags(write=False)
    probabilities.setflags(write=False)
    return unit, levels, probabilities
