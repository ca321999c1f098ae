"""Accounting: totals by hand, conversions against direct sums and mpmath, PLD against dp-accounting's own numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from assay._errors import MissingDependencyError
from assay.privacy import accounting as acc
from assay.privacy.accounting import Cost, Odometer
from assay.privacy.discrete import log_pmf_gaussian, log_pmf_laplace

TERMS = {"adjacency": "add-remove", "unit": "document"}


def test_costs_by_hand() -> None:
    laplace = Cost.laplace(Fraction(10), sensitivity=2, **TERMS)
    assert (laplace.epsilon, laplace.rho) == (Fraction(1, 5), Fraction(1, 50))
    gaussian = Cost.gaussian(Fraction(8), sensitivity=2, **TERMS)
    assert (gaussian.epsilon, gaussian.rho) == (None, Fraction(1, 4))
    pure = Cost.pure(Fraction(1, 3), **TERMS).times(6)
    assert (pure.epsilon, pure.rho) == (2, Fraction(1, 3))
    assert Cost.zcdp(Fraction(1, 7), **TERMS).times(7).rho == 1
    assert acc.pure_total([laplace, pure]) == Fraction(11, 5)
    assert acc.zcdp_total([laplace, gaussian]) == Fraction(27, 100)
    with pytest.raises(ValueError, match="gaussian"):
        acc.pure_total([gaussian])


def test_groups_cost_size_and_its_square() -> None:
    assert Cost.pure(Fraction(1, 2), **TERMS).for_group(3, "author").epsilon == Fraction(3, 2)
    assert Cost.zcdp(Fraction(1, 2), **TERMS).for_group(3, "author").rho == Fraction(9, 2)
    gaussian = Cost.gaussian(Fraction(5), **TERMS).for_group(4, "author")
    assert (gaussian.sensitivity, gaussian.unit, gaussian.rho) == (4, "author", Fraction(16, 10))


def direct_delta(log_p: np.ndarray, log_q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(np.exp(log_p) - np.exp(epsilon + log_q), 0).sum())


@pytest.mark.parametrize(("variance", "shift"), [(2, 1), (20, 3), (0.4, 1)])
def test_gaussian_costs_hold_for_the_discrete_law(variance: float, shift: int) -> None:
    y = np.arange(-400, 401)
    p, q = log_pmf_gaussian(y, variance), log_pmf_gaussian(y - shift, variance)
    rho = float(Cost.gaussian(Fraction(variance), sensitivity=shift, **TERMS).rho)
    for a in (1.5, 2.0, 7.0):
        divergence = math.log(np.exp(a * p + (1 - a) * q).sum()) / (a - 1)
        assert divergence <= a * rho * (1 + 1e-9)
    for epsilon in (0.1, 1.0, 3.0):
        exact = direct_delta(p, q, epsilon)
        assert acc.delta_of_gaussian(Fraction(variance), epsilon, sensitivity=shift) == pytest.approx(exact, rel=1e-9)
        assert exact <= acc.delta_of_rho(rho, epsilon) * (1 + 1e-9)
    # Half the rho is not enough: the bound is nearly tight.
    divergence = math.log(np.exp(2 * p - q).sum())
    assert divergence > 2 * rho * 0.9


def test_laplace_cost_is_the_exact_largest_log_ratio() -> None:
    y = np.arange(-500, 501)
    ratio = log_pmf_laplace(y, 3.5) - log_pmf_laplace(y - 2, 3.5)
    assert np.abs(ratio).max() == pytest.approx(float(Cost.laplace(Fraction(7, 2), sensitivity=2, **TERMS).epsilon))


def test_conversions_at_the_reference_point() -> None:
    assert float(acc.rho_for(1, 1e-6)) == pytest.approx(0.01747, abs=5e-6)
    assert 0.0242 < acc.rho_for(1, 1e-6, sharp=True) < 0.02801  # between the plain bound and one Gaussian
    variance = acc.single_gaussian_variance(1.0, 1e-6)
    # The continuous law needs 4.2247 (rho 0.02801); on the integers the exact sum asks for 0.2 % more.
    assert 4.2247 <= math.sqrt(variance) <= 4.2247 * 1.003
    assert acc.delta_of_gaussian(variance, 1.0) <= 1e-6
    assert acc.delta_of_gaussian(variance * Fraction(98, 100), 1.0) > 1e-6
    with mpmath.workdps(40):
        log = mpmath.log(mpmath.mpf(10) ** 6)
        assert float((mpmath.sqrt(log + 1) - mpmath.sqrt(log)) ** 2) == pytest.approx(float(acc.rho_for(1, 1e-6)))


def tails(variance: mpmath.mpf, epsilon: float, shift: int, *, integers: bool) -> mpmath.mpf:
    """P(Y > t - s/2) - e^epsilon P(Y > t + s/2) to many digits; on the integers by the Euler-Maclaurin formula."""
    centre = mpmath.mpf(epsilon) * variance / shift

    def above(place: mpmath.mpf) -> mpmath.mpf:
        if not integers:
            return mpmath.erfc(place / mpmath.sqrt(2 * variance)) / 2
        first = mpmath.floor(place) + 1
        height = mpmath.exp(-(first**2) / (2 * variance)) / mpmath.sqrt(2 * mpmath.pi * variance)
        slope = -first / variance * height
        third = (3 * first / variance**2 - first**3 / variance**3) * height
        return mpmath.erfc(first / mpmath.sqrt(2 * variance)) / 2 + height / 2 - slope / 12 + third / 720

    return above(centre - mpmath.mpf(shift) / 2) - mpmath.exp(epsilon) * above(centre + mpmath.mpf(shift) / 2)


@pytest.mark.parametrize(
    ("variance", "epsilon", "shift"),
    [(1e10 + 1, 1e-4, 1), (1e11, 1e-5, 1), (1e13, 1.0, 10**6), (1e24, 1e-12, 1), (1e28, 1e-13, 1), (1e12, 0.0, 3)],
)
def test_delta_of_a_wide_gaussian_is_never_below_the_sum(variance: float, epsilon: float, shift: int) -> None:
    """Near-misses: the continuous law's delta lies below the sum; two normal tails in doubles lose all digits."""
    with mpmath.workdps(60):
        exact = tails(mpmath.mpf(variance), epsilon, shift, integers=True)
        continuous = tails(mpmath.mpf(variance), epsilon, shift, integers=False)
        found = acc.delta_of_gaussian(Fraction(variance), epsilon, sensitivity=shift)
        assert exact <= found <= exact * (1 + 2e-6)
        assert abs(continuous / exact - 1) < 1e-6
    if variance < 2e10:
        assert continuous < exact * (1 - mpmath.mpf("1e-10"))
    if variance > 1e27:
        ratio, t = shift / math.sqrt(variance), epsilon * math.sqrt(variance) / shift
        assert abs((ndtr(ratio / 2 - t) - math.exp(epsilon) * ndtr(-ratio / 2 - t)) / float(exact) - 1) > 0.5


def test_conversions_round_to_the_safe_side() -> None:
    """Against 50 digits; the near-miss, the inverse in doubles rounded to the nearest, lands on either side."""
    over = 0
    with mpmath.workdps(50):
        for epsilon in np.linspace(0.05, 5, 60).tolist():
            for delta in (1e-5, 1e-9):
                log = -mpmath.log(mpmath.mpf(delta))
                exact = (mpmath.sqrt(log + epsilon) - mpmath.sqrt(log)) ** 2
                rho = acc.rho_for(epsilon, delta)
                assert mpmath.mpf(rho.numerator) / rho.denominator <= exact
                nearest = (epsilon / (math.sqrt(epsilon - math.log(delta)) + math.sqrt(-math.log(delta)))) ** 2
                over += mpmath.mpf(nearest) > exact
                value = mpmath.mpf(rho.numerator) / rho.denominator
                assert mpmath.mpf(acc.epsilon_of_rho(rho, delta)) >= value + 2 * mpmath.sqrt(value * log)
    assert over > 10


def test_conversions_at_the_ends_of_the_range() -> None:
    assert acc.delta_of_rho(1e12, 0.0) == 1.0  # its logarithm is beyond every double
    assert acc.delta_of_rho(Fraction(1, 10**400), 1.0) == 0.0
    assert 0 < acc.epsilon_of_rho(Fraction(1, 10**400), 1e-6, sharp=True) < 1e-150
    assert acc.epsilon_of_rho(Fraction(1, 10**400), 1e-6) > 0  # a subnormal spend is a spend
    with pytest.raises(ValueError, match="epsilon must be at least"):
        acc.rho_for(1e-300, 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-9, 50), st.floats(1e-15, 0.5))
def test_rho_for_is_rounded_down(epsilon: float, delta: float) -> None:
    rho = acc.rho_for(epsilon, delta)
    assert acc.epsilon_of_rho(rho, delta) <= epsilon
    assert acc.epsilon_of_rho(rho * Fraction(1001, 1000), delta) > epsilon
    assert acc.delta_of_rho(rho, epsilon) <= delta * (1 + 1e-6)  # the sharper conversion agrees
    sharp = acc.rho_for(epsilon, delta, sharp=True)
    assert sharp >= rho
    assert acc.delta_of_rho(sharp, epsilon) <= delta or sharp == rho
    assert acc.epsilon_of_rho(sharp, delta, sharp=True) <= epsilon * (1 + 1e-6)


def test_pld_is_tighter_than_zcdp_and_as_dp_accounting_says() -> None:
    pytest.importorskip("dp_accounting", reason="optional")
    costs = [Cost.gaussian(Fraction(100), **TERMS).times(100), Cost.laplace(Fraction(20), **TERMS).times(50)]
    found = acc.pld_epsilon(costs, 1e-6)
    assert found == pytest.approx(5.218, abs=0.02)  # 5.218 is for the continuous Gaussian
    assert found < acc.epsilon_of_rho(acc.zcdp_total(costs), 1e-6)
    assert acc.pld_epsilon([Cost.pure(Fraction(1, 2), **TERMS)], 1e-9) == pytest.approx(0.5, abs=1e-3)
    assert acc.pld_epsilon([], 1e-6) == 0
    with pytest.raises(ValueError, match="known only as zCDP"):
        acc.pld_epsilon([Cost.zcdp(1, **TERMS)], 1e-6)


def test_pld_of_one_gaussian_bounds_the_exact_delta() -> None:
    pytest.importorskip("dp_accounting", reason="optional")
    epsilon = acc.pld_epsilon([Cost.gaussian(Fraction(18), sensitivity=3, **TERMS)], 1e-5)
    assert acc.delta_of_gaussian(Fraction(18), epsilon, sensitivity=3) <= 1e-5 * (1 + 1e-6)
    assert acc.delta_of_gaussian(Fraction(18), epsilon * 0.99, sensitivity=3) > 1e-5


def test_pld_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="dp-accounting"):
        acc.pld_epsilon([Cost.pure(1, **TERMS)], 1e-6)


def test_reading_an_odometer_changes_nothing() -> None:
    odometer = Odometer(**TERMS)
    assert (odometer.epsilon(), odometer.rho(), odometer.epsilon_at(1e-6)) == (0, 0, 0)
    odometer.add(Cost.pure(Fraction(1, 10), **TERMS), Cost.laplace(Fraction(10), **TERMS))
    for _ in range(2):
        assert odometer.epsilon() == Fraction(1, 5)
        assert odometer.rho() == Fraction(1, 100)
        assert odometer.epsilon_at(1e-6) == acc.epsilon_of_rho(Fraction(1, 100), 1e-6, sharp=True)
    with pytest.raises(ValueError, match="for replace of one document"):
        odometer.add(Cost.pure(1, adjacency="replace", unit="document"))
    with pytest.raises(ValueError, match="for add-remove of one author"):
        odometer.add(Cost.pure(1, **TERMS), Cost.pure(1, adjacency="add-remove", unit="author"))
    assert len(odometer.costs) == 2  # all of a batch or none


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cost.pure(0, **TERMS), "epsilon must be positive"),
        (lambda: Cost.pure(math.nan, **TERMS), "epsilon must be positive"),
        (lambda: Cost.pure(1, adjacency="swap", unit="event"), "adjacency must be one of"),
        (lambda: Cost.pure(1, adjacency="replace", unit="user"), "unit must be one of"),
        (lambda: Cost.laplace(Fraction(1), sensitivity=0, **TERMS), "sensitivity must be"),
        (lambda: Cost.pure(1, **TERMS).times(0), "count must be"),
        (lambda: Cost.pure(1, **TERMS).for_group(0, "author"), "size must be"),
        (lambda: acc.epsilon_of_rho(1, 0.0), "delta must be in"),
        (lambda: acc.delta_of_rho(1, -1.0), "epsilon must be"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_text_is_no_number() -> None:
    with pytest.raises(TypeError, match="epsilon must be an integer, a float or a Fraction, got str"):
        Cost.pure("1", **TERMS)
