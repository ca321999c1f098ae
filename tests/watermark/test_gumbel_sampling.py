"""The Gumbel sampler: law of its tokens and texts over keys, contexts, repeats, determinism.

False-alarm rate of every chi-square check: 1e-6, seeds fixed. Each comes with a near-miss that it must reject.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.kernels import race
from assay.watermark.gumbel import marked_context, next_tokens, unmarked_key
from assay.watermark.keys import SecretKey, use_key

MakeKey = Callable[..., SecretKey]
FALSE_ALARM = 1e-6
UNMARKED = unmarked_key(b"tests")


def random_words(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2**32, 8, dtype=np.uint32)


def log(law: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(law)


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of counts against a law. Cells expecting under 10 are joined; those of probability 0 must be empty."""
    expected = counts.sum() * law / law.sum()
    assert not counts[law == 0].any()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    if keep.sum() == 1:
        return 1.0
    return float(stats.chisquare(observed[keep], expected[keep]).pvalue)


def drawn(law: np.ndarray, n: int, *, window: int, marked: bool, seed: int, dtype: type = np.float64) -> np.ndarray:
    """Counts of n tokens of one law, each after its own context, under 20 random keys."""
    rng = np.random.default_rng(seed)
    counts = np.zeros(len(law), dtype=np.int64)
    log_weights = np.broadcast_to(log(law).astype(dtype), (n // 20, len(law)))
    for key in range(20):
        # Contexts are numbered, so that none comes twice; a history one token short is drawn without the mark.
        ids = np.arange(n // 20)[:, None] + np.array([10**6 * (key + 1)] * (window if marked else window - 1))
        tokens = next_tokens(
            list(ids), log_weights, prf_key=random_words(rng), window=window, unmarked=random_words(rng)
        )
        counts += np.bincount(tokens, minlength=len(law))
    return counts


def top_k_law() -> np.ndarray:
    logits = np.random.default_rng(5).normal(0, 3, 2000)
    law = np.exp(logits - logits.max())
    law[logits < np.sort(logits)[-20]] = 0.0
    return law / law.sum()


LAWS = {
    "peaked": np.array([0.0005, 0.97, 0.02, 0.009, 0.0005]),
    "flat": np.full(64, 1 / 64),
    "zeros": np.array([0.0, 0.3, 0.0, 0.0, 0.6, 0.1, 0.0]),
    "one": np.array([0.0, 0.0, 1.0]),
    "geometric": 0.5 ** np.arange(1, 30.0),
    "top-k of 2000": top_k_law(),
}


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", LAWS)
def test_tokens_have_the_law_of_the_model(name: str, marked: bool) -> None:
    counts = drawn(LAWS[name], 30_000, window=2, marked=marked, seed=1)
    assert chi_square(counts, LAWS[name]) > FALSE_ALARM


@pytest.mark.parametrize("window", [1, 4, 5, 6])
def test_the_law_holds_for_every_window_and_in_single_precision(window: int) -> None:
    counts = drawn(LAWS["geometric"], 20_000, window=window, marked=True, seed=2, dtype=np.float32)
    assert chi_square(counts, LAWS["geometric"]) > FALSE_ALARM


def test_a_tilt_of_two_percent_is_rejected() -> None:
    # Power: the statistic has mean 3 + 77 and standard deviation 18; 30.7 is needed.
    law = np.array([0.4, 0.3, 0.2, 0.1])
    tilted = law * np.array([1.02, 0.98, 1.02, 0.98])
    counts = drawn(tilted, 200_000, window=2, marked=True, seed=3)
    assert chi_square(counts, law) < FALSE_ALARM
    assert chi_square(counts, tilted) > FALSE_ALARM


def pair_counts(law: np.ndarray, rows: int, again: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Joint counts of two tokens drawn after the same context; `again` is the history at the second."""
    rng = np.random.default_rng(4)
    key, unmarked = random_words(rng), random_words(rng)
    starts = 1000 + np.arange(rows)
    log_weights = np.broadcast_to(log(law), (rows, len(law)))
    first = next_tokens([np.array([start]) for start in starts], log_weights, prf_key=key, window=1, unmarked=unmarked)
    histories = [again(start, token) for start, token in zip(starts, first, strict=True)]
    second = next_tokens(histories, log_weights, prf_key=key, window=1, unmarked=unmarked)
    return np.bincount(first * len(law) + second, minlength=len(law) ** 2)


def test_two_tokens_after_one_context_are_independent() -> None:
    law = np.array([0.5, 0.3, 0.2])
    product = np.outer(law, law).ravel()
    repeated = pair_counts(law, 30_000, lambda start, token: np.array([start, token, start]))
    assert chi_square(repeated, product) > FALSE_ALARM
    # Near-miss: the context keyed again repeats the noise, and with it the token.
    keyed_again = pair_counts(law, 30_000, lambda start, token: np.array([start]))
    assert chi_square(keyed_again, product) < FALSE_ALARM


def text_counts(chain: np.ndarray, length: int, rows: int) -> np.ndarray:
    """Counts of whole texts of a Markov chain, written after the prompt [0], one key each."""
    rng = np.random.default_rng(6)
    log_chain = log(chain)
    counts = np.zeros(len(chain) ** length, dtype=np.int64)
    for _ in range(rows):
        key, unmarked = random_words(rng), random_words(rng)
        history = np.zeros(length + 1, dtype=np.int64)
        code = 0
        for t in range(length):
            token = next_tokens(
                [history[: t + 1]], log_chain[history[t]][None], prf_key=key, window=1, unmarked=unmarked
            )[0]
            history[t + 1] = token
            code = code * len(chain) + token
        counts[code] += 1
    return counts


def text_law(chain: np.ndarray, length: int) -> np.ndarray:
    texts = itertools.product(range(len(chain)), repeat=length)
    return np.array([np.prod([chain[a, b] for a, b in itertools.pairwise((0, *text))]) for text in texts])


def test_whole_texts_have_the_law_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three tokens and window 1: nearly every text of four tokens repeats a context.
    chain = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.0, 0.5]])
    assert chi_square(text_counts(chain, 4, 15_000), text_law(chain, 4)) > FALSE_ALARM

    # Near-miss: without the rule for repeated contexts a text that returns to a token goes on as it did before.
    whole = race.marked_keys
    monkeypatch.setattr(race, "marked_keys", lambda ids, pad, window, *rest: whole(ids[:, -window:], -1, window, *rest))
    assert chi_square(text_counts(chain, 4, 3_000), text_law(chain, 4)) < FALSE_ALARM


def brute_force_context(history: list[int], window: int) -> list[int] | None:
    if len(history) < window:
        return None
    context = history[len(history) - window :]
    followed = [history[i : i + window] for i in range(len(history) - window)]
    return None if context in followed else context


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6))
def test_marked_context_equals_brute_force(history: list[int], window: int) -> None:
    got = marked_context(np.array(history, dtype=np.int64), window)
    assert (None if got is None else got.tolist()) == brute_force_context(history, window)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6])
def test_marked_rows_follow_the_key_and_the_context_alone(make_key: MakeKey, window: int) -> None:
    rng = np.random.default_rng(window)
    key = use_key(make_key(window=window))
    histories = [rng.integers(0, 10**5, window + extra) for extra in (0, 1, 7, 100)]
    log_weights = rng.normal(0, 1, (4, 500))
    got = next_tokens(histories, log_weights, prf_key=key, window=window, unmarked=UNMARKED)
    contexts = np.stack([history[-window:] for history in histories]).astype(np.uint32)
    np.testing.assert_array_equal(got, race.winners_reference(key, contexts, log_weights))
    other = next_tokens(histories, log_weights, prf_key=key, window=window, unmarked=unmarked_key(b"other"))
    np.testing.assert_array_equal(got, other)


def test_unmarked_rows_follow_the_seed_and_the_whole_history_alone(make_key: MakeKey) -> None:
    rng = np.random.default_rng(8)
    repeated = np.array([5, 6, 7, 8, 1, 5, 6, 7, 8])
    histories = [np.array([], dtype=np.int64), np.array([5, 6, 7]), repeated, np.concatenate([[3], repeated])]
    log_weights = np.broadcast_to(rng.normal(0, 0.1, 5000), (4, 5000))
    draws = [
        next_tokens(histories, log_weights, prf_key=use_key(make_key(number)), window=4, unmarked=unmarked).tolist()
        for number, unmarked in ((0, UNMARKED), (1, UNMARKED), (0, unmarked_key(b"other")))
    ]
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])  # equal by chance: about 16 / 5000
    assert len(set(draws[0])) == 4


def test_rows_are_drawn_alone_and_twice_alike(make_key: MakeKey) -> None:
    rng = np.random.default_rng(9)
    settings_ = {"prf_key": use_key(make_key()), "window": 4, "unmarked": UNMARKED}
    histories = [rng.integers(0, 3, n) for n in (0, 3, 4, 5, 9, 60, 300)]
    log_weights = rng.normal(0, 1, (7, 700)).astype(np.float32)
    together = next_tokens(histories, log_weights, **settings_)
    np.testing.assert_array_equal(next_tokens(histories, log_weights, **settings_), together)
    for i in range(7):
        assert next_tokens(histories[i : i + 1], log_weights[i : i + 1], **settings_)[0] == together[i]
    for dtype in (np.uint32, np.int32, np.uint16):
        same = next_tokens([history.astype(dtype) for history in histories], log_weights, **settings_)
        np.testing.assert_array_equal(same, together)


def test_another_key_draws_other_tokens(make_key: MakeKey) -> None:
    histories = list(np.random.default_rng(10).integers(0, 10**5, (200, 4)))
    log_weights = np.zeros((200, 1000))
    draws = [
        next_tokens(histories, log_weights, prf_key=use_key(make_key(number)), window=4, unmarked=UNMARKED)
        for number in (0, 1)
    ]
    assert np.mean(draws[0] == draws[1]) < 0.05  # 1 in 1000 by chance


def test_one_history_per_row_is_required(make_key: MakeKey) -> None:
    with pytest.raises(ValueError, match="n = 1 rows"):
        next_tokens([np.arange(5)], np.zeros((2, 9)), prf_key=use_key(make_key()), window=4, unmarked=UNMARKED)
