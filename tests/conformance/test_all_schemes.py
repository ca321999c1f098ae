"""One suite for every registered watermark scheme.

Law of the tokens, size under the null, power against theory, wrong keys, determinism, batches, order of calls, edits.
A scheme that is registered is tested here without being named. Chi-square and binomial bounds: false alarm 1e-6 each.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from scheme_cases import (
    OTHERS,
    PROMPT,
    SETTINGS,
    VOCABULARY,
    Case,
    case_of,
    histories,
    law,
    marked,
    numbered,
    watermark_schemes,
    without_default,
)
from scipy import stats

from assay.detection import testers
from assay.detection.text import load_tokenizer
from assay.watermark import schemes
from assay.watermark.edits import edit
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.power import tokens_needed
from assay.watermark.schemes import SchemeConfig, newest, sampler_of

FALSE_ALARM = 1e-6
SCHEMES = watermark_schemes()
CORPUS = Path(__file__).resolve().parents[2] / "data" / "corpus"
SKEWED = np.array([0.62, 0.2, 0.1, 0.05, 0.03])


# --- the contract -------------------------------------------------------------------------------------------------


def broken_promises(config: type[SchemeConfig]) -> list[str]:
    """What a scheme lacks of what each must have; empty if nothing."""
    scheme, found = config.scheme, []
    if not (is_dataclass(config) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        found.append("settings that are a frozen dataclass")
    if not isinstance(config.distortion_free, bool):
        found.append("a word on whether it is distortion-free")
    if scheme in OTHERS:
        return found
    if without_default(config) and scheme not in SETTINGS:
        return [*found, "defaults for all settings, or an entry in SETTINGS"]
    settings = config(**SETTINGS.get(scheme, {}))
    try:
        sampler_of(settings, use_key(SecretKey(bytes(32), id="contract", config=settings)), np.zeros(8, np.uint32))
    except ValueError as error:
        found.append(f"a sampler, or an entry in OTHERS: {error}")
    try:
        module = testers.tester(settings)
    except ValueError as error:
        return [*found, f"a module of tests: {error}"]
    names = ("TESTS", "NEEDS_MODEL", "NULL", "ASSUMPTIONS", "documents_test", "test_ids", "token_log_tails")
    found += [f"{name} in its module of tests" for name in names if not hasattr(module, name)]
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_contract_is_kept(scheme: str) -> None:
    assert not broken_promises(newest(scheme))


def test_a_scheme_without_its_contract_would_be_noticed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare(SchemeConfig):
        scheme: ClassVar[str] = "bare"
        version: ClassVar[int] = 1

    @dataclass(frozen=True, kw_only=True)
    class Demanding(SchemeConfig):
        scheme: ClassVar[str] = "demanding"
        version: ClassVar[int] = 1
        width: int

    assert [promise.split(":")[0] for promise in broken_promises(Bare)] == [
        "a sampler, or an entry in OTHERS",
        "a module of tests",
    ]
    assert broken_promises(Demanding) == ["defaults for all settings, or an entry in SETTINGS"]


def test_every_module_that_registers_a_scheme_is_found() -> None:
    root = Path(schemes.__file__).parent
    registering = {path.stem for path in root.rglob("*.py") if "\n@register\n" in path.read_text(encoding="utf-8")}
    assert registering == {home.rpartition(".")[2] for home in schemes._HOMES.values()}


# --- the law of the tokens ----------------------------------------------------------------------------------------


def first_token_pvalue(case: Case, keys: int, rows: int) -> float:
    """Chi-square p-value of tokens after distinct contexts under many keys, against the law they were drawn from."""
    rng = np.random.default_rng(5)
    ids = rng.choice(VOCABULARY, len(SKEWED), replace=False)
    row = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    row[ids] = np.log(SKEWED)
    counts = np.zeros(VOCABULARY, dtype=np.int64)
    for number in range(keys):
        tokens = case.next_tokens(number, histories(rng, rows), np.broadcast_to(row, (rows, VOCABULARY)))
        counts += np.bincount(tokens, minlength=VOCABULARY)
    assert counts.sum() == counts[ids].sum()
    return float(stats.chisquare(counts[ids], keys * rows * SKEWED).pvalue)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_have_the_law_of_the_model_where_a_scheme_says_so(scheme: str) -> None:
    # 3,000 draws. The same check rejects every scheme that says it tilts the law: green and fixed lists.
    pvalue = first_token_pvalue(case_of(scheme), 60, 50)
    assert (pvalue > FALSE_ALARM) == newest(scheme).distortion_free


def pair_pvalue(case: Case, keys: int, rows: int, *, forget: bool = False) -> float:
    """Chi-square p-value of two tokens after the same context in one text, against independence."""
    rng = np.random.default_rng(6)
    ids, p = rng.choice(VOCABULARY, 3, replace=False), np.array([0.5, 0.3, 0.2])
    row = np.full((rows, VOCABULARY), -np.inf, dtype=np.float32)
    row[:, ids] = np.log(p)
    places = {int(token): place for place, token in enumerate(ids)}
    counts = np.zeros((3, 3))
    for number in range(keys):
        start = histories(rng, rows)
        first = case.next_tokens(number, start, row)
        again = start if forget else np.concatenate([start, first[:, None], start], axis=1)
        second = case.next_tokens(number, again, row)
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            counts[places[a], places[b]] += 1
    return float(stats.chisquare(counts.ravel(), keys * rows * np.outer(p, p).ravel()).pvalue)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if newest(name).distortion_free])
def test_a_context_that_returns_is_not_marked_again(scheme: str) -> None:
    assert pair_pvalue(case_of(scheme), 20, 50) > FALSE_ALARM


def test_a_sampler_that_forgets_its_history_is_rejected() -> None:
    # Near-miss: asked for the same context without the text between, the noise repeats, and with it the token.
    assert pair_pvalue(case_of("gumbel"), 20, 50, forget=True) < FALSE_ALARM


# --- size ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> dict[str, list[np.ndarray]]:
    """Human passages of 160 tokens, and blocks of 40 of their tokens four times over."""
    raw = gzip.decompress((CORPUS / "the-time-machine.txt.gz").read_bytes()).decode("utf-8")
    ids = np.asarray(load_tokenizer().encode(raw[20_000:24_000]), dtype=np.uint32)
    human = [ids[start : start + 160] for start in (0, 160, 320, 480)]
    assert all(len(passage) == 160 for passage in human)
    return {"human": human, "repetitive": [np.tile(passage[:40], 4) for passage in human]}


def oversized(log_p: np.ndarray) -> list[float]:
    """Levels at which too many p-values lie."""
    bounds = {level: stats.binom.ppf(1 - FALSE_ALARM, len(log_p), level) for level in (0.01, 0.001)}
    return [level for level, bound in bounds.items() if np.sum(log_p <= math.log(level)) > bound]


@pytest.mark.parametrize("text", ["human", "repetitive"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_size_on_unmarked_text(scheme: str, text: str, documents: dict[str, list[np.ndarray]]) -> None:
    assert not oversized(case_of(scheme).null_log_pvalues(documents[text], range(100, 220)))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["human", "repetitive"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_size_at_length(scheme: str, text: str, documents: dict[str, list[np.ndarray]]) -> None:
    assert not oversized(case_of(scheme).null_log_pvalues(documents[text], range(1000, 3000)))


def test_p_values_that_are_too_small_are_rejected() -> None:
    # What the check above can see: 120 p-values suffice for a factor of a hundred, 3,000 for one of two.
    uniform = np.log(np.random.default_rng(0).random(3000))
    assert not oversized(uniform)
    assert oversized(uniform[:120] - math.log(100)) == [0.01, 0.001]
    assert oversized(uniform - math.log(2)) == [0.01]


# --- power --------------------------------------------------------------------------------------------------------


# Scheme, its settings, its test, and that test's name in the theory of i.i.d. tokens.
THEORY: list[tuple[str, dict[str, Any], str, str]] = [
    ("gumbel", {}, "sum", "gumbel-sum"),
    ("gumbel", {}, "model-aware", "gumbel-model-aware"),
    ("green-list", {"gamma": 0.25, "delta": 2.0}, "sum", "green-list"),
]


@pytest.mark.parametrize(("scheme", "settings", "test", "theory"), THEORY, ids=[row[3] for row in THEORY])
def test_type_two_error_is_that_of_theory(scheme: str, settings: dict[str, Any], test: str, theory: str) -> None:
    # 100 texts at the length at which theory puts the Type II error just below 0.3.
    d, rows = 0.3, 100
    options = {key: settings[key] for key in ("gamma", "delta") if key in settings}
    needed = tokens_needed([1 - d, d], 1e-2, 0.3, theory, **options)  # type: ignore[arg-type]
    case, n, missed = case_of(scheme, **settings), needed.tokens, 0
    prompt = np.array([[2 * n - 1 - i for i in range(PROMPT)]])
    for number in range(rows):
        laws = np.concatenate(list(numbered(1, n, d)))
        ids = case.write(number, laws[None], prompt)[0]
        missed += case.log_pvalue(number, ids, PROMPT, laws, test) > math.log(1e-2)
    low, high = stats.binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], rows, needed.type2_error)
    assert low <= missed <= high


@pytest.mark.parametrize("scheme", SCHEMES)
def test_marked_text_is_found_under_its_key_and_no_other(scheme: str) -> None:
    case = case_of(scheme)
    ids, laws, length = marked(scheme)
    right = [case.log_pvalue(1, row, length, own) for row, own in zip(ids, laws, strict=True)]
    wrong = [case.log_pvalue(500 + i, ids[i % len(ids)], length, laws[i % len(ids)]) for i in range(30)]
    assert np.median(right) < math.log(1e-6)
    assert not oversized(np.array(wrong))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tampering_costs_evidence(scheme: str) -> None:
    # Mean log10 p of six texts against the share of substituted tokens: rising within noise, and null in the end.
    case, rng = case_of(scheme), np.random.default_rng(3)
    ids, laws, length = marked(scheme)
    curve = []
    for rate in (0.0, 0.1, 0.3, 0.6, 1.0):
        tampered = [np.append(row[:length], edit(row[length:], "substitute", rate, VOCABULARY, rng)) for row in ids]
        known = [np.maximum(own, np.float32(-14)) for own in laws]  # a model that finds every token possible
        values = [case.log_pvalue(1, row, length, own) for row, own in zip(tampered, known, strict=True)]
        curve.append(np.mean(values) / math.log(10))
    assert curve[0] < -6
    assert curve[-1] > -1.5
    assert all(later > earlier - 1.0 for earlier, later in pairwise(curve)), curve


# --- the sampler as a pure function -------------------------------------------------------------------------------


TOKENWISE = [name for name in SCHEMES if name not in OTHERS]


@pytest.mark.parametrize("scheme", TOKENWISE)
def test_tokens_do_not_depend_on_the_batch_on_padding_or_on_earlier_calls(scheme: str) -> None:
    case, rng = case_of(scheme), np.random.default_rng(8)
    rows = 12
    ids = histories(rng, rows)
    laws = np.stack([law(rng, 0.3) for _ in range(rows)])
    draw = case.sampler(case.key(1))
    together = draw(ids, laws, None)
    np.testing.assert_array_equal(together, draw(ids, laws, None))
    order = rng.permutation(rows)
    np.testing.assert_array_equal(case.sampler(case.key(1))(ids[order], laws[order], None), together[order])
    alone = [draw(ids[i : i + 1], laws[i : i + 1], None)[0] for i in range(rows)]
    np.testing.assert_array_equal(alone, together)
    padded = np.concatenate([np.full((rows, 3), VOCABULARY), ids], axis=1)
    np.testing.assert_array_equal(draw(padded, laws, VOCABULARY), together)
    double = draw(ids, laws.astype(np.float64), None)
    np.testing.assert_array_equal(double, together)


@pytest.mark.parametrize("scheme", TOKENWISE)
def test_a_text_can_be_drawn_in_any_order(scheme: str) -> None:
    # As assisted decoding does: positions are asked for out of order, some twice, some after text that is thrown away.
    case, rng = case_of(scheme), np.random.default_rng(9)
    ids, laws, length = marked(scheme)
    draw = case.sampler(case.key(1))
    for t in rng.permutation(40):
        draw(rng.integers(0, VOCABULARY, (1, 7)), laws[0, :1], None)
        token = draw(ids[:, : length + t], laws[:, t], None)
        np.testing.assert_array_equal(token, ids[:, length + t])


@pytest.mark.parametrize("scheme", TOKENWISE)
def test_a_document_does_not_depend_on_its_neighbours(scheme: str) -> None:
    case = case_of(scheme)
    module, key = testers.tester(case.config), case.key(1)
    rng = np.random.default_rng(4)
    lengths = [0, 1, 5, 90, 6, 40]
    parts = [rng.integers(0, 50, n).astype(np.uint32) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    batch = module.documents_test(np.concatenate(parts), offsets, key, case.config)
    for i, ids in enumerate(parts):
        single = module.test_ids(ids, 0, key, case.config, test="auto", model=None)
        for name in ("statistic", "log_pvalue", "log_evalue", "n_tokens", "n_scored", "n_repeats_dropped"):
            assert getattr(batch, name)[i] == pytest.approx(getattr(single, name), rel=1e-12, abs=1e-12), name
        assert single.n_tokens == lengths[i]
        tails = module.token_log_tails(ids, key, case.config)
        assert tails.shape == (lengths[i],)
        assert np.all(np.isnan(tails) | (tails <= 0.0))


@pytest.mark.parametrize("scheme", TOKENWISE)
def test_a_law_that_allows_one_token_gives_that_token(scheme: str) -> None:
    case = case_of(scheme)
    laws = np.full((5, VOCABULARY), -np.inf, dtype=np.float32)
    laws[np.arange(5), [0, 7, 500, 2046, 2047]] = 0.0
    tokens = case.next_tokens(3, histories(np.random.default_rng(1), 5), laws)
    assert tokens.tolist() == [0, 7, 500, 2046, 2047]
    assert tokens.dtype == np.int64
