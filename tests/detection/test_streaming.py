"""Streams of evidence: equal to the e-values of whole texts, valid under optional stopping, saved and restored."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.detection import bits, dual_gumbel, evidence, inverse_transform
from assay.detection.gumbel import robust_test, sum_test
from assay.detection.streaming import StreamingTest
from assay.watermark import dipmark, fixed_list, green_list, tournament
from assay.watermark.dual_gumbel import DualGumbelConfig
from assay.watermark.dual_gumbel import observe as observe_dual
from assay.watermark.gumbel import pivots, sum_scores, unmarked_key
from assay.watermark.inverse_transform import InverseTransformConfig
from assay.watermark.inverse_transform import observe as observe_inverse
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of

MakeKey = Callable[..., SecretKey]
Ids = Callable[[int, int], np.ndarray]

CONFIGS: list[Any] = [
    green_list.GreenListConfig(window=2),
    green_list.GreenListConfig(window=3, seeding="self"),
    fixed_list.FixedListConfig(),
    tournament.TournamentConfig(),
    dipmark.DipmarkConfig(),
]
OBSERVE = {
    "green-list": green_list.observe,
    "fixed-list": fixed_list.observe,
    "tournament": tournament.observe,
    "dipmark": dipmark.observe,
}


def key_for(config: Any, number: int = 0) -> SecretKey:
    secret = hashlib.sha256(f"streaming key {number}".encode()).digest()
    return SecretKey(secret, id=f"stream-{number}", config=config)


def in_pieces(test: StreamingTest, ids: np.ndarray, sizes: list[int], log_p: np.ndarray | None = None) -> None:
    """Feed a text in pieces of the given sizes, then some tokens one by one and the rest in pieces of 17."""
    start = 0
    for size in [*sizes, 1, 1, 1, 1, 1, *([17] * len(ids))]:
        if start >= len(ids):
            break
        piece = slice(start, start + size)
        test.update_many(ids[piece], None if log_p is None else log_p[piece])
        start += size


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=8))
def test_pieces_give_the_e_value_of_the_whole_text(sizes: list[int], make_key: MakeKey, zipf_ids: Ids) -> None:
    key = make_key(1)
    ids = np.tile(zipf_ids(60, 2), 2)  # repeats must count once, however the text is cut
    log_p = np.log(np.random.default_rng(3).uniform(0.01, 1, len(ids)))
    found = pivots(ids, key)
    for aware, whole in ((False, sum_test(found)), (True, robust_test(found, log_p[found.positions]))):
        stream = StreamingTest(key, model_aware=aware)
        in_pieces(stream, ids, sizes, log_p if aware else None)
        result = stream.result()
        assert result.log_evalue == pytest.approx(whole.log_evalue, abs=1e-10)
        assert result.n_scored == whole.n_scored
        assert result.n_repeats_dropped == whole.n_repeats_dropped
        assert result.n_tokens == whole.n_tokens


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.tag)
def test_bit_schemes_in_pieces(config: Any, zipf_ids: Ids) -> None:
    key = key_for(config)
    ids = np.tile(zipf_ids(120, 4), 2)
    prompt, text = ids[:30], ids[30:]
    coins = OBSERVE[config.scheme](ids, use_key(key), config, prompt_length=30)
    ones, size = np.array([coins.outcomes.sum()]), np.array([coins.outcomes.size])
    expected = bits.binomial_log_evalues(ones, size, getattr(config, "chance", 0.5))[0]
    for sizes in ([], [210], [7, 100]):
        stream = StreamingTest(key, prompt=prompt)
        in_pieces(stream, text, sizes)
        assert stream.log_evalue == pytest.approx(expected, abs=1e-10)
        assert stream.result().n_scored == len(coins.positions)
        assert stream.result().n_repeats_dropped == coins.n_repeats_dropped


PAIRS: list[Any] = [DualGumbelConfig(window=2), InverseTransformConfig(window=2)]


@pytest.mark.parametrize("config", PAIRS, ids=lambda config: config.tag)
def test_schemes_of_two_words_in_pieces(config: Any, zipf_ids: Ids) -> None:
    key = key_for(config)
    ids = np.tile(zipf_ids(120, 4), 2)
    if isinstance(config, DualGumbelConfig):
        whole = dual_gumbel.sum_test(observe_dual(ids, use_key(key), config, prompt_length=30))
    else:
        whole = inverse_transform.sum_test(observe_inverse(ids, use_key(key), config, prompt_length=30))
    for sizes in ([], [210], [7, 100]):
        stream = StreamingTest(key, prompt=ids[:30])
        in_pieces(stream, ids[30:], sizes)
        result = stream.result()
        assert result.log_evalue == pytest.approx(whole.log_evalue, abs=1e-10)
        assert (result.n_scored, result.n_repeats_dropped) == (whole.n_scored, whole.n_repeats_dropped)


@pytest.mark.parametrize(
    "config", [c for c in [*CONFIGS, *PAIRS] if c.scheme in evidence.MODEL_AWARE], ids=lambda config: config.tag
)
def test_model_aware_streams_do_not_depend_on_the_pieces(config: Any, zipf_ids: Ids) -> None:
    key = key_for(config)
    ids = np.tile(zipf_ids(120, 4), 2)
    log_p = np.log(np.random.default_rng(11).uniform(0.01, 1, len(ids)))
    found = evidence.gather(ids, use_key(key), config, log_prob=log_p)
    sums = found.log_ratios.sum(axis=0)
    expected = np.logaddexp.reduce(sums) - math.log(len(sums))
    for sizes in ([], [240], [7, 100]):
        stream = StreamingTest(key, model_aware=True)
        in_pieces(stream, ids, sizes, log_p)
        assert stream.log_evalue == pytest.approx(expected, abs=1e-9)


# --- the factors of coins, given a token's probability -------------------------------------------------------------


def mean_factor(config: Any, p: float, chance: float, layers: int = 1) -> np.ndarray:
    """Mean over all outcomes of a coin of what `evidence.gather` would multiply, at each edit rate's part."""
    total = np.zeros(1)
    for bits_ in np.ndindex(*[2] * layers):
        found = coins_of(np.array([bits_], dtype=np.bool_))
        weight = math.prod(chance if bit else 1.0 - chance for bit in bits_)
        total = total + weight * np.exp(evidence._given_probabilities(found, config, np.log([p]))[0])
    return total


def coins_of(outcomes: np.ndarray) -> Any:
    from assay.watermark._coins import Coins

    return Coins(np.arange(len(outcomes)), outcomes, len(outcomes), 0)


@pytest.mark.parametrize("p", [1e-9, 0.2, 0.7, 1.0])
def test_factors_of_coins_have_mean_one_whatever_the_probability(p: float) -> None:
    tree = tournament.TournamentConfig(layers=6)
    assert mean_factor(tree, p, 0.5, layers=6) == pytest.approx(1.0, abs=1e-12)
    for config in (green_list.GreenListConfig(), fixed_list.FixedListConfig(delta=None)):
        assert mean_factor(config, p, config.chance) == pytest.approx(1.0, abs=1e-12)
        # The near-miss: a coin that is not as likely as the factor assumes.
        assert abs(mean_factor(config, p, config.chance + 0.02)[0] - 1.0) > 0.01 or p == 1.0


def test_the_first_layer_and_a_law_of_two_tokens_are_exact() -> None:
    # Bayes over all bits of a law of three tokens: how much likelier the token drawn makes its own bit.
    law = np.array([0.5, 0.3, 0.2])
    for x, p in enumerate(law):
        weight = np.zeros(2)
        for g in np.ndindex(2, 2, 2):
            weight[g[x]] += p * (1.0 + g[x] - float(np.dot(g, law)))
        found = evidence._layer_log_odds(np.array([p]), 1)[0, 0]
        assert found == pytest.approx(math.log(weight[1] / weight[0]), abs=1e-12)
    # A green list, the others all of one colour on average: exact where their green mass is certain.
    config = fixed_list.FixedListConfig(delta=2.0, gamma=0.5)
    p, a, others = 0.4, math.expm1(2.0), 0.3
    green = p * math.exp(2.0) / (1.0 + a * (others + p))
    red = p / (1.0 + a * others)
    from assay.detection._lists import own_log_odds

    assert own_log_odds(np.array([p]), config)[0] == pytest.approx(math.log(green / red), abs=1e-9)


@pytest.mark.parametrize(
    "config",
    [green_list.GreenListConfig(delta=4.0), tournament.TournamentConfig(), DualGumbelConfig()],
    ids=lambda config: config.tag,
)
def test_probabilities_of_a_model_stop_a_stream_much_sooner(config: Any) -> None:
    # Three of four tokens are certain: without the model they dilute the others.
    key, rng = key_for(config), np.random.default_rng(13)
    draw, history, log_p = sampler_of(config, use_key(key), unmarked_key(b"t")), list(rng.integers(0, 300, 4)), []
    for t in range(300):
        law = np.eye(300)[rng.integers(300)] if t % 4 else rng.dirichlet(np.full(300, 0.3))
        row = np.log(np.maximum(law, 1e-300))
        history.append(int(draw(np.array([history], dtype=np.int64), row[None], None)[0]))
        log_p.append(row[history[-1]])
    stops = {}
    for aware in (False, True):
        test = StreamingTest(key, prompt=history[:4], model_aware=aware)
        test.update_many(history[4:], log_p if aware else None)
        stops[aware] = test.stopped_at or math.inf
    assert stops[True] < 0.6 * stops[False]


def too_many(stops: int, keys: int, level: float) -> bool:
    """Whether more keys stop than a binomial at its 1 - 1e-6 quantile allows: false alarm 1e-6."""
    return bool(stops > stats.binom.ppf(1 - 1e-6, keys, level))


def stops_of(make_key: MakeKey, ids: np.ndarray, keys: int, level: float) -> dict[str, int]:
    """How many keys ever stop at the level, for the streams and for p-values of fixed length looked at every time."""
    log_p = np.log(np.random.default_rng(6).uniform(0.01, 1, len(ids)))
    stops = {"stream": 0, "model-aware stream": 0, "fixed length, looked at every time": 0}
    for number in range(keys):
        key = make_key(number)
        for name, aware in (("stream", False), ("model-aware stream", True)):
            test = StreamingTest(key, alpha=level, model_aware=aware)
            test.update_many(ids, log_p if aware else None)
            assert test.stopped == (test.log_pvalue <= math.log(level))
            stops[name] += test.stopped
        scores = np.cumsum(sum_scores(pivots(ids, key).words))
        stops["fixed length, looked at every time"] += bool(
            np.any(stats.gamma.sf(scores, np.arange(1, len(scores) + 1)) <= level)
        )
    return stops


def test_optional_stopping_keeps_the_level(make_key: MakeKey, zipf_ids: Ids) -> None:
    stops = stops_of(make_key, np.tile(zipf_ids(150, 5), 2), 100, 0.05)
    assert not too_many(stops["stream"], 100, 0.05)
    assert not too_many(stops["model-aware stream"], 100, 0.05)
    # The near-miss: the exact p-value for n tokens, tested again after each token.
    assert too_many(stops["fixed length, looked at every time"], 100, 0.05)


@pytest.mark.slow
def test_optional_stopping_keeps_the_level_over_many_keys(make_key: MakeKey, zipf_ids: Ids) -> None:
    # 2,000 keys, up to 1,000 tokens: a true level of 0.03 would pass with probability 0.02.
    ids = zipf_ids(1000, 7)
    stops = stops_of(make_key, ids, 2000, 0.01)
    assert not too_many(stops["stream"], 2000, 0.01)
    assert not too_many(stops["model-aware stream"], 2000, 0.01)
    assert too_many(stops["fixed length, looked at every time"], 2000, 0.01)
    # Bits: the same for one of each kind.
    log_p = np.log(np.random.default_rng(6).uniform(0.01, 1, len(ids)))
    for config in [*CONFIGS, *PAIRS]:
        for aware in (False, True)[: 1 + (config.scheme in evidence.MODEL_AWARE)]:
            stopped = 0
            for number in range(400):
                test = StreamingTest(key_for(config, number), alpha=0.01, model_aware=aware)
                test.update_many(ids, log_p if aware else None)
                stopped += test.stopped
            assert not too_many(stopped, 400, 0.01)


def test_stops_early_on_marked_text_and_stays_stopped(make_key: MakeKey) -> None:
    from assay.watermark.gumbel import next_tokens, unmarked_key

    key, rng = make_key(1), np.random.default_rng(8)
    history, log_p = list(rng.integers(0, 50, 4)), []
    for _ in range(150):
        law = rng.dirichlet(np.full(50, 0.3))
        row = np.log(np.maximum(law, 1e-300))[None]
        drawn = next_tokens([np.array(history)], row, prf_key=use_key(key), window=4, unmarked=unmarked_key(b"t"))
        history.append(int(drawn[0]))
        log_p.append(math.log(law[history[-1]]))
    counts = {}
    for aware in (False, True):
        test = StreamingTest(key, alpha=1e-6, prompt=history[:4], model_aware=aware)
        for place, token in enumerate(history[4:]):
            value = test.update(token, log_p[place] if aware else None)
            assert value == test.log_evalue
            if test.stopped:
                break
        assert test.stopped_at == test.n_tokens < 150
        assert test.log_pvalue <= math.log(1e-6)
        counts[aware] = test.n_tokens
        at_stop = test.log_pvalue
        test.update_many(rng.integers(0, 50, 200), np.full(200, -1.0) if aware else None)
        assert test.stopped
        assert test.log_pvalue <= at_stop
        assert test.stopped_at == counts[aware]
    assert counts[True] <= counts[False]
    other = StreamingTest(make_key(2), alpha=1e-6, prompt=history[:4])
    other.update_many(history[4:])
    assert not other.stopped


def test_state_is_plain_holds_no_secret_and_restores(make_key: MakeKey, zipf_ids: Ids) -> None:
    ids = np.tile(zipf_ids(80, 9), 2)
    log_p = np.log(np.random.default_rng(10).uniform(0.01, 1, len(ids)))
    for key, aware in ((make_key(3), True), (key_for(CONFIGS[1]), False), (key_for(CONFIGS[2]), False)):
        whole = StreamingTest(key, alpha=0.1, prompt=ids[:10], model_aware=aware)
        whole.update_many(ids[10:], log_p[10:] if aware else None)
        first = StreamingTest(key, alpha=0.1, prompt=ids[:10], model_aware=aware)
        first.update_many(ids[10:100], log_p[10:100] if aware else None)
        text = json.dumps(first.state())
        assert use_key(key).tobytes().hex() not in text
        assert str(int(use_key(key)[0])) not in text
        second = StreamingTest.restore(json.loads(text), key)
        assert second.state() == first.state()
        second.update_many(ids[100:], log_p[100:] if aware else None)
        assert second.log_evalue == pytest.approx(whole.log_evalue, abs=1e-10)
        assert second.log_pvalue == pytest.approx(whole.log_pvalue, abs=1e-10)
        assert second.result().n_scored == whole.result().n_scored
        assert second.result().n_repeats_dropped == whole.result().n_repeats_dropped
        assert second.stopped_at == whole.stopped_at
        with pytest.raises(ValueError, match="key must be"):
            StreamingTest.restore(json.loads(text), make_key(4))
    with pytest.raises(TypeError, match="refuses to be pickled"):
        pickle.dumps(first)
    with pytest.raises(ValueError, match="state must have schema"):
        StreamingTest.restore({}, make_key(3))


def test_edges_and_errors(make_key: MakeKey) -> None:
    key = make_key(0)
    test = StreamingTest(key)
    assert (test.log_pvalue, test.stopped, test.n_tokens) == (0.0, False, 0)
    assert test.update_many([]) == pytest.approx(0.0, abs=1e-15)
    assert test.result().n_scored == 0
    before = test.state()
    with pytest.raises(ValueError, match="log_prob must be None unless"):
        test.update(1, -1.0)
    with pytest.raises(ValueError, match="tokens must be"):
        test.update(-1)
    assert test.state() == before
    aware = StreamingTest(key, model_aware=True)
    for log_prob in ([0.1], [-1.0, -1.0]):
        with pytest.raises(ValueError, match="log_prob must be natural logarithms"):
            aware.update_many([1], log_prob)
    with pytest.raises(ValueError, match="log_prob must be given"):
        aware.update(1)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got"):
            StreamingTest(key, alpha=alpha)
    with pytest.raises(ValueError, match="log_prob is used for the schemes dual-gumbel"):
        StreamingTest(key_for(dipmark.DipmarkConfig()), model_aware=True)
    assert key.id in repr(test.result())


def test_a_scheme_without_token_wise_evidence_is_refused() -> None:
    from assay.watermark.payload import PayloadConfig

    with pytest.raises(ValueError, match="key must be for one of the schemes dipmark"):
        StreamingTest(key_for(PayloadConfig()))


def test_unknown_probabilities_bring_no_evidence(make_key: MakeKey, zipf_ids: Ids) -> None:
    test = StreamingTest(make_key(0, window=1), model_aware=True)
    test.update_many(zipf_ids(50, 1), np.full(50, math.nan))
    assert test.log_evalue == pytest.approx(0.0, abs=1e-3)
