"""Conformal p-values: counts against brute force, guarantees by simulation, near-misses rejected, refusals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.base import clone

from assay.conformal.conditional import false_positive_bound, monte_carlo_bounds, simes_bounds
from assay.conformal.p_values import ConformalPValues

FALSE_ALARM = 1e-6  # of each statistical check below


def at_most(count: int, n: int, rate: float) -> bool:
    """Whether a count is compatible with a rate of at most `rate`."""
    return count <= stats.binom.isf(FALSE_ALARM, n, rate)


def marginal(**settings_: object) -> ConformalPValues:
    return ConformalPValues(level=0.5, **settings_)  # small calibration sets in most tests


@given(
    calibration=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    new=st.lists(st.integers(-4, 4), max_size=6),
    alternative=st.sampled_from(["greater", "less"]),
)
def test_counts_are_those_of_the_definition(calibration: list[int], new: list[int], alternative: str) -> None:
    found = marginal(alternative=alternative).fit(calibration).p_values(new)
    sign = 1 if alternative == "greater" else -1
    expected = [Fraction(1 + sum(sign * s >= sign * x for s in calibration), len(calibration) + 1) for x in new]
    assert found.tolist() == [float(p) for p in expected]


@given(calibration=st.lists(st.integers(-3, 3), min_size=1, max_size=12), x=st.integers(-4, 4), seed=st.integers(0, 99))
@settings(deadline=None)  # the machine may be busy
def test_smoothed_ranks_lie_in_the_tie(calibration: list[int], x: int, seed: int) -> None:
    found = marginal(ties="smoothed").fit(calibration).p_values([x], rng=np.random.default_rng(seed))[0]
    n, above, ties = len(calibration), sum(s > x for s in calibration), sum(s == x for s in calibration)
    u = 1.0 - np.random.default_rng(seed).random()
    assert found == pytest.approx((above + u * (1 + ties)) / (n + 1))


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=10), st.floats(0.1, 9), st.integers(-1, 10))
@settings(deadline=None)  # the machine may be busy
def test_weights_are_those_of_the_definition(weights: list[float], own: float, x: int) -> None:
    calibration = np.arange(len(weights))
    found = marginal().fit(calibration, weights=weights).p_values([x], weights=[own])[0]
    at_least = sum(w for s, w in zip(calibration, weights, strict=True) if s >= x)
    assert found == pytest.approx((at_least + own) / (sum(weights) + own))


def test_equal_weights_change_nothing() -> None:
    rng = np.random.default_rng(1)
    scores, new = rng.normal(size=50), rng.normal(size=20)
    weighted = marginal().fit(scores, weights=np.full(50, 3.0))
    np.testing.assert_allclose(weighted.p_values(new, weights=np.full(20, 3.0)), marginal().fit(scores).p_values(new))
    assert weighted.effective_sizes_.tolist() == [50.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_groups_are_calibrated_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, groups = rng.normal(size=60), rng.choice(["essay", "news"], 60)
    new, of = rng.normal(size=9), rng.choice(["essay", "news"], 9)
    found = marginal().fit(scores, groups).p_values(new, of)
    for group in ("essay", "news"):
        alone = marginal().fit(scores[groups == group]).p_values(new[of == group])
        np.testing.assert_array_equal(found[of == group], alone)
    order = rng.permutation(9)
    np.testing.assert_array_equal(marginal().fit(scores, groups).p_values(new[order], of[order]), found[order])


@pytest.mark.parametrize("ties", ["conservative", "smoothed"])
def test_marginal_size_over_calibration_and_text(ties: str) -> None:
    # 20,000 pairs of calibration set and text, scores rounded so that ties are common.
    rng, pairs = np.random.default_rng(2), 20_000
    scores = np.round(rng.normal(size=(pairs, 20)), 1)
    found = np.array([marginal(ties=ties).fit(s[:19]).p_values(s[19:], rng=rng)[0] for s in scores[:4000]])
    for level in (0.05, 0.1, 0.5):
        assert at_most(int(np.sum(found <= level)), 4000, level)
    if ties == "smoothed":
        assert stats.kstest(found, "uniform").pvalue > FALSE_ALARM
    # Near-miss: leaving out the text's own place, #{s >= x} / n, which is 1 / 19 or less in 2 of 20 cases.
    naive = np.mean(rng.random((pairs, 19)) >= rng.random((pairs, 1)), axis=1)
    assert not at_most(int(np.sum(naive <= 1 / 19)), pairs, 1 / 19)


@pytest.mark.parametrize("bounds", ["simes", "monte-carlo"])
@pytest.mark.parametrize("n", [1, 2, 40, 300])
def test_bounds_hold_all_at_once(bounds: str, n: int) -> None:
    rng, draws, confidence = np.random.default_rng(3), 20_000, 0.9
    if bounds == "simes":
        found = simes_bounds(n, confidence)
    else:
        found = monte_carlo_bounds(n, confidence, simulations=2000, rng=rng)
    assert found.shape == (n + 1,)
    assert found[-1] == 1.0
    assert (np.diff(found) >= 0).all()
    uniforms = np.sort(rng.random((draws, n)), axis=1)
    missed = int(np.sum((uniforms > found[:-1]).any(axis=1)))
    # The Monte-Carlo band's own probability is random: Beta with 2000 draws, sd 0.7 %; 4 of them are allowed.
    assert at_most(missed, draws, 0.1 + (0.028 if bounds == "monte-carlo" else 0.0))
    assert missed > draws * 0.05  # and they are not loose
    if n > 2:  # near-miss: bounds that each hold with the confidence asked for, as if one were looked at
        single = stats.beta.isf(0.1, np.arange(1, n + 1), n - np.arange(n))
        assert not at_most(int(np.sum((uniforms > single).any(axis=1))), draws, 0.128)


def test_simes_bounds_are_the_published_ones() -> None:
    # n = 4, k = 2, delta = 0.1: b_(5-i) = 1 - sqrt(0.1 * i (i - 1) / 12).
    expected = [1 - np.sqrt(0.1 * i * (i - 1) / 12) for i in (4, 3, 2, 1)] + [1.0]
    np.testing.assert_allclose(simes_bounds(4, 0.9, k=2), expected, rtol=1e-14)
    np.testing.assert_allclose(simes_bounds(3, 0.9, k=1), [0.9, 1 - 0.2 / 3, 1 - 0.1 / 3, 1.0], rtol=1e-14)


@pytest.mark.parametrize("guarantee", ["simes", "monte-carlo"])
def test_conditional_p_values_hold_for_most_calibration_sets(guarantee: str) -> None:
    # Scores are uniform, so the false positive rate that a calibration set leads to at level a is known exactly.
    rng, sets = np.random.default_rng(4), 2000

    def rates(fitted: ConformalPValues, level: float) -> float:
        edges = np.sort(np.append(fitted._scores[0], 1.0))
        rejected = edges[fitted.p_values(edges) <= level]
        below = fitted._scores[0][fitted._scores[0] < (rejected.min() if len(rejected) else 2.0)]
        return 1.0 - (below.max() if len(below) else 0.0) if len(rejected) else 0.0

    model = ConformalPValues(guarantee=guarantee, confidence=0.9, level=0.1, simulations=500).fit(rng.random(60))
    naive = ConformalPValues(level=0.05).fit(rng.random(60))
    bad = bad_naive = 0
    for _ in range(sets):
        # Only the scores change: the band depends on their number, and fitting it 2,000 times would take minutes.
        model._scores = naive._scores = [np.sort(rng.random(60))]
        bad += any(rates(model, level) > level for level in (0.1, 0.3))
        bad_naive += any(rates(naive, level) > level for level in (0.1, 0.3))
    assert at_most(bad, sets, 0.1 + (0.04 if guarantee == "monte-carlo" else 0.0))
    assert not at_most(bad_naive, sets, 0.14)  # near-miss: marginal p-values promise this on average only


def test_covariate_shift_needs_the_weights() -> None:
    # Score = covariate + noise; new texts have likelier large covariates: ratio exp(x).
    rng, trials = np.random.default_rng(5), 1500
    weighted, plain = [], []
    for _ in range(trials):
        x = rng.random(60)
        s = x + 0.1 * rng.normal(size=60)
        new_x = np.log1p(rng.random() * (np.e**3 - 1)) / 3  # density proportional to exp(3 x)
        new = [new_x + 0.1 * rng.normal()]
        model = marginal().fit(s, weights=np.exp(3 * x))
        weighted.append(model.p_values(new, weights=[np.exp(3 * new_x)])[0])
        plain.append(marginal().fit(s).p_values(new)[0])
    assert at_most(int(np.sum(np.array(weighted) <= 0.1)), trials, 0.1)
    assert not at_most(int(np.sum(np.array(plain) <= 0.1)), trials, 0.1)


def test_false_positive_bound() -> None:
    assert false_positive_bound(0, 299) < 0.01 < false_positive_bound(0, 298)
    assert false_positive_bound(0, 2995) < 0.001 < false_positive_bound(0, 2994)
    assert false_positive_bound(2, 200) == pytest.approx(0.031, abs=5e-4)
    assert false_positive_bound(5, 5) == 1.0
    # The exact definition: at the bound, so few are flagged with probability 1 - confidence.
    assert stats.binom.cdf(7, 90, false_positive_bound(7, 90, 0.8)) == pytest.approx(0.2, rel=1e-9)
    with pytest.raises(ValueError, match=r"flagged must be in \[0, n\]"):
        false_positive_bound(3, 2)
    with pytest.raises(ValueError, match="confidence must be in"):
        false_positive_bound(0, 2, 1.0)


def test_follows_the_conventions_of_estimators() -> None:
    model = ConformalPValues(alternative="less", level=0.2)
    assert clone(model).get_params() == model.get_params()
    assert model.fit([1.0, 2.0, 3.0, 4.0]) is model
    assert "alternative='less'" in repr(model)


def test_refusals() -> None:
    scores = np.arange(99.0)
    fitted = ConformalPValues(level=0.01).fit(scores)
    assert fitted.p_values([1000.0]).tolist() == [0.01]
    with pytest.raises(ValueError, match=r"at least 99 calibration texts for level 0.01: 'all texts' has 98"):
        ConformalPValues(level=0.01).fit(scores[1:])
    with pytest.raises(ValueError, match="'b' has 3"):
        ConformalPValues().fit(scores, ["a"] * 96 + ["b"] * 3)
    with pytest.raises(ValueError, match="scores must be finite, got nan at 2"):
        ConformalPValues().fit([1.0, 2.0, np.nan])
    with pytest.raises(ValueError, match="scores must have shape"):
        ConformalPValues().fit([[1.0]])
    with pytest.raises(ValueError, match="at least one text"):
        ConformalPValues().fit([])
    with pytest.raises(ValueError, match="scores must be finite, got inf at 0"):
        fitted.p_values([np.inf])
    with pytest.raises(ValueError, match=r"among the calibrated ones \['a'\], got 'z'"):
        marginal().fit(scores, ["a"] * 99).p_values([1.0], ["z"])
    with pytest.raises(ValueError, match="rng must be"):
        ConformalPValues(ties="smoothed").fit(scores).p_values([1.0])
    with pytest.raises(ValueError, match="if and only if"):
        fitted.p_values([1.0], weights=[1.0])
    with pytest.raises(ValueError, match="positive numbers"):
        fitted.fit(scores, weights=np.zeros(99))
    with pytest.raises(ValueError, match="groups must be 99 strings or integers"):
        fitted.fit(scores, [1.5] * 99)
    for bad, match in (
        ({"alternative": "both"}, "alternative must be one of"),
        ({"level": 0.0}, "level must be in"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"simulations": 5}, r"simulations must be a whole number in \[100"),
        ({"guarantee": "simes", "ties": "smoothed"}, "conservative ties"),
    ):
        with pytest.raises(ValueError, match=match):
            ConformalPValues(**bad).fit(scores)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="simulations must be at least 999"):
        ConformalPValues(guarantee="monte-carlo", confidence=0.999, simulations=500).fit(scores)
    assert fitted.p_values([]).shape == (0,)


@pytest.mark.parametrize("guarantee", ["simes", "monte-carlo"])
def test_a_group_that_could_never_be_flagged_is_refused(guarantee: str) -> None:
    """19 texts do for level 0.05 on average, but a conditional p-value of 19 texts is never below 0.2."""
    scores = np.random.default_rng(31).normal(size=400)
    assert ConformalPValues(level=0.05).fit(scores[:19]).p_values([99.0]) == pytest.approx([0.05])
    with pytest.raises(ValueError, match=r"about 90 or more.*'all texts' has 19 and 0\.2.*Add human texts"):
        ConformalPValues(level=0.05, guarantee=guarantee).fit(scores[:19])
    fitted = ConformalPValues(level=0.05, guarantee=guarantee).fit(scores, np.repeat(["a", "b"], 200))
    np.testing.assert_allclose(fitted.p_values([99.0, 99.0], ["a", "b"]), fitted.floors_)
    assert (fitted.floors_ > 1 / 201).all()


@pytest.mark.parametrize("factor", [1e308, 1.0, 1e-300])
def test_weights_of_any_size_count_up_to_a_factor(factor: float) -> None:
    rng = np.random.default_rng(32)
    scores, weights = rng.normal(size=50), rng.uniform(0.2, 1.0, size=50)
    plain = ConformalPValues().fit(scores, weights=weights)
    scaled = ConformalPValues().fit(scores, weights=weights * factor)
    expected = plain.p_values([0.0, 2.0, 9.0], weights=[0.5, 1.0, 0.3])
    np.testing.assert_allclose(scaled.p_values([0.0, 2.0, 9.0], weights=np.array([0.5, 1.0, 0.3]) * factor), expected)
    np.testing.assert_allclose(scaled.effective_sizes_, plain.effective_sizes_)
    assert ConformalPValues().fit(scores, weights=weights * 1e-300).p_values([9.0], weights=[1e300]) == [1.0]


def test_weights_that_leave_too_few_texts_are_refused() -> None:
    """200 texts of which five carry nearly all the weight can no more be judged at level 0.05 than five texts."""
    rng = np.random.default_rng(33)
    scores, weights = rng.normal(size=200), np.where(np.arange(200) < 5, 1.0, 1e-6)
    with pytest.raises(ValueError, match=r"at least 19 .*'all texts' has 200, whose weights leave 5"):
        ConformalPValues(level=0.05).fit(scores, weights=weights)
    # A group of little weight as a whole is judged by its own texts.
    tiny = np.where(np.arange(200) < 100, 1.0, 1e-200)
    found = ConformalPValues(level=0.05).fit(scores, np.repeat(["a", "b"], 100), weights=tiny)
    np.testing.assert_allclose(found.effective_sizes_, [100, 100])
    # The floor is that of new texts, which carry large weights more often than calibration texts do: their smallest
    # p-values, and so the level that can be kept at all, are 1 / (effective size + 1) and not 1 / (n + 1).
    x = rng.random(4000)
    new_x = np.log1p(rng.random(4000) * (np.e**6 - 1)) / 6  # density proportional to exp(6 x)
    fitted = ConformalPValues().fit(x, weights=np.exp(6 * x))
    smallest = fitted.p_values(np.full(4000, 2.0), weights=np.exp(6 * new_x)).mean()
    assert fitted.floors_[0] == pytest.approx(smallest, rel=0.05)
    assert smallest > 2 / 4001


def test_groups_may_be_a_column_of_strings() -> None:
    scores = np.arange(40.0)
    groups = np.array(["a", "b"] * 20, dtype=object)
    fitted = ConformalPValues(level=0.1).fit(scores, groups)
    np.testing.assert_allclose(fitted.p_values([99.0, -1.0], groups[:2]), [1 / 21, 1.0])
    with pytest.raises(ValueError, match="strings or integers"):
        ConformalPValues().fit(scores, np.array(["a", None] * 20, dtype=object))


@pytest.mark.parametrize("setting", [{"level": "x"}, {"confidence": None}, {"simulations": 150.5}])
def test_settings_of_the_wrong_type_are_named(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ConformalPValues(guarantee="monte-carlo", **setting).fit(np.arange(300.0))
