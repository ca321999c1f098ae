"""The least-favourable score: likelihood ratio by quadrature, exact law, size, and power at low entropy."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy import stats

from assay.detection.gumbel import sum_test
from assay.detection.pivot_score import least_favourable_law, least_favourable_scores, least_favourable_test
from assay.watermark.gumbel import Pivots, pivots, sum_scores
from assay.watermark.keys import SecretKey

MakeKey = Callable[..., SecretKey]


def seen(words: np.ndarray) -> Pivots:
    return Pivots(np.arange(len(words)), words.astype(np.uint32), len(words), 0)


def marked_words(law: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Words of n marked tokens of one law: U is Beta(1/p, 1) for the token drawn."""
    u = rng.random(n) ** law[rng.choice(len(law), size=n, p=law)]
    return np.minimum(np.floor((1 - u) * 2.0**32), 2.0**32 - 1).astype(np.uint32)


@pytest.mark.parametrize(
    ("delta", "expected"),
    [(0.1, [0.9, 0.1]), (0.5, [0.5, 0.5]), (0.6, [0.4, 0.4, 0.2]), (0.75, [0.25] * 4), (0.9, [0.1] * 10)],
)
def test_least_favourable_law(delta: float, expected: list[float]) -> None:
    np.testing.assert_allclose(least_favourable_law(delta), expected, atol=1e-12)


@pytest.mark.parametrize("delta", [0.001, 0.02, 0.1, 0.4, 0.6, 0.9])
def test_scores_are_cell_averages_of_the_density(delta: float) -> None:
    words = np.array([0, 1, 1000, 2**20, 2**31, 2**32 - 2**20, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    with mpmath.workdps(60):
        # The distribution function sum p u^(1/p) at both ends of each cell.
        def cdf(u: mpmath.mpf) -> mpmath.mpf:
            return sum(mpmath.mpf(p) * u ** (1 / mpmath.mpf(p)) for p in least_favourable_law(delta).tolist())

        for word, score in zip(words.tolist(), least_favourable_scores(words, delta), strict=True):
            high, low = 1 - mpmath.mpf(word) / 2**32, 1 - mpmath.mpf(word + 1) / 2**32
            exact = mpmath.log((cdf(high) - cdf(low)) * 2**32)
            assert float(score) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)
    # The middle of a cell agrees with the formula of the paper where the density is smooth.
    u = 1 - (2.0**31 + 0.5) / 2**32
    density = math.log(sum(u ** (1 / p - 1) for p in least_favourable_law(delta)))
    assert least_favourable_scores(np.array([2**31], dtype=np.uint32), delta)[0] == pytest.approx(density, abs=1e-6)


def test_one_token_has_its_exact_p_value() -> None:
    # One score: the p-value is the share of words whose rounded score is as large; small words come first.
    for word in (0, 5, 2**20, 2**31, 2**32 - 1):
        p = least_favourable_test(seen(np.array([word])), delta=0.3).pvalue
        assert p >= (word + 1) / 2**32 * (1 - 1e-12)
        # 1,024 levels: about their share of all words more at most, here.
        assert p <= (word + 1) / 2**32 + 8e-3


def test_size_over_keys(make_key: MakeKey, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    # 200 keys on a repetitive text; quantiles of the binomial at 1 - 1e-6: false alarm 1e-6 for each level.
    ids = np.tile(zipf_ids(60, 1), 5)
    found = [pivots(ids, make_key(number)) for number in range(200)]
    results = [least_favourable_test(one) for one in found]
    exact = np.array([result.pvalue for result in results])
    # The near-miss: the normal law with the mean and variance of 300 independent scores, repeats counted five times.
    scores = np.array([5 * least_favourable_scores(one.words, 0.1).sum() for one in found])
    sample = least_favourable_scores(np.arange(0, 2**32, 99991, dtype=np.int64).astype(np.uint32), 0.1)
    n = 5 * len(found[0].words)
    careless = stats.norm.sf((scores - n * sample.mean()) / (math.sqrt(n) * sample.std()))
    for level in (0.05, 0.01):
        limit = stats.binom.ppf(1 - 1e-6, 200, level)
        assert np.sum(exact <= level) <= limit
        assert np.sum(careless <= level) > limit
    assert np.sum(np.array([result.log_evalue for result in results]) >= math.log(20)) <= stats.binom.ppf(
        1 - 1e-6, 200, 1 / 20
    )
    assert stats.kstest(exact, "uniform").pvalue > 1e-6


def test_beats_the_sum_on_low_entropy_text() -> None:
    # Tokens of law (0.99, 0.01): 0.056 nats each. 12 texts of 6,000 tokens, both tests on each.
    rng = np.random.default_rng(5)
    law = np.array([0.99, 0.01])
    ours, plain, wrong = [], [], []
    for _ in range(12):
        found = seen(marked_words(law, 6000, rng))
        ours.append(least_favourable_test(found, delta=0.01).log10_pvalue)
        wrong.append(least_favourable_test(found, delta=0.03).log10_pvalue)
        plain.append(sum_test(found).log10_pvalue)
    gains = np.array(plain) - np.array(ours)
    # If the sum were as good, the mean gain would be below four standard errors but for 1e-3 (t with 11 degrees).
    assert gains.mean() > 4 * gains.std(ddof=1) / math.sqrt(12)
    assert np.median(ours) < 1.5 * np.median(plain)
    assert np.median(wrong) < np.median(plain)  # delta need not be known exactly
    # On uniform words neither finds anything.
    noise = seen(rng.integers(0, 2**32, 6000, dtype=np.uint32))
    assert least_favourable_test(noise, delta=0.01).pvalue > 1e-4


def test_edges() -> None:
    empty = least_favourable_test(seen(np.empty(0)))
    assert (empty.log_pvalue, empty.log_evalue, empty.n_scored) == (0.0, 0.0, 0)
    top = least_favourable_test(seen(np.zeros(100)))
    assert top.log10_pvalue < -250  # all words 0: the largest score of all
    words = np.sort(np.random.default_rng(1).integers(0, 2**32, 1000, dtype=np.uint32))
    assert np.all(np.diff(least_favourable_scores(words, 0.2)) <= 1e-12)
    assert np.all(np.diff(sum_scores(words)) <= 0)  # the same direction as the sum test
    for bad in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"delta must be in \[0.001, 0.999\], got"):
            least_favourable_test(seen(np.empty(0)), delta=bad)
