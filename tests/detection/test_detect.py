"""`detect`: every kind of input, several keys, with and without a model, and what must be refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

import assay
from assay._errors import TextError
from assay.detection import combine
from assay.detection.result import TestResult, format_evalue, format_pvalue
from assay.detection.text import load_tokenizer
from assay.watermark.dual_gumbel import DualGumbelConfig
from assay.watermark.green_list import GreenListConfig
from assay.watermark.gumbel import GumbelConfig, pivots
from assay.watermark.keys import SecretKey
from assay.watermark.schemes import SchemeConfig
from assay.watermark.signing import Ed25519Config
from assay.watermark.tournament import TournamentConfig

MakeKey = Callable[..., SecretKey]


@pytest.fixture(scope="module")
def marked(make_key: MakeKey) -> np.ndarray:
    """160 tokens written by the bundled model with key 1, from a prompt that is not part of them."""
    return generate(make_key(1), seed=5)


def generate(key: SecretKey, seed: int, prompt: str = "It was a cold and quiet evening, and") -> np.ndarray:
    import torch

    from assay.models import load_model, load_tokenizer_for_generation
    from assay.watermark import for_transformers

    model, tokenizer = load_model(), load_tokenizer_for_generation()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=0.8,
        max_new_tokens=160,
        min_new_tokens=160,
        watermarking_config=for_transformers(key),
    )
    return out[0, inputs["input_ids"].shape[1] :].numpy()


def test_marked_tokens_are_found_with_and_without_the_model(make_key: MakeKey, marked: np.ndarray) -> None:
    plain = assay.detect(marked, make_key(1))
    aware = assay.detect(marked, make_key(1), model="default")
    assert plain.pvalue < 1e-12
    assert plain.key_id == "test-1"
    assert plain.scheme == "gumbel/1"
    assert plain.n_tokens == 160
    assert plain.n_scored + plain.n_repeats_dropped == 156
    assert aware.test == "gumbel-best-of-three"
    assert [part.test for part in aware.components] == ["gumbel-sum", "gumbel-model-aware", "gumbel-robust"]
    assert aware.components[0].log_pvalue == plain.log_pvalue
    assert assay.detect(marked, make_key(2)).pvalue > 1e-3
    assert assay.detect(marked, make_key(2), model="default").pvalue > 1e-3


def test_a_model_runs_once_for_each_key_and_not_where_no_test_asks_for_it(
    make_key: MakeKey, marked: np.ndarray
) -> None:
    from assay.detection.inputs import scorer_of
    from assay.detection.sequence import sequence_test
    from assay.watermark.profiles.hf_kgw import HfKgwConfig
    from assay.watermark.sequence import SequenceConfig

    scorer = scorer_of("default")
    calls = []
    hook = scorer.model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))

    def passes(run: Callable[[], object]) -> int:
        calls.clear()
        run()
        return len(calls)

    def key_of(config: SchemeConfig) -> SecretKey:
        return SecretKey(bytes(32), id="k", config=config)

    configs = [GumbelConfig(), TournamentConfig(), GreenListConfig(seeding="self"), DualGumbelConfig()]
    for config in configs:
        assert passes(lambda config=config: assay.detect(marked, key_of(config), model=scorer)) == 1, config
    assert passes(lambda: assay.detect(marked, make_key(1), model=scorer, test="model-aware")) == 1
    assert passes(lambda: assay.detect(marked, [make_key(1), make_key(2)], model=scorer)) == 2
    assert passes(lambda: sequence_test(marked, key_of(SequenceConfig()), b"the nonce", model=scorer)) == 1
    other = key_of(HfKgwConfig(vocab_size=10_000))
    assert passes(lambda: assay.detect(marked, other, model=scorer)) == 0
    with pytest.raises(ValueError, match="temperature must be"):
        assay.detect(marked, other, model=scorer, temperature=-1.0)
    hook.remove()


def test_the_prompt_lets_the_first_tokens_count(make_key: MakeKey, marked: np.ndarray) -> None:
    prompt = "It was a cold and quiet evening, and"
    without = assay.detect(marked, make_key(1))
    known = assay.detect(marked, make_key(1), prompt=prompt)
    assert known.n_tokens == 160
    assert known.n_scored > without.n_scored
    assert known.log_pvalue < without.log_pvalue
    wrong = assay.detect(marked, make_key(1), prompt="Something else entirely was asked of the model.")
    assert wrong.pvalue < 1e-10  # only the first four tokens see the wrong context


def test_human_text_is_not_flagged_with_any_model(make_key: MakeKey, human_text: str) -> None:
    text = human_text[20_000:21_500]
    # 40 keys at level 1e-6: false alarm 4e-5 at these fixed keys.
    for number in range(40):
        assert assay.detect(text, make_key(number)).pvalue > 1e-6
    assert assay.detect(text, make_key(3), model="default").pvalue > 1e-6


def test_several_keys_are_corrected_and_the_right_one_is_named(make_key: MakeKey, marked: np.ndarray) -> None:
    keys = [make_key(number) for number in range(4)]
    result = assay.detect(marked, keys)
    single = assay.detect(marked, keys[1])
    assert result.key_id == "test-1"
    assert result.log_pvalue == pytest.approx(single.log_pvalue + math.log(4))
    assert result.log_evalue == pytest.approx(single.log_evalue - math.log(4))
    assert [part.key_id for part in result.components] == [key.id for key in keys]
    assert any("4 keys" in line for line in result.assumptions)


def test_holm_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(size=6) ** 3
        results = [
            TestResult(
                test="t", statistic=0.0, log_pvalue=math.log(x), log_evalue=0.0, n_tokens=9, n_scored=9,
                null="n", alternative="greater", key_id=str(i),
            )
            for i, x in enumerate(p)
        ]  # fmt: skip
        got = np.exp([part.log_pvalue for part in combine.over_keys(results).components])
        order = np.argsort(p)
        expected = np.empty(6)
        for k, i in enumerate(order):
            expected[i] = min(1.0, max((6 - j) * p[order[j]] for j in range(k + 1)))
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("text", ["", "a", "one two", [], [7], [1, 2, 3, 4]])
def test_nothing_to_score_gives_p_one_and_says_so(text: object, make_key: MakeKey) -> None:
    result = assay.detect(text, make_key(0))  # type: ignore[arg-type]
    assert (result.pvalue, result.evalue, result.n_scored) == (1.0, 1.0, 0)
    assert "Nothing could be tested" in result.sentence()
    aware = assay.detect(text, make_key(0), model="default")  # type: ignore[arg-type]
    assert aware.pvalue == 1.0


def test_one_token_more_than_the_window_counts(make_key: MakeKey) -> None:
    assert assay.detect([1, 2, 3, 4, 5], make_key(0)).n_scored == 1


def test_text_bytes_and_ids_agree(make_key: MakeKey, human_text: str) -> None:
    text = human_text[:2000] + " caf\u00e9 \U0001f600 \u202e"
    by_text = assay.detect(text, make_key(0))
    by_bytes = assay.detect(text.encode(), make_key(0))
    by_ids = assay.detect(load_tokenizer().encode(text), make_key(0))
    assert by_text == by_bytes
    assert by_text.log_pvalue == by_ids.log_pvalue
    assert any("tokenizer 'default'" in line for line in by_text.assumptions)


def test_bad_text_is_refused_with_its_place(make_key: MakeKey) -> None:
    with pytest.raises(TextError, match=r"lone surrogate U\+D800 at character 3"):
        assay.detect("abc\ud800", make_key(0))
    with pytest.raises(TextError, match="byte 0xFF at position 2"):
        assay.detect(b"ab\xff", make_key(0))


def test_ids_beyond_the_tokenizer_are_tested_like_any_other(make_key: MakeKey) -> None:
    # Models pad their logits beyond the tokenizer's vocabulary; the PRF knows no vocabulary size.
    ids = [50_271, 4_000_000_000, 7, 50_265, 128_255, 3, 4_294_967_294]
    result = assay.detect(ids, make_key(0))
    assert result.n_scored == 3


def test_huge_text_in_seconds(make_key: MakeKey) -> None:
    ids = np.random.default_rng(0).integers(0, 2048, 10_000_000).astype(np.uint32)
    began = time.perf_counter()
    result = assay.detect(ids, make_key(0))
    assert time.perf_counter() - began < 60
    assert result.n_tokens == 10_000_000
    assert result.n_scored + result.n_repeats_dropped == 9_999_996
    assert result.pvalue > 1e-6


def test_keys_that_cannot_be_used(make_key: MakeKey) -> None:
    signing = SecretKey(bytes(32), id="signer", config=Ed25519Config())
    with pytest.raises(ValueError, match="got 'ed25519/1'"):
        assay.detect([1, 2, 3, 4, 5], signing)
    with pytest.raises(ValueError, match="got a string"):
        assay.detect([1], "prod-2026")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no key"):
        assay.detect([1], [])
    with pytest.raises(ValueError, match="got int"):
        assay.detect([1], [5])  # type: ignore[list-item]


def test_a_revoked_key_says_so(make_key: MakeKey) -> None:
    from datetime import UTC, datetime

    key = make_key(0).with_state("revoked", datetime(2026, 1, 2, tzinfo=UTC))
    assert any("was revoked (2026-01-02" in line for line in assay.detect(range(9), key).assumptions)


def test_a_key_named_twice_is_one_key(make_key: MakeKey) -> None:
    ids = range(40)
    assert assay.detect(ids, [make_key(0), make_key(0)]) == assay.detect(ids, make_key(0))


def test_a_loaded_model_brings_its_tokenizer(make_key: MakeKey, human_text: str) -> None:
    from assay.models import load_model

    loaded = assay.detect(human_text[:600], make_key(0), model=load_model())
    assert loaded.log_pvalue == assay.detect(human_text[:600], make_key(0), model="default").log_pvalue


@pytest.mark.parametrize("text", [None, 5, {"text": "a"}])
def test_what_is_no_text_is_named(text: object, make_key: MakeKey) -> None:
    with pytest.raises(ValueError, match="text must be a string, UTF-8 bytes or token ids, got"):
        assay.detect(text, make_key(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key must be a SecretKey"):
        assay.detect("text", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["berk-jones", "least-favourable"])
def test_further_tests_of_gumbel_by_name(name: str, make_key: MakeKey, marked: np.ndarray) -> None:
    alone = {"berk-jones": assay.detection.berk_jones_test, "least-favourable": assay.detection.least_favourable_test}
    result = assay.detect(marked, make_key(1), test=name)
    assert result.test == f"gumbel-{name}"
    assert result.log_pvalue == alone[name](pivots(marked, make_key(1))).log_pvalue < math.log(1e-9)
    # They read no model: one that is there is neither loaded nor used.
    assert assay.detect(marked, make_key(1), test=name, model="default") == result
    assert assay.detect(marked, make_key(2), test=name).pvalue > 1e-3
    assert assay.detect([], make_key(1), test=name).pvalue == 1.0
    with pytest.raises(ValueError, match="test must be one of 'auto', 'sum'"):
        assay.detect(marked, SecretKey.generate(config=TournamentConfig()), test=name)


def test_options_that_make_no_sense(make_key: MakeKey) -> None:
    with pytest.raises(ValueError, match="test must be"):
        assay.detect([1], make_key(0), test="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs model="):
        assay.detect([1], make_key(0), test="robust")
    with pytest.raises(ValueError, match="none is at"):
        assay.detect("text", make_key(0), tokenizer="./nowhere")


def test_result_round_trip_and_words(make_key: MakeKey, marked: np.ndarray) -> None:
    import json

    result = assay.detect(marked, [make_key(0), make_key(1)], model="default")
    assert TestResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert "test-1" in result.sentence()
    assert f"{result.n_scored} of 160 tokens" in result.sentence()
    with pytest.raises(ValueError, match="schema must be"):
        TestResult.from_dict({**result.to_dict(), "schema": "assay.test-result/9"})


@pytest.mark.parametrize(
    ("log_value", "text"),
    [(0.0, "1"), (math.log(0.6123), "0.612"), (math.log(3.21e-7), "3.2e-07"), (-1000 * math.log(10), "1.0e-1000")],
)
def test_pvalues_are_written_for_people(log_value: float, text: str) -> None:
    assert format_pvalue(log_value) == text
    assert format_evalue(-1000.0).endswith("e-435")
    assert format_pvalue(-math.inf) == "0"
