"""Exact tests of the inverse-transform watermark, without a model and with one.

Sum test: log density of Plackett's copula at (U, W), in whole units on a grid of cells, so that its sum has an exact
null law on integers. Model-aware tests: is U in the token's interval, widened by a stated tolerance? Under H0 that is
Bernoulli(length), independent over contexts, for ANY model. Reference: Kuditipudi et al. (2023), arXiv:2307.15593;
Plackett (1965), JASA 60 (the copula); Vovk and Wang (2021), arXiv:1912.06116 (e-values).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection import combine
from assay.detection.convolution import log_sum_sf, log_weighted_count_sf
from assay.detection.documents import DocumentStatistics, by_document
from assay.detection.gumbel import MODEL_ASSUMPTIONS, NULL
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult, evalue_result
from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.watermark.inverse_transform import InversePivots, InverseTransformConfig, observe, scan

__all__ = [
    "ASSUMPTIONS",
    "NEEDS_MODEL",
    "NULL",
    "TESTS",
    "TOLERANCE",
    "documents_test",
    "interval_test",
    "intervals",
    "robust_test",
    "sum_test",
    "test_ids",
    "token_log_tails",
]

TESTS = ("sum", "model-aware", "robust")
NEEDS_MODEL = frozenset(("model-aware", "robust"))
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its PRF.",
    "Each distinct context counts once, at its first place.",
)

TOLERANCE = 1e-4
"""How far an end of a token's interval may have moved between generation and detection, by rounding in the model."""

_ODDS = 6.0  # of Plackett's copula in the sum test: near the best for texts of 0.3 to 2 nats a token
_E_ODDS = np.array([1.5, 3.0, 6.0, 12.0, 40.0])
_CELL_BITS = 8
_UNIT = 2.0 * math.log(_ODDS) / 256.0  # nats: the density lies between 1/6 and 6
_MISS_RATE = 0.01  # of the likelihood ratio behind the exact model-aware test
_MISS_UNIT = 1.0 / 16.0
_WORDS = 1 << 22  # of permutations held at a time
_EDIT_RATES = np.array([0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def _density(odds: float) -> npt.NDArray[np.float64]:
    """Plackett's copula density at the middle of each cell of (U, W); mean 1 over the cells."""
    u, w = np.meshgrid(*[(np.arange(1 << _CELL_BITS) + 0.5) / (1 << _CELL_BITS)] * 2, indexing="ij")
    total, gain = u + w, odds - 1.0
    density = (
        odds * (1.0 + gain * (total - 2.0 * u * w)) / ((1.0 + gain * total) ** 2 - 4.0 * odds * gain * u * w) ** 1.5
    )
    scaled: npt.NDArray[np.float64] = density / density.mean()
    return scaled


@cache
def _score_table() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Scores of the cells, which are equally likely, in whole units; the values they take, and how likely each is."""
    table = np.rint(np.log(_density(_ODDS)) / _UNIT).astype(np.int64)
    values, counts = np.unique(table, return_counts=True)
    return table, values.astype(np.float64), counts / table.size


@cache
def _log_densities() -> npt.NDArray[np.float64]:
    """Log densities of all cells, shape (odds, cells, cells), for the e-value."""
    return np.log([_density(odds) for odds in _E_ODDS])


def sum_test(pivots: InversePivots) -> TestResult:
    """The model-free test: exact tail of the sum of Plackett scores of (U, W).

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text. The
    e-value is the mean over odds of products of densities, each of which has mean 1 under the null.

    Parameters
    ----------
    pivots
        From `observe`.

    Returns
    -------
    TestResult, by the exact law of the sum on integers; with no pivot its p-value and e-value are 1.

    References
    ----------
    Plackett (1965), *A class of bivariate distributions*, JASA 60, for the density of (U, W).
    """
    n = len(pivots.positions)
    score, log_evalue = _scores(pivots.uniforms, pivots.places)
    return TestResult(
        test="inverse-transform-sum",
        statistic=score * _UNIT,
        log_pvalue=_log_tail(score, n),
        log_evalue=log_evalue,
        n_tokens=pivots.n_tokens,
        n_scored=n,
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def _scores(uniforms: Words, places: Words) -> tuple[int, float]:
    """Sum of scores in units, and the log e-value."""
    shift = np.uint32(32 - _CELL_BITS)
    score = int(_score_table()[0][uniforms >> shift, places >> shift].sum())
    log_evalues = density_log_ratios(uniforms, places).sum(axis=0)
    return score, float(special.logsumexp(log_evalues)) - math.log(len(_E_ODDS))


def density_log_ratios(uniforms: Words, places: Words) -> npt.NDArray[np.float64]:
    """log of the copula density of each token, shape (k, odds): the factors of the e-value, of mean 1 under H0."""
    shift = np.uint32(32 - _CELL_BITS)
    ratios: npt.NDArray[np.float64] = _log_densities()[:, uniforms >> shift, places >> shift].T
    return ratios


def _log_tail(score: int, n: int) -> float:
    _, values, probabilities = _score_table()
    return log_sum_sf(values[None], probabilities[None], score, counts=[n]) if n else 0.0


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: InverseTransformConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`: row d equals `sum_test` on document d."""
    positions, uniforms, places = scan(ids, offsets, prf_key, config)

    def row(a: int, b: int) -> tuple[float, float, float]:
        score, log_evalue = _scores(uniforms[a:b], places[a:b])
        return score * _UNIT, _log_tail(score, b - a), log_evalue

    return by_document(positions, offsets, config.window, row)


def intervals(
    ids: Words,
    prompt_length: int,
    prf_key: Words,
    config: InverseTransformConfig,
    pivots: InversePivots,
    model: ModelView,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Whether U lies in each counted token's widened interval, and the interval's length.

    Under the null the answers are independent Bernoulli(length): the permutation fixes the interval, and U, another
    word of the PRF, is independent of it.

    Parameters
    ----------
    ids, prompt_length, prf_key, config
        As `testers.Tester.test_ids`.
    pivots
        From `inverse_transform.observe` on these.
    model
        Its `rows()` are read once.

    Returns
    -------
    hits
        bool, shape (k,). True where the model had no law for the token.
    lengths
        float64, shape (k,), in (0, 1]: multiples of 2^-32. 1 where the model had no law for the token.
    """
    hits, lengths = np.ones(len(pivots.positions), dtype=np.bool_), np.ones(len(pivots.positions))
    for first, laws in model.rows():
        step = max(1, _WORDS // laws.shape[1])
        begin, end = np.searchsorted(pivots.positions, [first, first + len(laws)])
        for start in range(begin, end, step):
            piece = range(start, min(end, start + step))
            places = prompt_length + pivots.positions[piece.start : piece.stop]
            contexts = ids[places[:, None] - np.arange(config.window, 0, -1)]
            noise = prf.expand(prf_key, contexts, laws.shape[1], backend="numba")  # numpy takes them row by row
            for i, words, token in zip(piece, noise, ids[places].tolist(), strict=True):
                if token >= len(words):
                    continue  # the model has no such token, so it has nothing to say
                law = np.exp(laws[pivots.positions[i] - first].astype(np.float64))
                before = words < words[token]
                before[:token] |= words[:token] == words[token]
                low = float(law[before].sum()) / float(law.sum())
                high = low + float(law[token]) / float(law.sum())
                bottom = max(0, math.floor((low - TOLERANCE) * 2.0**32))
                top = min(2**32, math.ceil((high + TOLERANCE) * 2.0**32))
                hits[i] = bottom <= int(pivots.uniforms[i]) < top
                lengths[i] = (top - bottom) * 2.0**-32
    return hits, lengths


def interval_test(pivots: InversePivots, hits: npt.NDArray[np.bool_], lengths: npt.NDArray[np.float64]) -> TestResult:
    """The likelihood-ratio test with the model: exact tail of the sum of log(1 + (1 - e) / (e length)) over hits.

    Guarantee: P(pvalue <= a) <= a for ANY model whose laws were computed from the text alone. e = 0.01 is the share of
    tokens allowed to miss. The weights are rounded to whole sixteenths of a nat before they are summed, so the null
    law is exact on integers.

    Parameters
    ----------
    pivots
        The document's pivots.
    hits, lengths
        From `intervals`.
    """
    weights = np.rint(np.log1p((1.0 - _MISS_RATE) / (_MISS_RATE * lengths)) / _MISS_UNIT)
    statistic = float(weights[hits].sum())
    return TestResult(
        test="inverse-transform-model-aware",
        statistic=statistic * _MISS_UNIT,
        log_pvalue=log_weighted_count_sf(weights, lengths, statistic) if len(weights) else 0.0,
        log_evalue=_product(hits, lengths, _MISS_RATE),
        n_tokens=pivots.n_tokens,
        n_scored=len(pivots.positions),
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=(*ASSUMPTIONS, *MODEL_ASSUMPTIONS[-1:]),
    )


def robust_test(pivots: InversePivots, hits: npt.NDArray[np.bool_], lengths: npt.NDArray[np.float64]) -> TestResult:
    """The e-value for edited text: per token (1 - e) hit / length + e, mixed over edit rates e; the p-value is 1 / e.

    Guarantee: the e-value has mean exactly 1 under the null for ANY model whose laws were computed from the text alone.

    Parameters
    ----------
    pivots, hits, lengths
        As in `interval_test`.
    """
    logs = [_product(hits, lengths, e) for e in _EDIT_RATES]
    log_evalue = float(special.logsumexp(logs)) - math.log(len(logs))
    assumptions = (*ASSUMPTIONS, *MODEL_ASSUMPTIONS[-1:])
    return evalue_result("inverse-transform-robust", log_evalue, pivots, null=NULL, assumptions=assumptions)


def _product(hits: npt.NDArray[np.bool_], lengths: npt.NDArray[np.float64], e: float) -> float:
    """log prod of (1 - e) hit / length + e."""
    return float(np.sum(np.log((1.0 - e) * hits / lengths + e)))


def test_ids(
    ids: Words,
    prompt_length: int,
    prf_key: Words,
    config: InverseTransformConfig,
    *,
    test: str,
    model: ModelView | None,
) -> TestResult:
    """See `testers.Tester.test_ids`."""
    found = observe(ids, prf_key, config, prompt_length=prompt_length)
    if model is None or test == "sum" or (test == "auto" and len(found.positions) == 0):
        return sum_test(found)
    hits, lengths = intervals(ids, prompt_length, prf_key, config, found, model)
    if test == "model-aware":
        return interval_test(found, hits, lengths)
    if test == "robust":
        return robust_test(found, hits, lengths)
    parts = (sum_test(found), interval_test(found, hits, lengths), robust_test(found, hits, lengths))
    return combine.best_of(parts, test="inverse-transform-best-of-three")


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: InverseTransformConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`: of the token's score in the sum test."""
    found = observe(ids, prf_key, config)
    table, values, probabilities = _score_table()
    log_tail = np.log(np.cumsum(probabilities[::-1])[::-1])
    shift = np.uint32(32 - _CELL_BITS)
    tails = np.full(len(ids), np.nan)
    scores = table[found.uniforms >> shift, found.places >> shift]
    tails[found.positions] = np.minimum(0.0, log_tail[np.searchsorted(values, scores)])
    return tails
