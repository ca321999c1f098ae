"""Tests of deployed marks: null laws by enumeration, size on human text over keys, and what other rules get wrong."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from scipy import stats

from assay.detection import bits, hf_kgw, hf_synthid, sglang_gumbel, synthid_text, testers, vllm_gumbel
from assay.detection.detect import detect
from assay.detection.model_view import ModelView
from assay.kernels.chacha import Words
from assay.watermark import schemes
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.profiles import hf_kgw as kgw_contract
from assay.watermark.profiles import hf_synthid as synthid_contract
from assay.watermark.profiles.hf_kgw import HfKgwConfig
from assay.watermark.profiles.hf_synthid import HfSynthIdConfig
from assay.watermark.profiles.sglang_gumbel import SglangGumbelConfig
from assay.watermark.profiles.synthid_text import SynthIdTextConfig
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig

V = 2048
LEFT = HfKgwConfig(vocab_size=V)
SELF = HfKgwConfig(vocab_size=V, seeding_scheme="selfhash", context_width=4)
ALL: list[tuple[Any, Any]] = [
    (LEFT, hf_kgw),
    (SELF, hf_kgw),
    (HfSynthIdConfig(), hf_synthid),
    (SynthIdTextConfig(), synthid_text),
    (VllmGumbelConfig(), vllm_gumbel),
    (VllmGumbelConfig(algorithm="dual_key_gumbel"), vllm_gumbel),
    (SglangGumbelConfig(), sglang_gumbel),
    (SglangGumbelConfig(keys="dual"), sglang_gumbel),
]
IDS = [f"{config.scheme}-{number}" for number, (config, _) in enumerate(ALL)]


def key_of(config: Any, number: int) -> SecretKey:
    secret = hashlib.sha256(f"deployed {number}".encode()).digest()
    return SecretKey(secret, id="k", config=config)


def marked(config: Any, key: SecretKey, n: int, seed: int, spread: float = 1.5) -> Words:
    """A text of n tokens after a prompt of three, which comes first where the scheme reads it."""
    draw = schemes.sampler_of(config, use_key(key), unmarked_key(b"x"))
    rng = np.random.default_rng(seed)
    ids = np.empty((1, 0), dtype=np.int64) if config.completion_only else np.array([[5, 6, 7]])
    for _ in range(n):
        weights = rng.normal(0, spread, (1, V)).astype(np.float32)
        ids = np.concatenate([ids, draw(ids, weights, None)[:, None]], axis=1)
    return ids[0].astype(np.uint32)


@pytest.fixture(autouse=True)
def wired(monkeypatch: pytest.MonkeyPatch) -> None:
    for config, module in ALL:
        monkeypatch.setitem(testers._HOMES, config.scheme, module.__name__)
        monkeypatch.setitem(schemes._HOMES, config.scheme, type(config).__module__)


# ---------------------------------------------------------------- every scheme


@pytest.mark.parametrize(("config", "module"), ALL, ids=IDS)
def test_own_texts_are_found_and_only_with_their_key(config: Any, module: Any) -> None:
    key, other = key_of(config, 0), key_of(config, 1)
    text = marked(config, key, 60, seed=1)
    before = 0 if config.completion_only else 3
    found = detect(text[before:], key, prompt=text[:before])
    assert found.pvalue < 1e-3
    assert found.evalue > 50
    assert found.test.startswith(config.scheme.split("-")[0])
    assert found.scheme == config.tag
    assert detect(text[before:], other, prompt=text[:before]).pvalue > 1e-3


@pytest.mark.parametrize(("config", "module"), ALL, ids=IDS)
def test_many_documents_equal_each_alone(config: Any, module: Any, zipf_ids: Callable[..., Any]) -> None:
    prf_key = use_key(key_of(config, 0))
    documents = [zipf_ids(n, n) for n in (0, 1, 3, 4, 5, 40, 300)]
    offsets = np.cumsum([0, *map(len, documents)])
    together = module.documents_test(np.concatenate(documents), offsets, prf_key, config)
    for d, ids in enumerate(documents):
        alone = module.test_ids(ids, 0, prf_key, config, test="auto", model=None)
        for name in ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped"):
            assert getattr(together, name)[d] == getattr(alone, name), (name, len(ids))
        tails = module.token_log_tails(ids, prf_key, config)
        assert tails.shape == ids.shape
        assert np.sum(~np.isnan(tails)) == alone.n_scored
        assert not np.any(tails > 0)


@pytest.mark.parametrize(("config", "module"), ALL, ids=IDS)
def test_a_text_five_times_over_has_the_p_value_of_once(config: Any, module: Any, zipf_ids: Callable[..., Any]) -> None:
    # Up to the joints, where new contexts arise: their coins are all that is new.
    prf_key = use_key(key_of(config, 2))
    block = zipf_ids(80, 9)
    once = module.test_ids(block, 0, prf_key, config, test="auto", model=None)
    often = module.test_ids(np.tile(block, 5), 0, prf_key, config, test="auto", model=None)
    assert once.n_scored <= often.n_scored <= once.n_scored + 4
    assert often.n_tokens == 400


# Share of p-values at most 1 % and 5 % over 1,500 (text, key) pairs: at most the Binomial quantile that one seed in
# 10,000 exceeds. Near-misses (no dedup; n-grams for coins) are rejected by the same bound below.
PAIRS = 1500


def sizes_hold(pvalues: list[float]) -> bool:
    p = np.array(pvalues)
    return all(np.sum(p <= a) <= stats.binom.ppf(1 - 1e-4, len(p), a) for a in (0.05, 0.01, 0.002))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "module"), ALL, ids=IDS)
@pytest.mark.parametrize("repetitive", [False, True])
def test_size_on_human_text(config: Any, module: Any, repetitive: bool, human_ids: Words) -> None:
    pvalues = []
    for number in range(PAIRS):
        start = 97 * number % (len(human_ids) - 300)
        text = np.tile(human_ids[start : start + 60], 4) if repetitive else human_ids[start : start + 240]
        row = module.documents_test(text, np.array([0, 240]), use_key(key_of(config, number)), config)
        pvalues.append(math.exp(row.log_pvalue[0]))
    assert sizes_hold(pvalues)
    assert np.mean(pvalues) > 0.45


@pytest.fixture(scope="module")
def human_ids(human_text: str) -> Words:
    from assay.detection.text import load_tokenizer

    return load_tokenizer().encode(human_text)


def official_kgw_pvalue(text: Words, prf_key: Words, config: HfKgwConfig, *, distinct: bool) -> float:
    n, green = kgw_contract.official_counts(text, prf_key, config, ignore_repeated_ngrams=distinct)
    r = config.greenlist_ratio
    return float(stats.norm.sf((green - r * n) / math.sqrt(n * r * (1 - r))))


def test_the_same_bound_rejects_every_repeat_counted(human_ids: Words) -> None:
    pvalues = []
    for number in range(400):
        start = 97 * number % (len(human_ids) - 300)
        text = np.tile(human_ids[start : start + 60], 4)
        pvalues.append(official_kgw_pvalue(text, use_key(key_of(LEFT, number)), LEFT, distinct=False))
    assert not sizes_hold(pvalues)


@pytest.mark.slow
def test_the_same_bound_rejects_n_grams_in_place_of_coins() -> None:
    # Selfhash, 400 tokens of a heavy Zipf law: different windows share one (seed, target).
    rng = np.random.default_rng(0)
    official, ours = [], []
    for number in range(300):
        text = (rng.zipf(1.2, 400) % V).astype(np.uint32)
        prf_key = use_key(key_of(SELF, number))
        official.append(official_kgw_pvalue(text, prf_key, SELF, distinct=True))
        ours.append(math.exp(hf_kgw.documents_test(text, np.array([0, 400]), prf_key, SELF).log_pvalue[0]))
    assert not sizes_hold(official)
    assert sizes_hold(ours)


# ---------------------------------------------------------------- hf-kgw


def test_a_token_after_token_zero_has_no_coin() -> None:
    # Its seed is 0 whatever the key, so whether it is green is public.
    ids = np.array([5, 0, 9, 0, 11, 7], dtype=np.uint32)
    for number in range(3):
        positions, _, seeds = kgw_contract.scan(ids, np.array([0, 6]), use_key(key_of(LEFT, number)), LEFT)
        assert positions.tolist() == [1, 3, 5]
        assert (seeds != 0).all()


def test_the_coin_is_seed_and_target() -> None:
    ids = np.array([8, 3, 8, 3, 8, 4], dtype=np.uint32)
    positions, _, _ = kgw_contract.scan(ids, np.array([0, 6]), use_key(key_of(LEFT, 0)), LEFT)
    assert positions.tolist() == [1, 2, 5]
    wide = HfKgwConfig(vocab_size=V, context_width=3)  # lefthash: two windows, one last token, one coin
    positions, _, _ = kgw_contract.scan(
        np.array([1, 2, 8, 3, 5, 6, 8, 3], dtype=np.uint32), np.array([0, 8]), use_key(key_of(wide, 0)), wide
    )
    assert positions.tolist() == [3, 4, 5, 6]


def hypergeometric_tail(counts: tuple[int, ...], vocabulary: int, size: int, k: int) -> float:
    law = np.array([1.0])
    for n in counts:
        law = np.convolve(law, stats.hypergeom.pmf(np.arange(n + 1), vocabulary, size, n))
    return float(law[k:].sum())


@pytest.mark.parametrize(("vocabulary", "size"), [(12, 3), (41, 20), (9, 7)])
def test_binomial_bounds_coins_that_share_lists(vocabulary: int, size: int) -> None:
    chance = size / vocabulary
    tight = 0
    for counts in [(1, 1, 1), (2, 2, 2), (5, 1, 1), (9,), (3, 4, 2), (1,) * 8, (6, 6)]:
        n = sum(counts)
        single = np.full(n + 1, max(counts) == 1)
        green = np.arange(n + 1)
        bound = np.exp(hf_kgw.sum_log_pvalues(green, np.full(n + 1, n), chance, single))
        exact = np.array([hypergeometric_tail(counts, vocabulary, size, int(k)) for k in green])
        assert (exact <= bound * (1 + 1e-9)).all(), counts
        if max(counts) == 1:
            np.testing.assert_allclose(bound, exact, rtol=1e-9)
        # Near-miss: the bare Binomial tail is no bound below the mean.
        tight += bool((exact > stats.binom.sf(green - 1, n, chance) * (1 + 1e-9)).any())
    assert tight > 0


def test_the_e_value_has_mean_at_most_one_when_coins_share_a_list() -> None:
    green = np.arange(10)
    law = stats.hypergeom.pmf(green, 12, 3, 9)
    evalues = np.exp(bits.binomial_log_evalues(green, np.full(10, 9), 0.25))
    assert law @ evalues <= 1
    assert stats.binom.pmf(green, 9, 0.25) @ evalues == pytest.approx(1)


def test_the_chance_is_the_lists_own() -> None:
    # floor(41 * 0.3) / 41 = 12 / 41, not 0.3.
    config = HfKgwConfig(vocab_size=41, greenlist_ratio=0.3)
    prf_key = use_key(key_of(config, 0))
    ids = np.array([3, 17], dtype=np.uint32)
    found = hf_kgw.sum_test(ids, 0, prf_key, config)
    green = found.statistic == 1
    assert found.pvalue == pytest.approx(12 / 41 if green else 1, rel=1e-12)


# ---------------------------------------------------------------- hf-synthid


def test_the_law_of_synthid_is_that_of_all_keys() -> None:
    # A table of 16 bits and two layers: all 256 pairs of keys, by the contract itself.
    config = HfSynthIdConfig(depth=2, sampling_table_size=16, ngram_len=3)
    text = np.array([9, 4, 7, 7, 1, 30, 2, 2, 8], dtype=np.uint32)
    counts, pvalues, evalues = [], [], []
    for keys in itertools.product(range(16), repeat=2):
        prf_key = use_key(SecretKey.from_integers(config, keys))
        found = hf_synthid.sum_test(text, prf_key, config)
        counts.append(found.statistic)
        pvalues.append(found.pvalue)
        evalues.append(found.evalue)
    observed = np.array(counts)
    for value, p in zip(counts, pvalues, strict=True):
        assert p == pytest.approx(np.mean(observed >= value), rel=1e-6)
        assert p >= np.mean(observed >= value) * (1 - 1e-12)
    assert np.mean(evalues) == pytest.approx(1, rel=1e-9)
    # Near-miss: a table of fair coins.
    assert not np.allclose(pvalues, stats.binom.sf(observed - 1, 2 * found.n_scored, 0.5), rtol=0.05)


def test_layer_law_against_counting() -> None:
    config = HfSynthIdConfig(sampling_table_size=256, sampling_table_seed=7)
    table = synthid_contract.shifted_table(256, 7)
    states = np.random.default_rng(3).choice(256, 60, replace=False)
    counted = np.array([table[(states + shift) % 256].sum() for shift in range(256)])
    values, probabilities = hf_synthid.layer_law(states, config)
    expected = np.unique(counted, return_counts=True)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_allclose(probabilities, expected[1] / 256)
    # With all states seen nothing is left to chance, where independent coins would still vary.
    values, probabilities = hf_synthid.layer_law(np.arange(256), config)
    assert values.tolist() == [table.sum()]
    assert probabilities.tolist() == [1.0]


def test_long_texts_follow_the_table_not_the_coin() -> None:
    # 60,000 distinct states of 65,536: the Bernoulli(1/2) rule has a tenth of the variance wrong and the mean off.
    config = HfSynthIdConfig()
    rng = np.random.default_rng(4)
    states = rng.choice(65536, 60000, replace=False)
    values, probabilities = hf_synthid.layer_law(states, config)
    mean = float(values @ probabilities)
    spread = math.sqrt(float((values - mean) ** 2 @ probabilities))
    assert mean == pytest.approx(60000 * synthid_contract.sampling_table(65536, 0).mean(), rel=1e-12)
    assert spread < 0.35 * math.sqrt(60000 / 4)  # drawn without replacement
    assert (30000 - mean) * math.sqrt(30) / math.sqrt(60000 / 4) > 0.8  # z of the coin rule's centre, 30 layers


def test_tokens_65536_apart_show_the_same_values() -> None:
    # The near-identity of ids in large vocabularies is in the contract; each state counts once, so it does no harm.
    config = HfSynthIdConfig()
    prf_key = use_key(key_of(config, 0))
    ids = np.array([1, 2, 3, 4, 5], dtype=np.uint32)
    other = ids + np.array([0, 0, 0, 0, 65536], dtype=np.uint32)
    np.testing.assert_array_equal(
        synthid_contract.g_values(ids, prf_key, config), synthid_contract.g_values(other, prf_key, config)
    )


# ---------------------------------------------------------------- synthid-text


def test_synthid_text_bits_are_fair_and_uncorrelated(zipf_ids: Callable[..., Any]) -> None:
    # 30 layers, 20 keys, about 1,900 n-grams each: 1.1 million bits. Each z-score below 5: false alarm 1e-6 per look.
    config = SynthIdTextConfig()
    text = zipf_ids(2000, 1)
    from assay.watermark.profiles import synthid_text as contract

    values = np.concatenate(
        [contract.g_values(text, use_key(key_of(config, number)), config) for number in range(20)]
    ).astype(np.float64)
    n = len(values)
    assert abs(values.mean() - 0.5) * 2 * math.sqrt(values.size) < 5
    signs = 2 * values - 1
    correlations = (signs.T @ signs) / math.sqrt(n)
    np.fill_diagonal(correlations, 0)
    # Repeated n-grams of a Zipf text widen this by a factor below 1.6.
    assert np.abs(correlations).max() < 1.6 * 5


# ---------------------------------------------------------------- vllm-gumbel


def exact_two_gamma_tail(n: int, alpha: float, s: float) -> Any:
    """P((1 - alpha) G1 + alpha G2 >= s) by integrating over G2."""
    with mpmath.workdps(30):
        a, b, x = mpmath.mpf(1 - alpha), mpmath.mpf(alpha), mpmath.mpf(s)

        def inner(y: Any) -> Any:
            rest = (x - b * y) / a
            tail = mpmath.gammainc(n, rest, mpmath.inf, regularized=True) if rest > 0 else 1
            return tail * mpmath.exp(-y) * y ** (n - 1) / mpmath.gamma(n)

        return mpmath.quad(inner, [0, n, 4 * n, x / b]) + mpmath.gammainc(n, x / b, mpmath.inf, regularized=True)


@pytest.mark.parametrize(("n", "alpha", "s"), [(14, 0.1, 18.34), (14, 0.1, 26.6454), (50, 0.2, 95.0), (50, 0.1, 130.0)])
def test_two_keys_have_their_exact_law_and_not_vllms(n: int, alpha: float, s: float) -> None:
    from assay.detection.dual_gumbel import log_two_gamma_sf

    exact = float(exact_two_gamma_tail(n, alpha, s))
    assert math.exp(log_two_gamma_sf(n, alpha, s)) == pytest.approx(exact, rel=1e-6)
    v = (1 - alpha) ** 2 + alpha**2
    if exact < 1e-6:
        assert stats.gamma.sf(s / v, n / v) < exact / 1.3  # moment matching: too small by a third and more


@pytest.mark.parametrize(
    ("alpha", "reported", "times"), [(0.1, 1e-6, 1.3), (0.1, 1e-12, 2.4), (0.2, 1e-6, 1.5), (0.2, 1e-12, 3.5)]
)
def test_how_far_off_moment_matching_is(alpha: float, reported: float, times: float) -> None:
    # The figures of docs/explanation/deployed-marks.md: n = 50, where vLLM reports `reported`.
    from assay.detection.dual_gumbel import log_two_gamma_sf

    v = (1 - alpha) ** 2 + alpha**2
    s = v * float(stats.gamma.isf(reported, 50 / v))
    assert math.exp(log_two_gamma_sf(50, alpha, s)) / reported == pytest.approx(times, abs=0.06)


def test_two_keys_in_a_test(zipf_ids: Callable[..., Any]) -> None:
    config = VllmGumbelConfig(algorithm="dual_key_gumbel", alpha=0.2)
    prf_key = use_key(key_of(config, 0))
    text = zipf_ids(40, 2)
    found = vllm_gumbel.test_ids(text, 0, prf_key, config, test="sum", model=None)
    assert found.test == "vllm-dual-gumbel-sum"
    assert found.pvalue == pytest.approx(float(exact_two_gamma_tail(found.n_scored, 0.2, found.statistic)), rel=1e-6)
    from assay.watermark.profiles import vllm_gumbel as contract

    # The same statistic as vLLM's, but for its cells' edges.
    assert found.statistic == pytest.approx(contract.official_scores(text, prf_key, config)[1], abs=1e-5)


def test_words_of_a_cell_count_from_its_edge() -> None:
    from assay.watermark.gumbel import race_scores, sum_scores
    from assay.watermark.profiles import vllm_gumbel as contract

    words = np.array([0, 255, 256, 2**31, 2**32 - 257, 2**32 - 1], dtype=np.uint32)
    cells = (words >> np.uint32(8)).astype(np.float64)
    oriented = contract.race_words(words)
    with np.errstate(divide="ignore"):
        # P(cell or a larger one), and P(a smaller one), under uniform words.
        np.testing.assert_allclose(sum_scores(oriented), -np.log1p(-cells / 2**24), atol=1e-12)
        np.testing.assert_allclose(race_scores(oriented), -np.log(cells / 2**24), rtol=1e-9)


@pytest.mark.parametrize(("config", "module"), ALL[4:], ids=IDS[4:])
def test_with_a_model(config: Any, module: Any) -> None:
    key = key_of(config, 3)
    text = marked(config, key, 50, seed=4, spread=2.5)
    before = 0 if config.completion_only else 3
    log_p = np.full(50, math.log(0.02))
    log_p[0] = np.nan
    view = ModelView(lambda: log_p, lambda: iter(()))
    sums = module.test_ids(text, before, use_key(key), config, test="sum", model=view)
    for test in ("model-aware", "robust", "auto"):
        found = module.test_ids(text, before, use_key(key), config, test=test, model=view)
        assert found.pvalue < 1e-9, test
        assert len(set(found.assumptions)) == len(found.assumptions)
    assert found.test.endswith("best-of-three")
    assert found.components[0] == sums
    # No token of a text that was not marked: p-values of the wrong key stay where they belong.
    wrong = module.test_ids(text, before, use_key(key_of(config, 4)), config, test="auto", model=view)
    assert wrong.pvalue > 1e-3
    assert module.test_ids(text[:before], before, use_key(key), config, test="auto", model=view).pvalue == 1
