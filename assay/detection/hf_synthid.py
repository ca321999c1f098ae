"""Exact test of hf-synthid: the law of the number of ones over all keys, table and text being what they are.

With T' the public table in the order of states, F(k) = sum_i T'(s_i + k) is the count of a layer whose key is k: one
circular correlation. Under H0 the keys modulo N are independent and uniform, so the count is a sum of `depth` draws
from the N values of F. Nothing is assumed of the table, whose mean is not 1/2; no state counts twice.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from scipy import fft, special

from assay.detection import bits
from assay.detection.convolution import log_sum_sf
from assay.detection.documents import DocumentStatistics, by_document
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.profiles import hf_synthid
from assay.watermark.profiles.hf_synthid import HfSynthIdConfig, shifted_table

__all__ = [
    "ASSUMPTIONS",
    "NEEDS_MODEL",
    "NULL",
    "TESTS",
    "documents_test",
    "layer_law",
    "sum_test",
    "test_ids",
    "token_log_tails",
]

TESTS = ("sum",)
NEEDS_MODEL: frozenset[str] = frozenset()
NULL = bits.NULL
ASSUMPTIONS = (
    "The keys were secret, independent and uniform modulo the size of the sampling table.",
    "Each distinct state of the hash counts once, at its first place.",
)

# Rates of the exponential tilts of the e-value.
_TILTS = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5])


@functools.lru_cache(maxsize=2)
def _transform(size: int, seed: int) -> npt.NDArray[np.complex128]:
    transform: npt.NDArray[np.complex128] = fft.rfft(shifted_table(size, seed).astype(np.float64))
    return transform


def layer_law(
    states: npt.NDArray[np.int64], config: HfSynthIdConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The exact law, over a uniform key, of the number of ones that distinct states show in one layer.

    Parameters
    ----------
    states
        int64, shape (n,), distinct, in [0, N).
    config
        Names the table.

    Returns
    -------
    values
        int64, shape (k,), ascending.
    probabilities
        float64, shape (k,): multiples of 1 / N.

    Notes
    -----
    One pair of transforms of length N: 2 ms for N = 65,536. Counts are at most N <= 2**24, so rounding to the nearest
    integer undoes the transform's error exactly.
    """
    size = config.sampling_table_size
    chosen = np.zeros(size)
    chosen[states] = 1.0
    product = np.conj(fft.rfft(chosen)) * _transform(size, config.sampling_table_seed)
    counts = np.rint(fft.irfft(product, size)).astype(np.int64)
    frequencies = np.bincount(counts)
    values = np.flatnonzero(frequencies)
    return values, frequencies[values] / size


def _tails(states: npt.NDArray[np.int64], count: int, config: HfSynthIdConfig) -> tuple[float, float]:
    """log p-value and log e-value of one document."""
    if not len(states):
        return 0.0, 0.0
    values, probabilities = layer_law(states, config)
    log_pvalue = log_sum_sf([values], [probabilities], float(count), counts=[config.depth])
    log_means = special.logsumexp(np.outer(_TILTS, values), b=probabilities, axis=1)
    log_evalue = float(special.logsumexp(_TILTS * count - config.depth * log_means)) - math.log(len(_TILTS))
    return log_pvalue, log_evalue


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: HfSynthIdConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`."""
    positions, states, shown = hf_synthid.scan(ids, offsets, prf_key, config)
    ones = np.bitwise_count(shown).astype(np.int64)

    def row(a: int, b: int) -> tuple[float, float, float]:
        count = int(ones[a:b].sum())
        return float(count), *_tails(states[a:b], count, config)

    return by_document(positions, offsets, 0, row)


def sum_test(ids: Words, prf_key: Words, config: HfSynthIdConfig) -> TestResult:
    """The test of one text: generated tokens alone, uint32, shape (n,).

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key, if the keys were drawn uniformly
    modulo the size of the table; no assumption on the text or on the table.

    Parameters
    ----------
    ids
        uint32, shape (n,), n >= 0.
    prf_key
        uint32, shape (2 depth,): from `keys.use_key`.
    config
        The key's settings.

    Returns
    -------
    TestResult, by the exact law of the count over all keys.

    Notes
    -----
    Two Fourier transforms of the table's size and one tail, whatever the length of the text.

    References
    ----------
    Dathathri et al. (2024), Nature 634, 818-823, for the mark.
    """
    row = documents_test(ids, np.array([0, len(ids)], dtype=np.int64), prf_key, config)
    return TestResult(
        test="hf-synthid-sum",
        statistic=float(row.statistic[0]),
        log_pvalue=float(row.log_pvalue[0]),
        log_evalue=float(row.log_evalue[0]),
        n_tokens=len(ids),
        n_scored=int(row.n_scored[0]),
        n_repeats_dropped=int(row.n_repeats_dropped[0]),
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: HfSynthIdConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`; the prompt takes no part, and no test of this scheme uses a model."""
    return sum_test(ids[prompt_length:], prf_key, config)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: HfSynthIdConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`: of the ones that each token shows."""
    positions, _, shown = hf_synthid.scan(ids, np.array([0, len(ids)], dtype=np.int64), prf_key, config)
    out = np.full(len(ids), np.nan)
    ones = np.bitwise_count(shown).astype(np.int64)
    mean = float(np.mean(shifted_table(config.sampling_table_size, config.sampling_table_seed)))
    out[positions] = bits.log_binomial_sf(ones, np.full(len(ones), config.depth), mean)
    return out
