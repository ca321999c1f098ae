"""The Gumbel tests on words that other contracts give: one text under its scheme's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from assay.detection import combine, gumbel
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.dual_gumbel import DualPivots
from assay.watermark.gumbel import Pivots, sum_scores

P = TypeVar("P", Pivots, DualPivots)
Floats = npt.NDArray[np.float64]


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
    log_p = model.log_prob_at(found.positions)
    if test == "model-aware":
        return named(model_aware_test(found, log_p), "model-aware")
    if test == "robust":
        return named(robust_test(found, log_p), "robust")
    aware, robust = named(model_aware_test(found, log_p), "model-aware"), named(robust_test(found, log_p), "robust")
    return combine.best_of((named(sum_test(found), "sum"), aware, robust), test=f"{scheme}-best-of-three")
