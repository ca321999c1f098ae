"""Holm and Benjamini-Hochberg in log space, against their definitions in exact or very precise arithmetic."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.detection.multiplicity import benjamini_hochberg, holm

LOG_P = st.floats(min_value=-700.0, max_value=0.0)
# Short lists of few distinct values make ties likely.
FAMILIES = st.lists(st.one_of(LOG_P, st.sampled_from([0.0, -1.0, -690.7, -2000.0])), min_size=1, max_size=7)


def closure_with_bonferroni(log_p: list[float]) -> list[float]:
    """Holm by another road: closed testing (Marcus, Peritz, Gabriel 1976) of all intersections by Bonferroni."""
    m = len(log_p)
    subsets = [s for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
    level = {s: min(0.0, math.log(len(s)) + min(log_p[j] for j in s)) for s in subsets}
    return [max(level[s] for s in subsets if i in s) for i in range(m)]


def q_values_by_definition(log_p: list[float]) -> list[float]:
    """q_i = min over j with p_j >= p_i of n p_j / #{k: p_k <= p_j}, with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        p = [Decimal(value).exp() for value in log_p]
        n = len(p)
        return [float(min(Decimal(1), *(n * pj / sum(pk <= pj for pk in p) for pj in p if pj >= pi)).ln()) for pi in p]


def rejected_by_step_up(p: np.ndarray, alpha: float) -> set[int]:
    """The procedure as published: the k smallest, k the largest with p_(k) <= k alpha / n."""
    order = np.argsort(p, kind="stable")
    passing = [k for k in range(1, len(p) + 1) if p[order[k - 1]] <= k * alpha / len(p)]
    return set(order[: max(passing, default=0)].tolist())


@given(FAMILIES)
@settings(max_examples=150, deadline=None)
def test_holm_is_closed_testing_with_bonferroni(log_p: list[float]) -> None:
    np.testing.assert_allclose(holm(log_p), closure_with_bonferroni(log_p), rtol=1e-12, atol=1e-12)


@given(FAMILIES)
@settings(max_examples=150, deadline=None)
def test_q_values_are_their_definition(log_p: list[float]) -> None:
    np.testing.assert_allclose(benjamini_hochberg(log_p), q_values_by_definition(log_p), rtol=1e-12, atol=1e-12)


def test_below_the_smallest_float() -> None:
    log_p = np.log(10.0) * np.array([-300.0, -299.0, -400.0, -5000.0, -1.0])
    np.testing.assert_allclose(benjamini_hochberg(log_p), q_values_by_definition(log_p.tolist()), rtol=1e-14)
    np.testing.assert_allclose(holm(log_p), closure_with_bonferroni(log_p.tolist()), rtol=1e-14)


def test_flags_are_those_of_the_step_up_procedure() -> None:
    rng = np.random.default_rng(3)
    kinds = set()
    for _ in range(300):
        p = rng.uniform(size=rng.integers(1, 60)) ** rng.uniform(1, 6)
        flags = set(np.flatnonzero(benjamini_hochberg(np.log(p)) <= np.log(0.05)).tolist())
        assert flags == rejected_by_step_up(p, 0.05)
        # Near-miss: stopping at the first p-value above its line (step-down) rejects fewer.
        order = np.argsort(p)
        above = np.flatnonzero(p[order] > 0.05 * np.arange(1, len(p) + 1) / len(p))
        kinds.add(len(flags) == (above[0] if len(above) else len(p)))
    assert kinds == {True, False}


def test_false_discovery_rate() -> None:
    """500 corpora of 200 documents, 160 of them null. E[FDP] = 0.8 * 0.1 = 0.08 exactly, for independent p-values.

    The FDP's standard deviation is below 0.1, so the mean of 500 has one below 0.0045; five of them: a false alarm in
    less than 1e-6 of all seeds. Flagging at p <= 0.1 without correction, the near-miss, gives about 0.28.
    """
    rng = np.random.default_rng(11)
    corrected, uncorrected = [], []
    for _ in range(500):
        p = np.concatenate([rng.uniform(size=160), rng.uniform(size=40) ** 30])
        for flags, shares in ((benjamini_hochberg(np.log(p)) <= np.log(0.1), corrected), (p <= 0.1, uncorrected)):
            shares.append(flags[:160].sum() / max(1, flags.sum()))
    assert abs(np.mean(corrected) - 0.08) < 5 * 0.0045
    assert np.mean(uncorrected) > 0.2


def test_order_of_the_input_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    log_p = -rng.exponential(10, size=5000)
    shuffle = rng.permutation(len(log_p))
    for method in (holm, benjamini_hochberg):
        np.testing.assert_array_equal(method(log_p)[shuffle], method(log_p[shuffle]))


def test_pieces_do_not_show() -> None:
    """More tests than one piece of the ranks (2**20) holds."""
    log_p = -np.random.default_rng(7).exponential(5, size=(1 << 20) + 3)
    order = np.argsort(log_p)
    n = len(log_p)
    expected = np.empty(n)
    expected[order] = np.minimum.accumulate((log_p[order] - np.log(np.arange(1, n + 1) / n))[::-1])[::-1]
    np.testing.assert_array_equal(benjamini_hochberg(log_p), np.minimum(expected, 0))


def test_holm_takes_each_row_as_a_family() -> None:
    log_p = -np.random.default_rng(9).exponential(3, size=(20, 5))
    np.testing.assert_array_equal(holm(log_p), np.stack([holm(row) for row in log_p]))


def test_edges() -> None:
    assert benjamini_hochberg([]).shape == (0,)
    assert holm([]).shape == (0,)
    assert benjamini_hochberg([-3.0]).tolist() == [-3.0] == holm([-3.0]).tolist()
    assert benjamini_hochberg([-math.inf, 0.0]).tolist() == [-math.inf, 0.0] == holm([-math.inf, 0.0]).tolist()
    log_p = np.array([-2.0, -1.0])
    benjamini_hochberg(log_p)
    holm(log_p)
    assert log_p.tolist() == [-2.0, -1.0]  # the input is left alone


@pytest.mark.parametrize("method", [holm, benjamini_hochberg])
@pytest.mark.parametrize("bad", [[math.nan], [0.1], -1.0])
def test_refused(method, bad) -> None:
    with pytest.raises(ValueError, match="log_pvalues must"):
        method(bad)


def test_one_corpus_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        benjamini_hochberg(np.zeros((2, 3)))
