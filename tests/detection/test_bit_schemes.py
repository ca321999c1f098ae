"""Green list, fixed list, tournament and DiPmark end to end: size under the null, power, batch = single, e-values.

Bounds are binomial quantiles: false alarm 1e-6 each, seeds fixed. Near-misses are rejected by the same checks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marked import CONFIGS, VOCABULARY, guess, module_of, module_of_tests, prf_key, view, write
from scipy import stats

from assay.detection import _lists, bits
from assay.detection._contexts import first_of_context
from assay.detection.documents import DocumentStatistics
from assay.detection.text import load_tokenizer
from assay.kernels import chacha_numba, green_ratios, prf, tilted_laws
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import LAYERS, MEMBER, ORDER
from assay.watermark.green_list import GreenListConfig, anchors_of

FALSE_ALARM = 1e-6
SCHEMES = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(scope="module")
def human_ids(human_text: str) -> np.ndarray:
    return np.asarray(load_tokenizer().encode(human_text[:60_000]), dtype=np.uint32)


def at_most(level: float, n: int) -> float:
    return float(stats.binom.ppf(1 - FALSE_ALARM, n, level))


# --- size ---------------------------------------------------------------------------------------------------------


def statistics(config: Any, ids: np.ndarray, key: np.ndarray, copies: int = 1) -> DocumentStatistics:
    """The sum test on compiled PRF words; `copies` counts every coin so many times."""
    offsets = np.array([0, len(ids)])
    positions, outcomes = module_of(config).scan(ids, offsets, key, config, backend="numba")
    chance = getattr(config, "chance", 0.5)
    return bits.documents_sum_test(positions, np.tile(outcomes, copies), offsets, 0, chance)


@SCHEMES
@pytest.mark.parametrize("text", ["human", "repeated"])
def test_size_of_the_sum_test(config: Any, text: str, human_ids: np.ndarray) -> None:
    # 400 keys; the bound at 1e-2 is 16.
    ids = human_ids[:300] if text == "human" else np.tile(human_ids[:80], 5)
    found = [statistics(config, ids, prf_key(number)) for number in range(400)]
    for level in (0.05, 0.01):
        assert sum(one.log_pvalue[0] <= math.log(level) for one in found) <= at_most(level, 400)
        assert sum(one.log_evalue[0] >= -math.log(level) for one in found) <= at_most(level, 400)
    # The near-miss: every repeat counted as if it were a new coin.
    repeated = [statistics(config, human_ids[:80], prf_key(number), copies=5) for number in range(400)]
    assert sum(one.log_pvalue[0] <= math.log(0.01) for one in repeated) > at_most(0.01, 400)


def test_counting_windows_instead_of_coins_is_rejected() -> None:
    # Seeding "self": different windows share one (anchor, token) coin. Counting each window once is not enough.
    config = GreenListConfig(seeding="self")
    ids = np.random.default_rng(0).choice(30, 1500, p=np.arange(30, 0, -1) / 465).astype(np.uint32)
    offsets = np.array([0, len(ids)])
    windows = np.flatnonzero(first_occurrences(ids, offsets, 5))
    contexts, tokens = np.lib.stride_tricks.sliding_window_view(ids, 4)[windows - 4], ids[windows]
    honest = rejections = 0
    for number in range(150):
        key = prf_key(number)
        one = statistics(config, ids, key)
        assert one.n_scored[0] < 0.6 * len(windows)
        honest += one.log_pvalue[0] <= math.log(0.01)
        anchors = anchors_of(contexts, tokens, key, backend="numba")
        green = prf.words_at(key, anchors[:, None], tokens, stream=MEMBER, backend="numba") < 2**30
        each = bits.documents_sum_test(windows, green[:, None], offsets, 4, 0.25)
        rejections += each.log_pvalue[0] <= math.log(0.01)
    assert honest <= at_most(0.01, 150)
    assert rejections > at_most(0.01, 150)


def count_rejections(config: Any, ids: np.ndarray, keys: int, level: float) -> dict[str, int]:
    model = guess(ids[20:], 1)
    found: dict[str, int] = {}
    for number in range(keys):
        result = module_of_tests(config).test_ids(ids, 20, prf_key(number), config, test="auto", model=model)
        for one in (result, *result.components):
            found[one.test] = found.get(one.test, 0) + (one.pvalue <= level) + (one.evalue >= 1 / level)
    return found


@pytest.mark.slow
@SCHEMES
@pytest.mark.parametrize("text", ["human", "repeated"])
def test_size_of_every_test_under_a_wrong_model(config: Any, text: str, human_ids: np.ndarray) -> None:
    # 500 keys. A p-value and an e-value each may reject: twice the bound.
    ids = human_ids[1000:1200] if text == "human" else np.tile(human_ids[1000:1080], 4)
    found = count_rejections(config, ids, 500, 0.01)
    assert len(found) == 4
    for name, rejections in found.items():
        assert rejections <= 2 * at_most(0.01, 500), name


@SCHEMES
def test_size_under_a_wrong_model_at_a_glance(config: Any, human_ids: np.ndarray) -> None:
    # 15 keys at 5 %; the slow test above has the power.
    found = count_rejections(config, np.tile(human_ids[1000:1050], 2), 15, 0.05)
    for name, rejections in found.items():
        assert rejections <= 2 * at_most(0.05, 15), name


def test_weights_that_peek_at_the_tested_coins_are_rejected(human_ids: np.ndarray) -> None:
    # The near-miss: the green mass taken with the tested coins' own colours, as the sampler sees it.
    ids = human_ids[1000:1100]
    model = guess(ids, 1)
    # Half the probability of each law lies on its token, so the peek is worth something.
    rejections = 0
    for number in range(200):
        key = prf_key(number)
        coins = module_of(CONFIGS["green-list"]).observe(ids, key, CONFIGS["green-list"])
        shares = np.exp(model.log_prob[coins.positions])
        green = coins.outcomes[:, 0]
        log_odds = 2.0 - np.log1p(np.expm1(2.0) * (0.25 * (1 - shares) + shares * green))
        weights = np.where(green, np.abs(log_odds), -np.abs(log_odds))[:, None]
        test = bits.model_aware_test(coins, bits.bounded(weights), 0.25, scheme="x", assumptions=())
        rejections += test.pvalue <= 0.05
    assert rejections > at_most(0.05, 200)


# --- ratios have mean 1, exactly over keys ------------------------------------------------------------------------


def keys_and_law(n: int, concentration: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    row = np.log(np.maximum(rng.dirichlet(np.full(12, concentration)), 1e-6))
    row -= np.log(np.exp(row).sum())
    return rng.integers(0, 2**32, (n, 8), dtype=np.uint32), np.tile(row, (n, 1)), row


@pytest.mark.parametrize("token", range(3))
@pytest.mark.parametrize("concentration", [0.2, 3.0])
def test_ratios_of_the_whole_law_have_mean_one(token: int, concentration: float) -> None:
    # The ratio is bounded by 1 / p: with 20,000 keys Chebyshev is far too wide, so the bound is normal, 5 deviations.
    n = 20_000
    keys, rows, row = keys_and_law(n, concentration)
    tokens = np.full(n, int(np.argsort(-row)[token]))
    tournament = tilted_laws.tournament_log_ratios(keys, rows, tokens, stream=LAYERS, layers=4)
    dipmark = tilted_laws.reweighted_log_ratios(keys, rows, tokens, stream=ORDER, alpha=0.5)
    for ratio in (np.exp(tournament), np.exp(dipmark)):
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(n)
    green = np.exp(green_ratios.green_log_ratios(keys, rows, tokens, stream=MEMBER, threshold=2**30, delta=2.0))
    assert abs(green.mean() - 1) < 5 * green.std() / math.sqrt(n)
    # The near-miss: the green list's tilted probability over the model's. Its mean over keys is not 1.
    masses = tilted_laws.member_masses(keys, rows, [np.empty(0, dtype=np.int64)] * n, stream=MEMBER, threshold=2**30)
    out = np.empty((n,), dtype=np.uint32)
    chacha_numba._words_at(keys, tokens.astype(np.uint32), np.uint32(MEMBER), np.uint32(0), out)
    tilted = np.where(out < 2**30, math.exp(2), 1.0) / (1 + math.expm1(2) * masses)
    if token == 0 and concentration == 0.2:
        assert abs(tilted.mean() - 1) > 5 * tilted.std() / math.sqrt(n)


def own_words(keys: np.ndarray, tokens: np.ndarray, stream: int) -> np.ndarray:
    out = np.empty(len(tokens), dtype=np.uint32)
    chacha_numba._words_at(keys, tokens.astype(np.uint32), np.uint32(stream), np.uint32(0), out)
    return out


def test_chances_of_a_token_do_not_depend_on_its_own_words() -> None:
    # Over keys the outcome is fair whatever the chance was: in each bin of the chance, a binomial count.
    n = 30_000
    keys, rows, row = keys_and_law(n, 0.4)
    tokens = np.full(n, int(np.argsort(-row)[1]))
    own = own_words(keys, tokens, LAYERS)
    chances = tilted_laws.tournament_chances(keys, rows, tokens, stream=LAYERS, layers=3)
    half = tilted_laws.reweighted_chances(keys, rows, tokens, stream=ORDER, alpha=0.5)
    cases = [(chances[:, layer], own >> layer & 1) for layer in range(3)]
    cases.append((half, own_words(keys, tokens, ORDER) >> 31))
    for chance, outcome in cases:
        assert chance.std() > 0.01
        for part in np.array_split(np.argsort(chance), 4):
            assert abs(outcome[part].mean() - 0.5) < 5 * 0.5 / math.sqrt(len(part))
    # The near-miss: the ratio of the whole law, which does read the token's own words.
    whole = tilted_laws.tournament_log_ratios(keys, rows, tokens, stream=LAYERS, layers=3)
    top = np.argsort(whole)[-n // 4 :]
    assert abs((own[top] & 1).mean() - 0.5) > 5 * 0.5 / math.sqrt(n // 4)


def test_one_layer_has_the_chance_in_closed_form() -> None:
    # P(g = 1 | drawn) = 1/2 + (1 - p) / 4 over all keys: weigh each key by its ratio.
    n = 30_000
    keys, rows, row = keys_and_law(n, 0.5)
    token = int(np.argsort(-row)[0])
    ratio = np.exp(tilted_laws.tournament_log_ratios(keys, rows, np.full(n, token), stream=LAYERS, layers=1))
    bit = own_words(keys, np.full(n, token), LAYERS) & 1
    weighted = ratio * (bit - (0.5 + (1 - math.exp(row[token])) / 4))
    assert abs(weighted.mean()) < 5 * weighted.std() / math.sqrt(n)
    # And the conditional chance is exact for one layer, key by key: theta = ratio(1) / (ratio(0) + ratio(1)).
    chances = tilted_laws.tournament_chances(keys[:50], rows[:50], np.full(50, token), stream=LAYERS, layers=1)[:, 0]
    p = math.exp(row[token])
    expected = np.where(bit[:50], ratio[:50], np.nan)
    other = 3 - p  # ratio(0) + ratio(1) = 3 - p - 2 G, G the others' set mass
    mass = 2 - p - expected
    np.testing.assert_allclose(chances[bit[:50] == 1], (expected / (other - 2 * mass))[bit[:50] == 1], rtol=1e-9)


def test_green_odds_equal_bayes_over_all_colourings() -> None:
    # Five candidates: P(drawn, colours) for all 32 colourings; the untested colours are known to the detector.
    law, gamma, delta, token = np.array([0.35, 0.3, 0.2, 0.1, 0.05]), 0.25, 2.0, 1
    for others in np.ndindex(2, 2, 2, 2):
        likelihood = []
        for own in (0, 1):
            colours = np.insert(np.array(others), token, own)
            tilted = law * np.exp(delta * colours)
            likelihood.append(tilted[token] / tilted.sum())
        mass = float(np.sum(np.delete(law, token) * np.array(others)))
        got = _lists._evidence(law[[token]], np.array([True]), mass, gamma, delta)[0]
        assert got == pytest.approx(math.log(likelihood[1] / likelihood[0]), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=8),
    st.sampled_from([0.5, 2.0, 6.0]),
    st.sampled_from([0.1, 0.25, 0.5]),
)
def test_the_mean_of_a_green_ratio_is_bounded_from_above(weights: list[float], delta: float, gamma: float) -> None:
    # All 2^V colourings. Above, so that the e-value's mean is at most 1; and close, so that no power is lost.
    law, bonus = np.array(weights) / sum(weights), math.expm1(delta)
    colours = (np.arange(2 ** len(law))[:, None] >> np.arange(len(law))) & 1
    chances = np.prod(np.where(colours, gamma, 1 - gamma), axis=1)
    exact = float(np.sum(chances * (1 + bonus * colours[:, 0]) / (1 + bonus * colours @ law)))
    got = green_ratios._mean_ratio(law, len(law), 0, gamma, bonus)
    assert exact <= got
    if (law >= 1e-3).all():
        assert got <= exact * (1 + 3e-9)
    elif law[0] > 1e-3:
        assert got <= exact * (1 + (1e-5 if delta < 3 else 1e-2))


def evidence_per_token(law: np.ndarray, gamma: float, delta: float) -> tuple[float, float, float]:
    """Mean log-likelihood ratio of a marked token: whole list, coin given the others' colours, coin alone."""
    colours = (np.arange(2 ** len(law))[:, None] >> np.arange(len(law))) & 1
    chances = np.prod(np.where(colours, gamma, 1 - gamma), axis=1)
    tilted = law * np.exp(delta * colours)
    tilted /= tilted.sum(axis=1, keepdims=True)
    whole = given = alone = 0.0
    for x in range(len(law)):
        drawn = chances * tilted[:, x]
        whole += np.sum(drawn * np.log(tilted[:, x] / np.sum(drawn)))
        flipped = tilted[np.arange(len(colours)) ^ (1 << x), x]
        own = np.where(colours[:, x], gamma, 1 - gamma)
        given += np.sum(drawn * np.log(tilted[:, x] / (own * tilted[:, x] + (1 - own) * flipped)))
        q = np.sum(drawn[colours[:, x] == 1]) / np.sum(drawn)
        alone += np.sum(drawn) * (q * np.log(q / gamma) + (1 - q) * np.log((1 - q) / (1 - gamma)))
    return float(whole), float(given), float(alone)


def test_how_much_more_the_whole_list_says_than_the_coin() -> None:
    whole, given_, alone = evidence_per_token(np.array([0.9, 0.1]), 0.25, 2.0)
    assert whole / given_ == pytest.approx(1.6, abs=0.05)
    assert given_ / alone == pytest.approx(1.06, abs=0.01)
    whole, given_, alone = evidence_per_token(np.full(10, 0.1), 0.25, 2.0)
    assert whole / alone < 1.2
    assert given_ / alone < 1.01


def test_the_bound_on_many_rare_candidates_is_close() -> None:
    # 20,000 equal candidates: G is gamma up to a thousandth, so the mean is that of one coin.
    law = np.full(20_000, 1 / 20_000)
    got = green_ratios._mean_ratio(law, len(law), 0, 0.25, math.expm1(2.0))
    a = math.expm1(2.0)
    # E 1 / (1 + a G) to the second order about its mean, the coin's own share left out.
    mean, variance = 0.25 * (1 - law[0]), 0.25 * 0.75 * float(np.sum(law**2))
    red = 1 / (1 + a * mean) + a**2 * variance / (1 + a * mean) ** 3
    green = 1 / (1 + a * law[0] + a * mean) + a**2 * variance / (1 + a * mean) ** 3
    assert got == pytest.approx(0.75 * red + 0.25 * (1 + a) * green, rel=1e-7)


# --- power, and what it depends on --------------------------------------------------------------------------------


@SCHEMES
def test_marked_text_is_found_and_other_keys_see_nothing(config: Any) -> None:
    key, other = prf_key(1), prf_key(2)
    ids, rows = write(config, key, 150, 0.3, seed=3)
    model, tests = view(rows, ids[4:]), module_of_tests(config)
    result = tests.test_ids(ids, 4, key, config, test="auto", model=model)
    plain, aware, robust = result.components
    assert plain.log10_pvalue < -6
    assert aware.log10_pvalue < plain.log10_pvalue + 0.3  # the model helps, or costs nothing
    assert robust.log10_pvalue < -6
    assert robust.log_evalue > 14
    assert result.log_pvalue == pytest.approx(min(one.log_pvalue for one in result.components) + math.log(3))
    wrong = tests.test_ids(ids, 4, other, config, test="auto", model=model)
    assert all(one.pvalue > 1e-3 for one in (wrong, *wrong.components))
    assert {result.test for result in result.components} == {
        f"{config.scheme}-{name}" for name in ("sum", "model-aware", "robust")
    }


@SCHEMES
def test_named_tests_are_the_parts_of_the_best(config: Any) -> None:
    ids, rows = write(config, prf_key(1), 60, 0.3, seed=4)
    tests, model = module_of_tests(config), view(rows, ids[4:], piece=7)
    best = tests.test_ids(ids, 4, prf_key(1), config, test="auto", model=view(rows, ids[4:]))
    for part, name in zip(best.components, ("sum", "model-aware", "robust"), strict=True):
        alone = tests.test_ids(ids, 4, prf_key(1), config, test=name, model=model)
        assert alone.log_pvalue == pytest.approx(part.log_pvalue, rel=1e-9)
        assert alone.log_evalue == pytest.approx(part.log_evalue, rel=1e-9)
    assert tests.test_ids(ids, 4, prf_key(1), config, test="auto", model=None) == best.components[0]


@pytest.mark.parametrize("name", ["tournament", "dipmark", "green-list", "green-list hard"])
def test_the_whole_list_beats_the_tokens_own_bits(name: str) -> None:
    # What the other candidates show is most of the evidence: the reason for the e-value of the robust test.
    config = CONFIGS[name]
    ids, rows = write(config, prf_key(5), 200, 0.1, seed=6)
    result = module_of_tests(config).test_ids(ids, 4, prf_key(5), config, test="auto", model=view(rows, ids[4:]))
    plain, aware, robust = (one.log10_pvalue for one in result.components)
    assert robust < aware - 1 < plain - 0.5


@SCHEMES
def test_edits_weaken_the_mark_and_do_not_hide_it(config: Any) -> None:
    ids, rows = write(config, prf_key(1), 300, 0.3, seed=8)
    tests = module_of_tests(config)
    evidence = []
    for share in (0.0, 0.1, 0.2):
        rng = np.random.default_rng(9)
        edited = ids.copy()
        where = np.flatnonzero(rng.random(300) < share) + 4
        edited[where] = rng.integers(0, VOCABULARY, len(where))
        known = rows.copy()
        known[where - 4, edited[where]] = np.log(1e-5)
        result = tests.test_ids(edited, 4, prf_key(1), config, test="robust", model=view(known, edited[4:]))
        evidence.append(result.log_evalue)
    assert evidence[0] > evidence[1] > evidence[2] > math.log(1e3)


# --- shapes -------------------------------------------------------------------------------------------------------


@SCHEMES
def test_batch_equals_single(config: Any, human_ids: np.ndarray) -> None:
    lengths = [0, 1, 4, 5, 17, 500, 3]
    documents = [human_ids[n : 2 * n] for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tests = module_of_tests(config)
    batch = tests.documents_test(np.concatenate(documents), offsets, prf_key(0), config)
    for i, document in enumerate(documents):
        single = tests.test_ids(document, 0, prf_key(0), config, test="auto", model=None)
        for name in ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped"):
            assert getattr(batch, name)[i] == getattr(single, name), name


@SCHEMES
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, VOCABULARY + 50), max_size=30), st.integers(0, 30))
def test_any_ids_give_a_result(config: Any, ids: list[int], prompt_length: int) -> None:
    whole = np.array(ids, dtype=np.uint32)
    prompt_length = min(prompt_length, len(ids))
    n = len(ids) - prompt_length
    rows = np.full((n, VOCABULARY), -math.log(VOCABULARY), dtype=np.float32)
    known = np.where(whole[prompt_length:] < VOCABULARY, whole[prompt_length:], 0)
    model = replace(view(rows, known))
    for test in ("auto", "sum", "model-aware", "robust"):
        result = module_of_tests(config).test_ids(whole, prompt_length, prf_key(3), config, test=test, model=model)
        assert result.n_tokens == n
        assert 0 <= result.n_scored <= n
        assert result.log_pvalue <= 0.0
    tails = module_of_tests(config).token_log_tails(whole, prf_key(3), config)
    assert len(tails) == len(ids)
    assert (tails[~np.isnan(tails)] <= 0).all()


def test_the_first_token_of_each_context_alone_is_marked() -> None:
    config = CONFIGS["tournament"]
    ids = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3, 4, 5], dtype=np.uint32)
    coins = module_of(config).observe(ids, prf_key(0), config)
    assert coins.positions.tolist() == list(range(4, 14))
    kept = first_of_context(ids, 0, coins, 4)
    assert 9 not in kept.positions.tolist()
    assert kept.n_repeats_dropped == coins.n_repeats_dropped + 1
    assert len(kept.outcomes) == len(kept.positions)


def test_a_text_without_rows_keeps_weight_zero() -> None:
    config = CONFIGS["green-list"]
    ids, rows = write(config, prf_key(1), 40, 0.3, seed=4)
    empty = replace(view(rows, ids[4:]), rows=lambda: iter(()))
    for name in ("green-list", "fixed-list", "tournament", "dipmark"):
        one = CONFIGS[name]
        result = module_of_tests(one).test_ids(ids, 4, prf_key(1), one, test="model-aware", model=empty)
        assert (result.pvalue, result.log_evalue) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["tournament", "green-list"])
def test_generated_by_a_model_and_found_by_detect(
    name: str, monkeypatch: pytest.MonkeyPatch, human_ids: np.ndarray
) -> None:
    import torch

    import assay
    from assay.detection import testers
    from assay.models import load_model
    from assay.watermark import schemes

    config = CONFIGS[name]
    monkeypatch.setitem(schemes._HOMES, config.scheme, module_of(config).__name__)
    monkeypatch.setitem(testers._HOMES, config.scheme, module_of_tests(config).__name__)
    key, other = (assay.SecretKey(bytes([n]) * 32, id=f"key-{n}", config=config) for n in (1, 2))
    model, prompt = load_model(), torch.from_numpy(human_ids[None, :20].astype(np.int64))
    mark = assay.watermark.for_transformers(key, seed=1)
    text = model.generate(prompt, do_sample=True, max_new_tokens=120, watermarking_config=mark, pad_token_id=0)
    ids = text[0, 20:].numpy()
    found = assay.detect(ids, key, model="default", prompt=prompt[0].numpy())
    assert found.log10_pvalue < -8
    assert found.scheme == config.tag
    # The prompt missing costs the first tokens, never the rest.
    assert assay.detect(ids, key).log10_pvalue < -4
    assert assay.detect(ids, other, model="default").pvalue > 1e-3
    assert assay.detect(human_ids[:140], key, model="default").pvalue > 1e-3
