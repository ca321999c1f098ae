"""Exact tests of the dual-key Gumbel watermark: each token may carry key A's mark or key B's.

Sum test: 0.7 sum(Y_A) + 0.3 sum(Y_B), Y = -log(1 - U), is a weighted sum of two Gamma(n, 1) under H0; its upper tail
is a series of positive terms. Model-aware test: min(-log U_A / 0.8, -log U_B / 0.2) is Exp(1) under H0, so the
weighted sum has the exact tail of the single-key test. Reference: Moschopoulos (1985), Ann. Inst. Statist. Math. 37.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection import combine
from assay.detection.documents import DocumentStatistics, by_document
from assay.detection.gumbel import ASSUMPTIONS, MODEL_ASSUMPTIONS, NULL, clip_probabilities
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult, evalue_result
from assay.detection.tails import log_weighted_exponential_cdf
from assay.kernels.chacha import Words
from assay.watermark.dual_gumbel import DualGumbelConfig, DualPivots, observe, scan
from assay.watermark.gumbel import race_scores, sum_scores

__all__ = [
    "ASSUMPTIONS",
    "NEEDS_MODEL",
    "NULL",
    "TESTS",
    "documents_test",
    "log_two_gamma_sf",
    "model_aware_test",
    "robust_test",
    "sum_test",
    "test_ids",
    "token_log_tails",
]

TESTS = ("sum", "model-aware", "robust")
NEEDS_MODEL = frozenset(("model-aware", "robust"))

TARGET_WEIGHT = 0.3
"""Weight of key B's scores in the sum; within a fifth of the best weight for acceptance rates of drafts from 0.5 on."""

TARGET_SHARE = 0.2
"""Share of the null's rate that the model-aware test gives to key B: it costs a token -log(0.8) or -log(0.2) nats."""

_TILTS = np.array([0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
# Shares of tokens that key B marked, and of edited tokens, over which the model-aware e-value is mixed.
_TARGET_SHARES = np.array([0.02, 0.1, 0.25, 0.5])
_EDIT_RATES = np.array([0.001, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7])


def log_two_gamma_sf(n: int, weight: float, s: float) -> float:
    """log P((1 - weight) G_1 + weight G_2 >= s) for independent G_1, G_2 ~ Gamma(n, 1).

    Parameters
    ----------
    n
        Number of terms in each sum, >= 0; the empty sum is 0.
    weight
        In (0, 1).
    s
        Observed value, >= 0.

    Returns
    -------
    float in [-inf, 0]; relative error of the probability below 1e-6 (checked against exact integration to 1e-300).

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    With a > b the two weights, a Gamma(n) of scale a is a negative binomial mixture of Gammas of scale b: N failures
    before n successes of probability b / a give Gamma(n + N). So the tail is P(Poisson(s / b) < 2 n + N): a sum of
    positive terms, which loses no digits however small it is. O(n + s / b) time and memory.
    """
    if not 0.0 < weight < 1.0:
        raise ValueError(f"weight must be in (0, 1), got {weight}.")
    if n < 0 or math.isnan(s) or s < 0:
        raise ValueError(f"n and s must be at least 0, got {n} and {s}.")
    if s == 0.0:
        return 0.0
    if n == 0 or s == math.inf:
        return -math.inf
    small, large = sorted((weight, 1.0 - weight))
    log_success, log_failure = math.log(small / large), math.log1p(-small / large) if small < large else -math.inf
    x = s / small
    terms = 256 + int(2.0 * max(x, n * large / small))
    while True:
        points = np.arange(2 * n + terms, dtype=np.float64)
        log_below = np.logaddexp.accumulate(special.xlogy(points, x) - x - special.gammaln(points + 1.0))
        if small == large:
            return min(0.0, float(log_below[2 * n - 1]))
        failures = np.arange(terms, dtype=np.float64)
        log_mass = (
            special.gammaln(n + failures)
            - special.gammaln(n)
            - special.gammaln(failures + 1.0)
            + n * log_success
            + failures * log_failure
        )
        total = float(special.logsumexp(log_mass + log_below[2 * n - 1 : -1]))
        # What is left out is at most the rest of the negative binomial, whose terms shrink by `ratio` or faster.
        ratio = math.exp(log_failure) * (n + terms) / (terms + 1.0)
        if ratio < 1.0 and log_mass[-1] - math.log1p(-ratio) < total - 25.0:
            return min(0.0, total)
        terms *= 2


def sum_test(pivots: DualPivots, *, weight: float = TARGET_WEIGHT) -> TestResult:
    """The model-free test: exact tail of (1 - weight) sum(Y_A) + weight sum(Y_B).

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text.

    Parameters
    ----------
    pivots
        From `watermark.dual_gumbel.observe`.
    weight
        Of key B, in (0, 1).

    Returns
    -------
    TestResult; with no pivot its p-value and e-value are 1.

    References
    ----------
    Moschopoulos (1985), *The distribution of the sum of independent Gamma random variables*.
    """
    n = len(pivots.positions)
    draft, target = float(np.sum(sum_scores(pivots.draft_words))), float(np.sum(sum_scores(pivots.target_words)))
    statistic, log_pvalue, log_evalue = _sum_row(n, draft, target, weight)
    return TestResult(
        test="dual-gumbel-sum",
        statistic=statistic,
        log_pvalue=log_pvalue,
        log_evalue=log_evalue,
        n_tokens=pivots.n_tokens,
        n_scored=n,
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def _sum_row(n: int, draft: float, target: float, weight: float) -> tuple[float, float, float]:
    """Statistic, log p-value and log e-value: the mean over tilts r of prod (1 - r) exp(r Y) for both keys."""
    statistic = (1.0 - weight) * draft + weight * target
    exponents = sum(n * np.log1p(-r) + r * y for r, y in zip(_rates(weight), (draft, target), strict=True))
    log_evalue = float(special.logsumexp(exponents)) - math.log(len(_TILTS))
    return statistic, log_two_gamma_sf(n, weight, statistic), log_evalue


def _rates(weight: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Tilts of keys A and B, each scaled by the key's weight, the larger to 1."""
    largest = max(weight, 1.0 - weight)
    return _TILTS * ((1.0 - weight) / largest), _TILTS * (weight / largest)


def tilted_log_ratios(pivots: DualPivots) -> npt.NDArray[np.float64]:
    """log of each token's factor (1 - r) exp(r Y) of both keys, shape (k, tilts): the e-value of the sum test."""
    draft, target = sum_scores(pivots.draft_words)[:, None], sum_scores(pivots.target_words)[:, None]
    of_draft, of_target = _rates(TARGET_WEIGHT)
    ratios: npt.NDArray[np.float64] = (np.log1p(-of_draft) + of_draft * draft) + (
        np.log1p(-of_target) + of_target * target
    )
    return ratios


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: DualGumbelConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`: row d equals `sum_test` on document d."""
    return documents_sum_test(*scan(ids, offsets, prf_key, config), offsets, config.window)


def documents_sum_test(
    positions: npt.NDArray[np.int64],
    draft_words: Words,
    target_words: Words,
    offsets: npt.NDArray[np.int64],
    window: int,
    *,
    weight: float = TARGET_WEIGHT,
) -> DocumentStatistics:
    """The sum test on many documents that lie end to end; row d equals `sum_test` on document d.

    Parameters
    ----------
    positions, offsets, window
        As in `documents.by_document`.
    draft_words, target_words
        uint32, shape (k,): of the counted tokens under keys A and B.
    weight
        Of key B, in (0, 1).
    """
    draft, target = sum_scores(draft_words), sum_scores(target_words)

    def row(a: int, b: int) -> tuple[float, float, float]:
        return _sum_row(b - a, float(np.sum(draft[a:b])), float(np.sum(target[a:b])), weight)

    return by_document(positions, offsets, window, row)


def model_aware_test(pivots: DualPivots, log_probabilities: npt.NDArray[np.float64]) -> TestResult:
    """The test with the target model: S = sum (1/p - 1) min(E_A / 0.8, E_B / 0.2), E = -log U, rejecting for small S.

    Guarantee: P(pvalue <= a) <= a for ANY probabilities computed from the text alone: E / s is exponential with rate s,
    and the smaller of two has the sum of their rates, 1. So S is a weighted sum of Exp(1) under the null, with an exact
    tail. Its e-value weighs the keys, as `robust_test` does, without edits.

    Parameters
    ----------
    pivots
        The document's pivots.
    log_probabilities
        float64, shape (n_scored,), natural log, <= 0: of the counted tokens under the target model.
    """
    log_p = clip_probabilities(log_probabilities)
    weights = np.expm1(-log_p)
    draft, target = race_scores(pivots.draft_words), race_scores(pivots.target_words)
    times = np.minimum(draft / (1.0 - TARGET_SHARE), target / TARGET_SHARE)
    statistic = float(np.sum(weights * times))
    return TestResult(
        test="dual-gumbel-model-aware",
        statistic=statistic,
        log_pvalue=log_weighted_exponential_cdf(weights, statistic),
        log_evalue=_mixed(pivots, log_p, np.zeros(1)),
        n_tokens=pivots.n_tokens,
        n_scored=len(pivots.positions),
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="less",
        assumptions=MODEL_ASSUMPTIONS,
    )


def robust_test(pivots: DualPivots, log_probabilities: npt.NDArray[np.float64]) -> TestResult:
    """The e-process for edited text: per token (1 - e) [(1 - b) L_A + b L_B] + e with L = (1/p) U^(1/p - 1).

    Guarantee: mixed over shares b of key B and edit rates e, the e-value has mean at most 1 under the null for ANY
    probabilities computed from the text alone; the p-value is 1 / e (Markov).

    Parameters
    ----------
    pivots, log_probabilities
        As in `model_aware_test`.
    """
    log_evalue = _mixed(pivots, clip_probabilities(log_probabilities), _EDIT_RATES)
    return evalue_result("dual-gumbel-robust", log_evalue, pivots, null=NULL, assumptions=MODEL_ASSUMPTIONS)


def _mixed(pivots: DualPivots, log_p: npt.NDArray[np.float64], edit_rates: npt.NDArray[np.float64]) -> float:
    """log of the mean over (b, e) of prod over tokens of (1 - e) [(1 - b) L_A + b L_B] + e."""
    logs = []
    for either in shared_log_ratios(pivots, log_p):
        with np.errstate(divide="ignore"):
            logs += [np.sum(np.logaddexp(math.log1p(-e) + either, np.log(e))) for e in edit_rates]
    return float(special.logsumexp(logs)) - math.log(len(logs))


def shared_log_ratios(pivots: DualPivots, log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log of (1 - b) L_A + b L_B for each share b of key B and each token, shape (shares, k)."""
    weights = np.expm1(-log_p)
    draft = -log_p - weights * race_scores(pivots.draft_words)
    target = -log_p - weights * race_scores(pivots.target_words)
    shares = _TARGET_SHARES[:, None]
    either: npt.NDArray[np.float64] = np.logaddexp(np.log1p(-shares) + draft, np.log(shares) + target)
    return either


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: DualGumbelConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`."""
    found = observe(ids, prf_key, config, prompt_length=prompt_length)
    if model is None or test == "sum" or (test == "auto" and len(found.positions) == 0):
        return sum_test(found)
    log_p = model.log_prob_at(found.positions)
    if test == "model-aware":
        return model_aware_test(found, log_p)
    if test == "robust":
        return robust_test(found, log_p)
    parts = (sum_test(found), model_aware_test(found, log_p), robust_test(found, log_p))
    return combine.best_of(parts, test="dual-gumbel-best-of-three")


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: DualGumbelConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`: of 0.7 Y_A + 0.3 Y_B."""
    found = observe(ids, prf_key, config)
    large, small = 1.0 - TARGET_WEIGHT, TARGET_WEIGHT
    score = large * sum_scores(found.draft_words) + small * sum_scores(found.target_words)
    tails = np.full(len(ids), np.nan)
    # (large e^(-s / large) - small e^(-s / small)) / (large - small), its second term taken out of the logarithm.
    rest = np.log1p(-small / large * np.exp(score / large - score / small)) - math.log1p(-small / large)
    tails[found.positions] = np.minimum(0.0, rest - score / large)
    return tails
