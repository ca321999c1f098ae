"""The tilt e-process: mean 1 and Ville's bound by enumeration, the price of noise, and near-misses that fail."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from laws import all_texts, law_after, statistics_of
from scipy import special

from assay.detection.zero_shot import tilt_test
from assay.detection.zero_shot.tilt import finer_steps, tilt_steps
from assay.kernels.scoring.statistics import DEFAULT_TILTS


@pytest.mark.parametrize("finer", [False, True])
def test_mean_one_and_ville_by_complete_enumeration(finer):
    # Without a pair -s, s the grid gets no finer tilts, and the mean is exactly 1; with them it stays just below.
    tilts = DEFAULT_TILTS if finer else (-1.0, -0.5, 0.25)
    found = [(tilt_test(statistics_of(laws, np.array(tokens), tilts)), p) for tokens, laws, p in all_texts(6, 3, 1)]
    mean = sum(p * result.evalue for result, p in found)
    assert 0.9999 < mean < 1 if finer else mean == pytest.approx(1, abs=1e-12)
    order = sorted(found, key=lambda one: one[0].log_pvalue)
    assert np.all(np.cumsum([p for _, p in order]) <= np.array([r.pvalue for r, _ in order]) + 1e-12)
    # The near-miss: the largest value on the way is not an e-value, though 1 over it is a p-value.
    assert sum(p * math.exp(result.statistic) for result, p in found) > 1.02


@pytest.mark.parametrize("tilt", [-3.0, -0.5, 0.25, 0.9])
def test_each_factor_is_a_temperature_ratio(tilt):
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.ones(6), size=4)
    tokens = rng.integers(0, 6, 4)
    hotter = law ** (1 - tilt)
    hotter /= hotter.sum(axis=1, keepdims=True)
    ratio = np.log(hotter[np.arange(4), tokens] / law[np.arange(4), tokens])
    np.testing.assert_allclose(tilt_steps(statistics_of(law, tokens, (tilt,)))[:, 0], ratio, rtol=1e-9, atol=1e-12)


def test_the_wrong_normaliser_is_no_e_value():
    # The trap: texts drawn at temperature 0.7, sums taken at temperature 1.
    mean = {1.0: 0.0, 0.7: 0.0}
    for tokens in itertools.product(range(4), repeat=5):
        laws = np.array([law_after(tokens[:i], 3, 4) for i in range(5)])
        cooled = laws ** (1 / 0.7)
        cooled /= cooled.sum(axis=1, keepdims=True)
        p = float(np.prod(cooled[np.arange(5), tokens]))
        for temperature, assumed in ((1.0, laws), (0.7, cooled)):
            one = statistics_of(assumed, np.array(tokens), (-1.0, -0.5))
            mean[temperature] += p * tilt_test(one).evalue
    assert mean[0.7] == pytest.approx(1, abs=1e-9)
    assert mean[1.0] > 1.1


@pytest.mark.parametrize("stray", [0.0, 0.003, 0.01])
def test_support_noise_keeps_the_mean_below_one(stray):
    # A generator that leaves the support with probability up to the declared 0.01, wherever it then goes.
    total = 0.0
    for tokens in itertools.product(range(4), repeat=4):
        laws = np.array([[*law_after(tokens[:i], 4, 2), 0.0, 0.0] for i in range(4)])
        real = (1 - stray) * laws + stray * np.array([0, 0, 0.7, 0.3])
        result = tilt_test(statistics_of(laws, np.array(tokens), (-0.5, 0.25)), support_noise=0.01)
        total += float(np.prod(real[np.arange(4), tokens])) * result.evalue
    assert total <= 1 + 1e-12
    # The price is fair, not generous: at the declared rate the mean is exactly 1.
    assert stray < 0.01 or total == pytest.approx(1, abs=1e-12)


def test_more_noise_than_declared_is_noticed():
    total = 0.0
    for tokens in itertools.product(range(3), repeat=4):
        laws = np.array([[*law_after(tokens[:i], 4, 2), 0.0] for i in range(4)])
        real = 0.95 * laws + 0.05 * np.array([0, 0, 1.0])
        result = tilt_test(statistics_of(laws, np.array(tokens)), support_noise=0.01)
        total += float(np.prod(real[np.arange(4), tokens])) * result.evalue
    assert total > 1.1


def test_a_forbidden_token_refutes_outright_and_the_result_says_so():
    laws = np.array([[0.6, 0.4, 0.0]] * 5)
    result = tilt_test(statistics_of(laws, np.array([0, 2, 1, 2, 0])))
    assert result.log_pvalue == -math.inf
    assert result.pvalue == 0.0
    assert result.log_evalue == math.inf
    assert any("2 tokens have probability 0" in sentence for sentence in result.assumptions)
    tolerated = tilt_test(statistics_of(laws, np.array([0, 2, 1, 2, 0])), support_noise=1e-4)
    assert -2 * math.log(101) - 1 < tolerated.log_pvalue < -2 * math.log(99) + 1
    assert any("2 were found" in sentence for sentence in tolerated.assumptions)


@pytest.mark.parametrize("seed", range(6))
def test_finer_tilts_are_tight_supermartingales(seed):
    rng = np.random.default_rng(seed)
    finer = np.array([3, -3, 2, -2, 1, -1]) / 32
    for size, concentration in ((2, 0.1), (30, 0.05), (500, 0.2)):
        p = rng.dirichlet(np.full(size, concentration)) + 1e-15
        p /= p.sum()
        every = statistics_of(np.tile(p, (size, 1)), np.arange(size))
        deviation, v = -np.log(p) - every.entropy, every.varentropy[0]
        means = p @ np.exp(finer_steps(every, deviation))
        assert np.all(means <= 1 + 1e-12)
        # Tight for all but nearly certain laws: at most a tenth of the exponent s**2 V / 2 is given away.
        assert v < 0.1 or np.all(1 - means <= 0.1 * finer**2 * v / 2)
        # The near-miss: without the term of fourth order it is no supermartingale, for any law.
        short = 1 + finer**2 * v / 2 + finer**3 * every.third_moment[0] / 6
        assert np.all(p @ np.exp(np.outer(deviation, finer)) > short)


def test_against_a_plain_loop():
    rng = np.random.default_rng(2)
    laws = rng.dirichlet(np.full(8, 0.4), size=30)
    tokens = rng.integers(0, 8, 30)
    one = statistics_of(laws, tokens, (-0.5, 0.3))
    best, value = 0.0, [0.0, 0.0]
    for t in range(30):
        for i, s in enumerate((-0.5, 0.3)):
            value[i] += math.log(laws[t, tokens[t]] ** -s / np.sum(laws[t] ** (1 - s)))
        best = max(best, float(special.logsumexp(value)) - math.log(2))
    result = tilt_test(one)
    assert result.log_evalue == pytest.approx(float(special.logsumexp(value)) - math.log(2), rel=1e-9)
    assert result.statistic == pytest.approx(best, rel=1e-9)


def test_tokens_that_were_not_scored_do_not_count():
    rng = np.random.default_rng(3)
    laws, tokens = rng.dirichlet(np.ones(5), size=9), rng.integers(0, 5, 9)
    whole = statistics_of(laws, tokens)
    whole.scored[0] = False
    whole.log_prob[0] = -np.inf  # a burn-in: whatever stands there
    whole.tilted_log_sums[0] = np.nan
    result, rest = tilt_test(whole), tilt_test(statistics_of(laws[1:], tokens[1:]))
    assert (result.n_tokens, result.n_scored) == (9, 8)
    assert result.log_pvalue == rest.log_pvalue
    assert result.log_evalue == rest.log_evalue
    assert result.assumptions == rest.assumptions


def test_nothing_says_nothing():
    result = tilt_test(statistics_of(np.zeros((0, 3)), np.array([], dtype=int)))
    assert (result.pvalue, result.evalue, result.n_scored) == (1.0, 1.0, 0)


def test_bad_settings():
    one = statistics_of(np.array([[0.5, 0.5]]), np.array([0]))
    for noise in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"support_noise must be in \[0, 1\)"):
            tilt_test(one, support_noise=noise)
    with pytest.raises(ValueError, match="at least one tilt"):
        tilt_test(statistics_of(np.array([[0.5, 0.5]]), np.array([0]), ()))
