"""Exact tests of vllm-gumbel: those of the Gumbel watermark on vLLM's words, with one key and with two.

One key: -log(1 - U) is Exp(1) under H0. Two keys: the statistic is vLLM's, (1 - alpha) sum(Y_A) + alpha sum(Y_B), and
its null law the weighted sum of two Gamma(n, 1), of which vLLM takes a Gamma with the same two moments: its p-values
are up to some times too small. Reference: see `detection.gumbel` and `detection.dual_gumbel`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from assay.detection import dual_gumbel, gumbel
from assay.detection._words import result_of, token_tails
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.dual_gumbel import DualPivots
from assay.watermark.gumbel import Pivots
from assay.watermark.profiles import vllm_gumbel
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig, race_words

__all__ = ["ASSUMPTIONS", "NEEDS_MODEL", "NULL", "TESTS", "documents_test", "observe", "test_ids", "token_log_tails"]

TESTS = ("sum", "model-aware", "robust")
NEEDS_MODEL = gumbel.NEEDS_MODEL
NULL = gumbel.NULL
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its words.",
    "The words of distinct contexts behave as independent and uniform (Philox4x32-10, 64-bit key).",
    "Each distinct context counts once, at its first place.",
)


def observe(ids: Words, prf_key: Words, config: VllmGumbelConfig) -> Pivots | DualPivots:
    """The words of one text: generated tokens alone, uint32, shape (n,); under two keys where the settings say so."""
    positions, words = vllm_gumbel.scan(ids, np.array([0, len(ids)], dtype=np.int64), prf_key, config)
    oriented = [race_words(one) for one in words]
    dropped = len(ids) - len(positions)
    if len(oriented) == 1:
        return Pivots(positions, oriented[0], len(ids), dropped)
    return DualPivots(positions, oriented[0], oriented[1], len(ids), dropped)


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: VllmGumbelConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`; the documents are generated tokens alone."""
    positions, words = vllm_gumbel.scan(ids, offsets, prf_key, config)
    draft, *target = [race_words(one) for one in words]
    if not target:
        return gumbel.documents_sum_test(positions, draft, offsets, 0)
    return dual_gumbel.documents_sum_test(positions, draft, target[0], offsets, 0, weight=config.alpha)


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: VllmGumbelConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`; the prompt keys nothing."""
    found = observe(ids[prompt_length:], prf_key, config)
    if isinstance(found, Pivots):
        single = gumbel.sum_test, gumbel.model_aware_test, gumbel.robust_test
        return result_of(found, single, test, model, scheme="vllm-gumbel", assumptions=ASSUMPTIONS)
    dual = partial(dual_gumbel.sum_test, weight=config.alpha), dual_gumbel.model_aware_test, dual_gumbel.robust_test
    return result_of(found, dual, test, model, scheme="vllm-dual-gumbel", assumptions=ASSUMPTIONS)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: VllmGumbelConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`; with two keys, of the smaller of both words."""
    found = observe(ids, prf_key, config)
    if isinstance(found, Pivots):
        return token_tails(found.positions, found.words, len(ids))
    best = token_tails(found.positions, np.minimum(found.draft_words, found.target_words), len(ids))
    # P(the smaller of two is at most x) = 1 - (1 - x)^2.
    return np.log(-np.expm1(2.0 * np.log1p(-np.minimum(np.exp(best), 1.0 - 2.0**-53))))
