"""Exact tests of the multi-bit Gumbel mark, over all 2^bits payloads at once.

Sum test: the largest of 2^bits sums, each Gamma(n, 1) under H0, by the union bound. Model-aware: the smallest of 2^bits
weighted sums of Exp(1). E-values: the mean over ALL payloads of products of mean-one factors, exact by the trellis.
Reference: Vovk and Wang (2021), arXiv:1912.06116 (averages of e-values).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection import combine
from assay.detection.documents import DocumentStatistics
from assay.detection.gumbel import ASSUMPTIONS, MODEL_ASSUMPTIONS, NULL, clip_probabilities
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult, evalue_result
from assay.detection.tails import log_gamma_sf, log_weighted_exponential_cdf
from assay.detection.trellis import best_payload, log_mean_exp
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark.gumbel import race_scores, sum_scores
from assay.watermark.payload import PayloadConfig, PayloadPivots, observe, registers, words_of

TESTS = ("sum", "model-aware", "robust")
NEEDS_MODEL = frozenset(("model-aware", "robust"))

__all__ = [
    "ASSUMPTIONS",
    "NEEDS_MODEL",
    "NULL",
    "TESTS",
    "documents_test",
    "model_aware_test",
    "robust_test",
    "sum_test",
    "tables",
    "test_ids",
    "token_log_tails",
]

_TILTS = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
_EDIT_RATES = np.array([0.001, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7])
_TOKENS_AT_A_TIME = 1 << 14  # the words of all symbols take a kibibyte per token


def sum_test(pivots: PayloadPivots, config: PayloadConfig) -> TestResult:
    """The model-free test: 2^bits times the exact Gamma(n, 1) tail of the best payload's sum of -log(1 - U).

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key, whatever payload is best; no
    assumption on the text. The e-value is the mean over all payloads of products of (1 - r) exp(r Y), mixed over r.
    """
    scores, counts = tables(pivots.steps, pivots.words, config)
    n = len(pivots.positions)
    statistic, log_pvalue, log_evalue = _sum(scores, counts, config)
    return TestResult(
        test="payload-gumbel-sum",
        statistic=statistic,
        log_pvalue=log_pvalue,
        log_evalue=log_evalue,
        n_tokens=pivots.n_tokens,
        n_scored=n,
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=(*ASSUMPTIONS, _family(config)),
    )


def _family(config: PayloadConfig) -> str:
    return f"Corrected for all 2^{config.bits} payloads by the union bound."


def tables(
    steps: npt.NDArray[np.int64], words: Words, config: PayloadConfig
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sums of -log(1 - U), float64, shape (bits, 2^K), and numbers of tokens, int64, shape (bits,), by step."""
    scores = np.zeros((config.bits, 1 << config.memory))
    for start in range(0, len(steps), _TOKENS_AT_A_TIME):
        piece = slice(start, start + _TOKENS_AT_A_TIME)
        np.add.at(scores, steps[piece], sum_scores(words[piece]))
    return scores, np.bincount(steps, minlength=config.bits)


def _sum(
    scores: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], config: PayloadConfig
) -> tuple[float, float, float]:
    """Statistic, log p-value and log e-value of the sum test."""
    n = int(counts.sum())
    if n == 0:
        return 0.0, 0.0, 0.0
    _, statistic = best_payload(scores)
    log_pvalue = float(log_gamma_sf(np.array([n]), np.array([statistic]))[0]) + config.bits * math.log(2.0)
    logs = [log_mean_exp(r * scores) + n * math.log1p(-r) for r in _TILTS]
    return statistic, min(0.0, log_pvalue), float(special.logsumexp(logs)) - math.log(len(logs))


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: PayloadConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`: row d equals `sum_test` on document d."""
    positions = np.flatnonzero(first_occurrences(ids, offsets, config.window + 1))
    n_tokens = np.diff(offsets)
    bounds = np.searchsorted(positions, offsets)
    rows = np.empty((3, len(n_tokens)))
    for d, (scores, counts) in enumerate(_document_tables(ids, positions, bounds, prf_key, config)):
        rows[:, d] = _sum(scores, counts, config)
    n_scored = np.diff(bounds)
    return DocumentStatistics(
        statistic=rows[0],
        log_pvalue=rows[1],
        log_evalue=rows[2],
        n_tokens=n_tokens,
        n_scored=n_scored,
        n_repeats_dropped=np.maximum(0, n_tokens - config.window) - n_scored,
    )


def _document_tables(
    ids: Words,
    positions: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    prf_key: Words,
    config: PayloadConfig,
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """`tables` of each document; words of many short documents are made in one go."""
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= _TOKENS_AT_A_TIME:
            last += 1
        begin = bounds[first]
        steps, words = words_of(ids, positions[begin : bounds[last]], prf_key, config)
        for a, b in pairwise(bounds[first : last + 1] - begin):
            yield tables(steps[a:b], words[a:b], config)
        first = last


def model_aware_test(
    pivots: PayloadPivots, config: PayloadConfig, log_probabilities: npt.NDArray[np.float64]
) -> TestResult:
    """The likelihood-ratio test of the best payload: 2^bits times the exact tail of its sum of (1/p - 1) (-log U).

    Guarantee: P(pvalue <= a) <= a for ANY probabilities computed from the text alone. The e-value is the mean over all
    payloads of prod (1/p) U^(1/p - 1).

    Parameters
    ----------
    pivots, config
        The document's pivots and the key's settings.
    log_probabilities
        float64, shape (n_scored,), natural log, <= 0: of the counted tokens, in the order of `pivots.positions`.
    """
    log_p = clip_probabilities(log_probabilities)
    weights = np.expm1(-log_p)
    scores = _by_step(pivots, config, -weights[:, None] * race_scores(pivots.words))
    statistic = -best_payload(scores)[1]
    log_pvalue = log_weighted_exponential_cdf(weights, statistic) + config.bits * math.log(2.0)
    return TestResult(
        test="payload-gumbel-model-aware",
        statistic=statistic,
        log_pvalue=min(0.0, log_pvalue),
        log_evalue=log_mean_exp(scores) - float(np.sum(log_p)),
        n_tokens=pivots.n_tokens,
        n_scored=len(pivots.positions),
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="less",
        assumptions=(*MODEL_ASSUMPTIONS, _family(config)),
    )


def robust_test(pivots: PayloadPivots, config: PayloadConfig, log_probabilities: npt.NDArray[np.float64]) -> TestResult:
    """The e-value for edited text: per token (1 - e) (1/p) U^(1/p - 1) + e, its product averaged over ALL payloads.

    Guarantee: mixed over edit rates e, the e-value has mean at most 1 under the null for ANY probabilities computed
    from the text alone; the p-value is 1 / e (Markov).

    Parameters
    ----------
    pivots, config, log_probabilities
        As in `model_aware_test`.
    """
    log_p = clip_probabilities(log_probabilities)
    log_ratio = -log_p[:, None] - np.expm1(-log_p)[:, None] * race_scores(pivots.words)
    logs = [
        log_mean_exp(_by_step(pivots, config, np.logaddexp(math.log1p(-e) + log_ratio, math.log(e))))
        for e in _EDIT_RATES
    ]
    log_evalue = float(special.logsumexp(logs)) - math.log(len(logs))
    assumptions = (*MODEL_ASSUMPTIONS, "Averaged over all payloads.")
    return evalue_result("payload-gumbel-robust", log_evalue, pivots, null=NULL, assumptions=assumptions)


def _by_step(pivots: PayloadPivots, config: PayloadConfig, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values of tokens and symbols summed by step: shape (bits, 2^K)."""
    table = np.zeros((config.bits, values.shape[1]))
    np.add.at(table, pivots.steps, values)
    return table


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: PayloadConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`."""
    found = observe(ids, prf_key, config, prompt_length=prompt_length)
    if model is None or test == "sum" or len(found.positions) == 0:
        return sum_test(found, config)
    log_p = model.log_prob_at(found.positions)
    if test == "model-aware":
        return model_aware_test(found, config, log_p)
    if test == "robust":
        return robust_test(found, config, log_p)
    parts = (sum_test(found, config), model_aware_test(found, config, log_p), robust_test(found, config, log_p))
    return combine.best_of(parts, test="payload-gumbel-best-of-three")


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: PayloadConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`: of each token's word under the decoded payload.

    The payload was chosen to make these words look marked; for pictures of where the evidence lies, not for tests.
    """
    found = observe(ids, prf_key, config)
    tails = np.full(len(ids), np.nan)
    if len(found.positions):
        payload, _ = best_payload(tables(found.steps, found.words, config)[0])
        symbols = registers(payload, config)[found.steps]
        tails[found.positions] = -sum_scores(found.words[np.arange(len(symbols)), symbols])
    return tails
