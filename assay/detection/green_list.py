"""Tests of the green list: exact count, exact weighted count for a known model, and an e-value for edited text.

Under H0 the colours of the distinct coins are independent Bernoulli(c), c = floor(gamma 2**32) / 2**32. Source of the
lists: Kirchenbauer et al. (2023), arXiv:2301.10226, whose normal approximation is replaced by exact laws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay.detection import _lists, bits, combine
from assay.detection.bits import NEEDS_MODEL, NULL, TESTS, Floats
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.green_list import GreenListConfig, observe, scan

__all__ = ["ASSUMPTIONS", "NEEDS_MODEL", "NULL", "TESTS", "documents_test", "test_ids", "token_log_tails"]

ASSUMPTIONS = (
    bits.SECRECY,
    "Each distinct coin counts once, at its first place: (context, token), or with seeding 'self' (anchor, token).",
)


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: GreenListConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`."""
    positions, green = scan(ids, offsets, prf_key, config)
    return bits.documents_sum_test(positions, green, offsets, config.window, config.chance)


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: GreenListConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`.

    Guarantee of the model-aware and robust tests: given the text, the model and all colours but those of the tested
    coins, the weights are fixed and the tested colours are still independent Bernoulli(c). So the weighted count has
    its exact law, and each likelihood ratio has mean exactly 1. With seeding "left" the robust e-value is the mean of
    that product and of another: for the first token after each distinct context, its probability under the key's whole
    list over the mean of that over keys. The lists of different contexts are independent, so its mean is at most 1.
    """
    coins = observe(ids, prf_key, config, prompt_length=prompt_length)
    chance, scheme = config.chance, config.scheme
    plain = bits.sum_test(coins, chance, scheme=scheme, assumptions=ASSUMPTIONS)
    if model is None or test == "sum" or (test == "auto" and len(coins.positions) == 0):
        return plain
    whole_lists: tuple[Floats, ...] = ()
    if config.seeding == "left":
        log_odds, of_list = _lists.left_evidence(ids, prompt_length, coins, prf_key, config, model)
        whole_lists = (of_list,)
    else:
        log_odds = _lists.self_log_odds(ids, prompt_length, coins, prf_key, config, model)
    aware = bits.model_aware_test(coins, log_odds, chance, scheme=scheme, assumptions=ASSUMPTIONS)
    of_coins = bits.log_ratios(coins.outcomes, log_odds, chance)[:, 0]
    robust = bits.robust_test(coins, of_coins, *whole_lists, scheme=scheme, assumptions=ASSUMPTIONS)
    if test == "model-aware":
        return aware
    return robust if test == "robust" else combine.best_of((plain, aware, robust), test=f"{scheme}-best-of-three")


def token_log_tails(ids: Words, prf_key: Words, config: GreenListConfig) -> Floats:
    """See `testers.Tester.token_log_tails`."""
    return bits.token_log_tails(observe(ids, prf_key, config), config.chance)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*
