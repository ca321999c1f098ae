"""Shares of flagged documents with exact intervals, and the histogram of p-values with its band.

Intervals: Clopper and Pearson (1934), exact binomial. Band: binomial quantiles with Bonferroni's correction over bins.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from assay.report.columns import Booleans, Floats, ResultColumns
from assay.report.excerpts import clean
from assay.report.records import SHORT_TOKENS, Histogram, LengthBucket, SourceShare

LENGTH_EDGES = (1, 50, 100, SHORT_TOKENS, 400, 800, 1600, 3200)
BINS = 20
BAND_LEVEL = 0.99
SHARE_LEVEL = 0.95
_MOST_SOURCES = 200


def histogram(log_pvalue: Floats, *, banded: bool = True) -> Histogram:
    """p-values in bins of equal width, with the band in which independent uniform p-values stay."""
    n = len(log_pvalue)
    counts, _ = np.histogram(np.exp(log_pvalue), bins=BINS, range=(0.0, 1.0))
    tail = (1 - BAND_LEVEL) / (2 * BINS)
    return Histogram(
        counts=tuple(int(count) for count in counts),
        band_low=_binomial_quantile(tail, n, 1 / BINS) if banded else None,
        band_high=_binomial_quantile(1 - tail, n, 1 / BINS) if banded else None,
        band_level=BAND_LEVEL if banded else None,
    )


def clopper_pearson(successes: int, trials: int, level: float = SHARE_LEVEL) -> tuple[float, float]:
    """The exact binomial interval: it covers the true share with probability at least `level`.

    Reference: Clopper and Pearson (1934), Biometrika 26, 404-413.
    """
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(special.betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def _binomial_quantile(probability: float, trials: int, share: float) -> int:
    """The smallest k with P(Binomial(trials, share) <= k) >= probability."""
    low, high = 0, trials
    while low < high:
        middle = (low + high) // 2
        if special.bdtr(middle, trials, share) >= probability:
            high = middle
        else:
            low = middle + 1
    return low


def by_length(columns: ResultColumns, tested: Booleans, flagged: Booleans) -> tuple[LengthBucket, ...]:
    """Tested documents by length in tokens; `tested` and `flagged` have shape (documents,)."""
    buckets = []
    bucket_of = np.searchsorted(np.array(LENGTH_EDGES), columns.n_tokens, side="right") - 1
    for place, shortest in enumerate(LENGTH_EDGES):
        inside = (bucket_of == place) & tested
        documents, hits = int(np.sum(inside)), int(np.sum(inside & flagged))
        low, high = clopper_pearson(hits, documents)
        evidence = columns.log_pvalue[inside]
        buckets.append(
            LengthBucket(
                shortest=shortest,
                longest=LENGTH_EDGES[place + 1] - 1 if place + 1 < len(LENGTH_EDGES) else None,
                documents=documents,
                flagged=hits,
                low=low,
                high=high,
                log_pvalue_smallest=float(np.min(evidence)) if documents else None,
                # The lower of two middle values, so that the median is a p-value that occurred, even among infinities.
                log_pvalue_median=float(np.sort(evidence)[(documents - 1) // 2]) if documents else None,
            )
        )
    return tuple(buckets)


def by_source(columns: ResultColumns, tested: Booleans, flagged: Booleans) -> tuple[tuple[SourceShare, ...], int]:
    """Tested documents by source, largest first, and how many sources are left out; shapes as in `by_length`."""
    documents = np.bincount(columns.source_codes[tested], minlength=len(columns.sources))
    hits = np.bincount(columns.source_codes[flagged], minlength=len(columns.sources))
    names = [clean(name) for name in columns.sources]
    order = sorted((i for i in range(len(names)) if documents[i]), key=lambda i: (-int(documents[i]), names[i]))
    shares = []
    for i in order[:_MOST_SOURCES]:
        low, high = clopper_pearson(int(hits[i]), int(documents[i]))
        shares.append(
            SourceShare(source=names[i], documents=int(documents[i]), flagged=int(hits[i]), low=low, high=high)
        )
    return tuple(shares), max(0, len(order) - _MOST_SOURCES)
