"""Tests of yes-or-no marks: counts of coins that are independent Bernoulli(c) under H0, c known exactly.

Count: Binomial(n, c). Model-aware: sum of integer weights times coins, the exact law of which is summed on the
integers. Robust: mean over edit rates of products of likelihood ratios. Reference: Neyman and Pearson (1933) for the
weights; Vovk and Wang (2021), arXiv:1912.06116, for e-values. Proofs: docs/explanation/schemes.md.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection.convolution import log_weighted_count_sf
from assay.detection.documents import DocumentStatistics
from assay.detection.result import TestResult, evalue_result
from assay.watermark._coins import Coins

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

NULL = "the text was written without knowledge of the key"
TESTS = ("sum", "model-aware", "robust")
NEEDS_MODEL = frozenset(("model-aware", "robust"))
SECRECY = "The key was secret: whoever wrote an unmarked text could not compute its PRF."
ANY_MODEL = (
    "The weights were computed from the text, the model and PRF words that are not tested. A wrong model or a missing "
    "prompt costs power, never validity."
)

# Where the alternatives of the sum test's e-value lie between the null chance and 1: weak marks to certain ones.
_STRENGTHS = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
# Shares of edited tokens over which the robust e-value is mixed.
_EDIT_RATES = np.array([0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
# Bounds on the weights: a function of text and model alone, so that validity does not depend on them.
_MAX_LOG_ODDS = 12.0
# Weights are integers up to this one: rounding a weight costs a little power, and the sum's law becomes a finite sum.
_LEVELS = 63
_LOG_UNDERFLOW = math.log(1e-200)  # below this the incomplete beta function loses digits


def log_binomial_sf(k: Counts, n: Counts, chance: float) -> Floats:
    """log P(B >= k), B ~ Binomial(n, chance), elementwise, far below the smallest float.

    Parameters
    ----------
    k, n
        int64, one shape: counts, n >= 0.
    chance
        In (0, 1).

    Returns
    -------
    float64, same shape, in [-inf, 0]; relative error of the probability below 1e-7 for n up to 1e7.
    """
    k, n = np.asarray(k, dtype=np.int64), np.asarray(n, dtype=np.int64)
    inside = (k > 0) & (k <= n)
    with np.errstate(divide="ignore"):
        out = np.log(special.betainc(np.where(inside, k, 1), np.where(inside, n - k + 1, 1), chance))
    out = np.asarray(np.where(k <= 0, 0.0, np.where(k > n, -np.inf, out)), dtype=np.float64)
    for i in np.flatnonzero(inside & (out < _LOG_UNDERFLOW)):
        out.flat[i] = _log_binomial_sf_far(int(k.flat[i]), int(n.flat[i]), chance)
    bounded_above: Floats = np.minimum(out, 0.0)
    return bounded_above


def _log_binomial_sf_far(k: int, n: int, chance: float) -> float:
    """The same where the probability itself underflows: the first term times a sum of falling ratios."""
    first = (
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(chance)
        + (n - k) * math.log1p(-chance)
    )
    # So far out k > n chance, so the ratio of neighbouring terms is below 1 and falls: terms below 1e-17 end the sum.
    total, term, j = 1.0, 1.0, k
    while j < n and term > 1e-17 * total:
        term *= (n - j) / (j + 1) * chance / (1.0 - chance)
        total += term
        j += 1
    return first + math.log(total)


def binomial_log_evalues(k: Counts, n: Counts, chance: float) -> Floats:
    """log of the mean over alternatives q of (q / c)^k ((1 - q) / (1 - c))^(n - k), c the null chance.

    Guarantee: mean exactly 1 under Binomial(n, c), since each coin's factor has mean q + (1 - q).

    Parameters
    ----------
    k, n
        int64, shape (documents,).
    chance
        c, in (0, 1).
    """
    up = np.log1p(_STRENGTHS * (1.0 - chance) / chance)  # q = c + strength (1 - c)
    down = np.log1p(-_STRENGTHS)
    exponents = np.asarray(k)[:, None] * up + np.asarray(n - k)[:, None] * down
    out: Floats = special.logsumexp(exponents, axis=1) - math.log(len(_STRENGTHS))
    return out


def sum_test(coins: Coins, chance: float, *, scheme: str, assumptions: tuple[str, ...]) -> TestResult:
    """The model-free test: exact Binomial upper tail of the number of coins that show the mark.

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text.

    Parameters
    ----------
    coins
        The document's coins; all m outcomes of each count.
    chance
        Of an outcome under the null, in (0, 1).
    scheme
        Begins the name of the test.
    assumptions
        What the guarantee rests on.
    """
    count, n = np.array([coins.outcomes.sum()]), np.array([coins.outcomes.size])
    return TestResult(
        test=f"{scheme}-sum",
        statistic=float(count[0]),
        log_pvalue=float(log_binomial_sf(count, n, chance)[0]),
        log_evalue=float(binomial_log_evalues(count, n, chance)[0]),
        n_tokens=coins.n_tokens,
        n_scored=len(coins.outcomes),
        n_repeats_dropped=coins.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=assumptions,
    )


def documents_sum_test(
    positions: Counts, outcomes: npt.NDArray[np.bool_], offsets: Counts, window: int, chance: float
) -> DocumentStatistics:
    """The sum test on many documents that lie end to end; row d equals `sum_test` on document d.

    Parameters
    ----------
    positions
        int64, shape (k,), ascending: of the counted coins.
    outcomes
        bool, shape (k, m).
    offsets
        int64, shape (documents + 1,).
    window
        How many tokens of a document stand before the first that has a coin.
    chance
        Of an outcome under the null.
    """
    bounds = np.searchsorted(positions, offsets)
    n_tokens, n_scored = np.diff(offsets), np.diff(bounds)
    sums = np.concatenate([[0], np.cumsum(outcomes.sum(axis=1))])
    counts = np.diff(sums[bounds])
    n = n_scored * outcomes.shape[1]
    return DocumentStatistics(
        statistic=counts.astype(np.float64),
        log_pvalue=log_binomial_sf(counts, n, chance),
        log_evalue=binomial_log_evalues(counts, n, chance),
        n_tokens=n_tokens,
        n_scored=n_scored,
        n_repeats_dropped=np.maximum(0, n_tokens - window) - n_scored,
    )


def log_odds_of(chances: Floats, chance: float) -> Floats:
    """How much likelier an outcome is under the mark, as the logarithm of an odds ratio, bounded to [-12, 12]."""
    with np.errstate(divide="ignore"):
        return bounded(special.logit(chances) - special.logit(chance))


def bounded(log_odds: Floats) -> Floats:
    """Log odds ratios as the tests use them: in [-12, 12], 0 for NaN."""
    return np.clip(
        np.nan_to_num(log_odds, nan=0.0, posinf=_MAX_LOG_ODDS, neginf=-_MAX_LOG_ODDS), -_MAX_LOG_ODDS, _MAX_LOG_ODDS
    )


def log_ratios(outcomes: npt.NDArray[np.bool_], log_odds: Floats, chance: float) -> Floats:
    """Log likelihood ratio of each outcome: q / c or (1 - q) / (1 - c), where logit q = logit c + log_odds.

    Guarantee: exp has mean exactly 1 under Bernoulli(c), for any log odds that do not depend on the outcome.
    """
    # (1 - q) / (1 - c) = 1 / (1 + c expm1(log_odds)); the other is exp(log_odds) times it.
    down = -np.log1p(chance * np.expm1(log_odds))
    out: Floats = down + np.where(outcomes, log_odds, 0.0)
    return out


def model_aware_test(
    coins: Coins, log_odds: Floats, chance: float, *, scheme: str, assumptions: tuple[str, ...]
) -> TestResult:
    """The likelihood-ratio test: sum of integer weights over the coins that show the mark, exact upper tail.

    Guarantee: P(pvalue <= a) <= a for ANY weights that do not depend on the tested coins: under the null these are
    still independent Bernoulli(c) given the weights. Most powerful, up to the rounding of the weights, for verbatim
    text of the model that they come from.

    Parameters
    ----------
    coins
        The document's coins.
    log_odds
        float64, shape of `coins.outcomes`: from `log_odds_of` or `bounded`.
    chance, scheme, assumptions
        As in `sum_test`.

    Returns
    -------
    TestResult; its e-value is the product of the likelihood ratios.
    """
    largest = float(np.max(np.abs(log_odds), initial=0.0))
    weights = np.zeros(log_odds.shape, dtype=np.int64)
    if largest > 0.0:
        weights = np.rint(log_odds * (_LEVELS / largest)).astype(np.int64)
    observed = int(weights[coins.outcomes].sum())
    return TestResult(
        test=f"{scheme}-model-aware",
        statistic=float(observed),
        log_pvalue=log_weighted_count_sf(weights.ravel(), chance, observed),
        log_evalue=float(np.sum(log_ratios(coins.outcomes, log_odds, chance))),
        n_tokens=coins.n_tokens,
        n_scored=len(coins.outcomes),
        n_repeats_dropped=coins.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=(*assumptions, ANY_MODEL),
    )


def robust_test(coins: Coins, *ratios: Floats, scheme: str, assumptions: tuple[str, ...]) -> TestResult:
    """The e-value for edited text: per token (1 - e) ratio + e, mixed over edit rates e; p-value 1 / e-value.

    Guarantee: mean at most 1 under the null where each ratio has mean at most 1 given those before it. An edited token
    costs at most log(1 / e).

    Parameters
    ----------
    coins
        The document's coins, for their numbers.
    ratios
        float64, shape (tokens,): log likelihood ratios, -inf allowed. Of several arrays the e-values are averaged.
    scheme, assumptions
        As in `sum_test`.
    """
    mixed = [
        np.sum(np.logaddexp(math.log1p(-e) + one, math.log(e))) - math.log(len(_EDIT_RATES) * len(ratios))
        for one in ratios
        for e in _EDIT_RATES
    ]
    log_evalue = float(special.logsumexp(mixed))
    return evalue_result(f"{scheme}-robust", log_evalue, coins, null=NULL, assumptions=(*assumptions, ANY_MODEL))


def token_log_tails(coins: Coins, chance: float) -> Floats:
    """log of the chance of at least as many outcomes as each token shows; float64, shape (n_tokens,), NaN elsewhere."""
    out = np.full(coins.n_tokens, np.nan)
    counts = coins.outcomes.sum(axis=1)
    out[coins.positions] = log_binomial_sf(counts, np.full(len(counts), coins.outcomes.shape[1]), chance)
    return out
