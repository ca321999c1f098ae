"""The fixed list: its law, its coins, its settings. False-alarm rate of every chi-square check: 1e-6, seeds fixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from over_keys import FALSE_ALARM, chi_square, drawn_under_one_key, random_words

from assay.kernels import prf
from assay.watermark._coins import MEMBER
from assay.watermark.fixed_list import FixedListConfig, observe, scan
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of

LAW = np.array([0.3, 0.25, 0.0, 0.2, 0.15, 0.07, 0.03])


def colours_of(prf_key: np.ndarray, vocabulary: int, gamma: float) -> np.ndarray:
    none = np.empty((1, 0), dtype=np.uint32)
    words = prf.expand(prf_key, none, vocabulary, stream=MEMBER, backend="numpy")[0]
    return words.astype(np.int64) < math.floor(gamma * 2**32)


@pytest.mark.parametrize("delta", [2.0, None])
@pytest.mark.parametrize("context", [[1], [7, 7, 3]])
def test_the_law_is_tilted_alike_after_every_context(delta: float | None, context: list[int]) -> None:
    config = FixedListConfig(delta=delta)
    prf_key = random_words(np.random.default_rng(1))
    green = colours_of(prf_key, len(LAW), 0.5)
    law = LAW * np.where(green, math.exp(2.0), 1.0) if delta else LAW * green
    counts = drawn_under_one_key(config, prf_key, context, LAW, 20_000)
    assert chi_square(counts, law / law.sum()) > FALSE_ALARM
    wrong = LAW * np.where(colours_of(prf_key + np.uint32(1), len(LAW), 0.5), math.exp(2.0), 1.0)
    if delta:
        assert chi_square(counts, wrong / wrong.sum()) < FALSE_ALARM  # near-miss: another key's list


def test_the_first_token_is_marked_too() -> None:
    config = FixedListConfig(delta=None)
    prf_key = random_words(np.random.default_rng(2))
    draw = sampler_of(config, prf_key, unmarked_key(b"u"))
    ids = np.full((5, 3), 9, dtype=np.int64)  # nothing but padding
    tokens = draw(ids, np.zeros((5, 400)), 9)
    assert len(set(tokens.tolist())) == 1  # equal histories, equal draws
    assert colours_of(prf_key, 400, 0.5)[tokens].all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=25), min_size=1, max_size=4))
def test_coins_are_the_distinct_ids_of_each_document(documents: list[list[int]]) -> None:
    prf_key = np.arange(8, dtype=np.uint32)
    colours = colours_of(prf_key, 41, 0.5)
    offsets = np.cumsum([0, *map(len, documents)])
    ids = np.array([token for document in documents for token in document], dtype=np.uint32)
    positions, green = scan(ids, offsets, prf_key, FixedListConfig())
    expected = [
        (start + place, bool(colours[token]))
        for start, document in zip(offsets.tolist(), documents, strict=False)
        for place, token in enumerate(document)
        if token not in document[:place]
    ]
    assert [(int(place), bool(row[0])) for place, row in zip(positions, green, strict=True)] == expected


def test_ids_of_the_prompt_do_not_count() -> None:
    coins = observe(
        np.array([1, 2, 3, 2, 4, 4], dtype=np.uint32), np.arange(8, dtype=np.uint32), FixedListConfig(), prompt_length=3
    )
    assert coins.positions.tolist() == [1]
    assert (coins.n_tokens, coins.n_repeats_dropped) == (3, 2)


def test_known_answers() -> None:
    # A change here is a change of every mark that was made: it needs a new scheme version.
    config = FixedListConfig()
    assert config.canonical() == b'{"delta":2.0,"gamma":0.5}'
    prf_key = use_key(SecretKey(bytes(range(32)), id="vector", config=config))
    found = observe(np.arange(100, 132, dtype=np.uint32), prf_key, config)
    assert "".join(map(str, found.outcomes[:, 0].astype(int))) == "01100110011001011000010011111011"
    draw = sampler_of(config, prf_key, unmarked_key(b"vector"))
    log_weights = np.tile(np.log(np.arange(1.0, 1001.0) / 500500.0), (4, 1))
    assert draw(np.arange(20).reshape(4, 5), log_weights, None).tolist() == [769, 853, 911, 896]


@pytest.mark.parametrize(("name", "value"), [("gamma", 0), ("gamma", 1), ("delta", -2), ("delta", 21), ("gamma", None)])
def test_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number in"):
        FixedListConfig(**{name: value})  # type: ignore[arg-type]
