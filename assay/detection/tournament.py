"""Tests of the tournament: exact count of bits, exact weighted count for a known model, and an e-value.

Under H0 the m bits of each distinct (context, token) are independent fair coins. Source of the scheme: Dathathri et al.
(2024), Nature 634, 818-823, whose trained scores are replaced by exact laws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay.detection import bits
from assay.detection._contexts import Laws, context_test
from assay.detection.bits import NEEDS_MODEL, NULL, TESTS, Floats
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark._coins import LAYERS
from assay.watermark.tournament import TournamentConfig, observe, scan

__all__ = ["ASSUMPTIONS", "NEEDS_MODEL", "NULL", "TESTS", "documents_test", "test_ids", "token_log_tails"]

ASSUMPTIONS = (bits.SECRECY, "Each distinct (context, token) counts once, at its first place.")


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: TournamentConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`."""
    positions, outcomes = scan(ids, offsets, prf_key, config)
    return bits.documents_sum_test(positions, outcomes, offsets, config.window, 0.5)


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: TournamentConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`.

    Guarantee of the model-aware test: see `_contexts.context_test`. Of the robust test: a token's ratio is its
    probability after the tournament over the one before; given the layers before, the mean of 1 + g - sum g p over fair
    bits is 1, so the ratio has mean exactly 1 over keys. Both read the first token after each distinct context only: no
    other is marked, and no list is read twice.
    """
    coins = observe(ids, prf_key, config, prompt_length=prompt_length)

    def chances(keys: Words, laws: Laws, tokens: npt.NDArray[np.int64]) -> Floats:
        from assay.kernels import tilted_laws

        return tilted_laws.tournament_chances(keys, laws, tokens, stream=LAYERS, layers=config.layers)

    def log_ratios(keys: Words, laws: Laws, tokens: npt.NDArray[np.int64]) -> Floats:
        from assay.kernels import tilted_laws

        return tilted_laws.tournament_log_ratios(keys, laws, tokens, stream=LAYERS, layers=config.layers)

    return context_test(
        ids,
        prompt_length,
        coins,
        config.window,
        prf_key,
        test=test,
        model=model,
        chances=chances,
        log_ratios=log_ratios,
        scheme=config.scheme,
        assumptions=ASSUMPTIONS,
    )


def token_log_tails(ids: Words, prf_key: Words, config: TournamentConfig) -> Floats:
    """See `testers.Tester.token_log_tails`."""
    return bits.token_log_tails(observe(ids, prf_key, config), 0.5)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*
