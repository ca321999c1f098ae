"""Exact tests of the Gumbel watermark, without a model and with one.

Sum test: sum of -log(1 - U) is Gamma(n, 1) under H0, upper tail. Model-aware test: sum of (1/p - 1) (-log U) is a
weighted sum of Exp(1) under H0, lower tail; it is the likelihood-ratio test. Reference: Aaronson (2022); Huang et al.
(2023), arXiv:2312.07930, section 3; Vovk and Wang (2021), arXiv:1912.06116 (e-values).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection import combine
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult, evalue_result
from assay.detection.tails import log_gamma_sf, log_weighted_exponential_cdf
from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark.gumbel import GumbelConfig, Pivots, observe, race_scores, scan, sum_scores

NULL = "the text was written without knowledge of the key"
TESTS = ("sum", "model-aware", "robust", "berk-jones", "least-favourable")
NEEDS_MODEL = frozenset(("model-aware", "robust"))
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its PRF.",
    "Each distinct (context, token) counts once, at its first place.",
)
MODEL_ASSUMPTIONS = (
    *ASSUMPTIONS,
    (
        "The token probabilities were computed from the text alone, without the key. A wrong model or a missing prompt "
        "costs power, never validity."
    ),
)

# Rates of the exponential tilts of the sum test's e-value: weak marks (long texts) to strong ones.
_TILTS = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
# Shares of edited tokens over which the model-aware e-value is mixed.
_EDIT_RATES = np.array([0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
# Bounds on the probabilities used as weights. A function of the text alone, so validity does not depend on them.
MIN_PROBABILITY = 1e-6
MAX_PROBABILITY = 1 - 1e-6


def sum_test(pivots: Pivots) -> TestResult:
    """The model-free test: exact Gamma(n, 1) upper tail of the sum of -log(1 - U).

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text.
    """
    n = len(pivots.words)
    statistic = float(np.sum(sum_scores(pivots.words)))
    count, observed = np.array([n]), np.array([statistic])
    return TestResult(
        test="gumbel-sum",
        statistic=statistic,
        log_pvalue=float(log_gamma_sf(count, observed)[0]),
        log_evalue=float(_sum_log_evalues(count, observed)[0]),
        n_tokens=pivots.n_tokens,
        n_scored=n,
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def _sum_log_evalues(n: npt.NDArray[np.int64], statistic: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log of the mean over tilts r of prod (1 - r) exp(r Y): each factor has mean 1 under Exp(1)."""
    exponents = n[:, None] * np.log1p(-_TILTS) + statistic[:, None] * _TILTS
    peak = exponents.max(axis=1)
    out: npt.NDArray[np.float64] = peak + np.log(np.mean(np.exp(exponents - peak[:, None]), axis=1))
    return out


def documents_test(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: GumbelConfig,
    *,
    backend: prf.Backend = "auto",
) -> DocumentStatistics:
    """The sum test on many documents at once; row d equals `sum_test` on document d.

    Parameters
    ----------
    ids
        uint32, shape (n,): token ids of all documents end to end.
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    config
        The key's settings.
    """
    positions, words = scan(ids, offsets, prf_key, config.window, backend=backend)
    return documents_sum_test(positions, words, offsets, config.window)


def documents_sum_test(
    positions: npt.NDArray[np.int64], words: Words, offsets: npt.NDArray[np.int64], window: int
) -> DocumentStatistics:
    """The sum test on many documents that lie end to end; row d equals `sum_test` on document d.

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
    # One np.sum per document, as sum_test does: reduceat adds in another order and would differ in the last bits.
    statistic = np.array([np.sum(scores[a:b]) for a, b in pairwise(bounds)], dtype=np.float64)
    return DocumentStatistics(
        statistic=statistic,
        log_pvalue=log_gamma_sf(n_scored, statistic),
        log_evalue=_sum_log_evalues(n_scored, statistic),
        n_tokens=n_tokens,
        n_scored=n_scored,
        n_repeats_dropped=np.maximum(0, n_tokens - window) - n_scored,
    )


def clip_probabilities(log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Token log-probabilities bounded away from log 0 and log 1, as every model-aware test uses them."""
    return np.clip(log_probabilities, math.log(MIN_PROBABILITY), math.log(MAX_PROBABILITY))


def model_aware_test(pivots: Pivots, log_probabilities: npt.NDArray[np.float64]) -> TestResult:
    """The likelihood-ratio test for a known model: S = sum (1/p - 1) (-log U), rejecting for small S, exact tail.

    Guarantee: P(pvalue <= a) <= a for ANY probabilities computed from the text alone. Most powerful for verbatim text
    of the model that p comes from; a few edited tokens with small p can hide the mark (use `robust_test` for those).

    Parameters
    ----------
    pivots
        The document's pivots.
    log_probabilities
        float64, shape (n_scored,), natural log, <= 0: of the counted tokens, in the order of `pivots.positions`.

    Returns
    -------
    TestResult; its e-value is prod (1/p) U^(1/p - 1).
    """
    log_p = clip_probabilities(log_probabilities)
    times = race_scores(pivots.words)
    weights = np.expm1(-log_p)
    statistic = float(np.sum(weights * times))
    return TestResult(
        test="gumbel-model-aware",
        statistic=statistic,
        log_pvalue=log_weighted_exponential_cdf(weights, statistic),
        log_evalue=float(-np.sum(log_p) - statistic),
        n_tokens=pivots.n_tokens,
        n_scored=len(pivots.words),
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="less",
        assumptions=MODEL_ASSUMPTIONS,
    )


def robust_test(
    pivots: Pivots,
    log_probabilities: npt.NDArray[np.float64],
    row_log_ratios: npt.NDArray[np.float64] | None = None,
) -> TestResult:
    """The model-aware e-process for edited text: per token (1 - e) L + e, mixed over edit rates e.

    L is (1/p) U^(1/p - 1), which needs the token's own probability only; given whole laws, the e-value is averaged with
    that of L = 1[the token wins its race] / p, which tells a marked token from others by all candidates' words.

    Guarantee: the e-value has mean at most 1 under the null for ANY probabilities computed from the text alone, and
    the p-value is 1 / e (Markov). An edited token costs at most log(1 / e) instead of hiding the others.

    Parameters
    ----------
    pivots, log_probabilities
        As in `model_aware_test`.
    row_log_ratios
        float64, shape (n_scored,): from `row_evidence`; None where only `log_probabilities` are known.
    """
    log_p = clip_probabilities(log_probabilities)
    ratios = [-log_p - np.expm1(-log_p) * race_scores(pivots.words)]
    if row_log_ratios is not None:
        ratios.append(row_log_ratios)
    mixed = [np.sum(np.logaddexp(math.log1p(-e) + ratio, math.log(e))) for ratio in ratios for e in _EDIT_RATES]
    log_evalue = float(special.logsumexp(mixed)) - math.log(len(mixed))
    return evalue_result("gumbel-robust", log_evalue, pivots, null=NULL, assumptions=MODEL_ASSUMPTIONS)


def row_evidence(
    ids: Words,
    prompt_length: int,
    prf_key: Words,
    config: GumbelConfig,
    positions: npt.NDArray[np.int64],
    model: ModelView,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What one reading of the whole laws says of each counted token: log p, and log of 1[it wins its race] / p.

    Guarantee: for a text chosen without the key, exp of each log ratio has mean at most 1 given the others, for ANY
    model. Only the first token after each distinct context races, so that no race is run twice; different races are
    independent.

    Parameters
    ----------
    ids, prompt_length, prf_key, config
        As in `testers.Tester.test_ids`.
    positions
        int64, shape (k,): `Pivots.positions`.
    model
        Its `rows()` are read once.

    Returns
    -------
    log_probabilities
        float64, shape (k,); 0 where the model has no law for the token.
    winner_log_ratios
        float64, shape (k,); -inf where another token wins, 0 where no race is run.
    """
    from assay.kernels import race

    log_p, ratios = np.zeros(len(positions)), np.zeros(len(positions))
    places = positions + prompt_length
    new = first_occurrences(ids, np.array([0, len(ids)], dtype=np.int64), config.window)[places - 1]
    for first, laws in model.rows():
        vocabulary = laws.shape[1]
        inside = (positions >= first) & (positions < first + len(laws)) & (ids[places] < vocabulary)
        numbers = np.flatnonzero(inside)
        rows, tokens = laws[positions[numbers] - first], ids[places[numbers]].astype(np.int64)
        own = rows[np.arange(len(rows)), tokens].astype(np.float64)
        log_p[numbers] = own - np.log(np.exp(rows.astype(np.float64)).sum(axis=1))
        raced = new[numbers]
        numbers = numbers[raced]
        if len(numbers) == 0:
            continue
        contexts = np.lib.stride_tricks.sliding_window_view(ids, config.window)[places[numbers] - config.window]
        won = race.winners(race.subkeys(prf_key, contexts), rows[raced]) == tokens[raced]
        # Words are rounded, and ties go to the lower id: this bounds the chance to win.
        # Proof: docs/explanation/tests-and-null-laws.md, "The robust test".
        bound = np.exp(log_p[numbers]) * (1.0 + 2.0**-31 * (vocabulary + 2**14)) + 2.0**-30
        ratios[numbers] = np.where(won, -np.log(bound), -np.inf)
    return log_p, ratios


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: GumbelConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`."""
    found = observe(ids, prf_key, config, prompt_length=prompt_length)
    if test == "berk-jones":
        from assay.detection.goodness_of_fit import berk_jones_test

        return berk_jones_test(found)
    if test == "least-favourable":
        from assay.detection.pivot_score import least_favourable_test

        return least_favourable_test(found)
    if model is None or test == "sum" or (test == "auto" and len(found.words) == 0):
        return sum_test(found)
    if test == "model-aware":
        return model_aware_test(found, model.log_prob_at(found.positions))
    log_p, ratios = row_evidence(ids, prompt_length, prf_key, config, found.positions, model)
    robust = robust_test(found, log_p, ratios)
    if test == "robust":
        return robust
    parts = (sum_test(found), model_aware_test(found, log_p), robust)
    return combine.best_of(parts, test="gumbel-best-of-three")


def token_log_tails(ids: Words, prf_key: Words, config: GumbelConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`."""
    found = observe(ids, prf_key, config)
    out = np.full(len(ids), np.nan)
    # Under H0 a score is at most Exp(1) in law, so -score is the logarithm of its tail probability.
    out[found.positions] = np.minimum(0.0, -sum_scores(found.words))
    return out


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*
