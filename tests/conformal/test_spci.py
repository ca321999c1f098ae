"""SPCI: the loop, leave-one-out residuals, widths, several levels and steps, and what bad input does."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

from assay.conformal import ACI, SPCI, ConformalPID, DtACI, EnbPI, ShortCalibrationWarning, SplitConformal
from assay.conformal._ensemble import fit_ensemble, weighted_predictor
from assay.conformal.evaluation import coverage, mean_width


def series(n: int, seed: int, *, phi: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """y = 2 x + an autoregressive error that the base model cannot see."""
    rng = np.random.default_rng(seed)
    x, error = rng.normal(size=(n, 2)), rng.normal(size=n)
    for i in range(1, n):
        error[i] += phi * error[i - 1]
    return x, 2 * x[:, 0] + error


def small(**options: Any) -> SPCI:
    return SPCI(**{"n_bootstraps": 5, "window": 10, "alpha": 0.2, "random_state": 3, **options})


# --- the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refit_every": 4},
        {"horizon": 3},
        {"horizon": 3, "refit_every": 5, "alpha": [0.1, 0.3]},
        {"engine": "exact", "n_trees": 2},
    ],
)
def test_backtest_is_the_loop(options: dict[str, Any]) -> None:
    x, y = series(100, 1)
    whole = small(**options).fit(x[:80], y[:80])
    point, intervals = whole.backtest(x[80:], y[80:])
    loop = small(**options).fit(x[:80], y[:80])
    step = loop.horizon
    for first in range(80, 100, step):
        rows = slice(first, min(first + step, 100))
        seen = x[rows].copy()
        seen[1:] = np.nan  # with a horizon only the first row of a block is read
        centre, ends = loop.predict(seen if step > 1 else x[rows])
        again = loop.predict(seen if step > 1 else x[rows])[1]
        np.testing.assert_array_equal(ends, again)  # predict changes nothing
        np.testing.assert_allclose(centre, point[rows.start - 80 : rows.stop - 80], rtol=1e-12)
        np.testing.assert_allclose(ends, intervals[rows.start - 80 : rows.stop - 80], rtol=1e-12)
        loop.update(x[rows], y[rows])


def test_refitting_less_often_keeps_the_old_forest() -> None:
    """Between refits the forest rests on the old residuals: the first block equals that of never refitting."""
    x, y = series(120, 2)
    some, never = small(refit_every=10).fit(x[:80], y[:80]), small(refit_every=10**6).fit(x[:80], y[:80])
    first, second = some.backtest(x[80:], y[80:])[1], never.backtest(x[80:], y[80:])[1]
    np.testing.assert_array_equal(first[:10], second[:10])
    assert not np.array_equal(first[10:], second[10:])


def test_several_levels_at_once_are_each_alone() -> None:
    x, y = series(150, 3)
    levels = [0.05, 0.1, 0.5]
    together = small(alpha=levels).fit(x[:120], y[:120]).backtest(x[120:], y[120:])[1]
    assert together.shape == (30, 2, 3)
    for place, level in enumerate(levels):
        alone = small(alpha=level).fit(x[:120], y[:120]).backtest(x[120:], y[120:])[1]
        np.testing.assert_array_equal(together[:, :, place], alone[:, :, 0])


@pytest.mark.parametrize("method", [SPCI, EnbPI])
def test_the_optimised_width_is_at_most_the_symmetric_one(method: type) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(260, 1)), rng.exponential(size=260)
    both = [
        method(n_bootstraps=5, window=20, alpha=0.2, n_betas=n, random_state=1).fit(x[:200], y[:200]) for n in (5, 1)
    ]
    short, even = (np.diff(one.backtest(x[200:], y[200:])[1][:, :, 0], axis=1)[:, 0] for one in both)
    assert (short <= even).all()
    assert (short < 0.95 * even).mean() > 0.5  # skewed residuals: it does something


def test_every_draw_comes_from_the_generator() -> None:
    x, y = series(100, 5)
    forest = RandomForestRegressor(3, max_depth=2)

    def ends(random_state: Any) -> np.ndarray:
        np.random.seed(int(np.random.default_rng().integers(2**31)))  # noqa: NPY002 - the global state must not matter
        return small(estimator=forest, random_state=random_state).fit(x[:80], y[:80]).predict(x[80:])[1]

    np.testing.assert_array_equal(ends(np.random.default_rng(8)), ends(np.random.default_rng(8)))
    np.testing.assert_array_equal(ends(8), ends(8))
    assert not np.array_equal(ends(8), ends(9))
    rng = np.random.default_rng(8)
    assert not np.array_equal(ends(rng), ends(rng))  # it moves on


# --- the ensemble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bootstraps", [1, 2, 20])
def test_residuals_are_out_of_sample(n_bootstraps: int) -> None:
    """The nearest neighbour repeats what it has seen: an in-sample residual would be 0. Near-miss: the bag's mean."""
    x, y = series(40, 6)
    memory = KNeighborsRegressor(1)
    models, weights, residuals = fit_ensemble(memory, x, y, n_bootstraps, np.random.default_rng(1))
    assert np.abs(residuals).min() > 1e-6
    assert weights.sum() == pytest.approx(1)
    assert min(np.abs(y - model.predict(x)).min() for model in models) == 0


def test_the_ensemble_by_definition() -> None:
    """Leave-one-out means by loops, from the samples that each model remembers."""

    class Remembering(LinearRegression):
        def fit(self, X: np.ndarray, y: np.ndarray) -> Remembering:
            self.seen_ = set(y.tolist())
            super().fit(X, y)
            return self

    x, y = series(25, 7)
    models, weights, residuals = fit_ensemble(Remembering(), x, y, 12, np.random.default_rng(2))
    new = x[:3] + 1
    aggregates = []
    for i in range(25):
        outside = [model for model in models if y[i] not in model.seen_]
        assert y[i] - np.mean([m.predict(x[i : i + 1])[0] for m in outside]) == pytest.approx(residuals[i])
        aggregates.append(np.mean([m.predict(new) for m in outside], axis=0))
    np.testing.assert_allclose(weighted_predictor(models, weights)(new), np.mean(aggregates, axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        LinearRegression(),
        Ridge(2.0),
        DecisionTreeRegressor(max_depth=4),
        RandomForestRegressor(5, max_depth=3),
        ExtraTreesRegressor(4),
        KNeighborsRegressor(3),
    ],
    ids=lambda model: type(model).__name__,
)
def test_merged_models_predict_as_each_does(model: Any) -> None:
    x, y = series(80, 8)
    models, weights, _ = fit_ensemble(model, x, y, 4, np.random.default_rng(3))
    expected = sum(w * one.predict(x) for w, one in zip(weights, models, strict=True))
    np.testing.assert_allclose(weighted_predictor(models, weights)(x), expected, rtol=1e-9, atol=1e-12)


# --- several steps ahead ------------------------------------------------------------------------------------------


def test_each_lead_has_its_own_model_and_the_latest_window() -> None:
    """Lead k by hand: model k on row 0, a forest with targets k later, asked at the last residuals of lead 0.

    Near-miss, as in the published code: a window that ends horizon - 1 steps early gives another interval.
    """
    from assay.conformal._lag_forest import HistogramForest
    from assay.conformal.spci import shortest

    x, y = series(120, 9)
    model = small(horizon=4).fit(x[:110], y[:110]).update(x[110:113], y[110:113])
    point, intervals = model.predict(x[113:117])
    residuals = model._residuals
    assert residuals.shape == (4, 110)
    slipped = 0
    for lead in range(4):
        assert point[lead] == pytest.approx(model._predictors[lead](x[113:114])[0])
        # The residual of lead k at the last row is against the forecast from the row k before it.
        expected = y[112] - model._predictors[lead](x[112 - lead : 113 - lead])[0]
        assert residuals[lead, -1] == pytest.approx(expected)
        seed = model._forest_seed + 3 * 4 + lead
        forest = HistogramForest(residuals[0], residuals[lead, 10 + lead :], 10, model._settings, seed, whole=True)
        levels = model._levels.ravel()
        ends = shortest(forest.quantiles(residuals[0, -10:], levels).reshape(2, 5, 1))[:, 0]
        np.testing.assert_allclose(intervals[lead, :, 0], point[lead] + ends, rtol=1e-12)
        early = shortest(forest.quantiles(residuals[0, -13:-3], levels).reshape(2, 5, 1))[:, 0]
        slipped += not np.allclose(early, ends)
    assert slipped >= 2


def test_coverage_and_width_by_lead() -> None:
    """An autoregression followed 4 steps ahead: each lead covers about 90 %, and later leads are wider.

    300 rows a lead; misses cluster, so the band is 90 % plus or minus 6, over three binomial standard errors.
    """
    rng = np.random.default_rng(10)
    y = rng.normal(size=2301)
    for i in range(1, len(y)):
        y[i] += 0.9 * y[i - 1]
    x, y = y[:-1, None], y[1:]
    model = SPCI(n_bootstraps=10, window=20, alpha=0.1, horizon=4, random_state=1).fit(x[:1100], y[:1100])
    _, intervals = model.backtest(x[1100:], y[1100:])
    by_lead = [coverage(y[1100 + lead :: 4], intervals[lead::4])[0] for lead in range(4)]
    widths = [mean_width(intervals[lead::4])[0] for lead in range(4)]
    assert all(0.84 < share < 0.96 for share in by_lead), by_lead
    assert widths == sorted(widths)
    assert widths[3] > 1.4 * widths[0]


def test_spci_uses_what_enbpi_cannot() -> None:
    """Autocorrelated residuals: the same coverage from intervals a quarter narrower. 900 rows, errors as above."""
    x, y = series(1900, 11)
    spci = SPCI(n_bootstraps=10, window=20, random_state=1).fit(x[:1000], y[:1000]).backtest(x[1000:], y[1000:])[1]
    plain = EnbPI(n_bootstraps=10, window=None, random_state=1).fit(x[:1000], y[:1000]).backtest(x[1000:], y[1000:])[1]
    assert 0.86 < coverage(y[1000:], spci)[0] < 0.95
    assert mean_width(spci)[0] < 0.75 * mean_width(plain)[0]


# --- too few residuals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("horizon", "refit_every"), [(1, 1), (1, 3), (3, 1)])
def test_infinite_until_there_are_enough(horizon: int, refit_every: int) -> None:
    """window + horizon - 1 + (1 - alpha) / alpha residuals: 20 + 9 and horizon - 1 more."""
    x, y = series(60, 12)
    needed = 29 + horizon - 1
    model = small(window=20, alpha=0.1, horizon=horizon, refit_every=refit_every).fit(x[: needed - 1], y[: needed - 1])
    with pytest.warns(
        ShortCalibrationWarning, match=rf"{needed - 1} residuals are too few.*until there are {needed}\."
    ):
        intervals = model.predict(x[:horizon])[1]
    assert (intervals[-1, 0], intervals[-1, 1]) == (-np.inf, np.inf)
    for place in range(needed - 1, needed - 1 + refit_every):
        model.update(x[place : place + 1], y[place : place + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(model.predict(x[:horizon])[1]).all()


def test_only_the_level_that_lacks_residuals_is_infinite() -> None:
    x, y = series(60, 13)
    with pytest.warns(ShortCalibrationWarning, match=r"alpha=0\.01.*until there are 109"):
        intervals = small(alpha=[0.2, 0.01]).fit(x, y).predict(x[:1])[1]
    assert np.isfinite(intervals[0, :, 0]).all()
    assert np.isinf(intervals[0, :, 1]).all()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\)"),
        ({"alpha": [0.1, 1.5]}, "alpha must be"),
        ({"alpha": []}, "alpha must be"),
        ({"alpha": np.nan}, "alpha must be"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"window": 2.5}, "window must be"),
        ({"n_bootstraps": 0}, "n_bootstraps must be"),
        ({"horizon": True}, "horizon must be"),
        ({"n_betas": 4}, "n_betas must be odd"),
        ({"refit_every": 0}, "refit_every must be"),
        ({"max_depth": 13}, "max_depth must be at most 12"),
        ({"n_bins": 1}, "n_bins must be"),
        ({"engine": "fast"}, 'engine must be "histogram" or "exact"'),
    ],
)
def test_parameters_out_of_range(options: dict[str, Any], message: str) -> None:
    x, y = series(40, 14)
    with pytest.raises(ValueError, match=message):
        small(**options).fit(x, y)


def test_bad_data_is_refused_and_changes_nothing() -> None:
    x, y = series(60, 15)
    model = small().fit(x[:40], y[:40])
    before = model.predict(x[40:41])
    holed = x[40:42].copy()
    holed[0, 0] = np.nan
    for rows, truth, message in [
        (holed, y[40:42], "NaN"),
        (x[40:42], np.array([1.0, np.nan]), "NaN"),
        (x[40:42], np.array([1.0, np.inf]), "infinity"),
        (x[40:42], y[40:41], "inconsistent numbers of samples"),
        (x[40:42, :1], y[40:42], "expecting 2 features"),
        (x[40], y[40:41], "2D array"),
        (x[:0], y[:0], "0 sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.update(rows, truth)
        with pytest.raises(ValueError, match=message):
            small().fit(rows, truth) if message != "expecting 2 features" else model.predict(rows)
    with pytest.raises(ValueError, match="NaN"):
        small(horizon=2).fit(x, y).predict(holed)
    with pytest.raises(ValueError, match="horizon \\+ 1 = 6"):
        small(horizon=5).fit(x[:5], y[:5])
    with pytest.raises(NotFittedError):
        small().predict(x)
    with pytest.raises(NotFittedError):
        small().update(x, y)
    np.testing.assert_array_equal(model.predict(x[40:41])[1], before[1])


def test_times_must_go_on() -> None:
    x, y = series(60, 16)
    hours = np.datetime64("2026-01-01T00") + np.arange(60)
    model = small().fit(x[:40], y[:40], times=hours[:40])
    model.update(x[40:42], y[40:42], times=hours[40:42])
    for times, message in [
        (hours[41:43], "must go on after"),
        (hours[[43, 43]], "must increase strictly"),
        (hours[[45, 44]], "must increase strictly"),
        (hours[42:45], r"shape \(2,\)"),
        (None, "times were given to fit"),
        (np.array([np.datetime64("NaT"), hours[50]]), "NaN or NaT"),
        (np.array(["a", "b"]), "numbers or datetime64"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.update(x[42:44], y[42:44], times=times)
    model.update(x[42:44], y[42:44], times=hours[[50, 55]])  # gaps are fine
    with pytest.raises(ValueError, match="times were not given"):
        small().fit(x[:40], y[:40]).update(x[40:41], y[40:41], times=[1])
    with pytest.raises(ValueError, match="must increase"):
        small().fit(x[:3], y[:3], times=[1, 3, 2])


# --- scikit-learn -------------------------------------------------------------------------------------------------

METHODS = [
    SPCI(n_bootstraps=2, window=3, alpha=0.4, n_trees=2),
    EnbPI(n_bootstraps=2, window=5, alpha=0.4),
    ACI(n_bootstraps=2, alpha=0.4),
    DtACI(n_bootstraps=2, alpha=0.4),
    ConformalPID(n_bootstraps=2, alpha=0.4),
    SplitConformal(alpha=0.4),
]


def expected_failures(estimator: Any) -> dict[str, str]:
    # predict gives a pair, (point, intervals), which these checks take for one array; the next test does what they do.
    checks = ("check_methods_sample_order_invariance", "check_estimators_pickle", "check_fit_idempotent")
    return dict.fromkeys(checks, "predict gives a pair")


@pytest.mark.filterwarnings("ignore::assay.conformal.ShortCalibrationWarning")
@parametrize_with_checks(METHODS[:1], expected_failed_checks=expected_failures)
def test_scikit_learn_conventions(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::assay.conformal.ShortCalibrationWarning")
@parametrize_with_checks(METHODS[1:], expected_failed_checks=expected_failures)
def test_scikit_learn_conventions_of_the_others(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_one_loop_serves_every_method(method: Any) -> None:
    """predict and update, in a loop, on a pickled copy that was fitted twice, are the backtest."""
    x, y = series(130, 17)
    model = clone(method).set_params(alpha=[0.2, 0.4], random_state=1)
    assert model.get_params()["alpha"] == [0.2, 0.4]
    point, intervals = model.fit(x[:100], y[:100]).backtest(x[100:], y[100:])
    again = pickle.loads(pickle.dumps(clone(model).fit(x[:50], y[:50]).fit(x[:100], y[:100])))
    for row in range(100, 130):
        centre, ends = again.predict(x[row : row + 1])
        np.testing.assert_allclose(centre, point[row - 100 : row - 99])
        np.testing.assert_allclose(ends, intervals[row - 100 : row - 99])
        again.update(x[row : row + 1], y[row : row + 1])
    assert (intervals[:, 0] <= intervals[:, 1]).all()
