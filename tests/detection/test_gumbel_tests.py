"""The three tests of the Gumbel mark: size under the null, power on marked text, equality of batch and single."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from assay.detection.gumbel import (
    documents_test,
    model_aware_test,
    robust_test,
    row_evidence,
    sum_test,
    test_ids,
)
from assay.detection.model_view import ModelView
from assay.kernels.dedup import first_occurrences_numba, first_occurrences_numpy
from assay.kernels.prf import race_times
from assay.watermark.edits import edit
from assay.watermark.gumbel import (
    GumbelConfig,
    next_tokens,
    pivots,
    race_scores,
    sum_scores,
    token_ids,
    unmarked_key,
)
from assay.watermark.keys import SecretKey, use_key

MakeKey = Callable[..., SecretKey]


def marked_text(key: SecretKey, n: int, concentration: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a marked text from Dirichlet next-token laws over 200 tokens, and their log-probabilities."""
    rng = np.random.default_rng(seed)
    window = key.config.window  # type: ignore[attr-defined]
    history = list(rng.integers(0, 200, window))
    log_p = [0.0] * window
    for _ in range(n):
        law = rng.dirichlet(np.full(200, concentration))
        token = int(
            next_tokens(
                [np.array(history)],
                np.log(np.maximum(law, 1e-300))[None],
                prf_key=use_key(key),
                window=window,
                unmarked=unmarked_key(b"t"),
            )[0]
        )
        history.append(token)
        log_p.append(math.log(law[token]))
    return np.array(history), np.array(log_p)


def test_scores_take_the_conservative_edge_of_each_cell() -> None:
    words = np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    # P(word <= x) is exactly (x + 1) / 2**32, so exp(-score) must equal it.
    np.testing.assert_allclose(np.exp(-sum_scores(words)), (words.astype(float) + 1) / 2**32, rtol=1e-12)
    assert sum_scores(words)[-1] == 0.0
    np.testing.assert_allclose(-np.expm1(-race_scores(words)), (words.astype(float) + 1) / 2**32, rtol=1e-12)
    assert race_scores(words)[-1] == math.inf


def test_marked_text_is_found_and_other_keys_see_nothing(make_key: MakeKey) -> None:
    key, other = make_key(1), make_key(2)
    ids, log_p = marked_text(key, 150, 0.05, seed=3)
    found = pivots(ids, key)
    results = [
        sum_test(found),
        model_aware_test(found, log_p[found.positions]),
        robust_test(found, log_p[found.positions]),
    ]
    assert all(result.pvalue < 1e-30 and result.log_evalue > 60 for result in results)
    assert results[1].log_pvalue < results[0].log_pvalue  # the model helps
    missed = pivots(ids, other)
    assert sum_test(missed).pvalue > 1e-3
    assert model_aware_test(missed, log_p[missed.positions]).pvalue > 1e-3


def test_robust_test_survives_edits_that_hide_the_mark_from_the_model_aware_test(make_key: MakeKey) -> None:
    key = make_key(1)
    ids, log_p = marked_text(key, 200, 0.05, seed=4)
    rng = np.random.default_rng(5)
    edited = rng.random(len(ids)) < 0.1
    ids[edited] = rng.integers(0, 200, int(edited.sum()))
    found = pivots(ids, key)
    guess = np.where(edited, math.log(1e-5), log_p)[found.positions]
    assert model_aware_test(found, guess).pvalue > 1e-3
    assert robust_test(found, guess).pvalue < 1e-20


# --- the winner of each token's race --------------------------------------------------------------------------------


def view_of(ids: np.ndarray, laws: np.ndarray) -> ModelView:
    """A model that gives token t of the text the law laws[t], in two pieces; it knows nothing of the first four."""
    rows = np.log(np.maximum(laws, 1e-30)).astype(np.float32)
    half = len(ids) // 2
    own = rows[np.arange(len(ids)), np.minimum(ids, rows.shape[1] - 1)].astype(np.float64)
    return ModelView(lambda: own, lambda: iter([(4, rows[4:half]), (half, rows[half:])]))


def race_text(key: SecretKey, laws: np.ndarray, seed: int) -> np.ndarray:
    history = list(np.random.default_rng(seed).integers(0, laws.shape[1], 4))
    for law in laws[4:]:
        row = np.log(np.maximum(law, 1e-30)).astype(np.float32)[None]
        drawn = next_tokens([np.array(history)], row, prf_key=use_key(key), window=4, unmarked=unmarked_key(b"t"))
        history.append(int(drawn[0]))
    return np.array(history, dtype=np.uint32)


def test_marked_tokens_win_their_race_and_others_as_often_as_they_are_likely(make_key: MakeKey) -> None:
    laws = np.random.default_rng(6).dirichlet(np.full(30, 0.3), size=500)
    ids = race_text(make_key(1), laws, 7)
    found = pivots(ids, make_key(1))
    log_p, ratios = row_evidence(ids, 0, use_key(make_key(1)), GumbelConfig(), found.positions, view_of(ids, laws))
    p = laws[found.positions, ids[found.positions]]
    new = first_occurrences_numpy(ids, np.array([0, len(ids)]), 4)[found.positions - 1]
    np.testing.assert_allclose(log_p, np.log(p), atol=1e-5)
    np.testing.assert_allclose(ratios[new], -np.log(p[new]), atol=1e-4)
    assert np.all(ratios[~new] == 0.0)  # drawn without the mark
    # Under other keys a token wins as often as it is likely: 30 keys, normal bound at a false-alarm rate of 1e-6.
    wins, variance = 0.0, 30.0 * float(np.sum(p * (1 - p)))
    for number in range(30):
        _, other = row_evidence(
            ids, 0, use_key(make_key(100 + number)), GumbelConfig(), found.positions, view_of(ids, laws)
        )
        wins += np.count_nonzero(np.isfinite(other[new]))
    expected = 30.0 * float(np.sum(p[new]))
    assert abs(wins - expected) < 4.9 * math.sqrt(variance)
    # The near-miss: laws 15 % off.
    assert abs(wins - 1.15 * expected) > 4.9 * math.sqrt(variance)


def test_a_winner_is_never_paid_more_than_its_chance_allows(make_key: MakeKey) -> None:
    # Rows that are not normalised, and ids of which no race is run, which must say nothing.
    laws = 3.0 * np.random.default_rng(8).dirichlet(np.full(5, 0.5), size=60)
    ids = race_text(make_key(1), laws, 9)
    ids[20] = 17
    found = pivots(ids, make_key(1))
    log_p, ratios = row_evidence(ids, 0, use_key(make_key(1)), GumbelConfig(), found.positions, view_of(ids, laws))
    rows = np.exp(np.log(np.maximum(laws, 1e-30)).astype(np.float32).astype(np.float64))
    shares = (rows / rows.sum(axis=1, keepdims=True))[found.positions]
    for place, own, ratio, law in zip(found.positions.tolist(), log_p, ratios, shares, strict=True):
        if place == 20:
            assert own == ratio == 0.0
        elif np.isfinite(ratio) and ratio != 0.0:
            assert 0.0 <= -math.log(law[ids[place]]) - ratio < 1e-3 + 1e-6 / law[ids[place]]
    empty = row_evidence(ids[:4], 4, use_key(make_key(1)), GumbelConfig(), np.empty(0, np.int64), view_of(ids, laws))
    assert [one.shape for one in empty] == [(0,), (0,)]


def test_the_winner_of_a_tied_race_is_not_paid_for_the_tie(make_key: MakeKey) -> None:
    # Two equally likely ids tie where their words are rounded to one race time; the lower one then wins. Its chance is
    # 1/2 + sum of squares of the shares of words / 2: the mean, over words, of how many others share a word's time.
    words_tried = np.arange(0, 2**32, 2**18, dtype=np.uint64)[:-2] + np.uint64(2**17)
    near = words_tried[:, None] + np.arange(600, dtype=np.uint64)[None, :] - np.uint64(300)
    sharing = np.sum(race_times(near.astype(np.uint32)) == race_times(words_tried.astype(np.uint32))[:, None], axis=1)
    chance = 0.5 + 0.5 * float(np.mean(sharing)) * 2.0**-32
    assert chance == pytest.approx(0.5 + 2.0e-8, abs=1e-9)
    laws = np.full((40, 2), 0.5)
    ids = race_text(make_key(1), laws, 3)
    found = pivots(ids, make_key(1))
    _, ratios = row_evidence(ids, 0, use_key(make_key(1)), GumbelConfig(), found.positions, view_of(ids, laws))
    bounds = np.exp(-ratios[np.isfinite(ratios) & (ratios != 0.0)])
    assert len(bounds) >= 10
    assert np.all((chance <= bounds) & (bounds < 0.5 + 1e-5))
    # The near-miss: words taken as exact, their cells alone counted.
    assert chance > 0.5 * (1.0 + 2.0**-31 * (2 + 64)) + 2.0**-30


def test_the_winner_of_the_race_makes_the_robust_test_sharper_under_edits(make_key: MakeKey) -> None:
    # Laws of 0.9 nats on average; one token of ten is replaced.
    laws = np.random.default_rng(10).dirichlet(np.full(30, 0.03), size=300)
    marked = race_text(make_key(1), laws, 11)
    ids = edit(marked, "substitute", 0.1, 30, np.random.default_rng(12))
    view = view_of(ids, laws)
    found = pivots(ids, make_key(1))
    alone = robust_test(found, view.log_prob_at(found.positions))
    whole = test_ids(ids, 0, use_key(make_key(1)), GumbelConfig(), test="robust", model=view)
    assert whole.log_pvalue < 1.3 * alone.log_pvalue < math.log(1e-3)


def test_e_values_with_the_winner_of_the_race_have_mean_at_most_one(make_key: MakeKey) -> None:
    # 200 keys on a repetitive text with wrong laws; quantiles of the binomial at a false-alarm rate of 1e-6.
    ids = np.tile(np.random.default_rng(13).integers(0, 20, 60), 3).astype(np.uint32)
    view = view_of(ids, np.random.default_rng(14).dirichlet(np.full(20, 0.5), size=len(ids)))
    large = {20: 0, 5: 0}
    for number in range(200):
        result = test_ids(ids, 0, use_key(make_key(number)), GumbelConfig(), test="robust", model=view)
        for threshold in large:
            large[threshold] += result.evalue >= threshold
    assert all(count <= stats.binom.ppf(1 - 1e-6, 200, 1 / threshold) for threshold, count in large.items())


test_ids.__test__ = False  # it is the tester's, not one of these


@pytest.mark.parametrize("kind", ["sum", "model-aware", "robust"])
def test_size_under_the_null(kind: str, make_key: MakeKey, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    # 1,500 keys on one repetitive text. Bounds are the 1 - 1e-6 quantiles of the binomial: false alarm 1e-6 each.
    block = zipf_ids(80, 1)
    ids = np.tile(block, 5)
    guess = np.log(np.random.default_rng(2).uniform(0.01, 1, len(ids)))
    pvalues = np.empty(1500)
    evalues = np.empty(1500)
    for number in range(1500):
        found = pivots(ids, make_key(number))
        if kind == "sum":
            result = sum_test(found)
        elif kind == "model-aware":
            result = model_aware_test(found, guess[found.positions])
        else:
            result = robust_test(found, guess[found.positions])
        pvalues[number], evalues[number] = result.pvalue, result.evalue
    for level in (0.05, 0.01):
        assert np.sum(pvalues <= level) <= stats.binom.ppf(1 - 1e-6, 1500, level)
    for threshold in (20, 100):
        assert np.sum(evalues >= threshold) <= stats.binom.ppf(1 - 1e-6, 1500, 1 / threshold)
    if kind != "robust":
        # The p-values are uniform, not only conservative: KS at level 1e-6.
        assert stats.kstest(pvalues, "uniform").pvalue > 1e-6


def test_size_without_dropping_repeats_is_rejected(
    make_key: MakeKey, zipf_ids: Callable[[int, int], np.ndarray]
) -> None:
    # The near-miss: count every repeat, as detectors without de-duplication do. The same check must fail.
    block = zipf_ids(80, 1)
    rejections = 0
    for number in range(1000):
        once = pivots(block, make_key(number)).words
        statistic = 5 * float(np.sum(sum_scores(once)))
        rejections += stats.gamma.sf(statistic, 5 * len(once)) <= 0.01
    assert rejections > stats.binom.ppf(1 - 1e-6, 1000, 0.01)
    assert rejections / 1000 > 0.07


def test_batch_equals_single_bit_for_bit(make_key: MakeKey, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    key = make_key(0)
    lengths = [0, 1, 4, 5, 17, 500, 3]
    documents = [zipf_ids(n, n) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    batch = documents_test(np.concatenate(documents), offsets, use_key(key), GumbelConfig())
    for i, document in enumerate(documents):
        single = sum_test(pivots(document, key))
        assert batch.statistic[i] == single.statistic
        assert batch.log_pvalue[i] == single.log_pvalue
        assert batch.log_evalue[i] == single.log_evalue
        assert batch.n_tokens[i] == single.n_tokens
        assert batch.n_scored[i] == single.n_scored
        assert batch.n_repeats_dropped[i] == single.n_repeats_dropped


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9])
def test_backends_agree(window: int, make_key: MakeKey, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    key = make_key(0, window)
    ids = zipf_ids(333, 9)
    numpy, numba = pivots(ids, key, backend="numpy"), pivots(ids, key, backend="numba")
    np.testing.assert_array_equal(numpy.words, numba.words)
    np.testing.assert_array_equal(numpy.positions, numba.positions)


def test_first_occurrences_against_a_set() -> None:
    rng = np.random.default_rng(0)
    for width in (1, 2, 5):
        lengths = rng.integers(0, 60, 30)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = rng.integers(0, 3, int(offsets[-1])).astype(np.uint32)
        expected = np.zeros(len(ids), dtype=bool)
        for start, stop in pairwise(offsets):
            seen: set[tuple[int, ...]] = set()
            for end in range(start + width, stop + 1):
                gram = tuple(ids[end - width : end].tolist())
                expected[end - 1] = gram not in seen
                seen.add(gram)
        np.testing.assert_array_equal(first_occurrences_numpy(ids, offsets, width), expected)
        np.testing.assert_array_equal(first_occurrences_numba(ids, offsets, width), expected)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "one-dimensional, got shape"),
        ([[1, 2], [3]], "tokens must be one-dimensional, got rows of different lengths"),
        ([1.5, 2.0], "integers, got float64"),
        ([-1, 2], "got -1"),
        ([2**32 - 1], "got 4294967295"),
        (np.array([2**32 - 1], dtype=np.uint32), "got 4294967295"),
        (["a"], "integers"),
    ],
)
def test_bad_token_ids(tokens: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_ids(tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 65, 1.5, True, "4"])
def test_bad_window(window: object) -> None:
    with pytest.raises(ValueError, match=r"window must be an integer in \[1, 64\]"):
        GumbelConfig(window=window)  # type: ignore[arg-type]
