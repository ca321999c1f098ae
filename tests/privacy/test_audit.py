"""The audits find what the mechanisms spend, to the digit, and catch every planted fault."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.privacy import audit
from assay.privacy.audit import ScriptedNoise, black_box_bound, exact_loss, neighbours, observed_sensitivity
from assay.privacy.continual import Counter, Selection, plan_counter, plan_selection
from assay.privacy.continual.plan import Plan
from assay.privacy.grid import Grid, quantise
from assay.privacy.noise import NoiseSource, SeededNoise, laplace_scale

TERMS: dict[str, Any] = {"adjacency": "add-remove", "unit": "event"}


def counter_of(plan: Plan) -> Any:
    def mechanism(data: tuple[int, ...], noise: NoiseSource) -> tuple[int, ...]:
        return tuple(np.asarray(Counter(plan, noise=noise).extend(data)).ravel().tolist())

    return mechanism


# --- sensitivity of what is noised -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), max_size=6), st.sampled_from(["add-remove", "replace"]))
def test_clamped_sums_keep_their_sensitivity(records: list[float], adjacency: Any) -> None:
    grid = Grid(0.0, 1.0, 8)
    pairs = [(records, other) for other in neighbours(records, [-1e9, 0.0, 0.4, 1.0, 1e9], adjacency)]
    declared = grid.top
    if not pairs:
        return
    assert not observed_sensitivity(lambda data: quantise(data, grid).values.sum(), pairs, declared=declared).refuted


def test_mutant_unclamped_is_caught() -> None:
    pairs = [([0.5], other) for other in neighbours([0.5], [0.0, 1e9], "add-remove")]
    found = observed_sensitivity(lambda data: np.rint(255 * np.array(data)).sum(), pairs, declared=255)
    assert found.refuted
    assert "refuted" in str(found)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=6))
def test_mutant_replace_sold_as_add_remove_is_caught(records: list[int]) -> None:
    def histogram(data: list[int]) -> np.ndarray:
        return np.bincount(np.array(data, dtype=int), minlength=4)

    for norm, right, sold in (("l1", 2.0, 1.0), ("l2", math.sqrt(2), 1.0)):
        added = [(records, other) for other in neighbours(records, range(4), "add-remove")]
        assert not observed_sensitivity(histogram, added, declared=sold, norm=norm).refuted  # type: ignore[arg-type]
        swapped = [(records, other) for other in neighbours(records, range(4), "replace")]
        if swapped:
            assert not observed_sensitivity(histogram, swapped, declared=right, norm=norm).refuted  # type: ignore[arg-type]
            assert observed_sensitivity(histogram, swapped, declared=sold, norm=norm).refuted  # type: ignore[arg-type]


# --- exact loss of the counters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["plain", "binary tree", "smooth tree", "k-ary tree"])
def test_counters_spend_what_they_say_exactly(mechanism: str) -> None:
    """Two steps, every outcome of their draws, all pairs of streams that differ in one step."""
    plan = plan_counter(2, mechanism=mechanism, epsilon=2, arity=3, **TERMS)
    draws = {"plain": 2, "binary tree": 2, "smooth tree": 2, "k-ary tree": 2}[mechanism]
    found = [
        exact_loss(counter_of(plan), a, b, draws=draws, reach=12, claimed=2.0)
        for a, b in [((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 0), (0, 1))]
    ]
    assert not any(one.refuted for one in found)
    # Tight where every touched node is read within the two steps.
    if mechanism in ("plain", "binary tree"):
        assert max(one.found for one in found) == pytest.approx(2.0, rel=1e-9)


def test_gaussian_counter_loss_at_delta() -> None:
    from assay.privacy.accounting import delta_of_rho

    plan = plan_counter(2, mechanism="binary tree", rho=Fraction(1, 4), **TERMS)
    epsilon = 2.0
    delta = delta_of_rho(Fraction(1, 4), epsilon)
    found = exact_loss(counter_of(plan), (0, 0), (1, 0), draws=2, reach=14, claimed=epsilon, delta=delta)
    assert not found.refuted
    assert found.found > 0.5
    mutant = dataclasses.replace(plan, node=plan.node / 4)
    assert exact_loss(counter_of(mutant), (0, 0), (1, 0), draws=2, reach=14, claimed=epsilon, delta=delta).refuted


def test_mutant_half_noise_is_caught() -> None:
    plan = plan_counter(2, mechanism="binary tree", epsilon=1, **TERMS)
    mutant = dataclasses.replace(plan, node=plan.node / 2)
    assert not exact_loss(counter_of(plan), (0, 0), (1, 0), draws=2, reach=14, claimed=1.0).refuted
    found = exact_loss(counter_of(mutant), (0, 0), (1, 0), draws=2, reach=14, claimed=1.0)
    assert found.refuted
    assert found.found == pytest.approx(2.0)


def test_mutant_root_left_out_of_the_count_is_caught() -> None:
    """The node over both steps is read at time 2; noise made for one level less spends twice the claim."""
    plan = plan_counter(2, mechanism="binary tree", epsilon=1, **TERMS)
    assert plan.design.l1 == 2
    mutant = dataclasses.replace(plan, node=laplace_scale(plan.design.l1 - 1))
    found = exact_loss(counter_of(mutant), (0, 0), (1, 0), draws=2, reach=14, claimed=1.0)
    assert found.refuted
    assert found.found == pytest.approx(2.0)


def test_mutant_forgotten_split_is_caught() -> None:
    """Two columns that one event moves together, each with the noise of the whole budget."""

    def two(scale: Fraction) -> Any:
        def mechanism(data: int, noise: ScriptedNoise) -> tuple[int, int]:
            return data + int(noise.laplace(scale, 1)[0]), data + int(noise.laplace(scale, 1)[0])

        return mechanism

    split, forgotten = laplace_scale(2), laplace_scale(1)
    assert not exact_loss(two(split), 0, 1, draws=2, reach=12, claimed=1.0).refuted
    assert exact_loss(two(forgotten), 0, 1, draws=2, reach=12, claimed=1.0).found == pytest.approx(2.0)
    # The planner splits: two columns that move together get twice the scale of one.
    one, both = (plan_counter(9, epsilon=1, columns=columns, **TERMS).node for columns in (1, 2))
    assert both == 2 * one


def test_an_adaptive_stream_learns_no_more() -> None:
    """The second step is chosen from the first release: the adversary of the proof, enumerated."""
    plan = plan_counter(2, mechanism="binary tree", epsilon=1, **TERMS)

    def game(first: int, noise: NoiseSource) -> tuple[int, int]:
        counter = Counter(plan, noise=noise)
        seen = int(counter.step(first)[0])
        return seen, int(counter.step(int(seen > 0))[0])

    assert not exact_loss(game, 0, 1, draws=2, reach=14, claimed=1.0).refuted


def test_mutant_that_redraws_after_a_restart_is_caught() -> None:
    scale = laplace_scale(1)

    def twice(first: int, noise: NoiseSource) -> tuple[int, int]:
        return first + int(noise.laplace(scale, 1)[0]), first + int(noise.laplace(scale, 1)[0])

    assert exact_loss(twice, 0, 1, draws=2, reach=12, claimed=1.0).refuted


def test_recomputed_selection_spends_its_share() -> None:
    plan = plan_selection("max", 1, 2, epsilon=1, way="recompute", **TERMS)

    def mechanism(data: tuple[int, int], noise: NoiseSource) -> int:
        return int(np.asarray(Selection(plan, noise=noise).extend([data]))[0])

    found = exact_loss(mechanism, (0, 1), (0, 0), draws=1, reach=30, claimed=1.0)
    assert not found.refuted
    assert found.found == pytest.approx(1.0)


# --- black box -------------------------------------------------------------------------------------------------------


def single(scale: Fraction, source: SeededNoise) -> Any:
    return lambda first: float(np.asarray(source.laplace(scale, 1))[0] + first)


def test_black_box_bound_catches_half_noise_and_spares_the_honest() -> None:
    """4,000 runs each: the bound at beta 0.001 for a true epsilon of 2 lies above 1.5. Fixed seed."""
    honest = black_box_bound(single(laplace_scale(1), SeededNoise(5)), claimed=1.0, trials=4000, beta=1e-3)
    assert not honest.refuted
    assert honest.found > 0.7  # near the truth, or it could not catch anything
    mutant = black_box_bound(single(laplace_scale(Fraction(1, 2)), SeededNoise(5)), claimed=1.0, trials=4000, beta=1e-3)
    assert mutant.refuted
    assert mutant.found > 1.3


def test_clopper_pearson_covers() -> None:
    """Under a true epsilon of 1 the bound exceeds it in at most 5 % of 2,000 audits of 300 runs, 100 expected."""
    rng = np.random.default_rng(3)
    p, q = 0.5, 0.5 / math.e
    hits = rng.binomial(300, [p, q], (2000, 2))
    over = sum(audit.clopper_pearson_bound(int(a), 300, int(b), 300, beta=0.05) > 1.0 for a, b in hits)
    assert over <= 140  # chance 1e-4 at the nominal level
    raw = sum(math.log(max(a, 1) / max(b, 1)) > 1.0 for a, b in hits)
    assert raw > 700  # the ratio without its limits, the near-miss
    assert audit.clopper_pearson_bound(300, 300, 0, 300) > 3
    assert audit.clopper_pearson_bound(10, 300, 10, 300) == 0.0


def test_what_one_run_can_see() -> None:
    assert audit.one_run_limit(1000) == pytest.approx(5.8, abs=0.05)
    assert audit.one_run_limit(1) == pytest.approx(math.log(0.05 / 0.95))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: observed_sensitivity(np.sum, [], declared=1), "pairs must not be empty"),
        (lambda: observed_sensitivity(np.sum, [([1], [2])], declared=1, norm="linf"), "norm must be"),
        (lambda: exact_loss(lambda d, s: 0, 0, 1, draws=9, reach=9, claimed=1), "smaller instance"),
        (lambda: exact_loss(lambda d, s: 0, 0, 1, draws=1, reach=9, claimed=1), "does not change the output"),
        (lambda: audit.clopper_pearson_bound(5, 4, 0, 4), "hits must be"),
        (lambda: audit.clopper_pearson_bound(1, 4, 0, 4, beta=0), "beta must be"),
        (lambda: black_box_bound(float, claimed=1, trials=10), "trials must be"),
        (lambda: audit.one_run_limit(0), "canaries must be"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
