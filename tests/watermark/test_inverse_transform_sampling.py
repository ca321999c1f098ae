"""The inverse-transform sampler against its plain definition, its law over keys, known answers.

False-alarm rate of the chi-square checks: 1e-6, seeds fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from assay.kernels import chacha
from assay.watermark import inverse_transform
from assay.watermark.gumbel import token_ids
from assay.watermark.inverse_transform import InverseTransformConfig, observe, sampler, uniform_words

FALSE_ALARM = 1e-6
CONFIG = InverseTransformConfig(window=2)


def words(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 2**32, 8, dtype=np.uint32)


def reference(key: np.ndarray, context: np.ndarray, law: np.ndarray) -> int:
    """The definition, step by step: sort the line, walk it until U is passed."""
    line = chacha.expand(key, context[None], len(law))[0]
    u = (int(chacha.words_at(key, context[None], np.zeros(1, np.uint32), stream=1 << 24)[0]) + 0.5) / 2**32
    walked = 0.0
    for token in sorted(range(len(law)), key=lambda v: (line[v], v)):
        walked += law[token]
        if walked >= u and law[token] > 0:
            return token
    raise AssertionError("the law does not sum to one")


def test_the_sampler_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 17, 300):
        laws = rng.dirichlet(np.full(n, 0.2), 50)
        laws[:, rng.random(n) < 0.3] = 0.0
        laws[:, 0] += 1e-3
        laws /= laws.sum(axis=1, keepdims=True)
        ids = rng.integers(0, 1000, (50, 2))
        with np.errstate(divide="ignore"):
            tokens = sampler(words(1), CONFIG, words(2))(ids, np.log(laws), None)
        expected = [reference(words(1), row.astype(np.uint32), law) for row, law in zip(ids, laws, strict=True)]
        np.testing.assert_array_equal(tokens, expected)


def counts(law: np.ndarray, rows: int, key: int) -> np.ndarray:
    ids = np.stack([np.arange(rows), np.full(rows, 7)], axis=1).astype(np.int64)
    with np.errstate(divide="ignore"):
        tokens = sampler(words(key), CONFIG, words(key + 1))(ids, np.broadcast_to(np.log(law), (rows, len(law))), None)
    return np.bincount(tokens, minlength=len(law))


@pytest.mark.parametrize("law", [[0.5, 0.3, 0.2], [0.0, 0.97, 0.0, 0.03], [1.0], [0.1] * 10])
def test_tokens_have_the_law_of_the_model(law: list[float]) -> None:
    p = np.array(law)
    found = sum(counts(p, 500, 10 * key) for key in range(8))
    assert not found[p == 0].any()
    assert len(p[p > 0]) == 1 or stats.chisquare(found[p > 0], 4000 * p[p > 0]).pvalue > FALSE_ALARM


def test_a_uniform_that_orders_the_line_too_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    # Near-miss: U taken from the line's own words. The token whose word it is stands where U points, too often.
    monkeypatch.setattr(inverse_transform, "_UNIFORM", 0)
    p = np.array([0.5, 0.3, 0.2])
    found = sum(counts(p, 500, 10 * key) for key in range(8))
    assert stats.chisquare(found, 4000 * p).pvalue < FALSE_ALARM


def test_known_answers() -> None:
    key = np.arange(8, dtype=np.uint32)
    found = observe(token_ids(np.arange(100, 108)), key, InverseTransformConfig(), prompt_length=1)
    assert found.positions.tolist() == [3, 4, 5, 6]
    assert [hex(int(word)) for word in found.uniforms] == VECTORS["uniforms"]
    assert [hex(int(word)) for word in found.places] == VECTORS["places"]
    contexts = np.arange(100, 107, dtype=np.uint32)[None, :4]
    assert uniform_words(key, contexts, backend="numba")[0] == uniform_words(key, contexts, backend="numpy")[0]


def test_contexts_count_once_and_end_with_their_document() -> None:
    key = np.arange(8, dtype=np.uint32)
    ids = token_ids([1, 2, 3, 1, 2, 4, 1, 2, 3, 1])
    found = observe(ids, key, CONFIG)
    # (1, 2) three times, (2, 3) and (3, 1) twice; the last (3, 1) is followed by nothing.
    assert found.positions.tolist() == [2, 3, 4, 6, 7]
    assert found.n_repeats_dropped == 3
    offsets = np.array([0, 5, 10], dtype=np.int64)
    positions, _, _ = inverse_transform.scan(ids, offsets, key, CONFIG)
    assert positions.tolist() == [2, 3, 4, 7, 8, 9]


@pytest.mark.parametrize("row", [[np.nan, 0.0], [-np.inf, -np.inf], [np.inf, 0.0]])
def test_bad_laws(row: list[float]) -> None:
    with pytest.raises(ValueError, match="finite or -inf"):
        sampler(words(1), CONFIG, words(2))(np.array([[1, 2]]), np.array([row]), None)


VECTORS = {
    "uniforms": ["0xca01019", "0x75346470", "0x46b0c46f", "0xd2629878"],
    "places": ["0x2882176", "0x30358ede", "0x88387d86", "0xc2c99f18"],
}
