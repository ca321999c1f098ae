"""The green list, soft and hard, keyed by whole contexts or by anchors: its law, its coins, its settings.

False-alarm rate of every chi-square check: 1e-6, seeds fixed. Each comes with a near-miss that it must reject.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from over_keys import FALSE_ALARM, chi_square, drawn_over_keys, drawn_under_one_key, random_words
from scipy import stats

from assay.kernels import prf
from assay.watermark._coins import ANCHOR, MEMBER
from assay.watermark.green_list import GreenListConfig, anchors_of, observe, scan
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of

LAW = np.array([0.3, 0.25, 0.0, 0.2, 0.15, 0.07, 0.03])


def word(prf_key: np.ndarray, context: list[int], token: int, stream: int) -> int:
    return int(
        prf.words_at(
            prf_key,
            np.array([context], dtype=np.uint32),
            np.array([token], dtype=np.uint32),
            stream=stream,
            backend="numpy",
        )[0]
    )


def green(prf_key: np.ndarray, context: list[int], token: int, config: GreenListConfig) -> bool:
    """The definition, one PRF word at a time."""
    if config.seeding == "self":
        context = [min(context, key=lambda anchor: (word(prf_key, [anchor], token, ANCHOR), anchor))]
    return word(prf_key, context, token, MEMBER) < math.floor(config.gamma * 2**32)


def tilted(law: np.ndarray, colours: np.ndarray, delta: float | None) -> np.ndarray:
    if delta is None:
        out = law * colours if (law * colours).any() else law
    else:
        out = law * np.where(colours, math.exp(delta), 1.0)
    return out / out.sum()


@pytest.mark.parametrize("seeding", ["left", "self"])
@pytest.mark.parametrize("delta", [0.5, 2.0, None])
def test_the_law_under_one_key_is_the_tilted_one(seeding: str, delta: float | None) -> None:
    config = GreenListConfig(window=3, gamma=0.5, delta=delta, seeding=seeding)  # type: ignore[arg-type]
    prf_key = random_words(np.random.default_rng(2))
    context = [5, 9, 4]
    colours = np.array([green(prf_key, context, v, config) for v in range(len(LAW))])
    assert 0 < (LAW * colours).sum() < 1
    counts = drawn_under_one_key(config, prf_key, context, LAW, 20_000)
    assert chi_square(counts, tilted(LAW, colours, delta)) > FALSE_ALARM
    near = tilted(LAW, colours, 1.4 * delta if delta is not None else 4.0)  # near-miss: another bonus
    assert chi_square(counts, near) < FALSE_ALARM


def test_a_hard_list_without_a_green_candidate_draws_from_the_law_itself() -> None:
    config = GreenListConfig(window=1, gamma=2.0**-32, delta=None)
    counts = drawn_under_one_key(config, random_words(np.random.default_rng(0)), [3], LAW, 10_000)
    assert chi_square(counts, LAW) > FALSE_ALARM


def test_over_keys_the_law_is_not_the_models() -> None:
    # The green list prefers flat laws: the claim that it has no distortion is the near-miss of the other schemes.
    law = np.array([0.7, 0.2, 0.1])
    config = GreenListConfig(window=2)
    assert not config.distortion_free
    counts = drawn_over_keys(config, law, 20_000, seed=1)
    assert chi_square(counts, law) < FALSE_ALARM
    colours = (np.arange(8)[:, None] >> np.arange(3)) & 1
    chances = 0.25 ** colours.sum(axis=1) * 0.75 ** (3 - colours.sum(axis=1))
    exact = sum(chance * tilted(law, row, 2.0) for chance, row in zip(chances, colours, strict=True))
    assert chi_square(counts, exact) > FALSE_ALARM


@pytest.mark.parametrize("seeding", ["left", "self"])
def test_every_token_of_a_hard_list_is_green(seeding: str) -> None:
    # Sampler and detector agree: through different code, on 200 tokens.
    config = GreenListConfig(window=2, gamma=0.5, delta=None, seeding=seeding)  # type: ignore[arg-type]
    prf_key = random_words(np.random.default_rng(7))
    draw = sampler_of(config, prf_key, unmarked_key(b"u"))
    ids = np.random.default_rng(1).integers(0, 500, (1, 2))
    for _ in range(200):
        ids = np.column_stack([ids, draw(ids, np.zeros((1, 500)), None)])
    coins = observe(ids[0].astype(np.uint32), prf_key, config)
    assert len(coins.positions) > 150
    assert coins.outcomes.all()
    other = observe(ids[0].astype(np.uint32), random_words(np.random.default_rng(8)), config)
    assert other.outcomes.mean() < 0.75


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from(["left", "self"]),
)
def test_coins_equal_their_definition(documents: list[list[int]], window: int, seeding: str) -> None:
    config = GreenListConfig(window=window, gamma=0.5, seeding=seeding)  # type: ignore[arg-type]
    prf_key = np.arange(8, dtype=np.uint32)
    offsets = np.cumsum([0, *map(len, documents)])
    positions, colours = scan(
        np.array([token for document in documents for token in document], dtype=np.uint32), offsets, prf_key, config
    )
    expected = []
    for start, document in zip(offsets.tolist(), documents, strict=False):
        seen = set()
        for end in range(window, len(document)):
            context, token = document[end - window : end], document[end]
            key = tuple(context)
            if seeding == "self":
                key = (min(context, key=lambda anchor: (word(prf_key, [anchor], token, ANCHOR), anchor)),)
            if (key, token) not in seen:
                expected.append((start + end, green(prf_key, context, token, config)))
            seen.add((key, token))
    assert [(int(place), bool(row[0])) for place, row in zip(positions, colours, strict=True)] == expected


def test_anchors_survive_a_change_of_another_token() -> None:
    rng = np.random.default_rng(3)
    contexts = rng.integers(0, 10**6, (4000, 4)).astype(np.uint32)
    tokens = rng.integers(0, 10**6, 4000).astype(np.uint32)
    prf_key = random_words(rng)
    before = anchors_of(contexts, tokens, prf_key)
    contexts[:, 2] = rng.integers(0, 10**6, 4000)
    after = anchors_of(contexts, tokens, prf_key)
    # The anchor is lost if it was the changed token (1/4) or a new one beats it (3/4 * 1/4 of the rest, a minimum of
    # 5 words): P(same) = 3/5. The interval holds all but 1e-6.
    low, high = stats.binom.ppf([5e-7, 1 - 5e-7], 4000, 0.6)
    assert low <= np.sum(before == after) <= high


def test_membership_is_a_coin_of_chance_gamma_not_a_draw_without_replacement() -> None:
    # Sizes of 2,000 lists of 40 ids: binomial. Lists of fixed size, as others draw them, are the near-miss.
    rng = np.random.default_rng(5)
    words = prf.expand(random_words(rng), np.arange(2000, dtype=np.uint32)[:, None], 40, stream=MEMBER, backend="numba")
    sizes = (words < 2**30).sum(axis=1)

    def fits(sizes: np.ndarray) -> float:
        counts = np.bincount(sizes, minlength=41)
        return chi_square(counts, stats.binom.pmf(np.arange(41), 40, 0.25))

    assert fits(sizes) > FALSE_ALARM
    assert fits(np.full(2000, 10)) < FALSE_ALARM


@pytest.mark.parametrize(
    ("config", "canonical", "coins", "tokens"),
    [
        (
            GreenListConfig(),
            b'{"delta":2.0,"gamma":0.25,"seeding":"left","window":4}',
            "1001011110010111010001000010",
            [100, 853, 722, 372],
        ),
        (
            GreenListConfig(seeding="self", delta=None),
            b'{"delta":null,"gamma":0.25,"seeding":"self","window":4}',
            "1011000011001101000000000001",
            [769, 699, 911, 997],
        ),
    ],
    ids=["left", "self"],
)
def test_known_answers(config: GreenListConfig, canonical: bytes, coins: str, tokens: list[int]) -> None:
    # A change here is a change of every mark that was made: it needs a new scheme version.
    assert config.canonical() == canonical
    prf_key = use_key(SecretKey(bytes(range(32)), id="vector", config=config))
    found = observe(np.arange(100, 132, dtype=np.uint32), prf_key, config)
    assert "".join(map(str, found.outcomes[:, 0].astype(int))) == coins
    draw = sampler_of(config, prf_key, unmarked_key(b"vector"))
    log_weights = np.tile(np.log(np.arange(1.0, 1001.0) / 500500.0), (4, 1))
    assert draw(np.arange(20).reshape(4, 5), log_weights, None).tolist() == tokens


@pytest.mark.parametrize("seeding", ["left", "self"])
def test_rows_are_drawn_alone_and_whatever_pads_them(seeding: str) -> None:
    rng = np.random.default_rng(9)
    draw = sampler_of(GreenListConfig(seeding=seeding), random_words(rng), unmarked_key(b"u"))  # type: ignore[arg-type]
    histories = [rng.integers(1, 9, n) for n in (3, 4, 5, 40)]
    ids = np.zeros((4, 40), dtype=np.int64)
    for row, history in zip(ids, histories, strict=True):
        row[40 - len(history) :] = history
    log_weights = rng.normal(0, 1, (4, 300)).astype(np.float32)
    log_weights[:, 5:20] = -np.inf
    together = draw(ids, log_weights, 0)
    for i, history in enumerate(histories):
        assert draw(history[None], log_weights[i : i + 1], None)[0] == together[i]
    assert not set(together.tolist()) & set(range(5, 20))


def test_equal_settings_derive_one_key() -> None:
    assert GreenListConfig(delta=2).canonical() == GreenListConfig(delta=2.0).canonical()  # type: ignore[arg-type]
    assert GreenListConfig().chance == 0.25
    third = GreenListConfig(gamma=1 / 3)
    assert third.chance == math.floor(2**32 / 3) / 2**32 < third.gamma


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"gamma": 0.0}, r"gamma must be a number in \(0, 1\), got 0.0"),
        ({"gamma": 1.0}, r"gamma must be a number in \(0, 1\)"),
        ({"gamma": 1e-12}, r"at least 2\*\*-32, got 1e-12"),
        ({"gamma": math.nan}, "gamma must be"),
        ({"gamma": "0.5"}, "gamma must be"),
        ({"delta": 0.0}, r"delta must be a number in \(0, 20\] or None for the hard list, got 0.0"),
        ({"delta": -1.0}, "delta must be"),
        ({"delta": math.inf}, "delta must be"),
        ({"delta": True}, "delta must be"),
        ({"seeding": "right"}, "seeding must be 'left' or 'self', got 'right'"),
        ({"window": 0}, r"window must be an integer in \[1, 64\], got 0"),
    ],
)
def test_settings_out_of_range(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GreenListConfig(**settings_)  # type: ignore[arg-type]
