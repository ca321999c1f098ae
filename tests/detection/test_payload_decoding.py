"""Payloads: recovery against length and edits, family-wise error on unmarked and otherwise marked text, wrong keys."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import stats

from assay.detection.payload import PayloadResult, decode, decode_pivots
from assay.detection.payload_gumbel import (
    documents_test,
    model_aware_test,
    robust_test,
    sum_test,
    tables,
    test_ids,
    token_log_tails,
)
from assay.detection.tails import log_gamma_sf
from assay.watermark.edits import edit
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.payload import PayloadConfig, observe, registers, sampler

V = 200
PAYLOAD = 0xDEADBEEF


def make_key(number: int, bits: int = 32) -> SecretKey:
    secret = hashlib.sha256(f"payload {number}".encode()).digest()
    return SecretKey(secret, id=f"payload-{number}", config=PayloadConfig(bits=bits))


@cache
def marked(bits: int, n: int, rows: int, payload: int = PAYLOAD) -> tuple[np.ndarray, np.ndarray]:
    """Texts of n tokens of about 2 nats under key 0, after prompts of four tokens, and their log-probabilities."""
    rng = np.random.default_rng(bits)
    key = make_key(0, bits)
    unmarked = rng.integers(0, 2**32, 8, dtype=np.uint32)
    draw = sampler(use_key(key), key.config, unmarked, payload % (1 << bits))  # type: ignore[arg-type]
    ids, log_p = rng.integers(0, V, (rows, 4)), np.zeros((rows, n))
    for t in range(n):
        law = np.log(np.maximum(rng.dirichlet(np.full(V, 0.02), rows), 1e-300))
        token = draw(ids, law, None)
        log_p[:, t] = law[np.arange(rows), token]
        ids = np.concatenate([ids, token[:, None]], axis=1)
    return ids.astype(np.uint32), log_p


def decoded(ids: np.ndarray, key: SecretKey) -> PayloadResult:
    return decode(ids[4:], key, prompt=ids[:4])


@pytest.mark.parametrize(("bits", "n", "least"), [(8, 25, 20), (32, 50, 12), (32, 100, 20)])
def test_recovery_against_length(bits: int, n: int, least: int) -> None:
    # Of 20 texts. Measured: 8 bits are right from 25 tokens on; 32 bits in 0.85 of texts of 50 and in all of 100.
    ids, _ = marked(bits, 150, 20)
    results = [decoded(row[: 4 + n], make_key(0, bits)) for row in ids]
    assert sum(result.payload == PAYLOAD % (1 << bits) for result in results) >= least


@pytest.mark.parametrize(
    ("kind", "rate", "n"),
    [("substitute", 0.1, 250)]
    + [
        pytest.param(kind, rate, n, marks=pytest.mark.slow)
        for rate, n in ((0.1, 250), (0.2, 500))
        for kind in ("substitute", "delete", "insert")
    ],
)
def test_payloads_survive_edits(kind: str, rate: float, n: int) -> None:
    # All of 12 texts. An edit spoils up to five pivots: at 20 % a third of them still speak.
    ids, _ = marked(32, 500, 12)
    rng = np.random.default_rng(1)
    key = make_key(0)
    found = [decode(edit(row[4 : 4 + n], kind, rate, V, rng), key) for row in ids]  # type: ignore[arg-type]
    assert sum(result.payload == PAYLOAD for result in found) == 12
    assert np.median([result.marked.log_pvalue for result in found]) < math.log(1e-6)


def test_long_texts_name_their_payload_beyond_doubt() -> None:
    ids, _ = marked(32, 500, 12)
    for row in ids:
        result = decoded(row, make_key(0))
        assert result.payload == PAYLOAD
        assert result.payload_pvalue < 1e-6
        assert result.log_bit_pvalues.max() < math.log(1e-6)
        assert result.marked.pvalue < 1e-60
        assert result.tokens_per_step.sum() == result.marked.n_scored


def test_edits_cost_more_without_the_code() -> None:
    # Near-miss: each step decided alone, the register's best symbol, gets steps wrong that the trellis gets right.
    ids, _ = marked(32, 500, 12)
    rng = np.random.default_rng(1)
    key, wrong = make_key(0), 0
    code = registers(PAYLOAD, key.config)  # type: ignore[arg-type]
    for row in ids:
        found = observe(edit(row[4:], "substitute", 0.2, V, rng), use_key(key), key.config)  # type: ignore[arg-type]
        scores, _ = tables(found.steps, found.words, key.config)  # type: ignore[arg-type]
        wrong += int(np.sum(scores.argmax(axis=1) != code))
        assert decode_pivots(found, key.config).payload == PAYLOAD  # type: ignore[arg-type]
    assert wrong > 12


def null_pvalues(ids: np.ndarray, keys: int, bits: int) -> dict[str, np.ndarray]:
    """p-values of one unmarked text under many keys."""
    rows = []
    log_p = np.log(np.random.default_rng(2).uniform(0.01, 1, len(ids)))
    for number in range(1, keys + 1):
        key = make_key(number, bits)
        found = observe(ids, use_key(key), key.config)  # type: ignore[arg-type]
        result = decode_pivots(found, key.config)  # type: ignore[arg-type]
        aware = model_aware_test(found, key.config, log_p[found.positions])  # type: ignore[arg-type]
        robust = robust_test(found, key.config, log_p[found.positions])  # type: ignore[arg-type]
        rows.append(
            (
                result.marked.log_pvalue,
                result.log_payload_pvalue,
                result.log_bit_pvalues.min(),
                aware.log_pvalue,
                -result.marked.log_evalue,
                -aware.log_evalue,
                -robust.log_evalue,
                _single(found, key.config),
            )
        )
    names = ("marked", "payload", "bits", "aware", "e", "aware e", "robust e", "uncorrected")
    return dict(zip(names, np.array(rows).T, strict=True))


def _single(found: object, config: object) -> float:
    """The tail of the best payload's sum as if it had been the only one."""
    result = sum_test(found, config)  # type: ignore[arg-type]
    return float(log_gamma_sf(np.array([result.n_scored]), np.array([result.statistic]))[0])


def check_family_wise(found: dict[str, np.ndarray], keys: int) -> None:
    """Sizes at 0.05 and 0.01 within the binomial's 1 - 1e-6 quantile; the uncorrected minimum is far outside."""
    for name, log_p in found.items():
        for level in (0.05, 0.01):
            rejected = int(np.sum(log_p <= math.log(level)))
            bound = stats.binom.ppf(1 - 1e-6, keys, level)
            assert rejected <= bound or name == "uncorrected", (name, level, rejected)
            assert rejected > bound or name != "uncorrected" or level < 0.05, rejected


@pytest.mark.parametrize(("bits", "keys"), [(4, 100)])
def test_family_wise_error_on_unmarked_text(bits: int, keys: int, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    # A repetitive text; 18 rejections at 0.05 would be too many. The near-miss rejects every second key.
    check_family_wise(null_pvalues(np.tile(zipf_ids(40, 1), 3), keys, bits), keys)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 12, 32])
def test_family_wise_error_at_length(bits: int, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    check_family_wise(null_pvalues(np.tile(zipf_ids(60, 1), 3), 400, bits), 400)


@pytest.mark.slow
def test_the_bound_is_sharp_where_there_are_few_payloads(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    # Two payloads: P(min p <= a) is 2 a - a^2, so the corrected p-value must not be far from uniform below 0.2.
    p = np.exp(null_pvalues(zipf_ids(40, 1), 400, 1)["marked"])
    assert stats.binom.ppf(1e-6, 400, 0.19) <= np.sum(p <= 0.2) <= stats.binom.ppf(1 - 1e-6, 400, 0.2)


@pytest.mark.slow
def test_no_wrong_payload_is_named_with_confidence() -> None:
    # Short marked texts, of which many are decoded wrongly: a wrong name at level 0.05 must be rare.
    wrong = confident = naive = 0
    for payload in range(10):
        ids, _ = marked(32, 60, 20, PAYLOAD * (payload + 1))
        for row in ids:
            result = decoded(row[:40], make_key(0))
            if result.payload != PAYLOAD * (payload + 1) % (1 << 32):
                wrong += 1
                confident += result.payload_pvalue <= 0.05
                naive += result.marked.pvalue <= 0.05
    assert wrong > 40
    assert confident <= stats.binom.ppf(1 - 1e-6, 200, 0.05)
    # Near-miss: "the text is marked, so the decoded payload is right". It would name wrong users beyond the band.
    assert naive > stats.binom.ppf(1 - 1e-6, 200, 0.05)


def test_words_of_other_registers_are_uniform_in_marked_text() -> None:
    # What the payload's p-value rests on, pivot by pivot: 6,000 words of a symbol that is not the payload's own.
    ids, _ = marked(32, 500, 12)
    key = make_key(0)
    code = registers(PAYLOAD, key.config)  # type: ignore[arg-type]
    own, other = [], []
    for row in ids:
        found = observe(row, use_key(key), key.config, prompt_length=4)  # type: ignore[arg-type]
        rows = np.arange(len(found.positions))
        own.append(found.words[rows, code[found.steps]])
        other.append(found.words[rows, code[found.steps] ^ 1])
    assert stats.kstest(np.concatenate(other) / 2**32, "uniform").pvalue > 1e-6
    assert stats.kstest(np.concatenate(own) / 2**32, "uniform").pvalue < 1e-100


def test_a_wrong_key_sees_nothing() -> None:
    ids, _ = marked(32, 500, 12)
    for number, row in enumerate(ids):
        result = decoded(row, make_key(number + 50))
        assert result.marked.pvalue > 1e-3
        assert result.payload_pvalue == 1.0


def test_the_model_helps() -> None:
    ids, log_p = marked(32, 150, 20)
    config, prf_key = PayloadConfig(bits=32), use_key(make_key(0))
    gains = []
    for row, known in zip(ids[:8, :64], log_p, strict=False):
        found = observe(row, prf_key, config, prompt_length=4)
        plain = sum_test(found, config)
        assert model_aware_test(found, config, known[found.positions]).log_pvalue < plain.log_pvalue
        gains.append(robust_test(found, config, known[found.positions]).log_evalue - plain.log_evalue)
    assert np.median(gains) > 5


def test_e_values_have_mean_one() -> None:
    # One token, two payloads of one bit: the mean over a grid of both words; exact for the bounded e-values.
    from assay.watermark.payload import PayloadPivots

    config, total = PayloadConfig(bits=1), np.zeros(2)
    grid = ((np.arange(20) + 0.5) / 20 * 2.0**32).astype(np.uint32)
    for a in grid:
        for b in grid:
            pivots = PayloadPivots(np.array([0]), np.array([0]), np.array([[a, b]]), 1, 0)
            log_p = np.array([math.log(0.6)])
            total += model_aware_test(pivots, config, log_p).evalue, robust_test(pivots, config, log_p).evalue
    np.testing.assert_allclose(total / 400, 1.0, atol=5e-3)


def test_batch_equals_single_bit_for_bit(zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    key = make_key(3, 12)
    lengths = [0, 1, 4, 5, 17, 300, 3]
    documents = [zipf_ids(n, n) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    batch = documents_test(np.concatenate(documents), offsets, use_key(key), key.config)  # type: ignore[arg-type]
    for i, document in enumerate(documents):
        single = test_ids(document, 0, use_key(key), key.config, test="auto", model=None)  # type: ignore[arg-type]
        for name in ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped"):
            assert getattr(batch, name)[i] == getattr(single, name), name


def test_results_speak() -> None:
    ids, _ = marked(32, 500, 12)
    key = make_key(0)
    result = decoded(ids[0], key)
    assert f"payload {PAYLOAD} would be named for a text that does not carry it with probability" in result.sentence()
    assert repr(result).startswith(f"PayloadResult(payload={PAYLOAD}, bits=32, marked_pvalue=")
    assert result.to_dict()["payload"] == PAYLOAD
    tails = token_log_tails(ids[0], use_key(key), key.config)  # type: ignore[arg-type]
    assert np.nanmean(tails) < -1.3  # -1 without a mark
    nothing = decode([1, 2, 3], key)
    assert nothing.marked.pvalue == nothing.payload_pvalue == 1.0
    assert "Nothing could be tested" in nothing.sentence()


def test_keys_of_other_schemes_are_refused() -> None:
    other = SecretKey(bytes(32), id="other", config=GumbelConfig())
    with pytest.raises(ValueError, match="must be for scheme 'payload-gumbel', got 'gumbel/1'"):
        decode([1, 2, 3], other)
    with pytest.raises(ValueError, match="got 'str'"):
        decode([1, 2, 3], "key")  # type: ignore[arg-type]
