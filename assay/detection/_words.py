"""The Gumbel tests on words that other contracts give: many documents at once, one text under its scheme's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from assay.detection import combine, gumbel
from assay.detection.documents import DocumentStatistics
from assay.detection.gumbel import _sum_log_evalues
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.detection.tails import log_gamma_sf
from assay.kernels.chacha import Words
from assay.watermark.dual_gumbel import DualPivots
from assay.watermark.gumbel import Pivots, sum_scores

P = TypeVar("P", Pivots, DualPivots)
Floats = npt.NDArray[np.float64]


def documents_sum_test(
    positions: npt.NDArray[np.int64], words: Words, offsets: npt.NDArray[np.int64], window: int
) -> DocumentStatistics:
    """Row d equals `gumbel.sum_test` on document d.

    Parameters
    ----------
    positions
        int64, shape (k,), ascending: of the counted tokens of documents end to end.
    words
        uint32, shape (k,): uniform under the null, small for marked tokens.
    offsets
        int64, shape (documents + 1,).
    window
        How many tokens of a document stand before the first that can count.
    """
    n_tokens = np.diff(offsets)
    bounds = np.searchsorted(positions, offsets)
    n_scored = np.diff(bounds)
    scores = sum_scores(words)
    statistic = np.array([np.sum(scores[a:b]) for a, b in pairwise(bounds)], dtype=np.float64)
    return DocumentStatistics(
        statistic=statistic,
        log_pvalue=log_gamma_sf(n_scored, statistic),
        log_evalue=_sum_log_evalues(n_scored, statistic),
        n_tokens=n_tokens,
        n_scored=n_scored,
        n_repeats_dropped=np.maximum(0, n_tokens - window) - n_scored,
    )


def token_tails(positions: npt.NDArray[np.int64], words: Words, n_tokens: int) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`: minus the score, float64, shape (n_tokens,)."""
    tails = np.full(n_tokens, np.nan)
    tails[positions] = -sum_scores(words)
    return tails


def result_of(
    found: P,
    tests: tuple[Callable[[P], TestResult], Callable[[P, Floats], TestResult], Callable[[P, Floats], TestResult]],
    test: str,
    model: ModelView | None,
    *,
    scheme: str,
    assumptions: tuple[str, ...],
) -> TestResult:
    """What `test` names, or the best of all with a model, under the scheme's own name and assumptions.

    Parameters
    ----------
    found
        The text's pivots.
    tests
        The sum test, the model-aware test and the robust test.
    test, model
        As in `testers.Tester.test_ids`.
    scheme
        Begins the names of the tests.
    assumptions
        What the guarantee of the sum test rests on.
    """
    sum_test, model_aware_test, robust_test = tests

    def named(result: TestResult, name: str) -> TestResult:
        rest: tuple[str, ...] = tuple(line for line in result.assumptions if line not in gumbel.ASSUMPTIONS)
        return replace(result, test=f"{scheme}-{name}", assumptions=(*assumptions, *rest))

    if model is None or test == "sum" or (test == "auto" and len(found.positions) == 0):
        return named(sum_test(found), "sum")
    log_p = model.log_prob[found.positions]
    # A token that the model could not score (no context at all) gets probability 1: it has no weight.
    log_p = np.where(np.isnan(log_p), 0.0, log_p)
    if test == "model-aware":
        return named(model_aware_test(found, log_p), "model-aware")
    if test == "robust":
        return named(robust_test(found, log_p), "robust")
    aware, robust = named(model_aware_test(found, log_p), "model-aware"), named(robust_test(found, log_p), "robust")
    return combine.best_of((named(sum_test(found), "sum"), aware, robust), test=f"{scheme}-best-of-three")
