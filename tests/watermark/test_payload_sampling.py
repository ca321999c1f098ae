"""The multi-bit sampler: its code, law over keys for several payloads, known answers, refusals.

False-alarm rate of the chi-square checks: 1e-6, seeds fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from assay.watermark import payload
from assay.watermark.gumbel import token_ids
from assay.watermark.payload import PayloadConfig, observe, registers, sampler, symbol_keys

FALSE_ALARM = 1e-6
LAW = np.array([0.35, 0.3, 0.2, 0.1, 0.05])


def words(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 2**32, 8, dtype=np.uint32)


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 9, 16, 32])
def test_registers_are_consecutive_bits_around_a_ring(bits: int) -> None:
    config = PayloadConfig(bits=bits)
    rng = np.random.default_rng(bits)
    for value in rng.integers(0, 1 << bits, 20):
        code = registers(int(value), config)
        for j, register in enumerate(code):
            shown = [int(value) >> ((j - d) % bits) & 1 for d in range(config.memory)]
            assert register == sum(bit << d for d, bit in enumerate(shown))
        # One flipped bit changes `memory` registers: the distance of the code.
        for i in range(bits):
            assert np.sum(registers(int(value) ^ (1 << i), config) != code) == config.memory


def counts(value: int, rows: int, *, key: int, unmarked: int) -> np.ndarray:
    draw = sampler(words(key), PayloadConfig(bits=12, window=2), words(unmarked), value)
    contexts = np.stack([np.arange(rows), 7 + np.arange(rows) % 5], axis=1).astype(np.int64)
    tokens = draw(contexts, np.broadcast_to(np.log(LAW), (rows, len(LAW))), None)
    return np.bincount(tokens, minlength=len(LAW))


@pytest.mark.parametrize("value", [0, 0b101100111010, 4095])
def test_every_payload_keeps_the_law(value: int) -> None:
    found = sum(counts(value, 400, key=key, unmarked=100 + key) for key in range(10))
    assert stats.chisquare(found, 4000 * LAW).pvalue > FALSE_ALARM


def test_a_symbol_that_tilts_the_law_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    # Near-miss: all contexts of a text share the symbol's noise, so one text's tokens are alike under one key.
    monkeypatch.setattr(payload.gumbel, "marked_context", lambda history, window: np.zeros(window, dtype=np.uint32))
    found = sum(counts(5, 400, key=key, unmarked=100 + key) for key in range(10))
    assert stats.chisquare(found, 4000 * LAW).pvalue < FALSE_ALARM


def test_payloads_give_different_texts_and_unmarked_rows_do_not() -> None:
    config = PayloadConfig(bits=16)
    law = np.broadcast_to(np.log(np.full(500, 1 / 500)), (64, 500))
    ids = np.arange(64 * 4).reshape(64, 4).astype(np.int64)
    first, second = (sampler(words(1), config, words(2), value)(ids, law, None) for value in (1, 0xFFFE))
    assert np.mean(first == second) < 0.1
    short = ids[:, :3]
    first, second = (sampler(words(1), config, words(2), value)(short, law, None) for value in (1, 0xFFFE))
    np.testing.assert_array_equal(first, second)


def test_known_answers() -> None:
    key, config = np.arange(8, dtype=np.uint32), PayloadConfig(bits=32)
    assert [hex(int(symbol_keys(key, config)[s, 0])) for s in (0, 1, 255)] == VECTORS["symbol keys"]
    for backend in ("numpy", "numba"):
        found = observe(token_ids(np.arange(100, 108)), key, config, prompt_length=1, backend=backend)
        assert found.positions.tolist() == [3, 4, 5, 6]
        assert found.steps.tolist() == VECTORS["steps"]
        assert [hex(int(word)) for word in found.words[:, 37]] == VECTORS["words of symbol 37"]
    assert registers(0xDEADBEEF, config)[:4].tolist() == [0b11110111, 0b11101111, 0b11011111, 0b10111111]


@pytest.mark.parametrize("bits", [0, 33, 1.5, True, "8"])
def test_bad_bits(bits: object) -> None:
    with pytest.raises(ValueError, match=r"bits must be an integer in \[1, 32\]"):
        PayloadConfig(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 256, 1.0, True, "7"])
def test_bad_payload(value: object) -> None:
    with pytest.raises(ValueError, match=r"payload must be an integer in \[0, 2\*\*8\)"):
        sampler(words(1), PayloadConfig(bits=8), words(2), value)  # type: ignore[arg-type]


VECTORS = {
    "symbol keys": ["0x565fb570", "0xdb245d72", "0x7df6e1e5"],
    "steps": [7, 25, 0, 4],
    "words of symbol 37": ["0xd079531d", "0x67ff924c", "0xeea841d5", "0xd4729204"],
}
