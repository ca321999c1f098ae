"""The baselines: their quantiles and recursions by hand, and the guarantees that hold for any data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.conformal import ACI, SPCI, ConformalPID, DtACI, EnbPI, ShortCalibrationWarning, SplitConformal
from assay.conformal._sequence import attainable, upper_quantile
from assay.conformal.evaluation import coverage, covered, mean_width, rolling_coverage, standard_error, winkler_score
from assay.conformal.pid import autoregressive_scorecast


def noise(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1)), rng.normal(size=n)


def explosion(n: int, train: int) -> tuple[np.ndarray, np.ndarray]:
    """Quiet while training, then growing without end: exchangeability is gone."""
    x, y = noise(n, 1)
    y[train:] *= np.exp(0.01 * np.arange(n - train))
    return x, y


@given(st.integers(1, 60), st.floats(0.01, 0.9))
@settings(max_examples=200, deadline=None)
def test_the_upper_quantile_by_counting_and_attainable_when_it_says_so(m: int, alpha: float) -> None:
    scores = np.sort(np.random.default_rng(m).normal(size=m))
    found = upper_quantile(scores, alpha)
    enough = [s for s in scores if (scores <= s).sum() >= (m + 1) * (1 - alpha) - 1e-9]
    assert found == (enough[0] if enough else math.inf)
    assert (m >= attainable(alpha)) == math.isfinite(found)


def test_attainable_at_round_levels() -> None:
    assert [attainable(alpha) for alpha in (0.5, 0.2, 0.1, 0.05, 0.01)] == [1, 4, 9, 19, 99]


def test_split_covers_exchangeable_data() -> None:
    """39 rows calibrate: coverage is Beta(36, 4) over splits, mean 90 %.

    Its sd with 300 test rows is 0.05, that of the mean of 300 splits 0.0029; four of them, a false alarm in 15,000.
    Near-miss: one rank lower, the quantile without its finite-sample correction, has mean 87.5 %.
    """
    shares, plain = [], []
    for seed in range(300):
        x, y = noise(378, seed)
        model = SplitConformal(random_state=0).fit(x[:78], y[:78])
        centre, ends = model.predict(x[78:])
        shares.append(coverage(y[78:], ends)[0])
        plain.append((np.abs(y[78:] - centre) <= model._scores[34]).mean())
    assert abs(np.mean(shares) - 0.9) < 0.0117
    assert np.mean(plain) < 0.9 - 0.0117


def test_split_ignores_updates_but_checks_them() -> None:
    x, y = noise(60, 2)
    model = SplitConformal(calibration=0.25).fit(x, y)
    before = model.predict(x)[1]
    np.testing.assert_array_equal(model.update(x, y + 9).predict(x)[1], before)
    assert len(model._scores) == 15
    with pytest.raises(ValueError, match="NaN"):
        model.update(x, np.full(60, np.nan))
    with pytest.raises(ValueError, match=r"calibration must be a number in \(0, 1\)"):
        SplitConformal(calibration=1.0).fit(x, y)
    with pytest.warns(ShortCalibrationWarning, match="8 residuals are too few for alpha=0.1.*until there are 9"):
        assert np.isinf(SplitConformal().fit(x[:16], y[:16]).predict(x)[1]).all()


def test_enbpi_by_definition() -> None:
    """Of five pairs of empirical quantiles of the last 25 residuals the closest."""
    x, y = noise(80, 3)
    model = EnbPI(n_bootstraps=5, window=25, alpha=0.2, random_state=1).fit(x[:60], y[:60]).update(x[60:70], y[60:70])
    point, intervals = model.predict(x[70:71])
    last = np.sort(model._residuals[0, -25:])
    pairs = []
    for beta in (0.0, 0.05, 0.1, 0.15, 0.2):
        low, high = (last[max(math.ceil(level * 25 - 1e-9), 1) - 1] for level in (beta, 0.8 + beta))
        pairs.append((high - low, point[0] + low, point[0] + high))
    assert tuple(intervals[0, :, 0]) == pytest.approx(min(pairs)[1:])
    with pytest.raises(ValueError, match="window must be at least 9"):
        EnbPI(window=8).fit(x, y)
    with pytest.raises(ValueError, match="n_betas must be odd"):
        EnbPI(n_betas=2).fit(x, y)


@pytest.mark.parametrize("gamma", [0.02, 0.2])
def test_the_guarantee_of_aci_for_any_data(gamma: float) -> None:
    """|misses / T - alpha| <= (max(alpha, 1 - alpha) + gamma) / (gamma T), on data that break the other's guarantee."""
    x, y = explosion(900, 200)
    model = ACI(n_bootstraps=5, gamma=gamma, random_state=1).fit(x[:200], y[:200])
    missed = 1 - coverage(y[200:], model.backtest(x[200:], y[200:])[1])[0]
    bound = (0.9 + gamma) / (gamma * 700)
    assert abs(missed - 0.1) <= bound
    still = 1 - coverage(y[200:], SplitConformal(random_state=1).fit(x[:200], y[:200]).backtest(x[200:], y[200:])[1])[0]
    assert still - 0.1 > bound


def test_aci_by_hand() -> None:
    x, y = noise(60, 4)
    model = ACI(n_bootstraps=3, window=20, alpha=0.3, gamma=0.1, random_state=1).fit(x[:40], y[:40])
    level, scores = 0.3, list(np.abs(model._scores))
    for row in range(40, 60):
        point, intervals = model.predict(x[row : row + 1])
        ordered = sorted(scores[-20:])
        rank = math.ceil(21 * (1 - level) - 1e-9)
        half = math.inf if rank > 20 else ordered[rank - 1] if rank >= 1 else 0.0
        assert intervals[0, 1, 0] - point[0] == pytest.approx(half)
        score = abs(y[row] - point[0])
        level += 0.1 * (0.3 - (score > half or rank < 1))
        scores.append(score)
        model.update(x[row : row + 1], y[row : row + 1])
    with pytest.raises(ValueError, match="gamma must be"):
        ACI(gamma=0).fit(x, y)


def test_dtaci_with_one_expert_is_aci() -> None:
    x, y = explosion(300, 100)
    one = DtACI(n_bootstraps=3, gammas=[0.05], random_state=1).fit(x[:100], y[:100]).backtest(x[100:], y[100:])[1]
    plain = ACI(n_bootstraps=3, gamma=0.05, random_state=1).fit(x[:100], y[:100]).backtest(x[100:], y[100:])[1]
    np.testing.assert_allclose(one, plain)


def test_dtaci_by_hand_and_infinite_only_where_its_level_is_at_zero() -> None:
    """Weights, loss and levels of Gibbs and Candes (2024) written out, on errors that come in bursts.

    A level that were clipped at 0 would give the widest finite interval instead: the near-miss.
    """
    x, y = noise(400, 9)
    y[200:][np.arange(200) % 40 < 8] *= 6
    model = DtACI(n_bootstraps=3, random_state=1).fit(x[:200], y[:200])
    gammas, scores = np.array(model.gammas), list(model._scores)
    alpha, k, span = 0.1, len(gammas), 100
    moment = ((1 - alpha) ** 2 * alpha**3 + alpha**2 * (1 - alpha) ** 3) / 3
    eta, spread = math.sqrt((math.log(k * span) + 2) / (span * moment)), 1 / (2 * span)
    levels, weights = np.full(k, alpha), np.ones(k)
    infinite = 0
    for row in range(200, 400):
        level = float(levels @ weights / weights.sum())
        point, intervals = model.predict(x[row : row + 1])
        ordered = sorted(scores[-200:])
        rank = math.ceil(201 * (1 - level) - 1e-9)
        assert (intervals[0, 1, 0] == math.inf) == (rank > 200) == (level < 1 / 201)
        infinite += rank > 200
        if rank <= 200:
            assert intervals[0, 1, 0] - point[0] == pytest.approx(ordered[rank - 1])
        score = abs(y[row] - point[0])
        beta = 1 - sum(one < score for one in ordered) / 201
        loss = [alpha * (beta - one) - min(0.0, beta - one) for one in levels]
        grown = weights * np.exp(-eta * np.array(loss))
        weights = (1 - spread) * grown + spread * grown.sum() / k
        levels = levels + gammas * (alpha - (levels >= beta))
        scores.append(score)
        model.update(x[row : row + 1], y[row : row + 1])
    assert infinite > 0


def test_dtaci_follows_where_a_small_step_does_not() -> None:
    """Growing data: near 90 %, where ACI with the smallest of the step sizes falls behind."""
    x, y = explosion(900, 200)
    model = DtACI(n_bootstraps=3, random_state=1).fit(x[:200], y[:200])
    found = coverage(y[200:], model.backtest(x[200:], y[200:])[1])[0]
    np.testing.assert_allclose(model._weights.sum(axis=1), 1)
    slow = ACI(n_bootstraps=3, gamma=0.001, random_state=1).fit(x[:200], y[:200]).backtest(x[200:], y[200:])[1]
    assert abs(found - 0.9) < 0.04 < 0.9 - coverage(y[200:], slow)[0]
    for gammas in ([], [0.1, -1.0], [np.nan]):
        with pytest.raises(ValueError, match="gammas must be positive"):
            DtACI(gammas=gammas).fit(x, y)


def test_pid_by_hand() -> None:
    """P and I alone: q moves by 0.1 B (miss - alpha), and the integrator adds K tan(sum log(t + 1) / (C (t + 1)))."""
    x, y = noise(90, 6)
    model = ConformalPID(
        n_bootstraps=3, alpha=0.2, window=30, scorecaster=None, integral_gain=2.0, saturation=0.5, random_state=1
    ).fit(x[:60], y[:60])
    track, total = float(model._track[0]), 0.0
    scores = list(model._scores)
    for t, row in enumerate(range(60, 90)):
        point, intervals = model.predict(x[row : row + 1])
        angle = total * math.log(t + 1) / (0.5 * (t + 1))
        half = track + (2 * math.tan(angle) if abs(angle) < math.pi / 2 else math.copysign(math.inf, angle))
        assert intervals[0, 1, 0] - point[0] == pytest.approx(max(half, 0))
        score = abs(y[row] - point[0])
        missed = score > half
        track += 0.1 * max(scores[-30:]) * (missed - 0.2)
        total += missed - 0.2
        scores.append(score)
        model.update(x[row : row + 1], y[row : row + 1])


@pytest.mark.parametrize("scorecaster", [None, "autoregressive", lambda scores: (np.zeros(len(scores)), 0.0)])
def test_pid_keeps_its_rate_after_a_change(scorecaster: Any) -> None:
    """Errors four times as large: misses within 3 points of 10 % over 700 steps, where the split misses most."""
    x, y = noise(900, 10)
    y[200:] *= 4
    model = ConformalPID(n_bootstraps=3, scorecaster=scorecaster, random_state=1).fit(x[:200], y[:200])
    assert abs(coverage(y[200:], model.backtest(x[200:], y[200:])[1])[0] - 0.9) < 0.03
    assert coverage(y[200:], SplitConformal().fit(x[:200], y[:200]).predict(x[200:])[1])[0] < 0.5
    with pytest.raises(ValueError, match="scorecaster must be"):
        ConformalPID(scorecaster="theta").fit(x, y)


def test_the_scorecaster_is_least_squares() -> None:
    rng = np.random.default_rng(7)
    scores = rng.normal(size=200)
    for i in range(2, 200):
        scores[i] += 0.6 * scores[i - 1] - 0.2 * scores[i - 2]
    fitted, following = autoregressive_scorecast(scores, order=2)
    design = np.array([[1, scores[i - 2], scores[i - 1]] for i in range(2, 201)])
    weights = np.linalg.pinv(design[:-1]) @ scores[2:]
    np.testing.assert_allclose(fitted[2:], design[:-1] @ weights)
    assert following == pytest.approx(design[-1] @ weights)
    assert autoregressive_scorecast(scores[:5], order=2)[1] == pytest.approx(scores[:5].mean())
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="scores must be"):
            autoregressive_scorecast(bad)


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_the_winkler_score_by_definition() -> None:
    rng = np.random.default_rng(8)
    y = rng.normal(size=50)
    ends = np.sort(rng.normal(size=(50, 2, 3)), axis=1)
    alpha = np.array([0.1, 0.2, 0.5])
    for k in range(3):
        each = []
        for t in range(50):
            low, high = ends[t, :, k]
            penalty = 2 / alpha[k] * (low - y[t]) if y[t] < low else 2 / alpha[k] * (y[t] - high) if y[t] > high else 0
            each.append(high - low + penalty)
        assert winkler_score(y, ends, alpha)[k] == pytest.approx(np.mean(each))
    hits = covered(y, ends)
    np.testing.assert_allclose(rolling_coverage(y, ends, 10)[3], hits[3:13].mean(axis=0))
    np.testing.assert_allclose(mean_width(ends), (ends[:, 1] - ends[:, 0]).mean(axis=0))
    assert standard_error(0.9, 100) == pytest.approx(0.03)


def test_the_true_quantiles_have_the_best_winkler_score() -> None:
    """Gaussian truth, 20,000 rows: any of these other intervals is worse by more than five standard errors."""
    y = np.random.default_rng(9).normal(size=20_000)

    def score(low: float, high: float) -> float:
        return winkler_score(y, np.tile([low, high], (len(y), 1)), 0.1)[0]

    best = score(-1.645, 1.645)
    assert best < min(score(-1.3, 1.3), score(-2.2, 2.2), score(-1.3, 2.1)) - 0.05


@pytest.mark.parametrize(
    ("y", "ends", "message"),
    [
        ([1.0], [[0.0, 1.0], [0.0, 1.0]], r"intervals must have shape \(1, 2\)"),
        ([np.nan], [[0.0, 1.0]], "y must be finite"),
        ([], np.empty((0, 2)), "y must be finite"),
        ([1.0], [[2.0, 1.0]], "lower ends at most"),
        ([1.0], [[np.nan, 1.0]], "no NaN"),
    ],
)
def test_bad_intervals(y: Any, ends: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coverage(y, ends)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="alpha must be 1 levels"):
        winkler_score([1.0], [[0.0, 1.0]], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"window must be in 1\.\.1"):
        rolling_coverage([1.0], [[0.0, 1.0]], 2)
    assert issubclass(ShortCalibrationWarning, UserWarning)
    assert SPCI().get_params()["window"] == 100
