"""The decoding rule is transformers' own, bit for bit and ties included; the law after it scores what it generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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

from assay.kernels.scoring import decoding, survivors  # noqa: E402
from assay.kernels.scoring.ascending import order  # noqa: E402
from assay.kernels.scoring.decoding import Decoding, warp  # noqa: E402
from assay.kernels.scoring.head import Head  # noqa: E402
from assay.kernels.scoring.tokens import score_logits, score_tokens  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        Decoding(top_k=5),
        Decoding(temperature=0.7, top_k=20, top_p=0.8),
        Decoding(top_k=200, top_p=0.95, min_p=0.01),
        Decoding(temperature=0.5, top_p=0.5),
        Decoding(min_p=0.1),
        Decoding(temperature=0.6, min_p=1.0),
        Decoding(temperature=20.0, min_p=0.01),
    ],
    ids=str,
)
def test_score_tokens_applies_the_rule_to_whole_rows_bit_for_bit(rule, tied, dtype):
    # With top-k, or min-p alone, the survivors are collected block by block; else whole rows are held. Tied: a third of
    # all candidates are one, so that more tie with the k-th than are collected, and others tie in pairs. At temperature
    # 20 min-p keeps more than are collected.
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 32, generator=generator).to(dtype)
    weight = torch.randn(4100, 32, generator=generator).to(dtype)
    if tied:
        weight[::3] = weight[0]
        weight[1::4] = weight[2::4]
    targets = torch.randint(0, 4100, (40,), generator=generator)
    found = score_tokens(hidden, weight, targets, decoding=rule, logits_dtype=dtype)
    expected = score_logits(hidden @ weight.T, targets, decoding=rule)
    for name, value in found._columns().items():
        np.testing.assert_array_equal(value, expected._columns()[name], err_msg=name)


def collected_and_whole(logits, rule):
    """Rows after the rule by way of the survivors and by `warp`, and which rows could be collected."""
    held = survivors.collect(Rows(logits), rule)
    enough = np.flatnonzero(held.counts >= 0)
    targets = logits[enough].argmax(dim=1)
    memory = torch.empty(len(enough), logits.shape[1])
    return survivors.whole_rows(held.rows(enough), rule, targets, memory), warp(logits[enough], rule, targets), enough


@pytest.mark.parametrize("vocabulary", [64, 100, 5003, 50257])
@pytest.mark.parametrize(
    "rule",
    [
        Decoding(top_k=3),
        Decoding(top_k=40, top_p=0.9),
        Decoding(top_k=40, top_p=0.5),
        Decoding(top_k=40, top_p=0.9, min_p=0.1),
        Decoding(min_p=0.1),
    ],
    ids=str,
)
def test_collected_survivors_are_those_of_the_whole_row(rule, vocabulary):
    # Of rows with ties, with next to nothing allowed, with all or half forbidden: the identity as weight makes the
    # hidden states the logits.
    logits = rows_with_ties(4, 12, vocabulary)
    logits[3, 1:] = -torch.inf
    logits[4] = -torch.inf
    logits[5, ::2] = -torch.inf
    logits[6] = 1.0
    found, expected, enough = collected_and_whole(logits, rule)
    assert set(range(12)) - set(enough) <= {6, 1, 4, 7, 10}  # half-integers, or all the same
    assert {0, 3, 5} <= set(enough)
    assert torch.equal(found, expected)


def test_candidates_at_the_edge_of_min_p_are_decided_on_the_whole_row():
    # ln 2 below the largest is p = max p / 2 up to rounding, which only the whole row's softmax decides. The near miss
    # is far enough away to be decided by the logit alone.
    logits = torch.full((4, 3000), -5.0)
    logits[:, 7], logits[:, 2000] = 1.0, 1.0 - np.log(2)
    logits[1, 2000] += 1e-6
    logits[2, 2000] += 2e-4
    logits[3, 2000] -= 2e-4
    found, expected, enough = collected_and_whole(logits, Decoding(min_p=0.5))
    assert enough.tolist() == [2, 3]
    assert torch.equal(found, expected)
    assert torch.isfinite(found).sum(dim=1).tolist() == [2, 1]


@pytest.mark.parametrize("collected", [False, True])
def test_a_target_that_ties_at_the_edge_of_top_p_stays_as_torch_sorts(collected):
    # 200 candidates tie where top-p cuts. Whether the target stays is torch's sort's to say; of the others only the
    # number counts, and they may be other ones. The near miss: cutting by position, which keeps other targets.
    logits = torch.full((400, 1000), -30.0)
    logits[:, torch.randperm(1000, generator=torch.Generator().manual_seed(7))[:200]] = 1.0
    logits[:, 5] = 4.0
    rule = Decoding(top_k=60 if collected else None, top_p=0.8)
    expected = transformers_warp(logits, rule)
    tied = (logits[0] == 1.0).nonzero()[:, 0]
    targets = tied[torch.arange(400) % 200]
    if collected:
        held = survivors.collect(Rows(logits), Decoding(top_k=300))
        found = survivors.whole_rows(held, rule, targets, torch.empty_like(logits))
    else:
        found = warp(logits, rule, targets)
    rows = torch.arange(400)
    assert torch.equal(found[rows, targets], expected[rows, targets])
    assert torch.equal(found.isfinite().sum(dim=1), expected.isfinite().sum(dim=1))
    by_position = warp(logits, rule, torch.full((400,), 5))
    assert not torch.equal(by_position[rows, targets], expected[rows, targets])
    assert torch.equal(by_position.sort(dim=1).values, expected.sort(dim=1).values)


class Rows:
    """Logits that pretend to be products."""

    def __init__(self, logits):
        self.rows, self.head, self._logits = len(logits), Head(weight=logits.T), logits

    def logits(self, block):
        return self._logits[:, block].clone()


def test_survivors_without_enough_room_would_be_noticed():
    # The near miss: a bound taken from the k/2-th largest forgets candidates that survive.
    logits = rows_with_ties(5, 6, 20_000)
    rule, targets, memory = Decoding(top_k=50), torch.zeros(6, dtype=torch.int64), torch.empty(6, 20_000)
    short = survivors.collect(Rows(logits), Decoding(top_k=25))
    assert torch.equal(collected_and_whole(logits, rule)[0], warp(logits, rule))
    assert not torch.equal(survivors.whole_rows(short, rule, targets, memory), warp(logits, rule))


@pytest.mark.parametrize("rule", [{"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_logits_are_refused_by_row_under_every_rule(rule, bad):
    hidden, weight = torch.ones(300, 4), torch.ones(5000, 4)
    weight[:, 1:] = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    hidden[290] = bad  # an infinite one meets weights of both signs: NaN, with its sign bit set on x86
    with pytest.raises(ValueError, match=r"row 290 holds NaN or \+inf"):
        score_tokens(hidden, weight, torch.zeros(300, dtype=torch.int64), decoding=Decoding(**rule))
    logits = torch.zeros(300, 5000)
    logits[290, 0 if bad != -np.inf else slice(None)] = bad
    with pytest.raises(ValueError, match="row 290 holds"):
        score_logits(logits, torch.zeros(300, dtype=torch.int64), decoding=Decoding(**rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warped_rows_do_not_depend_on_how_many_are_sorted_at_once(dtype, monkeypatch):
    logits = rows_with_ties(6, 30, 3000).to(dtype)
    rule = Decoding(temperature=0.9, top_p=0.9)
    whole = warp(logits, rule)
    monkeypatch.setattr(decoding, "_SORTED", 1)
    assert torch.equal(warp(logits, rule), whole)
    assert torch.equal(whole, transformers_warp(logits.float(), rule))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (4, 5000)])
def test_order_is_a_stable_sort(shape):
    rows = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    rows[..., ::3] = np.round(rows[..., ::3])
    rows[..., 1::5] *= 0  # 0 and -0, which are equal
    rows[..., 2::7] = -np.inf
    np.testing.assert_array_equal(order(rows), np.argsort(rows, axis=1, kind="stable"))


MEMORY = """
import sys, torch
sys.path.insert(0, "benchmarks")
from scoring_cpu import peak_bytes
from assay.kernels.scoring.decoding import Decoding
from assay.kernels.scoring.tokens import score_tokens
torch.set_num_threads(1)
with torch.inference_mode():
    for dtype, logits_dtype, vocabulary in [
        (torch.float32, torch.float32, 50257), (torch.bfloat16, torch.float32, 50257),
        (torch.float32, torch.float32, 128256), (torch.bfloat16, torch.bfloat16, 128256),
    ]:
        hidden = torch.randn(160, 256).to(dtype)
        weight = (0.2 * torch.randn(vocabulary, 256)).to(dtype)
        targets = torch.zeros(160, dtype=torch.int64)
        rules = (Decoding(temperature=0.8), Decoding(top_k=50, top_p=0.95), Decoding(top_p=0.95), Decoding(min_p=0.05))
        ways = {
            "naive": lambda: torch.softmax(hidden.float() @ weight.float().T, dim=1) is None,
            **{str(rule): lambda rule=rule: score_tokens(
                   hidden, weight, targets, decoding=rule, logits_dtype=logits_dtype) is None for rule in rules},
        }
        for name, call in ways.items():
            call()
            print(name, peak_bytes(call) // 1_000_000, sep=": ")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_bounded_under_every_rule():
    # 160 rows of 50,257 logits are 32 MB, float32 copies of the bfloat16 weights 51 MB: neither may be held.
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    peaks = [(line.split(": ")[0], int(line.split(": ")[1])) for line in done.stdout.splitlines()]
    assert len(peaks) == 20
    for name, megabytes in peaks:
        assert (megabytes > 50) if name == "naive" else (megabytes <= 30), peaks


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
