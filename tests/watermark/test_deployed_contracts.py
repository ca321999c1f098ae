"""Deployed marks bit for bit: against transformers itself, and against numbers that the other systems' code gave.

The vectors come from vLLM 0.32.0 (`vllm/v1/watermarking`), SGLang 0.5.23 (`sglang/srt/sampling/watermarking`) and
synthid-text addb4a1, each run as published. A change here means that texts of those systems are no longer read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, WatermarkingConfig
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor
from transformers.generation.watermarking import WatermarkDetector

from assay.kernels.chacha import Words
from assay.watermark.foreign import ForeignConfig
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.profiles import hf_kgw, hf_synthid, sglang_gumbel, synthid_text, vllm_gumbel
from assay.watermark.profiles.hf_kgw import GreenLists, HfKgwConfig
from assay.watermark.profiles.hf_synthid import HfSynthIdConfig
from assay.watermark.profiles.sglang_gumbel import SglangGumbelConfig
from assay.watermark.profiles.synthid_text import SynthIdTextConfig
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig
from assay.watermark.schemes import sampler_of

IDS = np.array([17, 4, 99, 4, 17, 4, 99, 4, 50256, 0, 3, 17, 4, 99, 4, 8], dtype=np.uint32)
VLLM_KEY = 0x0123456789ABCDEF
SYNTHID_KEYS = [654, 400, -836, 2**62 + 12345]
SGLANG_A, SGLANG_B = 0xA1B2C3D4E5F60718, 0x7F


def words_for(config: ForeignConfig, *integers: int) -> Words:
    return use_key(SecretKey.from_integers(config, integers))


# ---------------------------------------------------------------- hf-kgw


def detector(config: HfKgwConfig, key: int, *, distinct: bool) -> Any:
    settings = WatermarkingConfig(
        seeding_scheme=config.seeding_scheme,
        context_width=config.context_width,
        hashing_key=key,
        bias=config.bias,
        greenlist_ratio=config.greenlist_ratio,
    )
    model = LlamaConfig(vocab_size=config.vocab_size, bos_token_id=None)
    official = WatermarkDetector(model, "cpu", settings, ignore_repeated_ngrams=distinct)
    official.bos_token_id = -1  # a model without one makes it fail
    return official


@pytest.mark.parametrize(("scheme", "width"), [("lefthash", 1), ("lefthash", 3), ("selfhash", 1), ("selfhash", 4)])
@pytest.mark.parametrize(("vocabulary", "ratio"), [(41, 0.5), (5000, 0.25), (50257, 0.1)])
def test_kgw_counts_and_scores_equal_transformers(scheme: Any, width: int, vocabulary: int, ratio: float) -> None:
    config = HfKgwConfig(
        vocab_size=vocabulary, greenlist_ratio=ratio, seeding_scheme=scheme, context_width=width, bias=1.5
    )
    rng = np.random.default_rng(vocabulary + width)
    texts = rng.zipf(1.2, (2, 40)) % vocabulary
    scores = rng.normal(size=(2, vocabulary)).astype(np.float32)
    for key in (15485863, 2**62 + 12345):
        prf_key = words_for(config, key)
        for distinct in (False, True):
            official = detector(config, key, distinct=distinct)
            found = official(torch.from_numpy(texts), return_dict=True)
            for row, text in enumerate(texts.astype(np.uint32)):
                counts = hf_kgw.official_counts(text, prf_key, config, ignore_repeated_ngrams=distinct)
                assert counts == (found.num_tokens_scored[row], found.num_green_tokens[row])
        expected = official.processor(torch.from_numpy(texts), torch.from_numpy(scores)).numpy()
        np.testing.assert_array_equal(hf_kgw.tilted_log_weights(texts, scores, None, prf_key, config), expected)
        assert not np.array_equal(expected, scores)


@pytest.mark.parametrize("vocabulary", [2, 41, 623, 625, 5000])
def test_lists_are_those_of_torch(vocabulary: int) -> None:
    generator = torch.Generator("cpu")
    lists = GreenLists(vocabulary, max(1, vocabulary // 4))
    every = np.arange(vocabulary, dtype=np.uint32)
    for seed in (0, 1, 2**31, 2**32 - 1, 2**40 + 5):
        order = torch.randperm(vocabulary, generator=generator.manual_seed(seed)).numpy()
        bits = lists.bits(np.full(vocabulary, seed & 0xFFFFFFFF, dtype=np.uint32), every)
        assert set(np.flatnonzero(bits)) == set(order[: max(1, vocabulary // 4)])


def test_a_full_cache_starts_anew_and_answers_alike() -> None:
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 40, 500).astype(np.uint32)
    targets = rng.integers(0, 300, 500).astype(np.uint32)
    small = GreenLists(300, 75, max_bytes=38 * 7)  # 7 rows, 40 seeds
    expected = GreenLists(300, 75).bits(seeds, targets)
    for _ in range(2):
        np.testing.assert_array_equal(small.bits(seeds, targets), expected)


def test_one_id_followed_through_the_shuffle_equals_its_row() -> None:
    from assay.watermark.profiles import mersenne_numba

    rng = np.random.default_rng(2)
    seeds = rng.integers(0, 2**32, 300, dtype=np.uint32)
    for size, count in ((7, 3), (1000, 250), (1000, 1000), (1000, 999)):
        targets = rng.integers(0, size, 300).astype(np.uint32)
        out = np.empty(300, dtype=np.bool_)
        mersenne_numba.own_members(seeds, targets, size, count, out)
        np.testing.assert_array_equal(out, GreenLists(size, count).bits(seeds, targets))


@given(key=st.integers(1, 2**63 - 1), token=st.integers(0, 2**32 - 2))
def test_left_seeds_against_whole_numbers(key: int, token: int) -> None:
    (seed,) = hf_kgw.left_seeds(np.array([token], dtype=np.uint32), key)
    assert int(seed) == key * token % (2**64 - 1) % 2**32


def test_a_left_seed_of_the_modulus_itself_is_zero() -> None:
    # (2**63 - 1) is no divisor of 2**64 - 1, but 3 * 5 * 17 * 257 * 641 * 65537 * 6700417 is: factors give the case.
    token = 3 * 5 * 17 * 257 * 641
    key = (2**64 - 1) // token
    assert int(hf_kgw.left_seeds(np.array([token], dtype=np.uint32), key)[0]) == 0


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    config = HfKgwConfig(vocab_size=100)
    with pytest.raises(ValueError, match="below vocab_size 100 of the key's settings, got 100"):
        hf_kgw.observe(np.array([1, 100], dtype=np.uint32), words_for(config, 5), config)
    with pytest.raises(ValueError, match="must have vocab_size 100 columns, got 99"):
        hf_kgw.tilted_log_weights(np.zeros((1, 2), np.int64), np.zeros((1, 99)), None, words_for(config, 5), config)


# ---------------------------------------------------------------- hf-synthid


@pytest.mark.parametrize(
    ("ngram_len", "depth", "history", "size", "seed"),
    [(5, 30, 1024, 2**16, 0), (2, 9, 8, 2**16, 3), (3, 7, 16, 1024, 0), (4, 64, 5, 2**10, 1)],
)
def test_synthid_values_masks_and_scores_equal_transformers(
    ngram_len: int, depth: int, history: int, size: int, seed: int
) -> None:
    rng = np.random.default_rng(depth)
    keys = [int(key) for key in rng.integers(-(2**63), 2**63 - 1, depth)]
    settings = {
        "ngram_len": ngram_len,
        "context_history_size": history,
        "sampling_table_size": size,
        "sampling_table_seed": seed,
    }
    config = HfSynthIdConfig(depth=depth, **settings)  # type: ignore[arg-type]
    prf_key = words_for(config, *keys)

    def processor() -> Any:
        return SynthIDTextWatermarkLogitsProcessor(keys=keys, device="cpu", **settings)

    texts = rng.zipf(1.2, (2, 150)) % 40
    texts[:, :60] %= 37  # no end of sequence before
    official = processor()
    values = official.compute_g_values(torch.from_numpy(texts)).numpy()
    masks = official.compute_context_repetition_mask(torch.from_numpy(texts)).numpy()
    ends = official.compute_eos_token_mask(torch.from_numpy(texts), 37).numpy()[:, ngram_len - 1 :]
    np.testing.assert_array_equal(hf_synthid.sampling_table(size, seed), official.sampling_table.numpy())
    for row, text in enumerate(texts.astype(np.uint32)):
        np.testing.assert_array_equal(hf_synthid.g_values(text, prf_key, config), values[row])
        np.testing.assert_array_equal(hf_synthid.context_mask(text, config), masks[row])
        n, mean, weighted = hf_synthid.official_scores(text, prf_key, config, eos_token_id=37)
        both = (masks[row] * ends[row]).astype(bool)
        weights = np.linspace(10, 1, depth)
        assert n == both.sum()
        assert mean == pytest.approx(values[row][both].mean(), rel=1e-12)
        assert weighted == pytest.approx((values[row][both] * (depth * weights / weights.sum())).mean(), rel=1e-12)
    # Writing: the law after the tournament, step by step, through repeated contexts, with removed candidates.
    official = processor()
    made = np.empty((2, 0), dtype=np.int64)
    repeated = 0
    for _ in range(30):
        scores = rng.normal(size=(2, 50))
        scores[:, 20:] = -np.inf
        whole = np.concatenate([np.full((2, 3), 9), made], axis=1)  # a prompt, which takes no part
        expected = official(torch.from_numpy(whole), torch.from_numpy(scores)).softmax(-1).numpy()
        law = np.exp(hf_synthid.tilted_log_weights(made, scores, None, prf_key, config))
        np.testing.assert_allclose(law / law.sum(1, keepdims=True), expected, atol=1e-12)
        repeated += np.allclose(expected, torch.from_numpy(scores).softmax(-1).numpy())
        made = np.concatenate([made, rng.integers(0, 3, (2, 1))], axis=1)
    assert repeated > 0 or ngram_len > 3


def test_other_table_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        HfSynthIdConfig(sampling_table_size=1000)


# ---------------------------------------------------------------- synthid-text


def test_synthid_text_vectors() -> None:
    config = SynthIdTextConfig(ngram_len=3, depth=4)
    prf_key = words_for(config, *SYNTHID_KEYS)
    assert synthid_text.initial_state(prf_key) == 8591080918959466443
    rows = ["".join(map(str, row)) for row in synthid_text.g_values(IDS, prf_key, config)]
    assert " ".join(rows) == "1110 0111 1000 0100 1110 0111 1111 1011 0000 0110 1111 1110 0111 1010"


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (
            2,
            [3.7531e-06, 0.0036432594, 0.0019939747, 1.11728e-05, 0.0026994339, 0.0038832733, 0.012486747, 0.0721718399,
             6.88316e-05, 0.0371727858, 0.0534749486, 0.8123899799],
        ),
        (
            3,
            [0.0, 0.00084377, 0.0002288784, 0.0, 8.01339e-05, 0.0001152767, 0.0009269134, 0.041797297,
             3e-10, 0.0027594019, 0.0039695403, 0.9492787882],
        ),
    ],
)  # fmt: skip
def test_synthid_text_laws(leaves: int, expected: list[float]) -> None:
    config = SynthIdTextConfig(ngram_len=3, depth=4, num_leaves=leaves)
    scores = np.linspace(-2, 2, 12)[None]
    nothing_yet = np.empty((1, 0), dtype=np.int64)
    law = np.exp(
        synthid_text.tilted_log_weights(nothing_yet, scores, None, words_for(config, *SYNTHID_KEYS), config)[0]
    )
    np.testing.assert_allclose(law / law.sum(), expected, atol=6e-11)


# ---------------------------------------------------------------- vllm-gumbel


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 by whole numbers, from the paper's definition."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ d ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_philox_against_its_published_answers() -> None:
    # Random123's known answers, for this file's own Philox; the compiled one is compared with it.
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    rng = np.random.default_rng(3)
    for width in (1, 3, 4, 5, 8, 9):
        context, key = rng.integers(0, 2**32, width, dtype=np.uint32), int(rng.integers(0, 2**63)) * 2 + 1
        state = [0x574D4358, width, 0, 0]
        for start in range(0, width, 4):
            block = [int(context[start + j]) if start + j < width else 2**32 - 1 - j for j in range(4)]
            lanes = [s ^ b for s, b in zip(state, block, strict=True)]
            state = philox(lanes, [(key & 0xFFFFFFFF) ^ start, key >> 32])
        for token in (0, 1, 2, 3, 50_257, 2**32 - 2):
            mixed = [(key & 0xFFFFFFFF) ^ state[3], (key >> 32) ^ 0x574D544B]
            expected = philox([token >> 2, *state[:3]], mixed)[token & 3]
            got = vllm_gumbel.raw_words(context[None], np.array([token], dtype=np.uint32), key)
            assert int(got[0]) == expected


def test_vllm_uniforms() -> None:
    contexts = np.array([[-1, -1, -1, -1], [-1, 17, 4, 99], [50256, 0, 3, 17]]).astype(np.uint32)
    expected = [
        [0.7236990928649902, 0.8503910899162292, 0.4728662669658661, 0.42400696873664856, 0.1491994708776474],
        [0.3820056617259979, 0.6482831835746765, 0.18698470294475555, 0.015011428855359554, 0.8656959533691406],
        [0.828883945941925, 0.9197983145713806, 0.4126763641834259, 0.8245397210121155, 0.24797098338603973],
    ]
    for context, row in zip(contexts, expected, strict=True):
        words = vllm_gumbel.raw_words(np.tile(context, (5, 1)), np.arange(5, dtype=np.uint32), VLLM_KEY)
        assert vllm_gumbel.uniforms(words).tolist() == row
    wide = np.tile(np.array([1, 2, 3, 4, 5], dtype=np.uint32), (5, 1))
    words = vllm_gumbel.raw_words(wide, np.array([0, 1, 2, 3, 100000], dtype=np.uint32), 2**64 - 1)
    row = [0.30494603514671326, 0.4273833930492401, 0.3243860900402069, 0.23402009904384613, 0.41970428824424744]
    assert vllm_gumbel.uniforms(words).tolist() == row


@pytest.mark.parametrize(
    ("key", "width", "n", "single", "dual"),
    [
        (VLLM_KEY, 1, 7, 14.803353312735819, 3.8303805743650363),
        (VLLM_KEY, 4, 14, 12.246395200624882, 18.340296893322154),
        (2**64 - 1, 1, 7, 6.236991433406347, 6.680213666645882),
        (2**64 - 1, 4, 14, 18.389346649449937, 26.64540971096882),
    ],
)
def test_vllm_scores(key: int, width: int, n: int, single: float, dual: float) -> None:
    one = VllmGumbelConfig(context_width=width)
    assert vllm_gumbel.official_scores(IDS, words_for(one, key), one) == (n, pytest.approx(single, rel=1e-12))
    two = VllmGumbelConfig(context_width=width, algorithm="dual_key_gumbel", alpha=0.1)
    assert vllm_gumbel.official_scores(IDS, words_for(two, key), two) == (n, pytest.approx(dual, rel=1e-12))


def test_vllm_subkeys_and_draws() -> None:
    two = VllmGumbelConfig(algorithm="dual_key_gumbel")
    assert vllm_gumbel.subkeys(words_for(two, VLLM_KEY), two) == (0x69A6C70A7E43D99E, 0xD554C11EB04C6C5C)
    logits = np.linspace(-2, 2, 12, dtype=np.float32)
    contexts = np.array([[-1, -1, -1, -1], [-1, 17, 4, 99], [50256, 0, 3, 17]]).astype(np.uint32)
    assert [vllm_gumbel.next_token(context, logits, VLLM_KEY) for context in contexts] == [11, 8, 10]
    one = VllmGumbelConfig()
    draw = sampler_of(one, words_for(one, VLLM_KEY), unmarked_key(b""))
    rows = np.array([[-1, -1, -1], [17, 4, 99]])
    assert draw(rows, np.stack([logits, logits]), None).tolist() == [11, 8]


# ---------------------------------------------------------------- sglang-gumbel


def test_sglang_words() -> None:
    def hash_of(context: list[int]) -> int:
        ids = np.array([*context, 0], dtype=np.uint32)
        return int(sglang_gumbel.context_hashes(ids, np.array([0, len(ids)]), 64)[-1])

    assert hash_of([0]) == 0x2362F9DE  # MurmurHash3_x86_32 of four zero bytes, as published
    assert [hash_of(c) for c in ([], [17], [17, 4, 99, 4], [50256, 0, 3, 17, 4])] == [
        0x0, 0xB8A6442F, 0xAE518686, 0xDA04DA71,
    ]  # fmt: skip
    config = SglangGumbelConfig()
    tokens = np.array([0, 1, 2, 50256], dtype=np.uint32)
    words = sglang_gumbel.raw_words(np.full(4, 0xAE518686, np.uint32), tokens, words_for(config, SGLANG_A), config)
    assert words.tolist() == [0xE37659BC, 0x225789EE, 0xE2799A23, 0x7C4AEC6A]


@pytest.mark.parametrize(
    ("prompt", "width", "n", "single", "dual"),
    [
        (0, 1, 6, 5.392863752479794, 9.903454057979886),
        (0, 4, 10, 13.220610259000415, 17.25080261604074),
        (2, 1, 6, 5.392863752479794, 9.903454057979886),
        (2, 4, 12, 15.264292760421622, 19.29448511746195),
        (6, 4, 9, 8.650551729457248, 12.05267251960349),
    ],
)
def test_sglang_scores(prompt: int, width: int, n: int, single: float, dual: float) -> None:
    one = SglangGumbelConfig(context_window=width)
    got = sglang_gumbel.official_score(IDS, words_for(one, SGLANG_A), one, prompt_length=prompt)
    assert got == (n, pytest.approx(single, rel=1e-12))
    two = SglangGumbelConfig(context_window=width, keys="dual", mixing_probability=0.3)
    got = sglang_gumbel.official_score(IDS, words_for(two, SGLANG_A, SGLANG_B), two, prompt_length=prompt)
    assert got == (n, pytest.approx(dual, rel=1e-12))


def test_sglang_reads_4096_contexts_at_most() -> None:
    config = SglangGumbelConfig()
    ids = np.random.default_rng(4).integers(0, 2**31, 9000).astype(np.uint32)
    offsets = np.array([0, 4200, 4210, 9000])
    positions, _ = sglang_gumbel.scan(ids, offsets, words_for(config, 5), config)
    assert np.diff(np.searchsorted(positions, offsets)).tolist() == [4096, 6, 4096]
    assert positions[4095] == 4 + 4095


# ---------------------------------------------------------------- writing, all of them

CONFIGS: list[Callable[[], ForeignConfig]] = [
    lambda: HfKgwConfig(vocab_size=60),
    lambda: HfKgwConfig(vocab_size=60, seeding_scheme="selfhash", context_width=3),
    HfSynthIdConfig,
    SynthIdTextConfig,
    VllmGumbelConfig,
    lambda: VllmGumbelConfig(algorithm="dual_key_gumbel"),
    SglangGumbelConfig,
    lambda: SglangGumbelConfig(keys="dual"),
]


@pytest.mark.parametrize("make", CONFIGS)
def test_a_draw_is_a_function_of_each_row(make: Callable[[], ForeignConfig]) -> None:
    config = make()
    key = SecretKey(bytes(range(32)), id="k", config=config)
    draw = sampler_of(config, use_key(key), unmarked_key(b"seed"))
    rng = np.random.default_rng(5)
    rows = [rng.integers(1, 5, n) for n in (0, 1, 3, 9, 30)]
    ids = np.stack([np.concatenate([np.zeros(30 - len(row), dtype=np.int64), row]) for row in rows])
    weights = rng.normal(size=(5, 60)).astype(np.float32)
    weights[:, 30:] = -np.inf
    before = weights.copy()
    together = draw(ids, weights, 0)
    assert (together < 30).all()
    np.testing.assert_array_equal(weights, before)
    for i, row in enumerate(rows):
        assert draw(row[None], weights[i : i + 1], None) == together[i]
    only = np.full((1, 60), -np.inf)
    only[0, 7] = -3.0
    assert draw(ids[:1], only, 0) == [7]
    for bad, message in ((np.nan, "nan"), (-np.inf, "only -inf")):
        with pytest.raises(ValueError, match=message):
            draw(ids[:1], np.full((1, 60), bad), 0)


LAWFUL = [make for make in CONFIGS if make().distortion_free and make is not HfSynthIdConfig]


# A small table: a new key makes the whole one anew.
@pytest.mark.parametrize("make", [*LAWFUL, lambda: HfSynthIdConfig(sampling_table_size=512, depth=20)])
def test_over_keys_the_token_has_the_law_of_the_model(make: Callable[[], ForeignConfig]) -> None:
    # 1,000 keys. Chi-square against p at level 1e-5 per scheme, fixed seed; the near-miss below is off by 20 %.
    config = make()
    law = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    counts = np.zeros(5)
    history = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    for number in range(1000):
        key = SecretKey(number.to_bytes(32, "big"), id="k", config=config)
        draw = sampler_of(config, use_key(key), unmarked_key(number.to_bytes(2, "big")))
        counts[draw(history, np.log(law)[None], None)[0]] += 1
    from scipy import stats

    assert stats.chisquare(counts, 1000 * law).pvalue > 1e-5
    mutant = np.array([0.4, 0.3, 0.15, 0.06, 0.09])
    assert stats.chisquare(counts, 1000 * mutant).pvalue < 1e-5


def test_equal_settings_derive_one_key() -> None:
    whole, real = HfKgwConfig(vocab_size=100, bias=2), HfKgwConfig(vocab_size=100, bias=2.0)
    assert whole == real
    keys = [use_key(SecretKey(bytes(32), id="k", config=config)).tolist() for config in (whole, real)]
    assert keys[0] == keys[1]
    other = SecretKey(bytes(32), id="k", config=HfKgwConfig(vocab_size=100, bias=2.5))
    assert use_key(other).tolist() != keys[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HfKgwConfig(vocab_size=1), "vocab_size must be an integer"),
        (lambda: HfKgwConfig(vocab_size=100, greenlist_ratio=1.0), "greenlist_ratio must be a number in"),
        (lambda: HfKgwConfig(vocab_size=3, greenlist_ratio=0.1), "at least one green token of 3"),
        (lambda: HfKgwConfig(vocab_size=100, bias=-1), "bias must be"),
        (lambda: HfKgwConfig(vocab_size=100, seeding_scheme="right"), "seeding_scheme must be"),  # type: ignore[arg-type]
        (lambda: HfKgwConfig(vocab_size=100, context_width=0), "context_width must be"),
        (lambda: HfSynthIdConfig(ngram_len=1), "ngram_len must be"),
        (lambda: HfSynthIdConfig(depth=65), "depth must be"),
        (lambda: HfSynthIdConfig(sampling_table_seed=-1), "sampling_table_seed must be"),
        (lambda: SynthIdTextConfig(num_leaves=1), "num_leaves must be"),
        (lambda: SynthIdTextConfig(skip_first_ngram_calls=1), "skip_first_ngram_calls must be"),  # type: ignore[arg-type]
        (lambda: VllmGumbelConfig(alpha=0.0), "alpha must be a number in"),
        (lambda: VllmGumbelConfig(algorithm="sbw"), "algorithm must be"),  # type: ignore[arg-type]
        (lambda: VllmGumbelConfig(context_width=True), "context_width must be"),
        (lambda: SglangGumbelConfig(keys="three"), "keys must be"),  # type: ignore[arg-type]
        (lambda: SglangGumbelConfig(mixing_probability=1.0), "mixing_probability must be"),
        (lambda: SglangGumbelConfig(context_window=65), "context_window must be"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- texts that transformers itself has written


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (HfKgwConfig(vocab_size=512, bias=4.0), {"bias": 4.0}),
        (
            HfKgwConfig(vocab_size=512, bias=4.0, seeding_scheme="selfhash", context_width=3),
            {"bias": 4.0, "seeding_scheme": "selfhash", "context_width": 3},
        ),
        (HfSynthIdConfig(depth=9), {}),
    ],
    ids=["lefthash", "selfhash", "synthid"],
)
def test_texts_of_generate_are_read_and_ours_are_read_there(
    tiny_model: Any, config: Any, settings: dict[str, Any]
) -> None:
    from transformers import SynthIDTextWatermarkingConfig

    from assay.detection import hf_kgw as kgw_tests
    from assay.detection import hf_synthid as synthid_tests

    integers = [15485863] if isinstance(config, HfKgwConfig) else [51_020, 3, 60_001, 17, 812, 4_242, 31_337, 99, 7]
    prf_key = words_for(config, *integers)
    official: Any = WatermarkingConfig(**settings)
    if isinstance(config, HfSynthIdConfig):
        official = SynthIDTextWatermarkingConfig(ngram_len=5, keys=integers)
    tests = kgw_tests if isinstance(config, HfKgwConfig) else synthid_tests
    prompt = torch.tensor([[5, 9, 33, 71]])
    torch.manual_seed(0)
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": 120, "attention_mask": torch.ones_like(prompt)}
    text = tiny_model.generate(prompt, watermarking_config=official, **arguments)[0].numpy().astype(np.uint32)
    assert tests.test_ids(text, 4, prf_key, config, test="auto", model=None).pvalue < 1e-6
    other = words_for(config, *[value + 1 for value in integers])
    assert tests.test_ids(text, 4, other, config, test="auto", model=None).pvalue > 1e-4
    if isinstance(config, HfSynthIdConfig):
        return
    # The other way round: Assay writes, transformers' detector reads.
    draw = sampler_of(config, prf_key, unmarked_key(b"there"))
    ids = prompt.numpy()
    for _ in range(120):
        scores = np.random.default_rng(ids.shape[1]).normal(0, 2, (1, 512))
        ids = np.concatenate([ids, draw(ids, scores, None)[:, None]], axis=1)
    found = detector(config, 15485863, distinct=True)(torch.from_numpy(ids[:, 4:]), return_dict=True)
    assert found.z_score[0] > 6
