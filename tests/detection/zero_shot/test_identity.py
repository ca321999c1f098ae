"""Did this model write it? Size on the bundled model's own texts under each rule; the trap; composite nulls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from assay import TestResult
from assay._errors import TextError
from assay.detection.zero_shot import identity_test, identity_tests, over_rules, studentised_score
from assay.kernels.scoring.decoding import Decoding

pytest.importorskip("transformers")

RULES = {
    "T = 1": Decoding(),
    "T = 0.7": Decoding(temperature=0.7),
    "top-k 50": Decoding(top_k=50),
    "top-p 0.9": Decoding(top_p=0.9),
}
Texts = Callable[..., np.ndarray]


def rejected(results: list[TestResult], level: float) -> int:
    return sum(result.log_pvalue <= math.log(level) for result in results)


def check_size(results: list[TestResult]) -> None:
    # Bounds are the 1 - 1e-6 quantiles of the binomial at each level: false alarm 1e-6 each.
    for level in (0.1, 0.05, 0.01):
        assert rejected(results, level) <= stats.binom.ppf(1 - 1e-6, len(results), level), level
    for threshold in (10, 100):
        high = sum(result.evalue >= threshold for result in results)
        assert high <= stats.binom.ppf(1 - 1e-6, len(results), 1 / threshold), threshold


def test_size_and_the_trap_in_short(bundled: Any, own_texts: Texts) -> None:
    texts = list(own_texts(50, RULES["T = 0.7"]))
    check_size(identity_tests(texts, bundled, decoding=RULES["T = 0.7"]))
    # The near-miss, which is what the published test assumes: plain sampling at temperature 1. The same check fails.
    with pytest.raises(AssertionError):
        check_size(identity_tests(texts, bundled))


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("test", ["tilt", "freedman", "entropy-gap"])
def test_nominal_size_on_the_model_s_own_texts(name: str, test: Any, bundled: Any, own_texts: Texts) -> None:
    # 2,000 texts of 60 tokens resolve 5 % to about 0.5 %; a size of 8 % would be rejected with probability over 0.99.
    check_size(identity_tests(list(own_texts(2000, RULES[name])), bundled, decoding=RULES[name], test=test))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T = 0.7", "top-k 50", "top-p 0.9"])
def test_the_naive_null_rejects_the_model_s_own_output(name: str, bundled: Any, own_texts: Texts) -> None:
    # 300 texts of 200 tokens.
    texts = list(own_texts(300, RULES[name], 200))
    naive = identity_tests(texts, bundled)
    with pytest.raises(AssertionError):
        check_size(naive)
    assert rejected(naive, 0.05) > {"T = 0.7": 0.95, "top-k 50": 0.85, "top-p 0.9": 0.5}[name] * 300
    check_size(identity_tests(texts, bundled, decoding=RULES[name]))
    # The composite null over all four rules holds for each of them.
    check_size(identity_tests(texts, bundled, decoding=list(RULES.values())))


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_screen_is_about_normal_and_only_about(name: str, bundled: Any, own_texts: Texts) -> None:
    rule = RULES[name]
    found = bundled.score(list(own_texts(2000, rule)), temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
    scores = np.array([studentised_score(one) for one in found])
    # Two-sided 5 %: a band of 2.5 to 8 % would be left by an exact test with probability below 1e-6.
    assert 0.025 < np.mean(np.abs(scores) > 1.96) < 0.08
    assert abs(np.mean(scores)) < 0.2


def test_other_texts_are_refuted(bundled: Any, human_text: str, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    noise = identity_test(zipf_ids(150, 1), bundled)
    assert noise.pvalue < 1e-20
    # Human prose looks like the model's own at temperature 1 far more often than truncated output does: the reason why
    # a large p-value is no proof. Under the truncated null it leaves the support at once.
    human = identity_test(human_text[2000:3000], bundled, decoding=Decoding(top_k=20))
    assert human.log_pvalue == -math.inf
    assert "probability 0 under the decoding rule" in " ".join(human.assumptions)
    assert "The ids were made from the text" in human.assumptions[-1]
    ids = bundled.tokenizer(human_text[2000:3000], add_special_tokens=False)["input_ids"]
    assert "The ids were made" not in identity_test(ids, bundled, decoding=Decoding(top_k=20)).assumptions[-1]


@pytest.mark.slow
def test_a_text_s_own_ids_may_refute_its_author(bundled: Any, own_texts: Texts) -> None:
    # About one text in twenty of 100 tokens at top-k 50 comes back with an id that the rule forbids: none of 200 would
    # with probability 4e-5. A tolerance keeps the level (false alarm 1e-6).
    rule = RULES["top-k 50"]
    ids = list(own_texts(200, rule, 100))
    texts = bundled.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    strict = identity_tests(texts, bundled, decoding=rule)
    assert any(one.log_pvalue == -math.inf for one in strict)
    check_size(identity_tests(ids, bundled, decoding=rule))
    tolerant = identity_tests(texts, bundled, decoding=rule, support_noise=1e-3)
    assert not any(one.log_pvalue == -math.inf for one in tolerant)
    assert rejected(tolerant, 0.05) <= stats.binom.ppf(1 - 1e-6, 200, 0.05)


def test_a_grid_keeps_the_least_refuted_rule(bundled: Any, own_texts: Texts) -> None:
    rules = [Decoding(), Decoding(temperature=0.7), Decoding(top_k=50)]
    text = own_texts(20, RULES["T = 0.7"])[3]
    whole = identity_test(text, bundled, decoding=rules)
    single = [identity_test(text, bundled, decoding=rule) for rule in rules]
    assert whole.components == tuple(single)
    assert whole.log_pvalue == max(one.log_pvalue for one in single)
    assert whole.log_evalue == min(one.log_evalue for one in single)
    assert all(part in whole.null for part in ("temperature 1", "temperature 0.7", "top-k 50"))
    assert any("least refuted of 3" in sentence for sentence in whole.assumptions)
    assert TestResult.from_dict(whole.to_dict()) == whole
    with pytest.raises(ValueError, match="at least one result"):
        over_rules([])


def test_batch_equals_single(bundled: Any, own_texts: Texts) -> None:
    texts = [text[:n] for text, n in zip(own_texts(20, Decoding()), (0, 1, 2, 7, 60), strict=False)]
    together = identity_tests(texts, bundled)
    for text, result in zip(texts, together, strict=True):
        alone = identity_test(text, bundled)
        assert alone.log_pvalue == pytest.approx(result.log_pvalue, abs=1e-3)
        assert alone.n_tokens == result.n_tokens == len(text)
    assert together[0].pvalue == together[0].evalue == 1.0


def test_burn_in_stands_in_for_an_unknown_prompt(bundled: Any) -> None:
    # Continuations of one prompt. With the prompt the test is exact; without it the first tokens cannot be explained,
    # and leaving them out mends most of it.
    import torch
    from transformers import GenerationConfig

    prompt = bundled.tokenizer("The captain of the ship said that", add_special_tokens=False)["input_ids"]
    model = bundled.model
    kept, model.generation_config = model.generation_config, GenerationConfig()
    torch.manual_seed(5)
    inputs = torch.tensor([[model.config.bos_token_id, *prompt]] * 60)
    config = GenerationConfig(do_sample=True, max_new_tokens=40, top_k=0, temperature=0.7, pad_token_id=0)
    try:
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    finally:
        model.generation_config = kept
    texts = list(made[:, inputs.shape[1] :].numpy())
    rule = Decoding(temperature=0.7)
    known = identity_tests(texts, bundled, decoding=rule, prompt=inputs[0].tolist())
    check_size(known)
    unknown = identity_tests(texts, bundled, decoding=rule)
    later = identity_tests(texts, bundled, decoding=rule, burn_in=10)
    assert later[0].n_scored == 30
    assert any("first 10 tokens" in sentence for sentence in later[0].assumptions)
    assert rejected(unknown, 0.05) > stats.binom.ppf(1 - 1e-6, 60, 0.05)
    assert rejected(later, 0.05) < rejected(unknown, 0.05) / 2


def test_text_bytes_and_ids_agree(bundled: Any, human_text: str) -> None:
    text = human_text[500:700]
    ids = bundled.tokenizer(text, add_special_tokens=False)["input_ids"]
    results = [identity_test(form, bundled) for form in (text, text.encode(), ids, np.array(ids, dtype=np.uint32))]
    assert len({result.log_pvalue for result in results}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "best"}, "test must be 'tilt', 'freedman' or 'entropy-gap', got 'best'"),
        ({"test": "freedman", "support_noise": 0.1}, "support_noise must be 0 for test 'freedman'"),
        ({"burn_in": -1}, "burn_in must be an integer >= 0, got -1"),
        ({"burn_in": 1.5}, "burn_in must be an integer >= 0"),
        ({"decoding": []}, "decoding must be a Decoding, several, or None"),
        ({"decoding": 0.7}, "decoding must be a Decoding, several, or None"),
        ({"decoding": ["hot"]}, "decoding must be a Decoding, several, or None"),
        ({"support_noise": 2.0}, r"support_noise must be in \[0, 1\)"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, bundled: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        identity_test([1, 2, 3], bundled, **changes)


def test_bad_texts(bundled: Any) -> None:
    with pytest.raises(TextError, match="lone surrogate"):
        identity_test("a \ud800 b", bundled)
    with pytest.raises(TextError, match="UTF-8"):
        identity_test(b"\xff\xfe", bundled)
    with pytest.raises(ValueError, match=r"ids in \[0, 2048\)"):
        identity_test([1, 5000], bundled)
    with pytest.raises(ValueError, match="integers"):
        identity_test([0.5, 1.5], bundled)


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, assay.detection.zero_shot; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(loaded.stdout.split()).isdisjoint({"torch", "transformers", "numba", "matplotlib", "pyarrow"})
