"""Corpora and streams: procedures against their definitions, false discovery rates by simulation, near-misses."""

from __future__ import annotations

import json
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.conformal.fdr import e_bh, share_interval, storey
from assay.conformal.online_fdr import ELond, Lord, Saffron, _lord_spending, _power_spending
from assay.conformal.p_values import ConformalPValues
from assay.detection.multiplicity import benjamini_hochberg

PVALUES = st.lists(st.floats(1e-6, 1), min_size=1, max_size=20)


def rate_is_at_most(proportions: list[float], fdr: float) -> bool:
    """One-sided check of a mean of false discovery proportions; false alarm 1e-5 (4.27 standard errors)."""
    values = np.array(proportions)
    return float(values.mean()) <= fdr + 4.27 * float(values.std()) / math.sqrt(len(values))


@given(PVALUES, st.floats(0.01, 0.9))
@settings(deadline=None)  # the machine may be busy
def test_storey_is_the_step_up_procedure_at_its_estimate(pvalues: list[float], level: float) -> None:
    p, n = np.array(pvalues), len(pvalues)
    null_share = (1 + np.sum(p > 0.5)) / (n * 0.5)
    ranked = np.sort(p)
    passing = [k for k in range(1, n + 1) if ranked[k - 1] <= min(0.5, k * level / (n * null_share))]
    threshold = ranked[passing[-1] - 1] if passing else -1.0
    found = storey(np.log(p)) <= math.log(level) + 1e-12
    expected = p <= threshold
    # Equality at the edge of a floating-point comparison may go either way.
    edge = np.isclose(np.exp(storey(np.log(p))), level, rtol=1e-9)
    assert (found == expected)[~edge].all()


@given(st.lists(st.floats(-5, 12), min_size=1, max_size=20), st.floats(0.01, 0.9))
@settings(deadline=None)  # the machine may be busy
def test_e_bh_is_its_definition(log_evalues: list[float], level: float) -> None:
    e = np.exp(np.array(log_evalues))
    n, ranked = len(e), np.sort(e)[::-1]
    passing = [k for k in range(1, n + 1) if ranked[k - 1] >= n / (level * k) * (1 - 1e-12)]
    expected = e >= (ranked[passing[-1] - 1] if passing else np.inf)
    found = e_bh(np.log(e)) <= math.log(level) + 1e-12
    assert found.tolist() == expected.tolist()


def test_storey_takes_no_threshold_above_its_cut() -> None:
    """p-values just above the cut must not lend their rank to those below.

    100 p-values of which 50, no nulls, are .1001, with a cut of .1: nothing below the cut but nulls, so any rejection
    is false. 2,000 corpora; the near-miss, q-values over all thresholds, rejects in three of four.
    """
    p = np.repeat([0.1, 0.1001], 50)
    assert np.exp(storey(np.log(p), cut=0.1))[0] == pytest.approx(0.1 * 51 / 0.9 / 50)
    rng, kept, near_miss = np.random.default_rng(21), [], []
    human = np.arange(100) < 50
    for _ in range(2000):
        log_p = np.log(np.concatenate([rng.random(50), np.full(50, 0.1001)]))
        kept.append(proportion(storey(log_p, cut=0.1) <= math.log(0.2), human))
        share = (1 + np.sum(log_p > math.log(0.1))) / 90
        everywhere = (benjamini_hochberg(log_p) + math.log(share) <= math.log(0.2)) & (log_p <= math.log(0.1))
        near_miss.append(proportion(everywhere, human))
    assert rate_is_at_most(kept, 0.2)
    assert not rate_is_at_most(near_miss, 0.2)


@given(st.lists(st.sampled_from([0.01, 0.2, 0.3, 0.45, 0.5, 0.500001, 0.6]), min_size=1, max_size=12))
@settings(deadline=None)  # the machine may be busy
def test_storey_by_its_definition_near_the_cut(pvalues: list[float]) -> None:
    p, n = np.array(pvalues), len(pvalues)
    share = (1 + np.sum(p > 0.5)) / (n * 0.5)
    for value, log_q in zip(p, storey(np.log(p)), strict=True):
        estimates = [share * n * t / np.sum(p <= t) for t in p if value <= t <= 0.5]
        assert np.exp(log_q) == pytest.approx(min([1.0, *estimates]))


@pytest.mark.parametrize("bad", [math.nan, 0.1])
def test_storey_takes_no_number_that_is_none(bad: float) -> None:
    """A nan compares as above the cut, where it would be counted as a null and sway every q-value."""
    with pytest.raises(ValueError, match=r"natural logarithms in \[-inf, 0\]; found nan or a positive number"):
        storey([math.log(0.01), bad])


def test_procedures_on_nothing() -> None:
    assert storey([]).shape == e_bh([]).shape == (0,)
    with pytest.raises(ValueError, match="cut must be"):
        storey([-1.0], cut=1.0)
    with pytest.raises(ValueError, match="found nan"):
        e_bh([math.nan])


def corpora(count: int, rng: np.random.Generator, share: float = 0.2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conformal log p-values of corpora of 200 documents that share 500 calibration texts, and which are human."""
    out = []
    for _ in range(count):
        model = ConformalPValues(level=0.01).fit(rng.normal(size=500))
        human = rng.random(200) >= share
        scores = rng.normal(size=200) + np.where(human, 0.0, 3.0)
        out.append((np.log(model.p_values(scores)), human))
    return out


def proportion(rejected: np.ndarray, human: np.ndarray) -> float:
    return float(np.sum(rejected & human) / max(1, np.sum(rejected)))


@pytest.mark.parametrize("procedure", [benjamini_hochberg, storey])
def test_corpora_keep_their_false_discovery_rate(procedure: object) -> None:
    # 200 corpora, as many discoveries as one would want; the near-miss is the same without correction.
    sample = corpora(200, np.random.default_rng(11))
    rejected = [procedure(log_p) <= math.log(0.1) for log_p, _ in sample]  # type: ignore[operator]
    assert rate_is_at_most([proportion(r, h) for r, (_, h) in zip(rejected, sample, strict=True)], 0.1)
    assert np.mean([r.sum() for r in rejected]) > 20
    assert not rate_is_at_most([proportion(p <= math.log(0.1), h) for p, h in sample], 0.1)


def test_e_bh_under_the_worst_dependence() -> None:
    # All nulls share one e-value: exp(x - 1/2) of one normal. The near-miss treats 100 e as e-values.
    rng, wrong, inflated = np.random.default_rng(12), [], []
    for _ in range(4000):
        null = rng.normal(size=1) * 3 - 4.5
        values = np.concatenate([np.repeat(null, 50), np.full(5, 6.0)])
        human = np.arange(55) < 50
        wrong.append(proportion(e_bh(values) <= math.log(0.2), human))
        inflated.append(proportion(e_bh(values + math.log(100)) <= math.log(0.2), human))
    assert rate_is_at_most(wrong, 0.2)
    assert not rate_is_at_most(inflated, 0.2)


def test_spending_sequences_sum_to_at_most_one() -> None:
    t = np.arange(1.0, 10**6 + 1)
    lord_rest = 2 * float(mpmath.gammainc(4, math.sqrt(math.log(t[-1])))) * 0.0790
    power_rest = float(mpmath.zeta(1.6, int(t[-1]) + 1)) * 0.4374
    for spending, rest in ((_lord_spending, lord_rest), (_power_spending, power_rest)):
        total = float(spending(t).sum()) + rest
        assert 0.99 < total <= 1.0
        assert (spending(np.array([-3.0, 0.0])) == 0.0).all()


def plain_lord(pvalues: np.ndarray, fdr: float) -> list[bool]:
    found: list[int] = []
    out = []
    for t, p in enumerate(pvalues, start=1):
        level = fdr / 2 * float(_lord_spending(np.array([float(t)]))[0])
        for j, tau in enumerate(found):
            level += (fdr / 2 if j == 0 else fdr) * float(_lord_spending(np.array([float(t - tau)]))[0])
        out.append(bool(p <= level))
        if out[-1]:
            found.append(t)
    return out


def plain_saffron(pvalues: np.ndarray, fdr: float, cut: float) -> list[bool]:
    """From the formula of the paper, with its counts of candidates recomputed at each step."""
    found: list[int] = []
    out = []
    for t, p in enumerate(pvalues, start=1):
        level = fdr / 2 * float(_power_spending(np.array([float(t - np.sum(pvalues[: t - 1] <= cut))]))[0])
        for j, tau in enumerate(found):
            lag = t - tau - np.sum(pvalues[tau : t - 1] <= cut)
            level += (fdr / 2 if j == 0 else fdr) * float(_power_spending(np.array([float(lag)]))[0])
        out.append(bool(p <= min(cut, (1 - cut) * level)))
        if out[-1]:
            found.append(t)
    return out


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None)  # the machine may be busy
def test_streams_follow_their_formulas_and_can_be_resumed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pvalues = rng.random(40) ** rng.choice([1, 6], 40)
    lord, saffron = Lord(fdr=0.2), Saffron(fdr=0.2)
    by_lord, by_saffron = [], []
    for p in pvalues:
        lord, saffron = Lord(**json.loads(json.dumps(lord.state()))), Saffron(**json.loads(json.dumps(saffron.state())))
        by_lord.append(lord.update(p))
        by_saffron.append(saffron.update(p))
    assert by_lord == plain_lord(pvalues, 0.2)
    assert by_saffron == plain_saffron(pvalues, 0.2, 0.5)


def test_streams_keep_their_false_discovery_rate() -> None:
    rng, wrong = np.random.default_rng(13), {"lord": [], "saffron": [], "fixed": []}  # type: ignore[var-annotated]
    power = {"lord": 0, "saffron": 0}
    for _ in range(150):
        human = rng.random(300) >= 0.3
        pvalues = np.where(human, rng.random(300), stats.norm.sf(rng.normal(3.0, 1.0, 300)))
        for name, stream in (("lord", Lord(fdr=0.1)), ("saffron", Saffron(fdr=0.1))):
            rejected = np.array([stream.update(p) for p in pvalues])
            wrong[name].append(proportion(rejected, human))
            power[name] += int(np.sum(rejected & ~human))
        wrong["fixed"].append(proportion(pvalues <= 0.1, human))
    assert rate_is_at_most(wrong["lord"], 0.1)
    assert rate_is_at_most(wrong["saffron"], 0.1)
    assert not rate_is_at_most(wrong["fixed"], 0.1)
    assert power["saffron"] > power["lord"] > 1000  # of about 13,500 marked documents


def test_e_lond_under_dependence_and_by_its_formula() -> None:
    rng, wrong, inflated = np.random.default_rng(14), [], []
    for _ in range(600):
        null = float(rng.normal() * 3 - 4.5)
        for proportions, gift in ((wrong, 0.0), (inflated, math.log(1e4))):
            stream = ELond(fdr=0.2)
            human = rng.random(60) >= 0.1
            rejected = np.array([stream.update(null + gift if h else 12.0) for h in human])
            proportions.append(proportion(rejected, human))
    assert rate_is_at_most(wrong, 0.2)
    assert not rate_is_at_most(inflated, 0.2)  # near-miss: e-values with mean 10,000
    stream = ELond(fdr=0.1)
    assert stream.level == pytest.approx(0.1 * 0.4374)
    assert stream.update(math.log(1 / 0.04))
    assert stream.level == pytest.approx(2 * 0.1 * 0.4374 * 2**-1.6)
    assert ELond(**stream.state()) == stream


@pytest.mark.parametrize("kind", [Lord, Saffron, ELond])
def test_streams_refuse(kind: type) -> None:
    with pytest.raises(ValueError, match=r"fdr must be in \(0, 1\), got 1"):
        kind(fdr=1.0)
    stream = kind(fdr=0.1)
    with pytest.raises(ValueError, match=r"must be .*got nan"):
        stream.update(math.nan)
    assert stream.n_tested == 0
    with pytest.raises(ValueError, match="cut must be"):
        Saffron(fdr=0.1, cut=0.0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_share_intervals_cover(share: float) -> None:
    # 2,000 corpora of 300, calibrated on 200 human and 150 machine texts; coverage at least 95 %, false alarm 1e-6.
    rng, trials, fpr, tpr = np.random.default_rng(15), 2000, 0.03, 0.6
    q = share * tpr + (1 - share) * fpr
    draws = zip(
        rng.binomial(300, q, trials), rng.binomial(200, fpr, trials), rng.binomial(150, tpr, trials), strict=True
    )
    missed = missed_low = widths = 0.0
    for flagged, human, machine in draws:
        found = share_interval(
            int(flagged), 300, human_flagged=int(human), humans=200, machine_flagged=int(machine), machines=150
        )
        missed += not found.low <= share <= found.high
        one_sided = share_interval(int(flagged), 300, human_flagged=int(human), humans=200)
        assert one_sided.high == 1.0
        missed_low += share < one_sided.low
        widths += found.high - found.low
    assert missed <= stats.binom.isf(1e-6, trials, 0.05)
    assert missed_low <= stats.binom.isf(1e-6, trials, 0.05)
    assert widths / trials < 0.55
    # Near-miss: the share of flagged documents taken for the share of machine texts.
    if share in (0.7, 1.0):
        naive = [stats.binomtest(int(f), 300).proportion_ci(0.95) for f in rng.binomial(300, q, 200)]
        assert sum(not ci.low <= share <= ci.high for ci in naive) > 100


def test_share_intervals_refuse() -> None:
    with pytest.raises(ValueError, match="flagged must be in"):
        share_interval(5, 4, human_flagged=0, humans=3)
    with pytest.raises(ValueError, match="given together"):
        share_interval(1, 4, human_flagged=0, humans=3, machines=3)
    with pytest.raises(ValueError, match="confidence"):
        share_interval(1, 4, human_flagged=0, humans=3, confidence=95)
    assert share_interval(4, 4, human_flagged=3, humans=3).low == 0.0
