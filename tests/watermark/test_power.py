"""Token counts against enumeration of every sequence, independent tail code, closed forms and simulation."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import integrate, special, stats

from assay.detection.tails import log_weighted_exponential_cdf
from assay.watermark import _iid, _inversion, _scores, _types, power, ump

LAWS = ([0.75, 0.25], [0.9, 0.1], [0.6, 0.3, 0.1], [0.4, 0.2, 0.2, 0.2])


def sequences(law, n):
    """Every sequence of n tokens, as rows of token probabilities."""
    return np.array(list(itertools.product(law, repeat=n)))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_sequence_errors_equal_enumeration(law, n):
    rho = sequences(law, n).prod(axis=1)
    for alpha in (1e-3, 0.05, 0.5):
        assert power.type2_error(law, n, alpha, "ump").value == pytest.approx(ump.type2_error(rho, alpha), abs=1e-12)
        assert power.type2_error(law, n, alpha, "race").value == pytest.approx(
            ump.race_type2_error(rho, alpha), abs=1e-12
        )


@pytest.mark.parametrize("test", ["ump", "race"])
def test_lattice_bracket_holds_the_exact_value(test, monkeypatch):
    law = [0.6, 0.25, 0.1, 0.05]
    exact = {n: power.type2_error(law, n, 1e-4, test) for n in (1, 5, 10, 15)}
    monkeypatch.setattr(_types, "MAX_ATOMS", 0)
    for n, one in exact.items():
        assert one.method == "exact"
        bracket = power.type2_error(law, n, 1e-4, test)
        assert bracket.method == "bracket"
        assert abs(bracket.value - one.value) <= bracket.error < 2e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("test", "e_value"), [("gumbel-model-aware", False), ("gumbel-e-value", True)])
def test_model_aware_errors_equal_enumeration_with_other_tail_code(law, test, e_value):
    from scipy.optimize import brentq

    n, alpha = 4, 0.02
    cache: dict[tuple[float, ...], float] = {}
    total = 0.0
    for p in sequences(law, n):
        key = tuple(sorted(p))
        if key not in cache:
            weights = 1 / p - 1
            if e_value:
                bound = math.log(alpha) - np.sum(np.log(p))
            else:
                bound = math.exp(
                    brentq(lambda s, w=weights: log_weighted_exponential_cdf(w, math.exp(s)) - math.log(alpha), -30, 30)
                )
            hit = math.exp(log_weighted_exponential_cdf(1 - p, bound)) if bound > 0 else 0.0
            cache[key] = 1 - hit
        total += p.prod() * cache[key]
    assert power.type2_error(law, n, alpha, test).value == pytest.approx(total, abs=1e-8)


def test_gamma_sums_against_mpmath_and_the_gamma_law():
    # One group is a Gamma law.
    value, _ = _inversion.log_gamma_sum_cdf(np.array([3.0]), np.array([0.5]), np.array([[7]]))
    assert value[0] == pytest.approx(math.log(special.gammainc(7, 6.0)), abs=1e-11)
    # Distinct weights: the hypoexponential sum, in 60 digits.
    weights = np.array([0.3, 1.7, 9.0, 40.0])
    with mpmath.workdps(60):
        rates = [1 / mpmath.mpf(w) for w in ("0.3", "1.7", "9", "40")]
        for s in ("1e-9", "0.01", "2", "70", "500"):
            total = mpmath.mpf(1)
            for i, a in enumerate(rates):
                others = mpmath.fprod(b / (b - a) for j, b in enumerate(rates) if j != i)
                total -= others * mpmath.exp(-a * mpmath.mpf(s))
            value, elasticity = _inversion.log_gamma_sum_cdf(np.array([float(s)]), weights, np.ones((1, 4)))
            assert value[0] == pytest.approx(float(mpmath.log(total)), abs=1e-9)
            up, _ = _inversion.log_gamma_sum_cdf(np.array([float(s) * 1.0001]), weights, np.ones((1, 4)))
            assert elasticity[0] == pytest.approx((up[0] - value[0]) / math.log(1.0001), rel=1e-3, abs=1e-6)
    quantile = _inversion.gamma_sum_quantile(math.log(1e-30), weights, np.array([[3, 1, 4, 1], [0, 2, 0, 50]]))
    back, _ = _inversion.log_gamma_sum_cdf(np.exp(quantile), weights, np.array([[3, 1, 4, 1], [0, 2, 0, 50]]))
    np.testing.assert_allclose(back, math.log(1e-30), atol=1e-9)


@pytest.mark.parametrize("p", [[0.9, 0.1], [0.97, 0.02, 0.00999, 1e-5]])
def test_score_sums_against_direct_integration(p):
    p = np.array(p)
    for s in (0.5, 3.0, 12.0):

        def cdf(y):
            return np.sum(p * (1 - np.exp(-y)) ** (1 / p))

        def density(y):
            return np.sum((1 - np.exp(-y)) ** (1 / p - 1)) * math.exp(-y)

        assert _scores.score_cdf(s, p, p, 1) == pytest.approx(cdf(s), abs=1e-9)
        two, _ = integrate.quad(lambda y, s=s: density(y) * cdf(s - y), 0, s, epsabs=1e-11, limit=200)
        assert _scores.score_cdf(s, p, p, 2) == pytest.approx(two, abs=1e-7)


def test_long_and_short_score_sums_agree(monkeypatch):
    # Laplace inversion and lattice convolution share nothing but the transform's definition.
    p = np.array([0.9, 0.07, 0.02, 0.009, 0.001])
    texts = np.random.default_rng(1).choice(p, size=(3, 20))
    lattice = {}
    monkeypatch.setattr(_scores, "_SHORT", 1000)
    for s in (8.0, 20.0):
        lattice[s] = [_scores.score_cdf(s, p, p, 20), *(_scores.score_cdf_given(s, text) for text in texts)]
    monkeypatch.setattr(_scores, "_SHORT", 16)
    for s, values in lattice.items():
        inverted = [_scores.score_cdf(s, p, p, 20), *(_scores.score_cdf_given(s, text) for text in texts)]
        np.testing.assert_allclose(inverted, values, atol=_scores.ERROR)
    # Equal tokens in all texts: the two laws coincide.
    assert _scores.score_cdf(30.0, np.array([0.5]), np.array([1.0]), 20) == pytest.approx(
        _scores.score_cdf_given(30.0, np.full(20, 0.5)), abs=1e-12
    )


def green_by_enumeration(law, gamma, delta):
    """Average over all green sets."""
    total = 0.0
    for green in itertools.product([0, 1], repeat=len(law)):
        weight = np.prod([gamma if g else 1 - gamma for g in green])
        mass = float(np.dot(law, green))
        chance = float(mass > 0) if math.isinf(delta) else math.exp(delta) * mass / (1 + math.expm1(delta) * mass)
        total += weight * chance
    return total


def test_green_chance_equals_enumeration_of_green_sets():
    rng = np.random.default_rng(2)
    for delta in (1e-6, 0.5, 2.0, 10.0, 30.0, math.inf):
        for law in ([1.0], [0.99, 0.01], rng.dirichlet(np.full(9, 0.3)), [0.2] * 5):
            for gamma in (0.1, 0.5):
                expected = green_by_enumeration(law, gamma, delta)
                assert power.green_chance(law, gamma, delta) == pytest.approx(expected, abs=1e-11)


def test_green_list_count_is_the_first_that_suffices():
    found = power.tokens_needed([0.8, 0.2], 1e-3, 0.1, "green-list", gamma=0.5, delta=2.0)
    chance = green_by_enumeration([0.8, 0.2], 0.5, 2.0)

    def missed(n):
        # Smallest rejected count, found by looking at every one.
        rejected = next(g for g in range(n + 2) if stats.binom.sf(g - 1, n, 0.5) <= 1e-3)
        return stats.binom.cdf(rejected - 1, n, chance)

    assert missed(found.tokens) == pytest.approx(found.type2_error, abs=1e-12)
    assert found.type2_error <= 0.1
    assert all(missed(n) > 0.1 for n in range(1, found.tokens))


def test_green_list_threshold_far_below_machine_precision():
    # In 60 digits: the last count kept, at levels where scipy's inverse survival function returns n.
    from assay.watermark._green import last_kept

    n, gamma = 400, mpmath.mpf(1) / 4
    with mpmath.workdps(60):
        law = [mpmath.binomial(n, k) * gamma**k * (1 - gamma) ** (n - k) for k in range(n + 1)]
        for alpha in (0.05, 1e-15, 1e-20, 1e-60, 1e-200):
            kept = int(last_kept(n, 0.25, alpha))
            assert mpmath.fsum(law[kept + 1 :]) <= alpha < mpmath.fsum(law[kept:])
    few = power.tokens_needed([0.5, 0.5], 1e-20, 0.1, "green-list")
    more = power.tokens_needed([0.5, 0.5], 1e-40, 0.1, "green-list")
    assert few.tokens < more.tokens < 3 * few.tokens


@pytest.mark.parametrize(
    ("d", "alpha", "n_ump", "n_race"),
    [
        (0.25, 1e-3, 16, 17),
        (0.25, 1e-6, 29, 31),
        (0.10, 1e-3, 34, 35),
        (0.10, 1e-6, 61, 62),
        (0.05, 1e-3, 64, 66),
        (0.02, 1e-3, 138, 151),
        (0.01, 1e-3, 230, 274),
        (0.01, 1e-6, 432, 455),
    ],
)
def test_reference_table(d, alpha, n_ump, n_race):
    law = [1 - d, d]
    for test, expected in (("ump", n_ump), ("race", n_race)):
        found = power.tokens_needed(law, alpha, 0.1, test)
        assert (found.tokens, found.method) == (expected, "exact")
        # Smallest: direct sums over the number of rare tokens, one token apart.
        for n in (expected - 1, expected):
            rare = np.arange(n + 1)
            log_rho = rare * math.log(d) + (n - rare) * math.log(1 - d)
            threshold = alpha if test == "ump" else -math.log1p(-alpha)
            ratio = np.exp(np.minimum(math.log(threshold) - log_rho, 700))
            loss = np.maximum(0.0, 1 - ratio) if test == "ump" else np.exp(-ratio)
            assert (np.sum(stats.binom.pmf(rare, n, d) * loss) <= 0.1) == (n == expected)


@pytest.mark.parametrize(("d", "alpha"), [(0.25, 1e-3), pytest.param(0.01, 1e-3, marks=pytest.mark.slow)])
def test_gumbel_errors_against_simulation(d, alpha):
    # Watermarked texts drawn token by token, exact p-values by other code. Four-sigma bands on 400 texts (0.06).
    rng = np.random.default_rng(3)
    size = 400
    for test in ("gumbel-model-aware", "gumbel-e-value", "gumbel-sum"):
        n = min(power.tokens_needed([1 - d, d], alpha, 0.1, test).tokens, 2000)
        missed = 0
        for _ in range(size):
            p = np.where(rng.random(n) < d, d, 1 - d)
            u = rng.random(n) ** p
            statistic = float(np.sum((1 / p - 1) * -np.log(u)))
            if test == "gumbel-sum":
                missed += special.gammaincc(n, -np.log1p(-u).sum()) > alpha
            elif test == "gumbel-e-value":
                missed += -np.log(p).sum() - statistic < -math.log(alpha)
            else:
                missed += log_weighted_exponential_cdf(1 / p - 1, statistic) > math.log(alpha)
        predicted = power.type2_error([1 - d, d], n, alpha, test).value
        band = 4 * math.sqrt(predicted * (1 - predicted) / size)
        assert abs(missed / size - predicted) < band
        # Near-miss: a text a quarter shorter is told apart.
        if n < 2000:
            assert abs(missed / size - power.type2_error([1 - d, d], 3 * n // 4, alpha, test).value) > band


def test_errors_fall_with_length_and_the_limit_is_a_limit():
    law = [0.8, 0.15, 0.05]
    previous = {}
    for n in range(1, 40, 6):
        errors = {test: power.type2_error(law, n, 1e-3, test).value for test in power.TESTS}
        # The green list changes the law of the text, so the distortion-free limit does not bind it.
        assert all(errors["ump"] <= errors[test] + 1e-7 for test in power.TESTS if test != "green-list")
        assert errors["gumbel-model-aware"] <= errors["gumbel-e-value"] + 1e-9
        assert errors["race"] <= errors["ump"] + math.exp(-1)
        for test in ("ump", "race", "gumbel-model-aware", "gumbel-sum"):
            assert errors[test] <= previous.get(test, 1.0) + 2e-7
        previous = errors


def test_many_distinct_probabilities_by_simulation(monkeypatch):
    law = [0.7, 0.15, 0.1, 0.05]
    exact = {t: power.type2_error(law, 25, 1e-3, t) for t in ("gumbel-model-aware", "gumbel-e-value")}
    monkeypatch.setattr(_types, "MAX_TYPES", 0)
    monkeypatch.setattr(_types, "MAX_GROUPS", 0)
    for test, one in exact.items():
        assert one.method == "inversion"
        simulated = power.type2_error(law, 25, 1e-3, test, seed=4)
        assert simulated.method == "monte-carlo"
        assert simulated.error == pytest.approx(math.sqrt(one.value * (1 - one.value) / _iid.DRAWS), rel=0.2)
        assert abs(simulated.value - one.value) < 4 * simulated.error


def test_a_real_vocabulary():
    law = 1 / np.arange(1, 501) ** 1.3
    law /= law.sum()
    counts = {test: power.tokens_needed(law, 1e-6, 0.05, test) for test in ("ump", "race", "gumbel-sum", "green-list")}
    assert counts["ump"].tokens <= counts["race"].tokens <= counts["gumbel-sum"].tokens
    assert counts["gumbel-sum"].tokens < counts["green-list"].tokens
    assert all(c.type2_error <= 0.05 for c in counts.values())
    assert power.tokens_needed(np.full(50_000, 2e-5), 1e-6, 0.05).tokens == 2  # 10.8 nats a token, 13.8 needed


def test_plan_is_the_average_of_the_exact_errors_of_its_texts():
    d, alpha = 0.25, 1e-3
    rng = np.random.default_rng(5)
    drawn = np.where(rng.random((8, 200)) < d, d, 1 - d)
    chance = power.green_chance([1 - d, d], 0.5, 3.0)
    texts = [power.TextProfile(p, np.full(200, 0.562), np.full(200, chance)) for p in drawn]
    made = power.plan(texts, alpha, 0.1, power.TESTS, gamma=0.5, curve_points=3)
    assert (made.texts, made.longest) == (8, 200)
    assert made.entropy == pytest.approx(0.562)
    for row in made.tests:

        def average(n, test=row.test):
            p = drawn[:, :n]
            if test == "ump":
                return np.mean(np.maximum(0.0, 1 - alpha / p.prod(axis=1)))
            if test == "race":
                return np.mean((1 - alpha) ** (1 / p.prod(axis=1)))
            if test == "green-list":  # here the same for all texts
                return power.type2_error([1 - d, d], n, alpha, "green-list", gamma=0.5, delta=3.0).value
            if test == "gumbel-sum":
                return np.mean([_scores.score_cdf_given(stats.gamma.isf(alpha, n), text) for text in p])
            # Tokens collapsed to two groups, where the plan treats each on its own.
            counts = np.column_stack([(p > 0.5).sum(axis=1), (p < 0.5).sum(axis=1)])
            groups = np.array([1 - d, d])
            return np.mean(_iid.conditional_type2_error(groups, counts, alpha, e_value=test == "gumbel-e-value"))

        assert row.type2_error == pytest.approx(average(row.tokens), abs=1e-8)
        assert row.type2_error <= 0.1 < average(row.tokens - 1)
        np.testing.assert_allclose(row.curve, [average(int(n)) for n in made.lengths], atol=1e-8)


def test_errors_given_the_text_average_to_those_of_the_token_law():
    # Over all types of 30 tokens, weighted by their probability: no sampling, so no tolerance for it.
    d, n, bound = 0.2, 30, 45.0
    given = [_scores.score_cdf_given(bound, np.r_[np.full(m, d), np.full(n - m, 1 - d)]) for m in range(n + 1)]
    average = np.dot(stats.binom.pmf(np.arange(n + 1), n, d), given)
    p = np.array([1 - d, d])
    assert average == pytest.approx(_scores.score_cdf(bound, p, p, n), abs=1e-9)


def test_plan_says_so_where_the_texts_are_too_short():
    text = power.TextProfile(np.full(20, 0.99))
    row = power.plan([text, text], 1e-6, 0.05, ["ump"]).tests[0]
    assert row.tokens is None
    assert row.type2_error == pytest.approx(1 - 1e-6 / 0.99**20)
    assert row.standard_error == 0.0
    assert math.isnan(power.plan([text], 1e-6, 0.05, ["ump"]).tests[0].standard_error)
    # A token of probability one carries nothing and breaks nothing.
    certain = power.TextProfile(np.r_[np.ones(10), np.full(40, 0.3)])
    for row in power.plan([certain], 1e-3, 0.1, ["ump", "gumbel-model-aware", "gumbel-sum"]).tests:
        assert 10 < row.tokens < 50


def test_profile_from_laws():
    laws = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    profile = power.profile_from_laws(laws, [1, 2], gamma=0.5, delta=1.0)
    np.testing.assert_allclose(profile.probabilities, [0.5, 0.5])
    np.testing.assert_allclose(profile.entropies, [math.log(2), stats.entropy([0.2, 0.3, 0.5])])
    np.testing.assert_allclose(profile.green_chances, [green_by_enumeration(law, 0.5, 1.0) for law in laws], atol=1e-12)


PROFILE = power.TextProfile(np.array([0.5, 0.5]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power.tokens_needed([0.5, 0.4], 0.1, 0.1), "token_law must sum to 1"),
        (lambda: power.tokens_needed([1.0], 0.1, 0.1), "at least two tokens"),
        (lambda: power.tokens_needed([0.5, 0.5], 0.0, 0.1), "alpha must be in"),
        (lambda: power.tokens_needed([0.5, 0.5], 0.1, 1.0), "beta must be in"),
        (lambda: power.tokens_needed([0.5, 0.5], 0.1, 1e-7, "gumbel-sum"), "beta must be at least 1e-06"),
        (lambda: power.tokens_needed([0.5, 0.5], 0.1, 0.1, "sum"), "test must be one of"),
        (lambda: power.tokens_needed([0.5, 0.5], 0.1, 0.1, "green-list", gamma=1.0), "gamma must be in"),
        (lambda: power.tokens_needed([0.5, 0.5], 0.1, 0.1, "green-list", delta=0.0), "delta must be greater than 0"),
        (lambda: power.type2_error([0.5, 0.5], 0, 0.1), "n must be a whole number in 1..1000000000, got 0"),
        (lambda: power.type2_error([0.5, 0.5], 10**400, 0.1), "n must be a whole number in 1..1000000000"),
        (lambda: power.plan([], 0.1, 0.1), "at least one text"),
        (lambda: power.plan([power.TextProfile(np.array([0.0]))], 0.1, 0.1), r"profiles\[0\].probabilities"),
        (lambda: power.plan([PROFILE], 0.1, 0.1, ["green-list"]), "needs green_chances"),
        (lambda: power.plan([PROFILE], 0.1, 0.1, ["nope"]), "test must be one of"),
        (lambda: power.plan([power.TextProfile(np.ones(2), np.ones(3))], 0.1, 0.1), r"profiles\[0\].entropies"),
        (lambda: power.profile_from_laws([[0.5, 0.5]], [2]), "tokens must be whole numbers in 0..1"),
        (lambda: power.profile_from_laws([[1.0, 0.0]], [1]), "positive probability"),
        (lambda: power.profile_from_laws([[0.5, 0.5]], [0, 1]), "laws must have shape"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
