"""Combining results: several tests of one null on one document (Bonferroni), several keys (Holm).

Reference: Holm (1979); Vovk and Wang (2021), arXiv:1912.06116 (averages of e-values).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from scipy import special

from assay.detection.multiplicity import holm
from assay.detection.result import TestResult


def best_of(results: Sequence[TestResult], *, test: str) -> TestResult:
    """One result from several tests of the same null on the same document.

    p = (number of tests) * smallest p; e = mean of the e-values. Both are valid whatever the dependence.

    Parameters
    ----------
    results
        At least one result.
    test
        Name of the combined test.
    """
    best = min(results, key=lambda result: result.log_pvalue)
    return replace(
        best,
        test=test,
        log_pvalue=min(0.0, best.log_pvalue + math.log(len(results))),
        log_evalue=float(special.logsumexp([r.log_evalue for r in results])) - math.log(len(results)),
        assumptions=tuple(dict.fromkeys(a for r in results for a in r.assumptions)),
        components=tuple(results),
    )


def over_keys(results: Sequence[TestResult]) -> TestResult:
    """The result for the most significant of several keys, with error rates that hold for the whole family.

    The p-value is Holm's adjusted p-value of the named key: the probability that ANY key is named wrongly at level a
    is at most a. The e-value is the named key's divided by the number of keys. `components` holds every key's result
    with its own Holm-adjusted p-value.

    Parameters
    ----------
    results
        One result per key, at least one, each with its own unadjusted p-value.
    """
    if len(results) == 1:
        return results[0]
    count = len(results)
    log_pvalues = holm([result.log_pvalue for result in results])
    adjusted = [
        replace(result, log_pvalue=float(log_p), log_evalue=result.log_evalue - math.log(count))
        for result, log_p in zip(results, log_pvalues, strict=True)
    ]
    # Holm can tie adjusted p-values; the unadjusted order names the key.
    named = adjusted[min(range(count), key=lambda i: results[i].log_pvalue)]
    return replace(
        named,
        assumptions=(*named.assumptions, f"Corrected for {count} keys by Holm's method."),
        components=tuple(adjusted),
    )
