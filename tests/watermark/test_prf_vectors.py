"""Known answers of the PRF. A change here is a change of every mark that was ever made: it needs a new scheme version.

Oracles: RFC 8439, draft-irtf-cfrg-xchacha-03, OpenSSL's ChaCha20 through `cryptography`, hashlib, exact rationals.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.kernels import chacha, chacha_numba, prf
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey, _encoded, use_key
from assay.watermark.schemes import SchemeConfig

BACKENDS = [pytest.param(chacha, id="numpy"), pytest.param(chacha_numba, id="numba")]
COUNTING = np.frombuffer(bytes(range(32)), dtype="<u4").astype(np.uint32)
PAD = 0xFFFFFFFF


def words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<u4").astype(np.uint32)


def openssl_keystream(key: bytes, nonce16: bytes, skip: int, length: int) -> bytes:
    """Bytes skip .. skip + length of a ChaCha20 keystream; skip is reached through the block counter."""
    counter = int.from_bytes(nonce16[:4], "little") + skip // 64
    nonce = counter.to_bytes(4, "little") + nonce16[4:]
    encryptor = Cipher(algorithms.ChaCha20(key, nonce), None).encryptor()
    return encryptor.update(bytes(skip % 64 + length))[skip % 64 :]


def openssl_hchacha20(key: bytes, nonce16: bytes) -> bytes:
    """HChaCha20 from a ChaCha20 block: the block adds the initial state at the end, HChaCha20 does not."""
    block = words(openssl_keystream(key, nonce16, 0, 64))
    constants = words(b"expand 32-byte k")
    first, last = block[:4] - constants, block[12:] - words(nonce16)
    return first.astype("<u4").tobytes() + last.astype("<u4").tobytes()


def openssl_subkey(key: bytes, context: list[int]) -> bytes:
    """The cascade, written from its definition: groups of four tokens, oldest first, the last one padded in front."""
    groups = [context[i : i + 4] for i in range(0, len(context), 4)] or [[]]
    for group in groups:
        padded = [PAD] * (4 - len(group)) + group
        key = openssl_hchacha20(key, b"".join(word.to_bytes(4, "little") for word in padded))
    return key


def test_rfc_8439_block() -> None:
    # Section 2.3.2.
    block = chacha.chacha20_blocks(COUNTING, np.array([1], np.uint32), (0x09000000, 0x4A000000, 0))
    expected = """e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3
                  466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"""
    assert [f"{word:08x}" for word in block[0]] == expected.split()


SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: "
    b"If I could offer you only one tip for the future, sunscreen would be it."
)
SUNSCREEN_ENCRYPTED = bytes.fromhex(
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b3571639d624e65152ab"
    "8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42"
    "874d"
)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_rfc_8439_encryption(backend: str) -> None:
    # Section 2.4.2: block counters 1 and 2, nonce 000000000000004a00000000.
    if backend == "numpy":
        stream = chacha.chacha20_blocks(COUNTING, np.arange(3, dtype=np.uint32), (0, 0x4A000000, 0))
    else:
        stream = np.empty((1, 48), np.uint32)
        chacha_numba._expand(COUNTING[None], 48, np.uint32(0x4A000000), np.uint32(0), stream)
    blocks = stream.reshape(-1)[16:].astype("<u4").tobytes()
    assert bytes(a ^ b for a, b in zip(SUNSCREEN, blocks, strict=False)) == SUNSCREEN_ENCRYPTED


@pytest.mark.parametrize("backend", BACKENDS)
def test_hchacha20_vector(backend) -> None:  # type: ignore[no-untyped-def]
    # draft-irtf-cfrg-xchacha-03, section 2.2.1; a context of four tokens is one HChaCha20 input.
    nonce = words(bytes.fromhex("000000090000004a0000000031415927"))
    subkey = backend.subkeys(COUNTING, nonce[None])[0].astype("<u4").tobytes()
    assert subkey.hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    assert subkey == openssl_hchacha20(bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927"))


SCHEME_IDS = np.array([0, 1, 15, 16, 50256, 128255], np.uint32)
SCHEME_VECTORS = [
    ([1, 2, 3, 4], 0, 0, "adf9f64b 499805c3 6e2b5218 fe04786b 5ec78df5 71cf05ec"),
    ([128255], 0x01000005, 7, "1e8874c3 26912187 d1a2e65b becbbdbf 88698b4c 21eefd67"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("context", "stream", "aux", "expected"), SCHEME_VECTORS)
def test_scheme_vectors(backend, context, stream, aux, expected) -> None:  # type: ignore[no-untyped-def]
    contexts = np.tile(np.array(context, np.uint32), (len(SCHEME_IDS), 1))
    single = backend.words_at(COUNTING, contexts, SCHEME_IDS, stream, aux)
    assert [f"{word:08x}" for word in single] == expected.split()
    full = backend.expand(COUNTING, contexts[:1], 128256, stream, aux)[0]
    np.testing.assert_array_equal(full[SCHEME_IDS], single)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", range(10))
def test_words_are_openssl_keystream(backend, width) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(20260 + width)
    key = rng.bytes(32)
    contexts = rng.integers(0, PAD, (24, width), dtype=np.uint32)
    ids = rng.integers(0, 1 << 32, 24, dtype=np.uint32)
    ids[:4] = (0, 15, 16, PAD)
    stream, aux = (int(word) for word in rng.integers(0, 1 << 32, 2, dtype=np.uint32))
    got = backend.words_at(words(key), contexts, ids, stream, aux)
    for context, id, word in zip(contexts.tolist(), ids.tolist(), got.tolist(), strict=True):
        nonce = bytes(8) + stream.to_bytes(4, "little") + aux.to_bytes(4, "little")
        keystream = openssl_keystream(openssl_subkey(key, context), nonce, 4 * id, 4)
        assert word == int.from_bytes(keystream, "little")


def test_padding_goes_before_the_tokens() -> None:
    # The near-miss that must not pass: padding behind them, which gives another subkey.
    context = np.array([[7, 8, 9]], np.uint32)
    behind = np.array([[7, 8, 9, PAD]], np.uint32)
    before = np.array([[PAD, 7, 8, 9]], np.uint32)
    np.testing.assert_array_equal(chacha.subkeys(COUNTING, context), chacha.subkeys(COUNTING, before))
    assert (chacha.subkeys(COUNTING, context) != chacha.subkeys(COUNTING, behind)).any()


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("width", [0, 1, 4, 5, 9])
def test_numpy_equals_numba(rows: int, width: int) -> None:
    rng = np.random.default_rng(1000 * rows + width)
    key = words(rng.bytes(32))
    contexts = rng.integers(0, PAD, (rows, width), dtype=np.uint32)
    ids = rng.integers(0, 1 << 32, rows, dtype=np.uint32)
    for backend in ("numpy", "numba"):
        got = prf.words_at(key, contexts, ids, stream=3, aux=9, backend=backend)
        assert got.shape == (rows,)
        assert got.dtype == np.uint32
    np.testing.assert_array_equal(chacha.subkeys(key, contexts), chacha_numba.subkeys(key, contexts))
    np.testing.assert_array_equal(
        chacha.words_at(key, contexts, ids, 3, 9), chacha_numba.words_at(key, contexts, ids, 3, 9)
    )
    # 256 words are one pass of the numba kernel; 257 need a second.
    for vocabulary in (0, 1, 15, 16, 17, 33, 256, 257):
        np.testing.assert_array_equal(
            chacha.expand(key, contexts, vocabulary, 3, 9), chacha_numba.expand(key, contexts, vocabulary, 3, 9)
        )


def test_few_words_wait_for_no_compiler_and_use_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(chacha_numba, "words_at", lambda *given: calls.append(1) or chacha.words_at(*given))
    contexts, ids = np.array([[1, 2]], np.uint32), np.array([3], np.uint32)
    expected = chacha.words_at(COUNTING, contexts, ids)
    assert prf.words_at(COUNTING, contexts, ids) == expected
    assert len(calls) == 1
    monkeypatch.delitem(sys.modules, chacha_numba.__name__)
    assert prf.words_at(COUNTING, contexts, ids) == expected
    assert len(calls) == 1


def test_numpy_tiles_join() -> None:
    # 4096 rows are one tile of the numpy kernel.
    rng = np.random.default_rng(7)
    contexts = rng.integers(0, PAD, (4099, 2), dtype=np.uint32)
    ids = rng.integers(0, 1 << 32, 4099, dtype=np.uint32)
    np.testing.assert_array_equal(
        chacha.words_at(COUNTING, contexts, ids), chacha_numba.words_at(COUNTING, contexts, ids)
    )


def test_views_and_strides_do_not_matter() -> None:
    # Detection passes sliding windows, which overlap in memory.
    ids = np.arange(100, 160, dtype=np.uint32)
    windows = np.lib.stride_tricks.sliding_window_view(ids, 5)[::3]
    candidates = ids[::-1][: len(windows)]
    expected = chacha.words_at(COUNTING, np.ascontiguousarray(windows), candidates.copy())
    np.testing.assert_array_equal(chacha.words_at(COUNTING, windows, candidates), expected)
    np.testing.assert_array_equal(chacha_numba.words_at(COUNTING, windows, candidates), expected)


# ---------------------------------------------------------------- words to race times


def nearest_float32(x: Fraction) -> Fraction:
    """IEEE round-to-nearest-even to 24 significant bits, in exact arithmetic; for x = 0 or in [2**-40, 2**33]."""
    if x == 0:
        return x
    exponent = 0
    while x >= 1 << 24:
        x, exponent = x / 2, exponent + 1
    while x < 1 << 23:
        x, exponent = x * 2, exponent - 1
    return Fraction(round(x)) * Fraction(2) ** exponent  # round() of a Fraction is to even


EDGE_WORDS = [0, 1, 2, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1]


def test_race_times_against_exact_arithmetic() -> None:
    rng = np.random.default_rng(5)
    sample = EDGE_WORDS + rng.integers(0, 1 << 32, 500, dtype=np.uint32).tolist()
    times = prf.race_times(np.array(sample, np.uint32))
    for word, time in zip(sample, times.tolist(), strict=True):
        r = nearest_float32(nearest_float32(Fraction(word)) + Fraction(1, 2)) / 2**32
        r = min(r, 1 - Fraction(1, 2**24))
        assert 0 < r < 1
        with mpmath.workdps(40):
            exact = -mpmath.log1p(-mpmath.mpf(r.numerator) / r.denominator)
            assert abs(time / exact - 1) < 4e-16, word


def test_race_times_are_strictly_inside() -> None:
    times = prf.race_times(np.array(EDGE_WORDS, np.uint32))
    assert times[0] == pytest.approx(2.0**-33, rel=1e-9)
    assert times[-1] == pytest.approx(24 * np.log(2), rel=1e-15)
    assert np.isfinite(times).all()
    assert (times > 0).all()
    assert (np.diff(times) >= 0).all()
    # The near-miss that must not pass: the 24-bit map rounds its top word to exactly 1, whose race time is infinite.
    top = (np.float32(2**24 - 1) + np.float32(0.5)) * np.float32(2.0**-24)
    assert top == 1


# ---------------------------------------------------------------- the use-key


def key_of(config: SchemeConfig, id: str = "audit-2026", secret: bytes = bytes(range(32))) -> SecretKey:
    return SecretKey(secret, id=id, config=config)


# As `openssl mac -macopt hexkey:0001..1f -macopt custom:assay-prf-v1 -macopt size:32 BLAKE2BMAC` prints them.
USE_KEYS = [
    (4, "audit-2026", "54001a7668fc48a7c596da52301a6cb1e0a6beb526521248e3e21f00b899d4e5"),
    (1, "audit-2026", "b0ec1ff64f03ed84066a74009fa36baec3f8b824e2e0ef2c90148aa08ace9d1e"),
    (4, "k", "93579683b6456e9ff5667fbae2cc2613e9453d155dd90ae39542781b23832285"),
]


@pytest.mark.parametrize(("window", "id", "pinned"), USE_KEYS)
def test_use_key_vectors(window: int, id: str, pinned: str) -> None:
    canonical = b'{"window":%d}' % window
    data = (
        b"\x08\0\0\0gumbel/1" + bytes([len(canonical), 0, 0, 0]) + canonical + bytes([len(id), 0, 0, 0]) + id.encode()
    )
    expected = hashlib.blake2b(data, digest_size=32, key=bytes(range(32)), person=b"assay-prf-v1").hexdigest()
    got = use_key(key_of(GumbelConfig(window=window), id))
    assert got.dtype == np.uint32
    assert got.astype("<u4").tobytes().hex() == expected
    assert expected == pinned


@dataclass(frozen=True, kw_only=True)
class OtherConfig(SchemeConfig):
    scheme: ClassVar[str] = "other"
    version: ClassVar[int] = 1

    window: int = 4


@dataclass(frozen=True, kw_only=True)
class OtherConfigV2(OtherConfig):
    version: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class ShiftedConfig(SchemeConfig):
    scheme: ClassVar[str] = "othe"
    version: ClassVar[int] = 1

    window: int = 4


def test_no_two_uses_share_a_key() -> None:
    configs = [c(window=w) for c in (GumbelConfig, OtherConfig, OtherConfigV2, ShiftedConfig) for w in (1, 4, 44)]
    keys = [
        key_of(config, id, secret) for config in configs for id in ("a", "a1", "1") for secret in (b"s" * 32, b"t" * 32)
    ]
    derived = {use_key(key).tobytes() for key in keys}
    assert len(derived) == len(keys) == 72


def test_words_of_two_uses_are_unrelated() -> None:
    # Word for word the same context under two widths or ids; 1000 pairs agree by chance with probability 2e-7.
    contexts = np.arange(4000, dtype=np.uint32).reshape(1000, 4)
    candidates = np.arange(1000, dtype=np.uint32)
    rows = [
        prf.words_at(use_key(key), contexts, candidates)
        for key in (key_of(GumbelConfig()), key_of(GumbelConfig(window=5)), key_of(GumbelConfig(), "b"))
    ]
    for one, other in itertools.combinations(rows, 2):
        assert not (one == other).any()


FIELDS = st.tuples(
    *[st.binary(max_size=6) | st.sampled_from([b"", b"\0", b"\1\0\0\0", b"\1\0\0\0a", b"a\0\0\0\0"])] * 3
)


@settings(max_examples=400, deadline=None)
@given(FIELDS, FIELDS)
def test_field_encoding_is_prefix_free(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> None:
    assert _encoded(*one).startswith(_encoded(*other)) == (one == other)


def test_bare_concatenation_would_collide() -> None:
    # The near-miss: without lengths these two lists of fields are the same bytes.
    one, other = (b"gumbel/1", b"", b"a"), (b"gumbel/", b"1", b"a")
    assert b"".join(one) == b"".join(other)
    assert _encoded(*one) != _encoded(*other)
