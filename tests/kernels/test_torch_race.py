"""Tensors raced where they are, and the adapters that do so. Runs on a GPU, or in Triton's interpreter
(TRITON_INTERPRET=1), which `test_triton_interpreter.py` starts; what needs neither runs everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "watermark"))

from fake_vllm import BatchUpdate, SamplingParams  # noqa: E402 - after the skips

from assay.kernels import race, torch_race  # noqa: E402
from assay.watermark.adapters._chance import TOKENS, WeakMarkWarning  # noqa: E402
from assay.watermark.adapters._embedding import embedding_sampler  # noqa: E402
from assay.watermark.adapters.transformers import _KeyedProcessor  # noqa: E402
from assay.watermark.adapters.vllm import RequestRows  # noqa: E402
from assay.watermark.gumbel import GumbelConfig  # noqa: E402
from assay.watermark.keys import SecretKey  # noqa: E402
from assay.watermark.payload import PayloadConfig  # noqa: E402
from assay.watermark.tournament import TournamentConfig  # noqa: E402

try:
    from assay.kernels.triton_sampling import INTERPRETED
except ImportError:
    INTERPRETED = False
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU, or TRITON_INTERPRET=1 before Python starts",
)
KEY = SecretKey(bytes(range(32)), id="k", config=GumbelConfig(window=2))
V = 300


@pytest.fixture
def on_device(monkeypatch):
    """In the interpreter tensors on the CPU stand for a GPU's; returns the places of all races that were run there."""
    raced, winners = [], torch_race.winners
    if INTERPRETED:
        monkeypatch.setattr(torch_race, "on_device", lambda logits: True)

    def noted(keys, logits, **settings):
        raced.append(logits.shape)
        return winners(keys, logits, **settings)

    monkeypatch.setattr(torch_race, "winners", noted)
    return raced


def logits_of(rows, seed, vocabulary=V):
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_on_the_cpu_it_is_the_race():
    keys = np.random.default_rng(0).integers(0, 2**32, (5, 8)).astype(np.uint32)
    logits = logits_of(5, 0)
    assert not torch_race.on_device(logits)
    expected = race.winners(keys, logits.numpy())
    np.testing.assert_array_equal(torch_race.winners(keys, logits).numpy(), expected)
    rounded = logits.bfloat16()
    expected = race.winners(keys, rounded.float().numpy())
    np.testing.assert_array_equal(torch_race.winners(keys, rounded).numpy(), expected)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_winners_on_the_device_are_those_of_the_race(dtype):
    keys = np.random.default_rng(1).integers(0, 2**32, (6, 8)).astype(np.uint32)
    logits = logits_of(6, 1).to(dtype)
    logits[::2, 20:] = -torch.inf
    found = torch_race.winners(keys, logits.to(DEVICE), backend="triton")
    assert found.device.type == DEVICE
    np.testing.assert_array_equal(found.cpu().numpy(), race.winners(keys, logits.float().numpy()))
    other = race.winners(keys[::-1].copy(), logits.float().numpy())  # the near miss: another row's key
    assert (found.cpu().numpy() != other).sum() > 2


@needs_triton
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_cannot_be_drawn_from_are_named(bad):
    logits = logits_of(3, 2)
    logits[1, 7] = bad
    with pytest.raises(ValueError, match=f"row 1 has {bad}"):
        torch_race.winners(np.zeros((3, 8), np.uint32), logits.to(DEVICE), backend="triton")
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match="row 1 has only -inf"):
        torch_race.winners(np.zeros((3, 8), np.uint32), logits.to(DEVICE), backend="triton")


@needs_triton
@pytest.mark.parametrize("config", [GumbelConfig(window=2), PayloadConfig(window=2, bits=8)], ids=lambda c: c.scheme)
def test_transformers_rows_are_raced_on_the_device(on_device, config):
    # Padded rows, one without a whole context and one whose context came before: both are drawn without the mark.
    key = SecretKey(bytes(range(32)), id="k", config=config)
    ids = torch.tensor([[0, 0, 0, 0, 5], [1, 2, 9, 1, 2], [0, 0, 7, 8, 9], [4, 5, 6, 7, 8]])
    scores = logits_of(4, 3)
    processor = _KeyedProcessor(embedding_sampler(key, b"seed"), 0)
    tokens = embedding_sampler(key, b"seed")(ids.numpy(), scores.numpy(), 0)
    out = processor(ids.to(DEVICE), scores.to(DEVICE))
    assert on_device == [(4, V)]
    assert out.device.type == DEVICE
    expected = torch.from_numpy(race.one_hot(tokens, scores.numpy()))
    assert torch.equal(out.cpu(), expected)


@needs_triton
def test_a_scheme_that_is_no_race_is_drawn_on_the_cpu(on_device):
    key = SecretKey(bytes(range(32)), id="k", config=TournamentConfig(window=2))
    ids, scores = torch.tensor([[1, 2, 3], [4, 5, 6]]), logits_of(2, 4)
    out = _KeyedProcessor(embedding_sampler(key, b"seed"), None)(ids.to(DEVICE), scores.to(DEVICE))
    assert on_device == []
    expected = embedding_sampler(key, b"seed")(ids.numpy(), scores.numpy(), None)
    np.testing.assert_array_equal(out.argmax(1).cpu().numpy(), expected)


def requests_of(rules):
    requests = RequestRows(KEY)
    added = [
        (row, SamplingParams(seed=row, **rule), [1, 2, 3][: 1 + row % 3], list(range(row)))
        for row, rule in enumerate(rules)
    ]
    requests.update(BatchUpdate(len(rules), [], added, []))
    return requests


@needs_triton
def test_vllm_requests_are_raced_on_the_device_by_rule(on_device, monkeypatch):
    # The near miss beside it: the same requests in another order draw other tokens.
    rules = [{"temperature": 0.7}, {"top_k": 5}, {"temperature": 0.7}, {"top_p": 0.9, "min_p": 0.01}]
    logits = logits_of(5, 5)
    found = requests_of(rules).apply(logits.clone().to(DEVICE)).cpu()
    assert on_device == [(2, V), (1, V), (1, V)]
    assert torch.equal(found[4], logits[4])  # a row without a request is left alone
    turned = requests_of(rules[::-1]).apply(logits.clone().to(DEVICE)).cpu()
    monkeypatch.undo()
    expected = requests_of(rules).apply(logits.clone())
    assert torch.equal(found, expected)
    assert not torch.equal(turned, expected)


@needs_triton
def test_decided_texts_are_warned_about_on_the_device_too(on_device):
    draw = embedding_sampler(KEY, b"seed")
    scores = torch.full((1, 8), -30.0)
    scores[:, 3] = 0.0
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    for place in range(2, TOKENS):  # on the CPU, which is faster than the interpreter
        draw(ids[:, :place].numpy(), scores.numpy(), None)
    processor = _KeyedProcessor(draw, None)
    processor(ids[:, :1].to(DEVICE), scores.to(DEVICE))
    with pytest.warns(WeakMarkWarning, match=f"first {TOKENS} tokens"):
        processor(ids.to(DEVICE), scores.to(DEVICE))
    assert on_device == [(1, 8), (1, 8)]
