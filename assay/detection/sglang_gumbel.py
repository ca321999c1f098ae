"""Exact tests of sglang-gumbel: those of the Gumbel watermark, on SGLang's words.

Under H0 each word is uniform, independently over distinct context hashes, with one key and with two (the coin that
picks the key is of the context alone): -log(1 - U) is Exp(1). Reference: see `detection.gumbel`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay.detection import gumbel
from assay.detection._words import result_of, token_tails
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.gumbel import Pivots
from assay.watermark.profiles import sglang_gumbel
from assay.watermark.profiles.sglang_gumbel import SglangGumbelConfig, race_words

__all__ = ["ASSUMPTIONS", "NEEDS_MODEL", "NULL", "TESTS", "documents_test", "observe", "test_ids", "token_log_tails"]

TESTS = ("sum", "model-aware", "robust")
NEEDS_MODEL = gumbel.NEEDS_MODEL
NULL = gumbel.NULL
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its words.",
    "The words of distinct contexts behave as independent and uniform (Murmur mix, 32 bits of key state).",
    "Each distinct context hash counts once, at its first place, and at most 4,096 of a text.",
)


def observe(ids: Words, prompt_length: int, prf_key: Words, config: SglangGumbelConfig) -> Pivots:
    """The words of one text, shape (n,), whose first `prompt_length` ids give context only."""
    whole = np.array([0, len(ids)], dtype=np.int64)
    positions, words = sglang_gumbel.scan(ids, whole, prf_key, config, prompt_length=prompt_length)
    n_text = len(ids) - prompt_length
    full = n_text if prompt_length else max(0, n_text - config.context_window)
    return Pivots(positions - prompt_length, race_words(words), n_text, full - len(positions))


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: SglangGumbelConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`."""
    positions, words = sglang_gumbel.scan(ids, offsets, prf_key, config)
    return gumbel.documents_sum_test(positions, race_words(words), offsets, config.context_window)


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: SglangGumbelConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`."""
    found = observe(ids, prompt_length, prf_key, config)
    tests = gumbel.sum_test, gumbel.model_aware_test, gumbel.robust_test
    return result_of(found, tests, test, model, scheme=config.scheme, assumptions=ASSUMPTIONS)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: SglangGumbelConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`."""
    found = observe(ids, 0, prf_key, config)
    return token_tails(found.positions, found.words, len(ids))
