"""Reweighting by a keyed permutation: its law against exact fractions, over keys against the model's, its coins.

False-alarm rate of every chi-square check: 1e-6, seeds fixed. Each comes with a near-miss that it must reject.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from over_keys import (
    FALSE_ALARM,
    LAWS,
    chi_square,
    drawn_over_keys,
    drawn_under_one_key,
    log,
    pairs_after_one_context,
    random_words,
    text_counts,
    text_law,
    without_the_rule_for_repeats,
)

from assay.kernels import prf, race, tilted_laws, tilted_race
from assay.watermark._coins import ORDER
from assay.watermark.dipmark import CUT, DipmarkConfig, observe
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of


def counted(mass: Fraction, alpha: Fraction) -> Fraction:
    return max(mass - alpha, Fraction(0)) + max(mass - (1 - alpha), Fraction(0))


def reweighted(law: list[Fraction], order: list[int], alpha: Fraction) -> list[Fraction]:
    """The definition (Wu et al., equation for F^W): differences of the reweighted cdf in the order."""
    out = [Fraction(0)] * len(law)
    below = Fraction(0)
    for v in order:
        out[v] = counted(below + law[v], alpha) - counted(below, alpha)
        below += law[v]
    return out


LAW = [Fraction(n, 40) for n in (12, 10, 0, 8, 6, 3, 1)]


def order_of(prf_key: np.ndarray, context: list[int], vocabulary: int) -> list[int]:
    words = prf.expand(prf_key, np.array([context], dtype=np.uint32), vocabulary, stream=ORDER, backend="numpy")[0]
    return sorted(range(vocabulary), key=lambda v: (int(words[v]), v))


@pytest.mark.parametrize(("alpha", "key"), [("1/2", 0), ("1/2", 1), ("3/10", 2), ("1/20", 3)])
def test_the_law_under_one_key_is_the_reweighted_one(alpha: str, key: int) -> None:
    share = Fraction(alpha)
    config = DipmarkConfig(window=2, alpha=float(share))
    prf_key = random_words(np.random.default_rng(key))
    expected = reweighted(LAW, order_of(prf_key, [5, 9], len(LAW)), share)
    law = np.array([float(p) for p in LAW])
    counts = drawn_under_one_key(config, prf_key, [5, 9], law, 20_000)
    assert chi_square(counts, np.array([float(p) for p in expected])) > FALSE_ALARM
    if share > Fraction(1, 10):
        assert chi_square(counts, law) < FALSE_ALARM  # near-miss: no reweighting


@pytest.mark.parametrize("alpha", ["1/2", "3/10"])
def test_the_mean_over_all_orders_is_the_law_itself(alpha: str) -> None:
    law = [p for p in LAW if p][:5]
    law = [p / sum(law) for p in law]
    share = Fraction(alpha)
    orders = [list(order) for order in itertools.permutations(range(5))]
    laws = [reweighted(law, order, share) for order in orders]
    assert [sum(column) / len(orders) for column in zip(*laws, strict=True)] == law
    # And for each order with its reverse, which is the proof.
    for order, one in zip(orders, laws, strict=True):
        assert [a + b for a, b in zip(one, reweighted(law, order[::-1], share), strict=True)] == [2 * p for p in law]


def test_the_ratio_of_a_large_vocabulary_equals_a_sort() -> None:
    # Masses are found in pieces of the order, not by a sort of all candidates: against the sort of 3,000.
    rng = np.random.default_rng(1)
    law = rng.dirichlet(np.full(3000, 0.3))
    key = random_words(rng)[None]
    words = prf.expand(key[0], np.empty((1, 0), dtype=np.uint32), 3000, stream=ORDER)[0]
    keys = race.subkeys(key[0], np.empty((1, 0), dtype=np.uint32))
    order = np.lexsort((np.arange(3000), words))
    for alpha in (0.5, 0.23):
        edges = np.concatenate([[0], np.cumsum(law[order])])
        mass = np.maximum(edges - alpha, 0) + np.maximum(edges - (1 - alpha), 0)
        expected = np.empty(3000)
        expected[order] = np.diff(mass) / law[order]
        below = np.searchsorted(edges, [alpha, 1 - alpha])  # the tokens on the bounds, and others
        tokens = np.concatenate([order[below - 1], np.flatnonzero(law > 1e-6)[:150]])
        rows = len(tokens)
        got = tilted_laws.reweighted_log_ratios(
            np.repeat(keys, rows, axis=0), np.tile(log(law), (rows, 1)), tokens, stream=ORDER, alpha=alpha
        )
        np.testing.assert_allclose(np.exp(got), expected[tokens], atol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_over_keys_tokens_have_the_law_of_the_model(name: str) -> None:
    for alpha in (0.5, 0.2):
        counts = drawn_over_keys(DipmarkConfig(window=2, alpha=alpha), LAWS[name], 10_000, seed=1)
        assert chi_square(counts, LAWS[name]) > FALSE_ALARM


def test_over_keys_an_order_that_is_not_uniform_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    # The near-miss: candidates in the order of their ids, as if every context gave one permutation.
    law = np.array([0.4, 0.3, 0.2, 0.1])
    same = race.subkeys

    def one_permutation(use_key: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        return same(use_key, np.zeros_like(contexts) if contexts.shape[1] == 2 else contexts)

    monkeypatch.setattr(race, "subkeys", one_permutation)
    assert chi_square(drawn_over_keys(DipmarkConfig(window=2), law, 15_000, seed=1), law) < FALSE_ALARM


def test_two_tokens_after_one_context_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    law = np.array([0.5, 0.3, 0.2])
    product = np.outer(law, law).ravel()
    assert chi_square(pairs_after_one_context(DipmarkConfig(window=1), law, 20_000), product) > FALSE_ALARM
    # Near-miss: without the rule for repeated contexts both tokens come from the same reweighted law.
    monkeypatch.setattr(tilted_race, "contexts", without_the_rule_for_repeats(tilted_race.contexts))
    assert chi_square(pairs_after_one_context(DipmarkConfig(window=1), law, 20_000), product) < FALSE_ALARM


def test_whole_texts_have_the_law_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.0, 0.5]])
    config = DipmarkConfig(window=1)
    assert chi_square(text_counts(config, chain, 4, 3_000), text_law(chain, 4)) > FALSE_ALARM
    monkeypatch.setattr(tilted_race, "contexts", without_the_rule_for_repeats(tilted_race.contexts))
    assert chi_square(text_counts(config, chain, 4, 2_000), text_law(chain, 4)) < FALSE_ALARM


def test_known_answers() -> None:
    # A change here is a change of every mark that was made: it needs a new scheme version.
    config = DipmarkConfig()
    assert config.canonical() == b'{"alpha":0.5,"window":4}'
    prf_key = use_key(SecretKey(bytes(range(32)), id="vector", config=config))
    coins = observe(np.arange(100, 132, dtype=np.uint32), prf_key, config)
    assert "".join(map(str, coins.outcomes[:, 0].astype(int))) == "1110101100011001101000110110"
    draw = sampler_of(config, prf_key, unmarked_key(b"vector"))
    log_weights = np.tile(np.log(np.arange(1.0, 1001.0) / 500500.0), (4, 1))
    assert draw(np.arange(20).reshape(4, 5), log_weights, None).tolist() == [100, 975, 588, 973]


def test_the_coin_is_the_upper_half_of_the_words() -> None:
    ids = np.random.default_rng(2).integers(0, 50, 200).astype(np.uint32)
    config = DipmarkConfig(window=3)
    prf_key = random_words(np.random.default_rng(3))
    coins = observe(ids, prf_key, config)
    words = prf.words_of(prf_key, ids, coins.positions, 3, stream=ORDER)
    np.testing.assert_array_equal(coins.outcomes[:, 0], words >= CUT)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([0.5, 0.35, 0.01]))
def test_the_reweighted_law_sums_to_one(seed: int, size: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    law = rng.dirichlet(np.full(size, 0.5)) + 1e-12
    law /= law.sum()
    keys = race.subkeys(random_words(rng), np.empty((1, 0), dtype=np.uint32))
    ratios = tilted_laws.reweighted_log_ratios(
        np.repeat(keys, size, axis=0), np.tile(log(law), (size, 1)), np.arange(size), stream=ORDER, alpha=alpha
    )
    assert abs(float(np.sum(law * np.exp(ratios))) - 1.0) < 1e-9


def test_equal_settings_have_equal_bytes() -> None:
    assert DipmarkConfig(alpha=0.5).canonical() == DipmarkConfig(alpha=1 / 2).canonical()


@pytest.mark.parametrize("alpha", [0, 0.0, -0.1, 0.51, np.nan, "0.5", True, None])
def test_alpha_out_of_range(alpha: object) -> None:
    with pytest.raises(ValueError, match=r"alpha must be a number in \(0, 0.5\]; 0 would mark nothing, got"):
        DipmarkConfig(alpha=alpha)  # type: ignore[arg-type]
