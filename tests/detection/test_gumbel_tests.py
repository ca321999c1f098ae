"""The three tests of the Gumbel mark: size under the null, power on marked text, equality of batch and single."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from assay.detection.gumbel import documents_test, model_aware_test, robust_test, sum_test
from assay.kernels.dedup import first_occurrences_numba, first_occurrences_numpy
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
