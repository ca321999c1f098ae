"""The decoding rule is transformers' own, bit for bit and ties included; the law after it scores what it generates."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import LogitsProcessorList  # noqa: E402 - after the skip
from transformers.generation.logits_process import (  # noqa: E402
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from assay.kernels.scoring.decoding import Decoding, warp  # noqa: E402
from assay.kernels.scoring.tokens import score_logits, score_tokens  # noqa: E402


def transformers_warp(logits, rule):
    """In the order in which `generate` applies them."""
    warpers = LogitsProcessorList()
    if rule.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(rule.temperature))
    if rule.top_k is not None:
        warpers.append(TopKLogitsWarper(rule.top_k))
    if rule.top_p is not None and rule.top_p < 1:
        warpers.append(TopPLogitsWarper(rule.top_p))
    if rule.min_p is not None:
        warpers.append(MinPLogitsWarper(rule.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone())


RULES = [
    Decoding(temperature=0.7),
    Decoding(top_k=50),
    Decoding(top_k=10**6),
    Decoding(top_p=0.9),
    Decoding(top_p=1e-9),
    Decoding(min_p=0.05),
    Decoding(min_p=1.0),
    Decoding(temperature=1.3, top_k=40, top_p=0.8, min_p=0.02),
]


def rows_with_ties(seed, rows, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits[1::3] = (2 * logits[1::3]).round() / 2  # half-integers: many exact ties, at every edge
    logits[2::3] = logits[2::3].bfloat16().float()  # what a bfloat16 model returns
    return logits


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(9, 1), (9, 7), (30, 1000), (3, 50257)])
def test_same_candidates_as_transformers(rule, shape):
    logits = rows_with_ties(1, *shape)
    expected = transformers_warp(logits, rule)
    assert torch.equal(warp(logits, rule), expected)
    # One row at a time, as a generator meets them.
    for row in range(0, shape[0], 7):
        assert torch.equal(warp(logits[row : row + 1], rule)[0], expected[row])


def test_top_k_keeps_what_ties_with_the_last():
    # Top-k by position, which drops ties of the k-th, would keep two.
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(warp(logits, Decoding(top_k=2))).sum() == 3
    assert torch.isfinite(transformers_warp(logits, Decoding(top_k=2))).sum() == 3


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_statistics_after_the_rule(backend, rule):
    logits = rows_with_ties(2, 12, 3000)
    law = torch.softmax(transformers_warp(logits, rule).double(), dim=1)
    # Targets the rule allows, and one it forbids wherever it forbids any.
    targets = torch.multinomial(law.float(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    targets[0] = law[0].argmin()
    found = score_logits(logits, targets, decoding=rule, backend=backend)
    p = law.numpy()
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(found.log_prob, np.log(p[np.arange(12), targets.numpy()]), atol=3e-6)
    surprisal = np.where(p > 0, -np.log(np.where(p > 0, p, 1)), 0)
    entropy = (p * surprisal).sum(1)
    np.testing.assert_allclose(found.entropy, entropy, atol=3e-6)
    np.testing.assert_allclose(found.varentropy, (p * (surprisal - entropy[:, None]) ** 2).sum(1), atol=1e-5)
    if law[0].min() == 0:
        assert found.log_prob[0] == -np.inf
        assert found.rank[0] == 1 + (p[0] > 0).sum()


@pytest.mark.parametrize("rule", [Decoding(top_k=5), Decoding(temperature=0.5, top_p=0.5), Decoding(min_p=0.1)])
def test_score_tokens_applies_the_rule_to_whole_rows(rule):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(40, 32, generator=generator), torch.randn(4100, 32, generator=generator)
    targets = torch.randint(0, 4100, (40,), generator=generator)
    found = score_tokens(hidden, weight, targets, decoding=rule)
    expected = score_logits(hidden @ weight.T, targets, decoding=rule)
    for name, value in found._columns().items():
        np.testing.assert_array_equal(value, expected._columns()[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be an integer >= 1 or None, got 0"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None, got 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\] or None, got -0.1"),
    ],
)
def test_bad_rules_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**change)
