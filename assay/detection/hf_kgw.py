"""Exact test of the hf-kgw green list: Binomial tail of the green count over distinct coins (seed, target).

Under H0 the count is a sum of independent hypergeometric variables, one per list, with mean n floor(V ratio) / V. Such
a variable is a sum of independent Bernoulli variables (Vatutin and Mikhailov 1982), so from one above its mean on the
Binomial tail is an upper bound (Hoeffding 1956, Ann. Math. Statist. 27, Thm 5); with one coin per list it is exact.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from assay.detection import bits
from assay.detection.documents import DocumentStatistics
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.watermark.gumbel import after_prompt
from assay.watermark.profiles import hf_kgw
from assay.watermark.profiles.hf_kgw import HfKgwConfig

__all__ = ["ASSUMPTIONS", "NEEDS_MODEL", "NULL", "TESTS", "documents_test", "sum_test", "test_ids", "token_log_tails"]

TESTS = ("sum",)
NEEDS_MODEL: frozenset[str] = frozenset()
NULL = bits.NULL
ASSUMPTIONS = (
    "The hashing key was secret: whoever wrote an unmarked text could not compute its lists.",
    "Green lists of different seeds are independent uniform subsets of the vocabulary (MT19937, the CPU generator).",
    "Each distinct (seed, target) counts once, at its first place; tokens whose seed no key changes do not count.",
)


def sum_log_pvalues(
    green: npt.NDArray[np.int64], n: npt.NDArray[np.int64], chance: float, one_per_list: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """log of an upper bound on P(count >= green), elementwise; exact where each list has one coin.

    Parameters
    ----------
    green, n
        int64, shape (documents,): green coins and coins.
    chance
        floor(V ratio) / V.
    one_per_list
        bool, shape (documents,): whether no list has two coins. Elsewhere the bound is 1 below the mean plus one.
    """
    out = bits.log_binomial_sf(green, n, chance)
    return np.where(one_per_list | (green >= n * chance + 1.0), out, 0.0)


def documents_test(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: HfKgwConfig
) -> DocumentStatistics:
    """See `testers.Tester.documents_test`."""
    positions, green, seeds = hf_kgw.scan(ids, offsets, prf_key, config)
    return _statistics(positions, green, seeds, offsets, config)


def _statistics(
    positions: npt.NDArray[np.int64],
    green: npt.NDArray[np.bool_],
    seeds: Words,
    offsets: npt.NDArray[np.int64],
    config: HfKgwConfig,
) -> DocumentStatistics:
    bounds = np.searchsorted(positions, offsets)
    n_tokens, n_scored = np.diff(offsets), np.diff(bounds)
    counts = np.diff(np.concatenate([[0], np.cumsum(green)])[bounds])
    chance = config.list_size / config.vocab_size
    single = np.array([len(np.unique(seeds[a:b])) == b - a for a, b in pairwise(bounds)], dtype=np.bool_)
    return DocumentStatistics(
        statistic=counts.astype(np.float64),
        log_pvalue=sum_log_pvalues(counts, n_scored, chance, single),
        # Coins of one list are negatively associated, and each factor of the e-value increases with its coin: the mean
        # of the product is at most the product of the means, which is 1 (Joag-Dev and Proschan 1983).
        log_evalue=bits.binomial_log_evalues(counts, n_scored, chance),
        n_tokens=n_tokens,
        n_scored=n_scored,
        n_repeats_dropped=np.maximum(0, n_tokens - config.reach) - n_scored,
    )


def sum_test(ids: Words, prompt_length: int, prf_key: Words, config: HfKgwConfig) -> TestResult:
    """The test of one text whose first `prompt_length` ids give context only.

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text.

    Parameters
    ----------
    ids
        uint32, shape (n,): prompt and text, without a begin-of-sequence token.
    prompt_length
        In 0 .. n.
    prf_key
        uint32, shape (2,): from `keys.use_key`.
    config
        The key's settings.

    Returns
    -------
    TestResult. Its p-value is that of a Binomial, which bounds the tail of the count whatever lists coins share.

    References
    ----------
    Hoeffding (1956), Theorem 5, for the bound; Kirchenbauer et al. (2023), arXiv:2301.10226, for the mark.
    """
    whole = np.array([0, len(ids)], dtype=np.int64)
    positions, green, seeds = hf_kgw.scan(ids, whole, prf_key, config, prompt_length=prompt_length)
    row = _statistics(positions, green, seeds, whole, config)
    _, n_text, n_dropped = after_prompt(positions, len(ids), prompt_length, config.reach)
    return TestResult(
        test="hf-kgw-sum",
        statistic=float(row.statistic[0]),
        log_pvalue=float(row.log_pvalue[0]),
        log_evalue=float(row.log_evalue[0]),
        n_tokens=n_text,
        n_scored=len(positions),
        n_repeats_dropped=n_dropped,
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def test_ids(
    ids: Words, prompt_length: int, prf_key: Words, config: HfKgwConfig, *, test: str, model: ModelView | None
) -> TestResult:
    """See `testers.Tester.test_ids`; no test of this scheme uses a model."""
    return sum_test(ids, prompt_length, prf_key, config)


test_ids.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions named test_*


def token_log_tails(ids: Words, prf_key: Words, config: HfKgwConfig) -> npt.NDArray[np.float64]:
    """See `testers.Tester.token_log_tails`."""
    return bits.token_log_tails(hf_kgw.observe(ids, prf_key, config), config.list_size / config.vocab_size)
