"""Likelihood-ratio e-values by complete enumeration; the certified maximum against scipy; near-misses that fail."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import law_after
from scipy import optimize

from assay.detection.zero_shot import likelihood_ratio_test, mixture_test
from assay.detection.zero_shot.likelihood import mixture_log_supremum

LENGTH, SIZE = 5, 3
TEXTS = list(itertools.product(range(SIZE), repeat=LENGTH))


def log_probabilities(tokens: tuple[int, ...], seed: int) -> np.ndarray:
    return np.log([law_after(tokens[:i], seed, SIZE)[token] for i, token in enumerate(tokens)])


@pytest.mark.parametrize("author", [1, 2])
def test_composite_null_by_complete_enumeration(author):
    found = []
    for tokens in TEXTS:
        p = np.array([log_probabilities(tokens, seed) for seed in (1, 2)])
        q = np.array([log_probabilities(tokens, seed) for seed in (3, 4)])
        probability = float(np.exp(np.sum(log_probabilities(tokens, author))))
        found.append((likelihood_ratio_test(p, q), probability))
    assert sum(p * result.evalue for result, p in found) <= 1
    order = sorted(found, key=lambda one: one[0].log_pvalue)
    assert np.all(np.cumsum([p for _, p in order]) <= np.array([r.pvalue for r, _ in order]) + 1e-12)


def test_simple_null_has_mean_exactly_one():
    total = 0.0
    for tokens in TEXTS:
        p, q = log_probabilities(tokens, 1), log_probabilities(tokens, 3)
        result = likelihood_ratio_test(p[None], q[None])
        assert result.log_evalue == pytest.approx(np.sum(q - p), abs=1e-9)
        total += float(np.exp(np.sum(p))) * result.evalue
    assert total == pytest.approx(1, abs=1e-12)


def test_dividing_by_the_mean_likelihood_is_no_e_value():
    # The near-miss: a Bayes factor averages the null set; its mean under a member exceeds 1.
    totals = []
    for author in (1, 2):
        total = 0.0
        for tokens in TEXTS:
            p1, p2, q = (float(np.exp(np.sum(log_probabilities(tokens, seed)))) for seed in (1, 2, 3))
            total += (p1, p2)[author - 1] * q / ((p1 + p2) / 2)
        totals.append(total)
    assert max(totals) > 1.01


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_token_mixtures_by_complete_enumeration(weight):
    mean = wrong = 0.0
    for tokens in TEXTS:
        p = np.array([log_probabilities(tokens, seed) for seed in (1, 2)])
        q = log_probabilities(tokens, 3)[None]
        mixed = float(np.prod(weight * np.exp(p[0]) + (1 - weight) * np.exp(p[1])))
        mean += mixed * mixture_test(p, q).evalue
        wrong += mixed * likelihood_ratio_test(p, q).evalue
    assert mean <= 1 + 1e-9
    # The near-miss: the largest single model does not bound a mixture token by token.
    assert weight != 0.5 or wrong > 1


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_certified_maximum_against_scipy(models, n, seed):
    rng = np.random.default_rng(seed)
    p = np.minimum(rng.normal(-2, 1.5, (models, n)), 0)
    bound = mixture_log_supremum(p)

    def negative(raw: np.ndarray) -> float:
        weights = np.exp(raw - np.max(raw))
        return -float(np.sum(np.log(weights / weights.sum() @ np.exp(p))))

    starts = [np.zeros(models), *(20 * np.eye(models)), rng.normal(size=models)]
    best = -min(optimize.minimize(negative, start).fun for start in starts)
    assert best <= bound + 1e-9
    assert bound <= best + 1e-3


def test_certified_maximum_of_the_certain_and_the_impossible():
    assert mixture_log_supremum(np.zeros((2, 0))) == 0.0
    assert mixture_log_supremum(np.array([[-math.inf], [-math.inf]])) == -math.inf
    assert mixture_log_supremum(np.array([[-math.inf, -1.0], [-1.0, -math.inf]])) == pytest.approx(
        2 * math.log(0.5) - 2, abs=1e-6
    )
    assert mixture_test([[-math.inf]], [[-1.0]]).log_pvalue == -math.inf
    nothing = mixture_test(np.zeros((1, 0)), np.zeros((1, 0)))
    assert (nothing.pvalue, nothing.evalue) == (1.0, 1.0)


def test_forbidden_tokens():
    p = np.array([[-1.0, -math.inf, -1.0], [-2.0, -1.0, -1.0]])
    q = np.array([[-1.0, -1.0, -1.0]])
    assert likelihood_ratio_test(p, q).log_evalue == pytest.approx(1.0)  # the other null model still stands
    refuted = likelihood_ratio_test(p[:1], q)
    assert refuted.log_pvalue == -math.inf
    assert refuted.log_evalue == math.inf
    helpless = likelihood_ratio_test(q, p[:1])
    assert helpless.log_evalue == -math.inf
    assert helpless.pvalue == 1.0
    both = likelihood_ratio_test([[-math.inf]], [[-math.inf]])
    assert both.log_pvalue == -math.inf
    nothing = likelihood_ratio_test(np.zeros((2, 0)), np.zeros((1, 0)))
    assert (nothing.pvalue, nothing.evalue, nothing.n_scored) == (1.0, 1.0, 0)


@pytest.mark.parametrize("test", [likelihood_ratio_test, mixture_test])
@pytest.mark.parametrize(
    ("null", "alternative", "message"),
    [
        ([-1.0], [[-1.0]], "null must have shape"),
        ([[-1.0]], np.zeros((0, 1)), "alternative must have shape"),
        ([[math.nan]], [[-1.0]], "null must hold natural logarithms"),
        ([[-1.0]], [[0.5]], "alternative must hold natural logarithms"),
        ([[-1.0, -1.0]], [[-1.0]], "alternative must have 2 tokens"),
    ],
)
def test_bad_arrays(test, null, alternative, message):
    with pytest.raises(ValueError, match=message):
        test(null, alternative)
