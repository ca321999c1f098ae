"""The drift guard: uniform ranks under the null, alarms bounded at every stop, drift found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from assay.conformal.drift import DriftGuard


def test_ranks_are_independent_uniforms_with_ties() -> None:
    # KS at 1e-4; ties in most pairs.
    rng = np.random.default_rng(1)
    guard = DriftGuard(np.round(rng.normal(size=50), 1), rng=rng)
    ranks = np.array([guard._rank(x) for x in np.round(rng.normal(size=4000), 1)])
    assert stats.kstest(ranks, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 4 / np.sqrt(4000)


def test_wealth_is_a_martingale() -> None:
    # E[wealth after one bet] = wealth, by numerical integration over a uniform p-value after a stretch of bets.
    rng = np.random.default_rng(2)
    guard = DriftGuard([0.0], rng=rng)
    for p in rng.random(30) ** 3:
        guard.bet(p)
    before, parts = guard.log_wealth, guard._log_parts.copy()
    grid = (np.arange(2000) + 0.5) / 2000
    after = []
    for p in grid:
        guard._log_parts = parts.copy()
        guard.bet(p)
        after.append(guard.log_wealth)
    assert np.log(np.mean(np.exp(after))) == pytest.approx(before, abs=1e-6)


def alarms(streams: int, length: int, shift: float, rng: np.random.Generator) -> int:
    count = 0
    for _ in range(streams):
        guard = DriftGuard(rng.normal(size=60), level=0.1, rng=rng)
        count += any(guard.update(x) for x in rng.normal(shift, 1.0, length))
    return count


def test_alarms_while_nothing_drifts_are_bounded_at_every_stop() -> None:
    rng, streams = np.random.default_rng(3), 300
    assert alarms(streams, 150, 0.0, rng) <= stats.binom.isf(1e-6, streams, 0.1)
    # Near-miss: a fixed-sample test repeated at every step.
    repeated = 0
    for _ in range(streams):
        ranks = rng.random(150)
        z = np.cumsum(ranks - 0.5) / np.sqrt(np.arange(1, 151) / 12)
        repeated += bool((np.abs(z) > stats.norm.isf(0.05)).any())
    assert repeated > stats.binom.isf(1e-6, streams, 0.1)


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_drift_either_way_is_found(shift: float) -> None:
    assert alarms(20, 300, shift, np.random.default_rng(4)) >= 18


def test_alarm_stays_and_is_dated() -> None:
    rng = np.random.default_rng(5)
    guard = DriftGuard(rng.normal(size=500), rng=rng)
    for _ in range(30):
        assert not guard.update(float(rng.normal()))
    while not guard.update(9.0):
        assert guard.n_seen < 200
    assert guard.alarm_at == guard.n_seen > 30
    assert guard.update(0.0)
    assert guard.alarm_at == guard.n_seen - 1
    assert guard.log_evidence >= np.log(100)


def test_refusals() -> None:
    rng = np.random.default_rng(6)
    for bad in ([], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="calibration must be finite"):
            DriftGuard(bad, rng=rng)
    with pytest.raises(ValueError, match="level must be"):
        DriftGuard([1.0], level=1.0, rng=rng)
    with pytest.raises(ValueError, match="rng must be"):
        DriftGuard([1.0], rng=0)  # type: ignore[arg-type]
    guard = DriftGuard([1.0], rng=rng)
    with pytest.raises(ValueError, match="score must be finite"):
        guard.update(np.inf)
    assert guard.n_seen == 0


@pytest.mark.parametrize("pvalue", [math.nan, -0.1, 1.1])
def test_a_bet_on_what_is_no_p_value_is_refused_and_changes_nothing(pvalue: float) -> None:
    """A NaN would make the wealth NaN for good, which never reaches any threshold: a guard that cannot cry."""
    guard = DriftGuard(np.arange(50.0), rng=np.random.default_rng(1))
    with pytest.raises(ValueError, match=r"pvalue must be in \[0, 1\]"):
        guard.bet(pvalue)
    assert (guard.n_seen, guard.log_wealth) == (0, pytest.approx(0.0))
