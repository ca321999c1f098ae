"""Speculative decoding under two keys: law of the emitted tokens, near-miss with one key, purity, vectors.

False-alarm rate of every chi-square check: 1e-6, seeds fixed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from assay.watermark import dual_gumbel
from assay.watermark.dual_gumbel import (
    DualGumbelConfig,
    RoundKeys,
    draft_tokens,
    observe,
    role_key,
    round_keys,
    sampler,
    verify,
)
from assay.watermark.gumbel import token_ids

FALSE_ALARM = 1e-6
CONFIG = DualGumbelConfig(window=1)
# Token laws after each of three tokens. The draft model is poor on purpose: a third of its drafts are rejected.
TARGET = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.05, 0.45]])
DRAFT = np.array([[0.2, 0.5, 0.3], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])


def words(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 2**32, 8, dtype=np.uint32)


def speculate(prompt: list[int], n: int, drafts: int, keys: RoundKeys) -> list[int]:
    """n tokens after the prompt, in rounds of `drafts` drafted tokens."""
    history = np.array(prompt, dtype=np.int64)
    while len(history) < len(prompt) + n:
        sofar = history
        for _ in range(drafts):
            law = np.log(DRAFT[sofar[-1]])[None]
            sofar = np.append(sofar, draft_tokens(sofar[None], law, keys, CONFIG))
        log_draft = np.log(DRAFT[sofar[len(history) - 1 : -1]])
        log_target = np.log(TARGET[sofar[len(history) - 1 :]])
        emitted = verify(history, sofar[len(history) :], log_draft, log_target, keys, CONFIG)
        history = np.append(history, emitted)
    return history[len(prompt) :][:n].tolist()


def text_pvalue(length: int, rows: int, drafts: int) -> float:
    """Chi-square p-value of whole texts after the prompt [0], one pair of keys each, against the target model."""
    counts = np.zeros(3**length, dtype=np.int64)
    for row in range(rows):
        code = 0
        for token in speculate([0], length, drafts, round_keys(words(2 * row), words(2 * row + 1))):
            code = 3 * code + token
        counts[code] += 1
    texts = itertools.product(range(3), repeat=length)
    law = np.array([np.prod([TARGET[a, b] for a, b in itertools.pairwise((0, *text))]) for text in texts])
    rare = rows * law < 10  # joined into one cell
    observed, expected = (np.append(of[~rare], of[rare].sum()) for of in (counts, rows * law))
    return float(stats.chisquare(observed, expected).pvalue)


def test_whole_texts_have_the_law_of_the_target_model() -> None:
    # Three tokens and window 1: most texts repeat a context.
    assert text_pvalue(3, 1_000, 2) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_whole_texts_have_the_law_of_the_target_model_at_length(drafts: int) -> None:
    assert text_pvalue(4, 3_000, drafts) > FALSE_ALARM


def one_token_pvalue(rows: int) -> float:
    """Chi-square p-value of the first emitted token, after one draft, each row after its own context."""
    p = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    q = np.array([0.05, 0.1, 0.05, 0.3, 0.5])
    keys = round_keys(words(1), words(2))
    log_p, log_q = np.log(p), np.log(q)
    contexts = np.arange(10, 10 + rows)[:, None]
    drafted = draft_tokens(contexts, np.broadcast_to(log_q, (rows, 5)), keys, CONFIG)
    laws = np.stack([log_p, log_p])
    first = [
        verify(context, token[None], log_q[None], laws, keys, CONFIG)[0]
        for context, token in zip(contexts, drafted, strict=True)
    ]
    return float(stats.chisquare(np.bincount(first, minlength=5), rows * p).pvalue)


def test_the_first_token_of_a_round_has_the_target_law() -> None:
    assert one_token_pvalue(8_000) > FALSE_ALARM


def test_one_key_for_both_roles_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    # Near-miss: a rejected draft's replacement raced under the draft's own noise, as a single key would have it.
    monkeypatch.setitem(dual_gumbel._ROLES, "target", dual_gumbel._ROLES["draft"])
    assert one_token_pvalue(8_000) < FALSE_ALARM


def test_a_draft_model_that_equals_the_target_gives_the_plain_text() -> None:
    draw, keys = sampler(words(1), CONFIG, words(2)), round_keys(words(1), words(2))
    history = np.array([0], dtype=np.int64)
    for _ in range(12):
        history = np.append(history, draw(history[None], np.log(TARGET[history[-1]])[None], None))
    log_p = np.log(TARGET[history])
    emitted = verify(history[:1], history[1:], log_p[:-1], log_p, keys, CONFIG)
    np.testing.assert_array_equal(emitted[:-1], history[1:])
    assert len(emitted) == 13


def test_a_round_is_a_pure_function_of_the_history() -> None:
    keys = round_keys(words(5), words(6))
    assert speculate([0], 20, 3, keys) == speculate([0], 20, 3, keys)
    # Whether a draft stands, and what replaces it, does not depend on the drafts after it.
    history = np.array([0, 1, 2])
    for first in range(3):
        rounds = [
            verify(history, np.array(drafted), np.log(DRAFT[rows[:-1]]), np.log(TARGET[rows]), keys, CONFIG)
            for drafted in ([first], [first, 0], [first, 1])
            for rows in [[2, *drafted]]
        ]
        assert len({int(emitted[0]) for emitted in rounds}) == 1


def test_keys_do_not_show() -> None:
    keys = round_keys(words(1), words(2))
    assert repr(keys) == "RoundKeys()"
    derived = [keys.draft, keys.target, keys.unmarked_draft, keys.unmarked_target, keys.coin, words(1), words(2)]
    assert len({one.tobytes() for one in derived}) == 7


def test_known_answers() -> None:
    key = np.arange(8, dtype=np.uint32)
    assert [hex(int(role_key(key, role)[0])) for role in ("draft", "target", "coin")] == VECTORS["roles"]
    found = observe(token_ids(np.arange(100, 108)), key, DualGumbelConfig(), prompt_length=1)
    assert found.positions.tolist() == [3, 4, 5, 6]
    assert [hex(int(word)) for word in found.draft_words] == VECTORS["draft"]
    assert [hex(int(word)) for word in found.target_words] == VECTORS["target"]


VECTORS = {
    "roles": ["0xdb245d72", "0x7f8f50e0", "0x14badebb"],
    "draft": ["0xf197ebc4", "0x1657dabc", "0xc71d9893", "0xb8d25ee"],
    "target": ["0xaa9f0777", "0x6af155c6", "0xf5a7ebd0", "0xaa32ef6a"],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_target": np.zeros((1, 3))}, r"shape \(k \+ 1, V\) with k = 1"),
        ({"log_draft": np.zeros((1, 4))}, r"log_draft must have shape \(1, 3\)"),
        ({"drafted": np.array([3])}, "drafted must be ids below 3"),
        ({"log_target": np.full((2, 3), np.nan)}, "finite or -inf"),
        ({"log_draft": np.full((1, 3), -np.inf)}, "finite or -inf"),
    ],
)
def test_bad_rounds(change: dict[str, np.ndarray], message: str) -> None:
    arguments = {"drafted": np.array([0]), "log_draft": np.zeros((1, 3)), "log_target": np.zeros((2, 3)), **change}
    with pytest.raises(ValueError, match=message):
        verify(np.array([0]), **arguments, keys=round_keys(words(1), words(2)), config=CONFIG)


def test_bad_window() -> None:
    with pytest.raises(ValueError, match=r"window must be an integer in \[1, 64\]"):
        DualGumbelConfig(window=0)
