"""The tournament: its law against the matches it is named after, over keys against the model's, its bits, its texts.

False-alarm rate of every chi-square check: 1e-6, seeds fixed. Each comes with a near-miss that it must reject.
"""

from __future__ import annotations

import itertools

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

from assay.kernels import prf, tilted_race
from assay.watermark._coins import LAYERS
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of
from assay.watermark.tournament import TournamentConfig, observe, scan


def bits_of(prf_key: np.ndarray, context: list[int], vocabulary: int, layers: int) -> np.ndarray:
    """g_1 .. g_m of every candidate, shape (V, m), from the numpy PRF."""
    words = prf.expand(prf_key, np.array([context], dtype=np.uint32), vocabulary, stream=LAYERS, backend="numpy")[0]
    return np.array([[word >> layer & 1 for layer in range(layers)] for word in words.tolist()])


def law_of_matches(law: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The winner's law from the rules: two entrants a match, the higher bit wins, equal bits toss a coin."""
    for layer in range(bits.shape[1]):
        after = np.zeros_like(law)
        for a, b in itertools.product(range(len(law)), repeat=2):
            if bits[a, layer] == bits[b, layer]:
                after[a] += law[a] * law[b] / 2
                after[b] += law[a] * law[b] / 2
            else:
                after[a if bits[a, layer] else b] += law[a] * law[b]
        law = after
    return law


@pytest.mark.parametrize(("layers", "key"), [(1, 0), (2, 1), (3, 2), (30, 3)])
def test_the_law_under_one_key_is_that_of_the_matches(layers: int, key: int) -> None:
    config = TournamentConfig(window=2, layers=layers)
    prf_key = random_words(np.random.default_rng(key))
    law = np.array([0.3, 0.25, 0.0, 0.2, 0.15, 0.07, 0.03])
    bits = bits_of(prf_key, [5, 9], len(law), layers)
    counts = drawn_under_one_key(config, prf_key, [5, 9], law, 20_000)
    assert chi_square(counts, law_of_matches(law, bits)) > FALSE_ALARM
    assert chi_square(counts, law) < FALSE_ALARM  # near-miss: no tournament


@pytest.mark.parametrize("name", LAWS)
def test_over_keys_tokens_have_the_law_of_the_model(name: str) -> None:
    draws = 20_000 if len(LAWS[name]) < 100 else 8_000
    counts = drawn_over_keys(TournamentConfig(window=2), LAWS[name], draws, seed=1)
    assert chi_square(counts, LAWS[name]) > FALSE_ALARM


def test_over_keys_a_tilt_of_five_percent_is_rejected() -> None:
    # Power: the statistic has mean 3 + 90 and standard deviation 20; 30.7 is needed.
    law = np.array([0.4, 0.3, 0.2, 0.1])
    tilted = law * np.array([1.05, 0.95, 1.05, 0.95])
    counts = drawn_over_keys(TournamentConfig(window=2), tilted, 36_000, seed=3)
    assert chi_square(counts, law) < FALSE_ALARM
    assert chi_square(counts, tilted) > FALSE_ALARM


def test_two_tokens_after_one_context_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    law = np.array([0.5, 0.3, 0.2])
    product = np.outer(law, law).ravel()
    config = TournamentConfig(window=1)
    assert chi_square(pairs_after_one_context(config, law, 20_000), product) > FALSE_ALARM
    # Near-miss: without the rule for repeated contexts both tokens win the same tournament.
    monkeypatch.setattr(tilted_race, "contexts", without_the_rule_for_repeats(tilted_race.contexts))
    assert chi_square(pairs_after_one_context(config, law, 20_000), product) < FALSE_ALARM


def test_whole_texts_have_the_law_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three tokens and window 1: nearly every text of four tokens repeats a context.
    chain = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.0, 0.5]])
    config = TournamentConfig(window=1, layers=8)
    assert chi_square(text_counts(config, chain, 4, 3_000), text_law(chain, 4)) > FALSE_ALARM
    monkeypatch.setattr(tilted_race, "contexts", without_the_rule_for_repeats(tilted_race.contexts))
    assert chi_square(text_counts(config, chain, 4, 2_000), text_law(chain, 4)) < FALSE_ALARM


def test_short_contexts_are_drawn_without_the_mark() -> None:
    law = np.random.default_rng(0).dirichlet(np.full(50, 0.3))
    ids = np.full((40, 6), -1, dtype=np.int64)
    ids[:, -3:] = np.arange(120).reshape(40, 3)
    rows = np.broadcast_to(log(law), (40, 50))
    first, second = (
        sampler_of(TournamentConfig(), random_words(np.random.default_rng(key)), unmarked_key(b"u"))(ids, rows, None)
        for key in (0, 1)
    )
    np.testing.assert_array_equal(first, second)  # the key plays no part
    other_seed = sampler_of(TournamentConfig(), random_words(np.random.default_rng(0)), unmarked_key(b"v"))
    assert (other_seed(ids, rows, None) != first).any()


def test_known_answers() -> None:
    # A change here is a change of every mark that was made: it needs a new scheme version.
    config = TournamentConfig()
    assert config.canonical() == b'{"layers":30,"window":4}'
    prf_key = use_key(SecretKey(bytes(range(32)), id="vector", config=config))
    ids = np.arange(100, 108, dtype=np.uint32)
    coins = observe(ids, prf_key, config)
    assert coins.positions.tolist() == [4, 5, 6, 7]
    packed = (coins.outcomes.astype(np.uint64) << np.arange(30, dtype=np.uint64)).sum(axis=1).tolist()
    assert packed == [609605406, 613500382, 620361541, 620586586]
    draw = sampler_of(config, prf_key, unmarked_key(b"vector"))
    histories = np.arange(20).reshape(4, 5).astype(np.int64)
    log_weights = np.log(np.arange(1.0, 1001.0) / 500500.0)
    assert draw(histories, np.tile(log_weights, (4, 1)), None).tolist() == [925, 479, 418, 757]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=25), min_size=1, max_size=4), st.integers(1, 5))
def test_coins_are_the_distinct_pairs_of_context_and_token(documents: list[list[int]], window: int) -> None:
    config = TournamentConfig(window=window, layers=7)
    prf_key = np.arange(8, dtype=np.uint32)
    offsets = np.cumsum([0, *map(len, documents)])
    positions, bits = scan(
        np.array([token for document in documents for token in document], dtype=np.uint32), offsets, prf_key, config
    )
    expected = []
    for start, document in zip(offsets.tolist(), documents, strict=False):
        seen = set()
        for end in range(window, len(document)):
            gram = tuple(document[end - window : end + 1])
            if gram not in seen:
                expected.append((start + end, bits_of(prf_key, list(gram[:-1]), 3, 7)[gram[-1]].tolist()))
                seen.add(gram)
    assert [(int(place), row.astype(int).tolist()) for place, row in zip(positions, bits, strict=True)] == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 30))
def test_what_a_prompt_showed_does_not_count(ids: list[int], prompt_length: int) -> None:
    config = TournamentConfig(window=2, layers=5)
    prompt_length = min(prompt_length, len(ids))
    whole = observe(np.array(ids, dtype=np.uint32), np.arange(8, dtype=np.uint32), config)
    part = observe(np.array(ids, dtype=np.uint32), np.arange(8, dtype=np.uint32), config, prompt_length=prompt_length)
    kept = whole.positions >= prompt_length
    assert part.positions.tolist() == (whole.positions[kept] - prompt_length).tolist()
    np.testing.assert_array_equal(part.outcomes, whole.outcomes[kept])
    assert part.n_tokens == len(ids) - prompt_length
    with_context = max(0, len(ids) - max(2, prompt_length))
    assert part.n_repeats_dropped == with_context - len(part.positions) >= 0


@pytest.mark.parametrize("layers", [0, 33, True, 2.5, None])
def test_layers_out_of_range(layers: object) -> None:
    with pytest.raises(ValueError, match=r"layers must be an integer in \[1, 32\], got"):
        TournamentConfig(layers=layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 65, True, "4"])
def test_window_out_of_range(window: object) -> None:
    with pytest.raises(ValueError, match=r"window must be an integer in \[1, 64\]"):
        TournamentConfig(window=window)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_cannot_be_drawn_from(bad: float) -> None:
    draw = sampler_of(TournamentConfig(), np.arange(8, dtype=np.uint32), unmarked_key(b"u"))
    rows = np.zeros((2, 5))
    rows[1, 3] = bad
    with pytest.raises(ValueError, match=r"log_weights must be finite or -inf .* row 1"):
        draw(np.zeros((2, 6), dtype=np.int64), rows, None)
    with pytest.raises(ValueError, match="no id is left to draw"):
        draw(np.zeros((2, 6), dtype=np.int64), np.full((2, 5), -np.inf), None)
