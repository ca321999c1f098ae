"""Noise: the laws by exact enumeration and by chi-square, OpenDP as the oracle, what a release refuses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay._errors import MissingDependencyError
from assay.privacy import discrete, noise
from assay.privacy.errors import SeededNoiseError
from assay.privacy.grid import Grid, quantise, restore
from assay.privacy.noise import (
    ExactNoise,
    NoiseSource,
    OpenDPNoise,
    SeededNoise,
    gaussian_variance,
    laplace_scale,
    noise_source,
    refuse_seeded,
)

Law = dict[int, float]


# --- exact enumeration: the sampler's own decision tree, with rational probabilities ---------------------------------


class _Fork(Exception):
    """The sampler asked for a draw that the script does not hold; `law` is the law of that draw."""

    def __init__(self, law: list[float]) -> None:
        self.law = law


class _Restart(Exception):
    """The sampler rejected its proposal and begins again."""


class _Script:
    """Draws as scripted; past the end it asks for a fork. `once`: the second draw of the first kind is a restart."""

    def __init__(self, values: tuple[int, ...], once: bool) -> None:
        self._left = iter(values)
        self._once = once
        self._first: object = None

    def draw(self, law: list[float], kind: object = None) -> int:
        if self._once and kind is not None:
            if kind == self._first:
                raise _Restart
            self._first = self._first or kind
        if len(law) == 1:
            return 0
        for value in self._left:
            return value
        raise _Fork(law)

    def __call__(self, n: int) -> int:
        return self.draw([1 / n] * n, kind=n)


def enumerate_law(draw: Callable[[_Script], int], least: float, *, once: bool = False) -> tuple[Law, float]:
    """The law of `draw` over all its coin tosses, and the mass of the paths that were cut below `least`.

    With `once`, given that the first proposal is accepted; rounds are alike, so this is the law of all of them.
    """
    law: Law = defaultdict(float)
    cut = rejected = 0.0
    paths: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while paths:
        values, mass = paths.pop()
        try:
            law[draw(_Script(values, once))] += mass
        except _Restart:
            rejected += mass
        except _Fork as fork:
            if mass < least:
                cut += mass
            else:
                paths += [((*values, value), mass * p) for value, p in enumerate(fork.law) if p]
    return {y: mass / (1 - rejected) for y, mass in law.items()}, cut / (1 - rejected)


@pytest.mark.parametrize(("num", "den"), [(0, 1), (1, 3), (2, 3), (1, 2), (1, 1), (2, 2)])
def test_enumerated_coin_has_probability_exp(num: int, den: int) -> None:
    law, cut = enumerate_law(lambda below: discrete.bernoulli_exp(below, num, den), 1e-7)
    assert cut < 1e-3
    assert law[True] <= math.exp(-num / den) + 1e-12 <= law[True] + cut + 2e-12


@pytest.mark.parametrize(("a", "b"), [(0, 2), (1, 2), (2, 3), (3, 3)])
def test_enumerated_half_square_coin(a: int, b: int) -> None:
    law, cut = enumerate_law(lambda below: discrete._exp_half_square(below, a, b), 1e-6)
    assert cut < 1e-2
    exact = math.exp(-((a / b) ** 2) / 2)
    assert law[True] <= exact + 1e-12 <= law[True] + cut + 2e-12


@pytest.fixture
def whole_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coins checked above, as one toss each: the trees of the samplers stay small."""

    def coin(script: _Script, num: int, den: int) -> bool:
        return bool(script.draw([1 - math.exp(-num / den), math.exp(-num / den)]))

    monkeypatch.setattr(discrete, "bernoulli_exp", coin)
    monkeypatch.setattr(
        discrete,
        "_exp_half_square",
        lambda script, a, b: bool(
            script.draw([1 - math.exp(-(a * a) / (2 * b * b)), math.exp(-(a * a) / (2 * b * b))])
        ),
    )


@pytest.fixture
def whole_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Laplace law checked here too, as one draw."""

    def proposal(script: _Script, num: int, den: int) -> int:
        return script.draw(np.exp(discrete.log_pmf_laplace(np.arange(-160, 161), num / den)).tolist(), kind="y") - 160

    monkeypatch.setattr(discrete, "laplace", proposal)


def check_enumerated(draw: Callable[[_Script], int], log_pmf: Callable[[int], float]) -> bool:
    law, cut = enumerate_law(draw, 1e-11, once=True)
    assert cut < 1e-6
    return all(mass <= math.exp(log_pmf(y)) * (1 + 1e-9) + cut <= mass + 3 * cut + 1e-9 for y, mass in law.items())


@pytest.mark.usefixtures("whole_coins")
@pytest.mark.parametrize("scale", [Fraction(1), Fraction(1, 2), Fraction(3, 2), Fraction(5), Fraction(7, 3)], ids=str)
def test_enumerated_laplace_is_the_law(scale: Fraction) -> None:
    num, den = scale.numerator, scale.denominator
    assert check_enumerated(
        lambda below: discrete.laplace(below, num, den), lambda y: discrete.log_pmf_laplace(y, scale)
    )


@pytest.mark.usefixtures("whole_coins")
@pytest.mark.parametrize("sigma", [1, 3, 5])
def test_enumerated_gaussian_of_integer_sigma_is_the_law(sigma: int) -> None:
    assert check_enumerated(
        lambda below: discrete.gaussian_of_sigma(below, sigma), lambda y: discrete.log_pmf_gaussian(y, sigma**2)
    )


@pytest.mark.usefixtures("whole_coins", "whole_proposals")
@pytest.mark.parametrize("variance", [Fraction(1, 2), Fraction(2), Fraction(7, 3), Fraction(10)], ids=str)
def test_enumerated_gaussian_is_the_law(variance: Fraction) -> None:
    num, den = variance.numerator, variance.denominator
    assert check_enumerated(
        lambda below: discrete.gaussian(below, num, den), lambda y: discrete.log_pmf_gaussian(y, variance)
    )


@pytest.mark.usefixtures("whole_coins")
def test_enumeration_rejects_a_zero_of_two_signs() -> None:
    def mutant(below: _Script) -> int:
        v = 0
        while discrete.bernoulli_exp(below, 1, 1):
            v += 1
        return v if below(2) else -v

    assert not check_enumerated(mutant, lambda y: discrete.log_pmf_laplace(y, 1))


@pytest.mark.usefixtures("whole_coins", "whole_proposals")
def test_enumeration_rejects_an_acceptance_of_another_scale() -> None:
    def mutant(below: _Script) -> int:
        while True:
            y = discrete.laplace(below, 2, 1)
            if discrete.bernoulli_exp(below, (abs(y) - 1) ** 2, 2):
                return y

    assert not check_enumerated(mutant, lambda y: discrete.log_pmf_gaussian(y, 1))


# --- chi-square: against the law and against OpenDP --------------------------------------------------------------


def bins_of(draws: np.ndarray, reach: int) -> np.ndarray:
    return np.bincount(np.clip(draws, -reach, reach) + reach, minlength=2 * reach + 1)


def fit_pvalue(draws: np.ndarray, log_pmf: Callable[[np.ndarray], np.ndarray], reach: int) -> float:
    inner = np.exp(log_pmf(np.arange(-reach + 1, reach)))
    tail = (1 - inner.sum()) / 2
    expected = np.concatenate([[tail], inner, [tail]]) * len(draws)
    return float(stats.chisquare(bins_of(draws, reach), expected).pvalue)


CASES = [
    ("laplace", Fraction(1), 5),
    ("laplace", Fraction(10, 3), 15),
    ("gaussian", Fraction(1, 3), 2),
    ("gaussian", Fraction(4), 6),
    ("gaussian", Fraction(10, 3), 5),
    ("gaussian", Fraction(900), 90),
]


def sample(source: NoiseSource, law: str, parameter: Fraction, n: int) -> np.ndarray:
    return np.asarray(source.laplace(parameter, n) if law == "laplace" else source.gaussian(parameter, n))


@pytest.mark.parametrize(("law", "parameter", "reach"), CASES, ids=str)
def test_seeded_sampler_has_the_law(law: str, parameter: Fraction, reach: int) -> None:
    # 200,000 draws: a scale off by 1 % moves the statistic by far more than its spread at the level 1e-4 per case.
    pmf = discrete.log_pmf_laplace if law == "laplace" else discrete.log_pmf_gaussian
    draws = sample(SeededNoise(11), law, parameter, 200_000)
    assert fit_pvalue(draws, lambda y: pmf(y, parameter), reach) > 1e-4
    near_miss = sample(SeededNoise(11), law, parameter * Fraction(26, 25), 200_000)
    assert fit_pvalue(near_miss, lambda y: pmf(y, parameter), reach) < 1e-4


@pytest.mark.parametrize(("law", "parameter", "reach"), [CASES[1], CASES[4]], ids=str)
def test_opendp_and_own_sampler_have_one_law(law: str, parameter: Fraction, reach: int) -> None:
    """OpenDP is the oracle; its entropy cannot be seeded, so the level is 1e-6 per case."""
    pytest.importorskip("opendp", reason="the oracle is optional")
    theirs = sample(OpenDPNoise(), law, parameter, 10_000)
    ours = sample(SeededNoise(3), law, parameter, 400_000)
    table = np.stack([bins_of(theirs, reach), bins_of(ours, reach)])
    assert stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue > 1e-6
    halved = bins_of(sample(SeededNoise(3), law, parameter / 2, 400_000), reach)
    table[1] = halved
    assert stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue < 1e-6


@pytest.mark.parametrize("scale", [2.0**30, 2.0**49])
def test_wide_laws_have_their_moments_and_residues(scale: float) -> None:
    draws = np.asarray(SeededNoise(5).laplace(laplace_scale(scale), 100_000)).astype(float)
    assert stats.kstest(draws / scale, stats.laplace.cdf).pvalue > 1e-4
    wide = np.asarray(SeededNoise(6).gaussian(gaussian_variance(scale**2), 100_000))
    assert stats.kstest(wide / scale, stats.norm.cdf).pvalue > 1e-4
    assert stats.chisquare(np.bincount(wide % 8)).pvalue > 1e-4  # the low bits carry noise too


# --- twins -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["laplace", "gaussian"]),
    st.fractions(min_value=Fraction(1, 50), max_value=5000, max_denominator=64),
    st.integers(0, 2**32),
)
def test_machine_integers_give_what_python_integers_give(law: str, parameter: Fraction, seed: int) -> None:
    fast = sample(SeededNoise(seed), law, parameter, 20)
    words = SeededNoise(seed)._words
    stream = noise._Stream(words(24 * 20 + 64), words)
    draw = discrete.laplace if law == "laplace" else discrete.gaussian
    slow = [draw(stream.below, parameter.numerator, parameter.denominator) for _ in range(20)]
    # The first words are common; past them the two ask for fresh words in different amounts.
    same = int(np.argmin(np.append(fast == slow, False)))
    assert same >= 15


def test_integer_sigma_takes_another_path_to_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    special = np.asarray(SeededNoise(1).gaussian(Fraction(900), 100_000))
    monkeypatch.setattr(math, "isqrt", lambda n, isqrt=math.isqrt: isqrt(n) + (n == 900))  # hide that 900 is a square
    general = np.asarray(SeededNoise(2).gaussian(Fraction(900), 100_000))
    assert stats.ks_2samp(special, general).pvalue > 1e-3


def test_big_integers_take_over_without_losing_a_draw() -> None:
    """A kernel that stops for width at every sample still ends with the law: the words of a sample are not dropped."""
    parameter = Fraction(2**40 + 1, 2**31)  # about 512, with products past 64 bits
    assert noise._checked_variance(parameter) == parameter
    draws = np.asarray(SeededNoise(8).gaussian(parameter, 3000))
    assert stats.kstest(draws / math.sqrt(parameter), stats.norm.cdf).pvalue > 1e-3


def test_no_sample_is_favoured_for_needing_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words in many short pools: dropping those of an unfinished sample would thin out the large values."""
    source = SeededNoise(9)
    generator = source._generator
    monkeypatch.setattr(source, "_words", lambda count: generator.integers(0, 2**64, min(count, 6), dtype=np.uint64))
    draws = np.asarray(source.laplace(Fraction(3), 20_000))
    assert fit_pvalue(draws, lambda y: discrete.log_pmf_laplace(y, 3), 14) > 1e-4


# --- rounding --------------------------------------------------------------------------------------------------------


@given(st.fractions(min_value=Fraction(1, 10**6), max_value=2**50))
@settings(deadline=None)  # the machine may be busy
def test_scales_are_rounded_up_and_by_little(scale: Fraction) -> None:
    rounded = laplace_scale(scale)
    assert scale <= rounded <= scale * (1 + Fraction(1, 2**39))
    assert Fraction(float(rounded)) == rounded  # OpenDP gets the very same scale
    assert laplace_scale(rounded) == rounded


@given(st.fractions(min_value=Fraction(1, 10**6), max_value=2**80))
@settings(deadline=None)  # the machine may be busy
def test_variances_are_rounded_up_and_by_little(variance: Fraction) -> None:
    rounded = gaussian_variance(variance)
    slack = Fraction(1, 2**23) if variance <= 2**24 else Fraction(1, 2**10)
    assert variance <= rounded <= variance * (1 + slack)
    assert gaussian_variance(rounded) == rounded


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, 2**50 + 1])
def test_scales_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        laplace_scale(bad)
    if bad == 2**50 + 1:
        bad = 2**100 + 1
    with pytest.raises(ValueError, match="variance must be"):
        gaussian_variance(bad)


def test_types_and_sizes_are_checked() -> None:
    with pytest.raises(TypeError, match="scale must be an integer, a float or a Fraction, got str"):
        laplace_scale("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got bool"):
        laplace_scale(True)
    for size in (-1, (2, -1), 1.5):
        with pytest.raises(ValueError, match="size must be"):
            ExactNoise().laplace(Fraction(1), size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind must be"):
        noise_source("float")  # type: ignore[arg-type]


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "exact", "opendp"])
def test_sources_keep_the_interface(kind: str) -> None:
    if kind == "opendp":
        pytest.importorskip("opendp", reason="the oracle is optional")
    source = noise_source(kind)  # type: ignore[arg-type]
    assert isinstance(source, NoiseSource)
    assert not source.seeded
    for draws in (source.laplace(Fraction(5), (3, 4)), source.gaussian(Fraction(5), (3, 4))):
        assert draws.shape == (3, 4)
        assert draws.dtype == np.int64
    assert source.laplace(Fraction(5), 0).shape == (0,)
    first, second = source.laplace(laplace_scale(1e12), 2), source.laplace(laplace_scale(1e12), 2)
    assert (first != second).all()
    refuse_seeded(source, first)


def test_auto_draws_long_vectors_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opendp", reason="without it there is nothing to choose")
    source = noise_source()
    assert source.name == "opendp, exact"
    monkeypatch.setattr(noise, "_opendp_draw", lambda law, scale, size: np.full(size, 7))
    assert (source.laplace(Fraction(3), 9_999) == 7).all()
    assert (source.laplace(Fraction(3), 10_000) != 7).any()


def test_without_opendp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert noise_source().name == "exact"
    with pytest.raises(MissingDependencyError, match=r"assay\[privacy\]"):
        noise_source("opendp")


def test_seeded_noise_is_repeatable_marked_and_refused() -> None:
    first, second = SeededNoise(1).laplace(Fraction(9), 50), SeededNoise(1).laplace(Fraction(9), 50)
    assert (first == second).all()
    assert (first != SeededNoise(2).laplace(Fraction(9), 50)).any()
    released = np.arange(50) + 0.5 * first  # the mark survives what a mechanism does with its noise
    for thing in (SeededNoise(1), first, released, np.cumsum(released)):
        with pytest.raises(SeededNoiseError, match="seeded noise"):
            refuse_seeded(thing)
    refuse_seeded(np.arange(3), ExactNoise())


# --- quantisation ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(allow_nan=False), max_size=30), st.integers(1, 40))
@settings(deadline=None)  # the machine may be busy
def test_quantising_is_per_value_and_clamps(values: list[float], bits: int) -> None:
    grid = Grid(-2.0, 3.0, bits)
    found = quantise(values, grid)
    assert found.values.dtype == np.int64
    assert all(0 <= value <= grid.top for value in found.values)
    assert [int(quantise([value], grid).values[0]) for value in values] == found.values.tolist()
    assert found.n_clamped == sum(not -2.0 <= value <= 3.0 for value in values)
    inside = np.clip(np.array(values), -2.0, 3.0)
    assert np.all(np.abs(restore(found.values, grid) - inside) <= grid.step / 2 * (1 + 1e-9) + 1e-12)


def test_quantising_refuses_what_has_no_place() -> None:
    grid = Grid(0.0, 1.0)
    with pytest.raises(ValueError, match="NaN"):
        quantise([0.5, math.nan], grid)
    with pytest.raises(TypeError, match="real numbers"):
        quantise(["a"], grid)
    for low, high in [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf), (-1e308, 1e308)]:
        with pytest.raises(ValueError, match="low"):
            Grid(low, high)
    for bits in (0, 41, True, 2.0):
        with pytest.raises(ValueError, match="bits"):
            Grid(0.0, 1.0, bits)  # type: ignore[arg-type]
