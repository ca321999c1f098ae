"""The sequence watermark: exact intervals, known answers, the model's law, Type II = sum (rho - alpha)+, rounding."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.kernels import chacha
from assay.watermark import sequence, ump
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import SchemeConfig, sampler_of
from assay.watermark.sequence import (
    GRID,
    Interval,
    SequenceConfig,
    SequenceDecoder,
    cumulated,
    draw,
    nonce_words,
    reals,
)


def key_of(number=0, config=None):
    return SecretKey(bytes([number]) * 32, id="k", config=config or SequenceConfig())


def nonces(count, salt=0):
    return [salt.to_bytes(4, "little") + i.to_bytes(8, "little") for i in range(count)]


def test_known_answers():
    words = use_key(key_of())
    nonce = nonce_words(b"a nonce of sixteen bytes or more")
    assert nonce.tolist() == NONCE
    assert reals(words, nonce, [0, 1, 4_000_000_000]) == REALS
    # The same words from the reference cipher, assembled by hand.
    by_hand = chacha.expand(words, np.array([[*NONCE, 1]], dtype=np.uint32), 4)[0]
    assert REALS[1] == int.from_bytes(by_hand.astype("<u4").tobytes(), "little")


NONCE = [214786925, 2122638749, 2491605943, 750317611]
REALS = [
    23025837367799702901033717178842234225,
    277094045596701098964848661792824431810,
    238362746936170331162505770216610206384,
]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.integers(1, 60), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_tokens_divide_an_interval_exactly(weights, width, low):
    # Oracle: rational arithmetic, point by point.
    law = np.concatenate([[0], np.cumsum(weights)]).astype(np.int64)
    total = Fraction(int(law[-1]))
    whole = Interval(3, low, width)
    for point in range(low, low + width):
        token, rest = draw(whole, point, law)
        edges = [low + math.floor(width * Fraction(int(c)) / total) for c in law]
        (expected,) = [v for v in range(len(weights)) if edges[v] <= point < edges[v + 1]]
        assert token == expected
        assert (rest.start, rest.low, rest.low + rest.width) == (3, edges[token], edges[token + 1])
        assert weights[token] > 0


def test_cumulated_weights():
    law = cumulated(np.log([0.5, 0.25, 0.25]))
    assert law.tolist() == [0, 2**51, 2**51 + 2**50, 2**52]
    p = np.random.default_rng(0).dirichlet(np.full(3000, 0.1))
    with np.errstate(divide="ignore"):
        found = np.diff(cumulated(np.log(p) + 5.0))  # any normalisation
    np.testing.assert_allclose(found / 2**52, p, atol=2**-52)
    assert np.diff(cumulated(np.array([0.0, -np.inf, -1.0], dtype=np.float32)))[1] == 0
    for bad in ([np.nan, 0.0], [-np.inf, -np.inf], [np.inf, 0.0], []):
        with pytest.raises(ValueError, match="finite largest value"):
            cumulated(np.array(bad))


# --- a toy model whose texts can be enumerated ----------------------------------------------------------------------

TOKENS, LENGTH = 3, 4


def toy_law(prefix):
    """The law of the next of three tokens, different after every beginning."""
    rng = np.random.default_rng([*prefix, 99])
    return rng.dirichlet([0.6, 0.6, 0.6]) * 0.97 + 0.01


TEXTS = list(itertools.product(range(TOKENS), repeat=LENGTH))
LAWS = {prefix: toy_law(prefix) for n in range(LENGTH) for prefix in itertools.product(range(TOKENS), repeat=n)}
RHO = np.array([math.prod(LAWS[text[:t]][text[t]] for t in range(LENGTH)) for text in TEXTS])


def write(words, count, config, salt=0):
    """Texts of the toy model under so many nonces."""
    decoder = SequenceDecoder(words, nonces(count, salt), config)
    texts = [()] * count
    for _ in range(LENGTH):
        drawn = decoder(None, np.log([LAWS[text] for text in texts]))
        texts = [(*text, int(token)) for text, token in zip(texts, drawn, strict=True)]
    return texts


@pytest.mark.parametrize("bits", [0, 2, pytest.param(64, marks=pytest.mark.slow)])
def test_texts_have_the_law_of_the_model(bits):
    # 6,000 texts, false alarm 1e-6; the mutant moves 3 % of every token's law to its neighbour and must be seen.
    counts = np.bincount(
        [TEXTS.index(t) for t in write(use_key(key_of(bits)), 6000, SequenceConfig(block_bits=bits))],
        minlength=len(TEXTS),
    )

    def pvalue(rho):
        rare = rho * 6000 < 8
        expected = np.append(rho[~rare], rho[rare].sum()) * 6000
        return stats.chisquare(np.append(counts[~rare], counts[rare].sum()), expected).pvalue

    assert pvalue(RHO / RHO.sum()) > 1e-6
    moved = {prefix: 0.97 * law + 0.03 * np.roll(law, 1) for prefix, law in LAWS.items()}
    mutant = np.array([math.prod(moved[text[:t]][text[t]] for t in range(LENGTH)) for text in TEXTS])
    assert pvalue(mutant / mutant.sum()) < 1e-6


@pytest.mark.parametrize("bits", [0, 2, pytest.param(64, marks=pytest.mark.slow)])
def test_type2_error_is_that_of_the_most_powerful_watermark(bits):
    from assay.detection.sequence import evidence

    words, config, size = use_key(key_of(10 + bits)), SequenceConfig(block_bits=bits), 2500
    log_p = np.empty(size)
    keyed = np.repeat([nonce_words(nonce) for nonce in nonces(size)], LENGTH + 1, axis=0)
    points = np.reshape(reals(words, keyed, np.tile(np.arange(LENGTH + 1), size)), (size, LENGTH + 1)).tolist()
    for i, text in enumerate(write(words, size, config)):
        rows = np.log([LAWS[text[:t]] for t in range(LENGTH)])
        found = evidence(np.array(text), [(0, rows)], points[i], config)
        assert found.n_inside == LENGTH
        log_p[i] = found.log_pvalue[-1]
    for alpha in (0.1, 0.05, 0.02):
        missed = np.mean(log_p > math.log(alpha))
        expected = ump.type2_error(RHO, alpha)
        band = 4 * math.sqrt(expected * (1 - expected) / size)  # false alarm below 1e-4 a level
        assert abs(missed - expected) < band
        # Mutants: the race over texts, and the interval's length as p-value (Type II = P(rho > alpha)).
        assert abs(missed - ump.race_type2_error(RHO, alpha)) > band
        assert abs(missed - RHO[alpha < RHO].sum()) > band


def test_rho_is_a_law():
    assert RHO.sum() == pytest.approx(1.0)
    assert len({round(rho, 12) for rho in RHO}) == len(TEXTS)


# --- settings and refusals ------------------------------------------------------------------------------------------


def test_settings():
    assert SequenceConfig().limit == GRID >> 4
    assert SequenceConfig(block_bits=0).limit == GRID
    for bad in (-1, 65, 1.5, True):
        with pytest.raises(ValueError, match="block_bits must be an integer in"):
            SequenceConfig(block_bits=bad)
    assert isinstance(SequenceConfig(), SchemeConfig)
    with pytest.raises(ValueError, match="does not draw token by token"):
        sampler_of(SequenceConfig(), use_key(key_of()), use_key(key_of()))


def test_the_decoder_shows_nothing_secret():
    decoder = SequenceDecoder(use_key(key_of()), nonces(2), SequenceConfig())
    assert repr(decoder) == "SequenceDecoder(2 texts, 0 tokens drawn)"


@pytest.mark.parametrize("bad", [b"short", "a string of text", None])
def test_a_nonce_is_eight_bytes_or_more(bad):
    with pytest.raises(ValueError, match="nonce must be at least 8 bytes"):
        nonce_words(bad)


def test_a_key_of_another_scheme_is_refused():
    with pytest.raises(ValueError, match="key must be for scheme 'sequence', got 'gumbel/1'"):
        sequence.config_of(SecretKey(bytes(32), id="k", config=GumbelConfig()))
    with pytest.raises(ValueError, match="got str"):
        sequence.config_of("key")
