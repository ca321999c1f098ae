"""Exact test of synthid-text: Binomial(n depth, 1/2) tail of the number of ones over distinct n-grams.

Under H0 the bits are fair coins, as far as the contract's keyed hash behaves as a random function; unlike hf-synthid it
has no small table whose law could be listed. Reference: Dathathri et al. (2024), doi:10.1038/s41586-024-08025-4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay.detection import bits
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark._coins import Coins
from assay.watermark.profiles import synthid_text
from assay.watermark.profiles._tournament import bit_columns
from assay.watermark.profiles.synthid_text import SynthIdTextConfig

__all__ = ["ASSUMPTIONS", "NEEDS_MODEL", "NULL", "TESTS", "documents_test", "sum_test", "test_ids", "token_log_tails"]

TESTS = ("sum",)
NEEDS_MODEL: frozenset[str] = frozenset()
NULL = bits.NULL
ASSUMPTIONS = (
    "The keys were secret and different from one another: whoever wrote an unmarked text could not compute its bits.",
    "The bits of distinct n-grams and layers behave as independent fair coins (64-bit hash of the contract).",
    "Each distinct n-gram counts once, at its first place.",
)


def _coins(ids: Words, prf_key: Words, config: SynthIdTextConfig) -> Coins:
    positions, shown = synthid_text.scan(ids, np.array([0, len(ids)], dtype=np.int64), prf_key, config)
    return Coins(positions, _outcomes(shown, config), len(ids), len(ids) - len(positions))


def _outcomes(shown: npt.NDArray[np.uint64], config: SynthIdTextConfig) -> npt.NDArray[np.bool_]:
    return bit_columns(shown, config.depth).astype(np.bool_)


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: SynthIdTextConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`."""
    positions, shown = synthid_text.scan(ids, offsets, prf_key, config)
    return bits.documents_sum_test(positions, _outcomes(shown, config), offsets, 0, 0.5)


def sum_test(ids: Words, prf_key: Words, config: SynthIdTextConfig) -> TestResult:
    """The test of one text: generated tokens alone, uint32, shape (n,).

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the keys, if the hash is as assumed.
    """
    return bits.sum_test(_coins(ids, prf_key, config), 0.5, scheme="synthid-text", assumptions=ASSUMPTIONS)


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: SynthIdTextConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`; the prompt takes no part, and no test of this scheme uses a model."""
    return sum_test(ids[prompt_length:], prf_key, config)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: SynthIdTextConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`."""
    return bits.token_log_tails(_coins(ids, prf_key, config), 0.5)
