"""Segments at a family-wise level, the scan's p-value, the posterior: against enumeration, and by simulation."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.detection import localisation
from assay.detection.evidence import Evidence, gather
from assay.detection.localisation import (
    family,
    localise,
    log_mean_of_all_segments,
    of_lone_coins,
    of_lone_contexts,
    posterior,
    scan,
)
from assay.detection.model_view import ModelView
from assay.detection.text import load_tokenizer
from assay.kernels import prf
from assay.watermark._coins import ANCHOR
from assay.watermark.dipmark import DipmarkConfig
from assay.watermark.dual_gumbel import DualGumbelConfig
from assay.watermark.edits import paste
from assay.watermark.fixed_list import FixedListConfig
from assay.watermark.green_list import GreenListConfig
from assay.watermark.gumbel import next_tokens, pivots, sum_scores, unmarked_key
from assay.watermark.inverse_transform import InverseTransformConfig
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.payload import PayloadConfig
from assay.watermark.schemes import sampler_of
from assay.watermark.tournament import TournamentConfig

MakeKey = Callable[..., SecretKey]
Ids = Callable[[int, int], np.ndarray]
WINDOW = 4


def marked_tokens(key: SecretKey, n: int, seed: int, vocabulary: int = 60) -> np.ndarray:
    """Marked tokens of Dirichlet laws over 60 ids, about 3 nats each, without the random context before them."""
    rng = np.random.default_rng(seed)
    draw = sampler_of(key.config, use_key(key), unmarked_key(b"t"))
    history = list(rng.integers(0, vocabulary, WINDOW))
    for _ in range(n):
        row = np.log(np.maximum(rng.dirichlet(np.full(vocabulary, 0.5)), 1e-300))[None]
        history.append(int(draw(np.array([history], dtype=np.int64), row, None)[0]))
    return np.array(history[WINDOW:], dtype=np.uint32)


@pytest.fixture(scope="module")
def key(make_key: MakeKey) -> SecretKey:
    return make_key(1)


@pytest.fixture(scope="module")
def passage(key: SecretKey) -> np.ndarray:
    return marked_tokens(key, 80, seed=1)


def evidence_of(log_ratios: np.ndarray) -> Evidence:
    return Evidence(np.arange(len(log_ratios)), log_ratios, len(log_ratios), 0)


# --- the pieces, against enumeration -------------------------------------------------------------------------------


def test_mean_over_all_segments_is_the_mean_over_all_segments() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 17, 60):
        sums = np.concatenate([np.zeros((1, 3)), np.cumsum(rng.normal(-0.2, 1.5, (n, 3)), axis=0)])
        every = [np.exp(sums[b] - sums[a]) for a, b in itertools.combinations(range(n + 1), 2)]
        assert log_mean_of_all_segments(sums) == pytest.approx(math.log(np.mean(every)), abs=1e-12)


@given(st.integers(4, 400), st.data())
def test_every_segment_holds_one_of_the_family_of_0_6_of_its_length(n: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 4))
    stop = data.draw(st.integers(start + 4, n))
    best = 0
    count = 0
    for starts, length in family(n):
        assert starts[0] == 0
        assert starts[-1] == n - length
        assert len(np.unique(starts)) == len(starts)
        count += len(starts)
        if np.any((starts >= start) & (starts + length <= stop)):
            best = max(best, length)
    assert best > 0.6 * (stop - start)
    assert count <= 12 * n


def test_weights_sum_to_one() -> None:
    # Without evidence every e-value is 1, and so is any mean with weights that sum to 1.
    for n in (4, 5, 33, 1000):
        log_e, segments = scan(evidence_of(np.zeros((n, 2))), 0.01)
        assert log_e == pytest.approx(0.0, abs=1e-12)
        assert segments == ()


@pytest.mark.parametrize("alternatives", [1, 2])
def test_posterior_against_all_paths(alternatives: int) -> None:
    rng = np.random.default_rng(2)
    n, length = 9, 5.0
    ratios = rng.normal(0, 1.5, (n - 2, alternatives))
    counted = np.array([0, 1, 2, 4, 5, 7, 8])  # two tokens say nothing
    expected = np.zeros(n)
    total = 0.0
    for path in itertools.product([0, 1], repeat=n):
        states = np.array(path)
        changes = int(np.sum(states[1:] != states[:-1]))
        prior = 0.5 * (1 / length) ** changes * (1 - 1 / length) ** (n - 1 - changes)
        for g in range(alternatives):
            mass = prior * math.exp(float(ratios[states[counted] == 1, g].sum()))
            total += mass
            expected += mass * states
    found = Evidence(counted, ratios, n, 0)
    np.testing.assert_allclose(posterior(found, length), expected / total, atol=1e-12)


def test_only_tokens_of_lone_contexts_count(key: SecretKey) -> None:
    rng = np.random.default_rng(3)
    for n in (0, 3, 5, 6, 200):
        ids = rng.integers(0, 3, n).astype(np.uint32)
        for prompt in (0, min(n, 7)):
            found = gather(ids, use_key(key), key.config, prompt_length=prompt)
            kept = of_lone_contexts(found, ids, prompt, WINDOW)
            grams = [tuple(ids[t - WINDOW : t]) for t in range(WINDOW, n + 1)]
            alone = [t for t in range(WINDOW, n) if grams.count(tuple(ids[t - WINDOW : t])) == 1 and t >= prompt]
            assert kept.positions.tolist() == [t - prompt for t in alone]
            assert kept.n_repeats_dropped + len(kept.positions) == found.n_repeats_dropped + len(found.positions)


# --- found, and at the level ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 150, 400])
def test_a_pasted_passage_is_found_where_it_is(key: SecretKey, passage: np.ndarray, zipf_ids: Ids, at: int) -> None:
    document = paste(passage, zipf_ids(400, 5), at)
    where = localise(document, key)
    assert len(where.segments) == 1
    (segment,) = where.segments
    inside = set(range(at, at + 80))
    reported = set(range(segment.start, segment.stop))
    assert len(inside & reported) / len(inside | reported) > 0.75
    assert segment.log_pvalue < math.log(1e-8)
    assert segment.log_evalue > -segment.log_pvalue
    assert where.result.pvalue < 1e-8
    assert where.result.test == "gumbel-scan"
    marked = np.isin(np.arange(len(document)), list(inside))
    assert where.posterior[marked].mean() > 0.9
    assert where.posterior[~marked].mean() < 0.1


def test_probabilities_of_a_model_sharpen_it(
    key: SecretKey, passage: np.ndarray, zipf_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = paste(passage, zipf_ids(200, 12), 100)
    # What a model would say: the marked tokens' laws have 60 ids, the host's tokens are unlikely; one is unknown.
    log_prob = np.where((np.arange(280) >= 100) & (np.arange(280) < 180), math.log(0.05), math.log(1e-3))
    log_prob[0] = math.nan
    monkeypatch.setattr(localisation, "scorer_of", lambda model: model)
    monkeypatch.setattr(localisation, "model_view_of", lambda *args: ModelView(lambda: log_prob, lambda: iter(())))
    aware, plain = localise(document, key, model="fake"), localise(document, key)
    assert aware.result.log_pvalue < plain.result.log_pvalue
    assert len(aware.segments) == 1
    assert any("wrong model" in sentence for sentence in aware.result.assumptions)
    own = SecretKey(hashlib.sha256(b"localise").digest(), id="localise", config=DipmarkConfig())
    with pytest.raises(ValueError, match="log_prob is used for the schemes dual-gumbel"):
        localise(document, own, model="fake")


def test_two_passages_are_two_segments(key: SecretKey, passage: np.ndarray, zipf_ids: Ids) -> None:
    document = paste(passage[:40], paste(passage[40:], zipf_ids(400, 6), 300), 100)
    segments = localise(document, key, level=0.05).segments
    assert len(segments) == 2
    for segment, (start, stop) in zip(segments, [(100, 140), (340, 380)], strict=True):
        assert segment.start < stop
        assert segment.stop > start


def test_a_prompt_gives_context_and_is_not_reported(key: SecretKey, passage: np.ndarray, zipf_ids: Ids) -> None:
    host = zipf_ids(120, 7)
    where = localise(paste(passage, host[20:], 0), key, prompt=host[:20])
    assert where.result.n_tokens == len(where.posterior) == 180
    (segment,) = where.segments
    assert segment.start < 10
    assert 70 < segment.stop < 100
    # The mark within the prompt is not evidence on the text.
    assert localise(zipf_ids(100, 8), key, prompt=passage).result.pvalue > 0.01


@pytest.mark.parametrize(
    "config",
    [
        GreenListConfig(window=WINDOW, delta=6.0),
        TournamentConfig(window=WINDOW),
        DualGumbelConfig(window=WINDOW),
        InverseTransformConfig(window=WINDOW),
    ],
    ids=lambda config: config.tag,
)
def test_other_schemes_are_found_too(config: Any, zipf_ids: Ids) -> None:
    own = SecretKey(hashlib.sha256(b"localise").digest(), id="localise", config=config)
    document = paste(marked_tokens(own, 80, seed=9), zipf_ids(300, 10), 120)
    where = localise(document, own)
    assert where.segments
    assert all(segment.start < 200 and segment.stop > 120 for segment in where.segments)
    assert where.posterior[130:190].mean() > 0.8


def test_phrases_shared_with_the_mark_are_no_evidence(key: SecretKey, passage: np.ndarray, zipf_ids: Ids) -> None:
    # Somebody without the key wrote, before the marked passage, phrases of 12 tokens that the passage has too.
    phrases = [passage[start : start + 12] for start in (0, 24, 48)]
    host = np.concatenate([np.concatenate([zipf_ids(10, seed), phrases[seed]]) for seed in range(3)])
    document = np.concatenate([host, zipf_ids(30, 13), passage]).astype(np.uint32)
    until = len(host)
    assert all(segment.start >= until for segment in localise(document, key).segments)
    # The near-miss: each distinct coin counted at its first place, as in a test of the whole document.
    found = gather(document, use_key(key), key.config)
    assert any(segment.stop <= until for segment in scan(found, 0.01)[1])


# --- coins that many contexts share ---------------------------------------------------------------------------------

SHARED: list[Any] = [FixedListConfig(delta=6.0), GreenListConfig(window=WINDOW, delta=6.0, seeding="self")]


def shared_key(config: Any) -> SecretKey:
    return SecretKey(hashlib.sha256(b"shared").digest(), id="shared", config=config)


@pytest.mark.parametrize("config", SHARED, ids=lambda config: config.tag)
def test_shared_coins_are_localised_by_those_that_occur_once(config: Any, zipf_ids: Ids) -> None:
    own = shared_key(config)
    document = paste(marked_tokens(own, 120, seed=9, vocabulary=3000), zipf_ids(300, 10), 120)
    where = localise(document, own)
    assert where.segments
    assert all(segment.start < 240 and segment.stop > 120 for segment in where.segments)
    assert where.posterior[140:220].mean() > 0.8
    other = SecretKey(hashlib.sha256(b"other").digest(), id="other", config=config)
    assert localise(document, other).result.pvalue > 1e-3


@pytest.mark.parametrize("config", SHARED, ids=lambda config: config.tag)
def test_words_taken_from_the_marked_part_are_no_evidence(config: Any, zipf_ids: Ids) -> None:
    # Somebody without the key wrote, before the marked passage, words that the passage has too, in another order.
    own = shared_key(config)
    rng = np.random.default_rng(4)
    passage = marked_tokens(own, 120, seed=9, vocabulary=3000)
    host = rng.permutation(passage)
    document = np.concatenate([host, zipf_ids(30, 13), passage]).astype(np.uint32)
    assert all(segment.start >= len(host) for segment in localise(document, own).segments)
    if config.scheme == "fixed-list":
        # The near-miss: each distinct coin at its first place, as in a test of the whole document. None is then
        # left in the passage itself.
        found = gather(document, use_key(own), config)
        assert any(segment.stop <= len(host) + 30 for segment in scan(found, 0.01)[1])


@pytest.mark.parametrize("prompt", [0, 9])
def test_only_coins_that_occur_once_count(prompt: int) -> None:
    rng = np.random.default_rng(5)
    for config in SHARED:
        prf_key = use_key(shared_key(config))
        for n in (9, 40, 200):
            ids = rng.integers(0, 60, n).astype(np.uint32)
            found = gather(ids, prf_key, config, prompt_length=prompt)
            kept = of_lone_coins(found, ids, prompt, prf_key, config)
            window = 0 if config.scheme == "fixed-list" else WINDOW
            coins: list[tuple[int, ...]] = []
            for t in range(window, n):
                token = int(ids[t])
                if window:
                    words = [
                        int(prf.words_at(prf_key, ids[None, j : j + 1], ids[t : t + 1], stream=ANCHOR)[0])
                        for j in range(t - window, t)
                    ]
                    coins.append((min(zip(words, ids[t - window : t].tolist(), strict=True))[1], token))
                else:
                    coins.append((token,))
            alone = [t for t in range(max(window, prompt), n) if coins.count(coins[t - window]) == 1]
            assert kept.positions.tolist() == [t - prompt for t in alone]
            assert kept.n_repeats_dropped + len(kept.positions) == found.n_repeats_dropped + len(found.positions)


@pytest.mark.parametrize("boost", [2.0, 50.0, math.inf])
def test_given_a_marked_text_coins_that_it_does_not_show_are_no_greener(boost: float) -> None:
    # All colourings of six ids, all marked texts of three tokens: the mean of any product of factors that grow with
    # green over ids that the text does not show is at most 1 given the text. This is what a segment's e-value needs.
    rng = np.random.default_rng(6)
    laws, chance = rng.dirichlet(np.full(6, 0.7), size=3), 0.3
    colours = np.array(list(itertools.product([0, 1], repeat=6)), dtype=np.float64)
    prior = np.prod(np.where(colours == 1, chance, 1 - chance), axis=1)
    weights = np.where(colours == 1, min(boost, 1e300), 1.0)
    hard = np.isinf(boost)
    greatest_shown = 0.0
    for text in itertools.product(range(6), repeat=3):
        likelihood = np.ones(len(colours))
        for law, x in zip(laws, text, strict=True):
            if hard:
                green = colours @ law
                likelihood *= np.where(green > 0, colours[:, x] * law[x] / np.where(green > 0, green, 1.0), law[x])
            else:
                likelihood *= weights[:, x] * law[x] / (weights @ law)
        posterior_law = prior * likelihood
        posterior_law /= posterior_law.sum()
        for strength in (0.1, 0.5, 0.97):
            factor = np.where(colours == 1, 1 + strength * (1 - chance) / chance, 1 - strength)
            unseen = [v for v in range(6) if v not in text]
            for size in range(1, len(unseen) + 1):
                for chosen in itertools.combinations(unseen, size):
                    assert posterior_law @ np.prod(factor[:, chosen], axis=1) <= 1 + 1e-9
            # The near-miss: an id that the marked text shows.
            greatest_shown = max(greatest_shown, float(posterior_law @ factor[:, text[0]]))
    assert greatest_shown > 1.3


def not_above(count: int, trials: int, level: float) -> bool:
    """Whether a count is within a binomial's 1 - 1e-6 quantile: false alarm 1e-6."""
    return bool(count <= stats.binom.ppf(1 - 1e-6, trials, level))


def windows_beat(words: np.ndarray, level: float, width: int = 40) -> bool:
    """The near-miss "winmax": the exact p-value of the best window of fixed width, not corrected for the search."""
    sums = np.convolve(sum_scores(words), np.ones(width), "valid")
    return bool(len(sums) and np.any(stats.gamma.sf(sums, width) <= level))


def test_scan_p_value_keeps_its_level(make_key: MakeKey, zipf_ids: Ids) -> None:
    ids = np.concatenate([zipf_ids(200, 11), zipf_ids(50, 12), zipf_ids(50, 12)])  # with a repeat
    small = windows = 0
    for number in range(80):
        other = make_key(number)
        where = localise(ids, other, level=0.05)
        small += where.result.pvalue <= 0.05
        assert not where.segments or where.result.pvalue <= 2 * 0.05  # half the weight is on the family
        windows += windows_beat(pivots(ids, other).words, 0.05)
    assert not_above(small, 80, 0.05)
    assert not not_above(windows, 80, 0.05)


def false_segments(key: SecretKey, passage: np.ndarray, zipf_ids: Ids, hosts: int, level: float) -> tuple[int, int]:
    """In how many documents a segment without a marked token is reported: with the weights, and without them."""
    wrong = careless = 0
    for seed in range(hosts):
        at = 60 + seed % 100
        document = paste(passage, zipf_ids(250, 1000 + seed), at)
        segments = localise(document, key, level=level).segments
        wrong += any(segment.stop <= at or segment.start >= at + len(passage) for segment in segments)
        # The near-miss: each segment of the family at the full level.
        found = of_lone_contexts(gather(document, use_key(key), key.config), document, 0, WINDOW)
        outside = (found.positions < at) | (found.positions >= at + len(passage))
        sums = np.concatenate([np.zeros((1, found.log_ratios.shape[1])), np.cumsum(found.log_ratios, axis=0)])
        inside = np.concatenate([[0], np.cumsum(~outside)])
        careless += any(
            np.any(
                (inside[first + size] == inside[first])
                & (np.exp(sums[first + size] - sums[first]).mean(axis=1) >= 1 / level)
            )
            for first, size in family(len(found.positions))
        )
    return wrong, careless


def test_segments_outside_the_mark_keep_the_family_wise_level(
    key: SecretKey, passage: np.ndarray, zipf_ids: Ids
) -> None:
    wrong, careless = false_segments(key, passage, zipf_ids, 60, 0.1)
    assert not_above(wrong, 60, 0.1)
    assert not not_above(careless, 60, 0.1)


@pytest.mark.slow
def test_segments_keep_the_level_over_many_hosts(key: SecretKey, passage: np.ndarray, zipf_ids: Ids) -> None:
    # 1,500 documents: a true rate of 0.035 at level 0.01 would pass with probability 0.02.
    wrong, careless = false_segments(key, passage, zipf_ids, 1500, 0.01)
    assert not_above(wrong, 1500, 0.01)
    assert not not_above(careless, 1500, 0.01)


@pytest.mark.slow
def test_levels_on_human_prose(key: SecretKey, passage: np.ndarray, make_key: MakeKey, human_text: str) -> None:
    # 1,500 documents of 300 tokens of prose, with its repeated phrases: nothing marked, or a passage in the middle.
    ids = load_tokenizer("default").encode(human_text)
    small = wrong = missed = 0
    for number in range(1500):
        host = ids[(start := 37 * number % (len(ids) - 300)) : start + 300]
        small += localise(host, make_key(10 + number), level=0.05).result.pvalue <= 0.05
        segments = localise(paste(passage, host, 150), key, level=0.05).segments
        wrong += any(segment.stop <= 150 or segment.start >= 230 for segment in segments)
        missed += not segments
    assert not_above(small, 1500, 0.05)
    assert not_above(wrong, 1500, 0.05)
    assert missed == 0


def test_edges_and_errors(key: SecretKey) -> None:
    for ids in ([], [1, 2, 3], [1, 2, 3, 4, 5, 6]):
        where = localise(ids, key)
        assert where.segments == ()
        assert where.result.pvalue == 1.0
        assert where.posterior.shape == (len(ids),)
    np.testing.assert_allclose(localise([1, 2, 3], key).posterior, 0.5)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got"):
            localise([1], key, level=level)
    for run_length in (1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="run_length must be a finite number above 1"):
            localise([1], key, run_length=run_length)
    for config in SHARED:
        for ids in ([], [1], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
            assert localise(ids, shared_key(config)).result.pvalue == 1.0
            assert localise(ids, shared_key(config), prompt=[7, 8, 9]).segments == ()
    with pytest.raises(ValueError, match="key must be for one of the schemes dipmark"):
        localise([1], shared_key(PayloadConfig()))


def test_marked_tokens_here_are_marked(key: SecretKey, passage: np.ndarray) -> None:
    # The helper of this file, against the function that generation uses.
    rng = np.random.default_rng(1)
    history = rng.integers(0, 60, WINDOW)
    row = np.log(np.maximum(rng.dirichlet(np.full(60, 0.5)), 1e-300))[None]
    drawn = next_tokens([history], row, prf_key=use_key(key), window=WINDOW, unmarked=unmarked_key(b"t"))
    assert int(drawn[0]) == int(passage[0])
