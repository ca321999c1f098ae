"""The tests of the dual-key Gumbel mark: exact tail against mpmath, size, power, and vLLM's approximation rejected."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy import stats

from assay.detection import dual_gumbel
from assay.detection.dual_gumbel import (
    documents_test,
    log_two_gamma_sf,
    model_aware_test,
    robust_test,
    sum_test,
    test_ids,
    token_log_tails,
)
from assay.detection.gumbel import sum_test as single_key_sum_test
from assay.detection.model_view import ModelView
from assay.watermark.dual_gumbel import DualGumbelConfig, DualPivots, draft_tokens, observe, round_keys, verify
from assay.watermark.gumbel import Pivots

CONFIG = DualGumbelConfig(window=4)


def words(number: int) -> np.ndarray:
    digest = hashlib.sha256(f"dual {number}".encode()).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


def oracle(n: int, weight: float, s: float) -> float:
    """The tail by integration over one of the two sums, in 60 digits."""
    with mpmath.workdps(60):
        a, b, s = 1 - mpmath.mpf(weight), mpmath.mpf(weight), mpmath.mpf(s)

        def upper(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.gammainc(n, x, mpmath.inf, regularized=True)

        def density(g: mpmath.mpf) -> mpmath.mpf:
            return g ** (n - 1) * mpmath.exp(-g) / mpmath.gamma(n) * upper((s - a * g) / b)

        return float(mpmath.log(upper(s / a) + mpmath.quad(density, mpmath.linspace(0, s / a, 20 + int(s / 3)))))


@pytest.mark.parametrize(
    ("n", "weight", "s"),
    [(1, 0.3, 2.0), (5, 0.3, 0.5), (5, 0.1, 30.0), (20, 0.3, 200.0), (3, 0.8, 50.0), (4, 0.5, 9.0), (2, 0.3, 500.0)],
)
def test_tail_against_mpmath(n: int, weight: float, s: float) -> None:
    # The last of them is below 1e-300; weight 0.5 is a Gamma law.
    assert log_two_gamma_sf(n, weight, s) == pytest.approx(oracle(n, weight, s), abs=1e-6)


def test_tail_of_long_texts_against_simulation_and_its_symmetry() -> None:
    rng = np.random.default_rng(0)
    draws = 0.7 * rng.gamma(2000, size=200_000) + 0.3 * rng.gamma(2000, size=200_000)
    for s in (1950.0, 2000.0, 2100.0):
        chance = math.exp(log_two_gamma_sf(2000, 0.3, s))
        assert abs(np.mean(draws >= s) - chance) < 5 * math.sqrt(chance * (1 - chance) / 200_000)
        assert log_two_gamma_sf(2000, 0.7, s) == pytest.approx(log_two_gamma_sf(2000, 0.3, s), rel=1e-9)


def test_tail_edges() -> None:
    assert log_two_gamma_sf(0, 0.3, 0.0) == 0.0
    assert log_two_gamma_sf(7, 0.3, 0.0) == 0.0
    assert log_two_gamma_sf(0, 0.3, 1.0) == -math.inf
    assert log_two_gamma_sf(7, 0.3, math.inf) == -math.inf
    for arguments in ((5, 0.0, 1.0), (5, 1.0, 1.0), (-1, 0.3, 1.0), (5, 0.3, -1.0), (5, 0.3, math.nan)):
        with pytest.raises(ValueError, match="must be"):
            log_two_gamma_sf(*arguments)


@pytest.mark.parametrize(("weight", "log10", "factor"), [(0.1, -12, 2.0), (0.2, -12, 3.0)])
def test_a_gamma_law_with_matched_moments_reports_too_small_p_values(weight: float, log10: int, factor: float) -> None:
    # Near-miss: what vLLM's detector does for n = 50. The exact tail at its reported 1e-12 is two to four times larger.
    n, variance = 50, (1 - weight) ** 2 + weight**2
    shape, scale = n / variance, variance
    s = stats.gamma.isf(10.0**log10, shape, scale=scale)
    exact = log_two_gamma_sf(n, weight, float(s))
    assert exact == pytest.approx(oracle(n, weight, float(s)), abs=1e-6)
    assert exact - log10 * math.log(10) > math.log(factor)


def speculated(n: int, acceptance: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A marked text over 200 tokens written with two drafts a round, and its tokens' target log-probabilities."""
    rng = np.random.default_rng(seed)
    keys = round_keys(words(1), words(2))
    history, log_p = rng.integers(0, 200, 4).astype(np.int64), [math.nan] * 4
    while len(history) < n:
        p = rng.dirichlet(np.full(200, 0.05), 3)
        q = acceptance * p + (1 - acceptance) * rng.dirichlet(np.full(200, 0.05), 3)
        log_draft, log_target = np.log(np.maximum(q[:2], 1e-300)), np.log(np.maximum(p, 1e-300))
        sofar = history
        for row in log_draft:
            sofar = np.append(sofar, draft_tokens(sofar[None], row[None], keys, CONFIG))
        emitted = verify(history, sofar[len(history) :], log_draft, log_target, keys, CONFIG)
        log_p += [float(log_target[i, token]) for i, token in enumerate(emitted)]
        history = np.append(history, emitted)
    return history[:n].astype(np.uint32), np.array(log_p[:n])


@pytest.mark.parametrize("acceptance", [0.9, 0.5])
def test_marked_text_is_found_and_other_keys_see_nothing(acceptance: float) -> None:
    ids, log_p = speculated(150, acceptance, seed=3)
    found, missed = observe(ids, words(1), CONFIG), observe(ids, words(3), CONFIG)
    for test, bound in ((sum_test, 1e-20), (model_aware_test, 1e-12), (robust_test, 1e-20)):
        arguments = () if test is sum_test else (log_p[found.positions],)
        assert test(found, *arguments).pvalue < bound
        assert test(missed, *arguments).pvalue > 1e-3
    # Either key alone sees less than both.
    for one in (found.draft_words, found.target_words):
        alone = single_key_sum_test(Pivots(found.positions, one, found.n_tokens, 0))
        if acceptance == 0.5:
            assert alone.log_pvalue > robust_test(found, log_p[found.positions]).log_pvalue


def test_size_under_the_null(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    # 1,200 keys on one repetitive text. Bounds are the 1 - 1e-6 quantiles of the binomial: false alarm 1e-6 each.
    ids = np.tile(zipf_ids(60, 1), 4)
    guess = np.log(np.random.default_rng(2).uniform(0.01, 1, len(ids)))
    p, e = np.empty((3, 300)), np.empty((3, 300))
    for number in range(300):
        found = observe(ids, words(100 + number), CONFIG)
        aware = guess[found.positions]
        for row, result in enumerate((sum_test(found), model_aware_test(found, aware), robust_test(found, aware))):
            p[row, number], e[row, number] = result.pvalue, result.evalue
    for level in (0.05, 0.01):
        assert np.all(np.sum(p <= level, axis=1) <= stats.binom.ppf(1 - 1e-6, 300, level))
    assert np.all(np.sum(e >= 20, axis=1) <= stats.binom.ppf(1 - 1e-6, 300, 1 / 20))
    # The first two are uniform, not only conservative: KS at level 1e-6.
    assert stats.kstest(p[0], "uniform").pvalue > 1e-6
    assert stats.kstest(p[1], "uniform").pvalue > 1e-6


def test_taking_the_better_key_without_paying_is_rejected(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    # Near-miss: per token the larger of the two scores, tested as if it were one Exp(1).
    ids, rejections = zipf_ids(60, 1), 0
    for number in range(150):
        found = observe(ids, words(100 + number), CONFIG)
        best = np.minimum(found.draft_words, found.target_words)
        rejections += single_key_sum_test(Pivots(found.positions, best, 60, 0)).pvalue <= 0.01
    assert rejections > stats.binom.ppf(1 - 1e-6, 150, 0.01)


def test_e_values_have_mean_one() -> None:
    # One token: the mean over both words by the midpoint rule, and for the unbounded e-value of the sum over both
    # scores by Gauss-Laguerre quadrature, exact to five digits for exp(0.9 y).
    grid = (np.arange(24) + 0.5) / 24 * 2.0**32
    log_p, total = np.array([math.log(0.7)]), np.zeros(2)
    for a, b in itertools.product(grid.astype(np.uint32), repeat=2):
        pivots = DualPivots(np.array([0]), np.array([a]), np.array([b]), 1, 0)
        total += model_aware_test(pivots, log_p).evalue, robust_test(pivots, log_p).evalue
    np.testing.assert_allclose(total / 576, 1.0, atol=3e-3)
    nodes, masses = np.polynomial.laguerre.laggauss(60)
    sums = [[math.exp(dual_gumbel._sum_row(1, a, b, dual_gumbel.TARGET_WEIGHT)[2]) for a in nodes] for b in nodes]
    assert masses @ np.array(sums) @ masses == pytest.approx(1.0, abs=1e-3)


def test_batch_equals_single_bit_for_bit(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    lengths = [0, 1, 4, 5, 17, 400, 3]
    documents = [zipf_ids(n, n) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    batch = documents_test(np.concatenate(documents), offsets, words(1), CONFIG)
    for i, document in enumerate(documents):
        single = test_ids(document, 0, words(1), CONFIG, test="auto", model=None)
        for name in ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped"):
            assert getattr(batch, name)[i] == getattr(single, name), name


def test_the_tests_by_name_and_the_best_of_three() -> None:
    ids, log_p = speculated(80, 0.8, seed=5)
    view = ModelView(lambda: log_p[4:], lambda: iter(()))
    by_name = {
        name: test_ids(ids, 4, words(1), CONFIG, test=name, model=view)
        for name in ("sum", "model-aware", "robust", "auto")
    }
    assert [by_name[name].test for name in by_name] == [
        "dual-gumbel-sum",
        "dual-gumbel-model-aware",
        "dual-gumbel-robust",
        "dual-gumbel-best-of-three",
    ]
    smallest = min(by_name[name].log_pvalue for name in ("sum", "model-aware", "robust"))
    assert by_name["auto"].log_pvalue == pytest.approx(smallest + math.log(3))
    assert all(result.n_scored == 76 for result in by_name.values())
    nothing = test_ids(ids[:3], 0, words(1), CONFIG, test="auto", model=view)
    assert nothing.pvalue == nothing.evalue == 1.0


def test_token_tails_are_uniform_under_the_null(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    ids = np.arange(3000, dtype=np.uint32)
    tails = token_log_tails(ids, words(9), CONFIG)
    assert np.isnan(tails[:4]).all()
    assert stats.kstest(np.exp(tails[4:]), "uniform").pvalue > 1e-6


def exponent(marked: np.ndarray, null: np.ndarray) -> float:
    """Chernoff's exponent per token: how fast the p-value of a sum of scores falls."""
    best, peak = 0.0, null.max()
    for r in np.exp(np.linspace(-4, 0.6, 40)):
        best = max(best, r * marked.mean() - math.log(np.mean(np.exp(r * (null - peak)))) - r * peak)
    return best


@pytest.mark.parametrize("acceptance", [0.95, 0.8, 0.5])
def test_the_weight_of_the_target_key_suits_most_acceptance_rates(acceptance: float) -> None:
    # Tokens of law 1/2, 1/4, ...; a marked token's score under its own key is -log(1 - exp(-p T)), T ~ Exp(1).
    rng, n = np.random.default_rng(0), 100_000
    p = 0.5 ** rng.geometric(0.5, n)
    own = -np.log(-np.expm1(-p * rng.exponential(size=n)))
    other, first, second = rng.exponential(size=(3, n))
    stands = rng.random(n) < acceptance
    draft, target = np.where(stands, own, other), np.where(stands, other, own)
    exponents = {
        weight: exponent((1 - weight) * draft + weight * target, (1 - weight) * first + weight * second)
        for weight in (0.05, 0.1, 0.2, dual_gumbel.TARGET_WEIGHT, 0.4, 0.5)
    }
    assert exponents[dual_gumbel.TARGET_WEIGHT] > 0.8 * max(exponents.values())
    # The weights differ where most tokens, or half of them, are the draft's.
    assert acceptance == 0.8 or min(exponents.values()) < 0.8 * max(exponents.values())
