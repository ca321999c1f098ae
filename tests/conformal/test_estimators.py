"""Every class with `fit`: parameters as scikit-learn wants them, generators that are missing, numbers that are huge."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

import assay.conformal as room
from assay.conformal import (
    ACI,
    SPCI,
    ConformalPID,
    ConformalPValues,
    DtACI,
    EnbPI,
    HMMSets,
    MarkovSets,
    ScoreMonitor,
    SentenceLabeller,
    SplitConformal,
    label_sentences,
)
from assay.conformal._lag_forest import binary_scale
from assay.conformal.pid import autoregressive_scorecast

STATES = (["human"] * 6 + ["llm"] * 4) * 3
SYMBOLS = [2, 2, 1, 2, 1, 2, 0, 1, 0, 0] * 3
SERIES = np.random.default_rng(4).normal(size=(300, 2)) @ [[1.0, 0.4], [0.0, 0.9]]

ESTIMATORS: dict[str, Any] = {
    "SPCI": SPCI(window=10, n_trees=2, n_bootstraps=2, random_state=1),
    "EnbPI": EnbPI(n_bootstraps=2, random_state=1),
    "ACI": ACI(n_bootstraps=2, random_state=1),
    "DtACI": DtACI(n_bootstraps=2, random_state=1),
    "ConformalPID": ConformalPID(n_bootstraps=2, random_state=1),
    "SplitConformal": SplitConformal(random_state=1),
    "ConformalPValues": ConformalPValues(),
    "MarkovSets": MarkovSets(["human", "llm"], randomised=False),
    "HMMSets": HMMSets(["human", "llm"], [0, 1, 2], randomised=False),
    "SentenceLabeller": SentenceLabeller([0.5, 1.5]),
    "ScoreMonitor": ScoreMonitor(random_state=1),
}


def answer(estimator: Any) -> Any:
    """Fitted on fixed data, what it says about the next."""
    x, y = SERIES[:, :1], SERIES[:, 1]
    if isinstance(estimator, MarkovSets):
        return estimator.fit(STATES).predict(2).pvalues
    if isinstance(estimator, HMMSets):
        return estimator.fit(STATES, SYMBOLS).predict([0, 2]).pvalues
    if isinstance(estimator, SentenceLabeller):
        return estimator.fit(STATES, SYMBOLS).predict([0.0, 2.0]).sets.pvalues
    if isinstance(estimator, ScoreMonitor):
        return estimator.fit(y[:250]).update(y[250:]).log_evalue
    if isinstance(estimator, ConformalPValues):
        return estimator.fit(y[:250]).p_values(y[250:])
    return estimator.fit(x[:250], y[:250]).predict(x[250:])[1]


@pytest.fixture(params=ESTIMATORS)
def estimator(request: pytest.FixtureRequest) -> Any:
    return clone(ESTIMATORS[request.param])


def test_the_list_is_complete() -> None:
    found = {name for name in room.__all__ if hasattr(getattr(room, name), "fit")}
    assert found == ESTIMATORS.keys()


def test_parameters_are_the_constructors_and_clones_answer_alike(estimator: Any) -> None:
    given = estimator.get_params(deep=False)
    assert given.keys() == set(inspect.signature(type(estimator)).parameters)
    expected = answer(estimator)
    np.testing.assert_array_equal(answer(clone(estimator)), expected)
    np.testing.assert_array_equal(answer(pickle.loads(pickle.dumps(estimator))), expected)
    # fit leaves the parameters alone, and a clone knows nothing of it.
    assert all(estimator.get_params(deep=False)[name] is value for name, value in given.items())
    assert not [name for name in vars(clone(estimator)) if name not in given]
    assert all(f"{name}=" in repr(estimator.set_params(**{name: 0.25})) for name in ("alpha",) if name in given)


def test_set_params_is_heard_and_checked_by_fit(estimator: Any) -> None:
    if isinstance(estimator, ConformalPValues):
        expected = answer(ConformalPValues(alternative="less"))
        np.testing.assert_array_equal(answer(estimator.set_params(alternative="less")), expected)
        bad = {"alternative": "odd"}
    else:
        answer(estimator)
        other = type(estimator)(**{**estimator.get_params(deep=False), "alpha": 0.3})
        for mine, theirs in zip(answer(estimator.set_params(alpha=0.3)), answer(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        bad = {"alpha": 1.5}
    with pytest.raises(ValueError, match=r"(alpha|alternative) must be"):
        answer(estimator.set_params(**bad))
    with pytest.raises(ValueError, match="Invalid parameter"):
        estimator.set_params(no_such=1)


def test_labels_and_options_set_later_are_those_of_the_next_fit() -> None:
    sets = HMMSets(["a"], [0]).set_params(states=["human", "llm"], symbols=[0, 1, 2], randomised=False)
    np.testing.assert_array_equal(answer(sets), answer(ESTIMATORS["HMMSets"]))
    before = sets.predict([0]).pvalues
    # Until then those of the last fit hold: counts of one anchor with the blocks of the other would not be exact.
    sets.set_params(anchor="pair", states=["x", "y", "z"])
    np.testing.assert_array_equal(sets.predict([0]).pvalues, before)
    with pytest.raises(ValueError, match="must be different labels"):
        answer(sets.set_params(states=["llm", "llm"]))
    with pytest.raises(ValueError, match="must be different labels"):
        answer(MarkovSets(["a"]).set_params(states=[]))
    with pytest.raises(ValueError, match="edges must be"):
        answer(SentenceLabeller([1.0]).set_params(edges=[2.0, 1.0]))
    with pytest.raises(ValueError, match="anchor must be"):
        answer(HMMSets(["human", "llm"], [0, 1, 2]).set_params(anchor="both"))


def test_a_watch_keeps_the_bound_it_began_with() -> None:
    """A bound that is loosened on the way holds for nobody: the running watch goes on, the next fit takes the new."""
    y = SERIES[:, 1]
    plain = ScoreMonitor(random_state=1).fit(y[:250]).update(y[250:] + 3)
    monitor = ScoreMonitor(random_state=1).fit(y[:250])
    monitor.set_params(false_alarm=0.5, direction="below", alpha=0.2, lags=2, max_miss_rate=0.9)
    changed = monitor.update(y[250:] + 3)
    assert plain.to_dict() == changed.to_dict()
    assert monitor.fit(y[:250]).update(y[250:] + 3).false_alarm == 0.5
    with pytest.raises(ValueError, match="lags must be"):
        monitor.set_params(lags=0).fit(y)


def test_p_values_keep_the_direction_of_their_fit() -> None:
    y = SERIES[:, 1]
    model = ConformalPValues().fit(y[:250])
    expected = model.p_values(y[250:])
    np.testing.assert_array_equal(model.set_params(alternative="less", ties="smoothed").p_values(y[250:]), expected)
    assert not np.array_equal(model.set_params(ties="conservative").fit(y[:250]).p_values(y[250:]), expected)


# --- generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", [None, 7, np.random.RandomState(1)], ids=["none", "seed", "old"])
@pytest.mark.parametrize(
    "call",
    [
        lambda rng: MarkovSets(["human", "llm"]).fit(STATES).predict(1, rng=rng),
        lambda rng: HMMSets(["human", "llm"], [0, 1, 2]).fit(STATES, SYMBOLS).predict([1], rng=rng),
        lambda rng: MarkovSets(["human", "llm"], randomised=False, n_permutations=19).fit(STATES).predict(1, rng=rng),
        lambda rng: SentenceLabeller([0.5]).fit(STATES, SYMBOLS).predict([0.0] * 5, rng=rng),
        lambda rng: label_sentences(STATES, SYMBOLS, [0.0, 1.0], randomised=True, rng=rng),
    ],
    ids=["chain", "hidden", "permutations", "many sentences", "labels"],
)
def test_draws_need_a_generator(call: Callable[[Any], Any], rng: Any) -> None:
    with pytest.raises(ValueError, match=r"rng must be a numpy Generator, such as numpy\.random\.default_rng\(\)"):
        call(rng)
    assert call(np.random.default_rng(1)) is not None


def test_without_draws_none_is_needed() -> None:
    first, second = (
        label_sentences(STATES, SYMBOLS, [0.0, 2.0], rng=rng).sets.pvalues for rng in (None, np.random.default_rng(3))
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("make", [lambda: SentenceLabeller([0.5]), lambda: HMMSets(["human"], [0])])
def test_predict_before_fit(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="fit comes first"):
        make().predict([0])
    with pytest.raises(ValueError, match="fit comes first"):
        make().update(["human"], [0])


# --- sizes of numbers ------------------------------------------------------------------------------------------------

INTERVALS = {
    **{name: ESTIMATORS[name] for name in ("SPCI", "EnbPI", "ACI", "DtACI", "ConformalPID", "SplitConformal")},
    "SPCI ahead": SPCI(window=10, n_trees=2, n_bootstraps=2, horizon=2, refit_every=5, random_state=1),
    "SPCI exact": SPCI(window=5, n_trees=2, n_bootstraps=2, engine="exact", random_state=1),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_scale_with_the_data(name: str) -> None:
    """From numbers whose squares vanish to numbers whose squares are near the largest float."""
    x, y = SERIES[:, :1], SERIES[:, 1]
    last = 255 if name == "SPCI exact" else 300
    expected = clone(INTERVALS[name]).fit(x[:250], y[:250]).backtest(x[250:last], y[250:last])[1]
    for scale in (1e-300, 1e-200, 1e-30, 1e20, 1e60, 2e99):
        model = clone(INTERVALS[name]).fit(x[:250], scale * y[:250])
        found = model.backtest(x[250:last], scale * y[250:last])[1]
        np.testing.assert_allclose(found / scale, expected, rtol=1e-6, err_msg=f"{scale:g}")


@pytest.mark.parametrize("name", INTERVALS)
def test_what_cannot_be_squared_is_refused_and_changes_nothing(name: str) -> None:
    x, y = SERIES[:, :1], SERIES[:, 1]
    message = r"y must be in \[-1e\+100, 1e\+100\], got .* in size\. Rescale y\."
    with pytest.raises(ValueError, match=message):
        clone(INTERVALS[name]).fit(x, 1e200 * y)
    model = clone(INTERVALS[name]).fit(x[:250], y[:250])
    before = model.predict(x[250:260])
    for take in (model.update, model.backtest):
        with pytest.raises(ValueError, match=message):
            take(x[250:260], np.full(10, 2e100))
        with pytest.raises(ValueError, match=r"forecasts of the base models must lie within 1e\+120 of y"):
            take(np.full((10, 1), 1e200), y[250:260])
    with pytest.raises(ValueError, match="forecasts of the base models"):
        model.predict(np.full((2, 1), 1e200))
    for mine, theirs in zip(model.predict(x[250:260]), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("value", [5e-324, 1e-310, 2.0**-1022, 0.3, 1.0, 1e308])
def test_scales_are_powers_of_two_that_bring_values_near_one(value: float) -> None:
    scale = binary_scale(np.array([value, -value / 2, 0.0]))
    assert np.frexp(scale)[0] == 0.5
    assert value / scale < 2
    assert value / scale >= 1 or scale == 2.0**-1022
    assert binary_scale(np.zeros(3)) == 1


def test_the_scorecaster_sees_no_unit() -> None:
    """With a column of ones beside scores of 1e17 or 1e-17 the solver gives up a column; the forecast then moves."""
    scores = np.abs(SERIES[:60, 1])
    fitted, following = autoregressive_scorecast(scores)
    for scale in (1e-200, 1e-17, 1e17, 1e200):
        other = autoregressive_scorecast(scale * scores)
        np.testing.assert_allclose(other[0] / scale, fitted, rtol=1e-9)
        assert other[1] / scale == pytest.approx(following, rel=1e-9)
