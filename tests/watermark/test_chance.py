"""What is left to chance: settings that mark nothing are refused, texts that were all but decided are warned about."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fake_vllm import SamplingParams

from assay._errors import GenerationError
from assay.watermark import WeakMarkWarning
from assay.watermark.adapters._chance import LEVEL, TOKENS, Watched, check_candidates, surprisals
from assay.watermark.adapters.vllm import RequestRows
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey
from assay.watermark.ump import optimal_coupling

KEY = SecretKey(bytes(range(32)), id="k", config=GumbelConfig())


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0}, {"top_p": 0.0}, {"min_p": 1}, {"min_p": 1.0}])
def test_settings_that_leave_one_candidate(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(
        GenerationError, match=rf"^{name} must be \w+ \d for a watermark, got {value:g}: .*assay plan.*!$"
    ):
        check_candidates(**settings, otherwise="!")


def test_settings_that_leave_more() -> None:
    check_candidates(top_k=2, top_p=1e-9, min_p=0.999)
    check_candidates(top_k=0, top_p=1.0, min_p=0.0)
    check_candidates(top_k=None, top_p=None, min_p=None)


def test_surprisals_against_fractions() -> None:
    weights = [[1, 2, 4], [0, 5, 3]]
    with np.errstate(divide="ignore"):
        got = surprisals(np.log(np.array(weights, dtype=np.float64)) + 700, np.array([1, 2]))
    np.testing.assert_allclose(got, [-math.log(Fraction(2, 7)), -math.log(Fraction(3, 8))], rtol=1e-13)


def run(p: float, steps: int, rows: int = 1, *, repeat: int = 1) -> int:
    """How often a text warns whose tokens, one of two, are always the one with probability p."""
    law = np.log(np.array([[p, 1 - p]] * rows, dtype=np.float64))
    watched = Watched(lambda ids, log_weights, pad: np.zeros(len(ids), dtype=np.int64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            for _ in range(repeat):
                watched(np.zeros((rows, 3 + step), dtype=np.int64), law, None)
    assert all(one.category is WeakMarkWarning for one in caught)
    return len(caught)


def test_the_bound_is_where_it_is_said_to_be() -> None:
    # The whole text has probability p**TOKENS; the best test finds it with chance LEVEL / p**TOKENS.
    edge = (LEVEL / 0.5) ** (1 / TOKENS)
    assert run(edge * (1 + 1e-9), 3 * TOKENS) == 1  # once, however long the text becomes
    assert run(edge * (1 - 1e-9), 3 * TOKENS) == 0
    text = optimal_coupling([edge**TOKENS, 1 - edge**TOKENS], LEVEL)
    assert text.joint()[0, 0] / text.law[0] == pytest.approx(0.5, rel=1e-12)
    assert run(1 - 1e-12, TOKENS - 1) == 0  # too short to judge
    assert run(1 - 1e-12, TOKENS - 1, repeat=5) == 0  # the same tokens again are no more tokens


def test_a_batch_is_judged_by_its_freest_row() -> None:
    free = np.log(np.array([[1 - 1e-9, 1e-9], [0.5, 0.5]]))
    watched = Watched(lambda ids, log_weights, pad: np.zeros(len(ids), dtype=np.int64))
    for step in range(TOKENS):
        watched(np.zeros((2, step), dtype=np.int64), free, None)  # warnings are errors here
    assert run(1 - 1e-9, TOKENS, rows=2) == 1


def test_a_discarded_draft_counts_as_it_was_last_drawn() -> None:
    # As in assisted decoding: the assistant's law first, the model's after it, at the same place.
    watched = Watched(lambda ids, log_weights, pad: np.zeros(len(ids), dtype=np.int64))
    decided, even = (np.log(np.array([[p, 1 - p]])) for p in (1 - 1e-9, 0.5))

    def step(place: int) -> None:
        watched(np.zeros((1, place), dtype=np.int64), even, None)
        watched(np.zeros((1, place), dtype=np.int64), decided, None)

    for place in range(TOKENS - 1):
        step(place)
    with pytest.warns(WeakMarkWarning):
        step(TOKENS)


def test_vllm_warns_of_a_low_temperature() -> None:
    import torch
    from fake_vllm import BatchUpdate

    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))

    def text(temperature: float) -> None:
        output: list[int] = []
        requests = RequestRows(KEY)
        params = SamplingParams(temperature=temperature)
        requests.update(BatchUpdate(1, [], [(0, params, [1, 2, 3, 4], output)], []))
        while len(output) < TOKENS:
            output.append(int(requests.apply(logits.clone()).argmax()))

    text(1.0)
    with pytest.warns(WeakMarkWarning, match=f"first {TOKENS} tokens of a text were all but decided.*0.01"):
        text(0.01)


def test_llama_cpp_warns_of_a_low_temperature() -> None:
    from assay.watermark.adapters.llama_cpp import for_llama_cpp

    scores = np.random.default_rng(0).normal(0, 1, 64).astype(np.float32)

    def text(temperature: float) -> None:
        mark = for_llama_cpp(KEY, temperature=temperature)
        ids = [1, 2, 3, 4]
        while len(ids) < 4 + TOKENS:
            ids.append(int(mark(np.array(ids, dtype=np.intc), scores).argmax()))

    text(1.0)
    with pytest.warns(WeakMarkWarning):
        text(0.01)


def test_transformers_warns_of_a_low_temperature(tiny_model: Any) -> None:
    import torch

    from assay.watermark import for_transformers

    ids = torch.arange(10, 20).reshape(2, 5)
    settings = {"do_sample": True, "max_new_tokens": TOKENS, "attention_mask": torch.ones_like(ids)}
    tiny_model.generate(ids, temperature=1.0, watermarking_config=for_transformers(KEY), **settings)
    with pytest.warns(WeakMarkWarning):
        tiny_model.generate(ids, temperature=1e-3, watermarking_config=for_transformers(KEY), **settings)


def test_the_sequence_watermark_warns_and_refuses(tiny_model: Any) -> None:
    from assay.watermark import SequenceConfig, generate_sequence

    key = SecretKey(bytes(range(32)), id="k", config=SequenceConfig())
    text = {"prompt": [5, 6, 7], "key": key, "nonce": b"a request", "max_new_tokens": TOKENS}
    generate_sequence(tiny_model, None, **text)
    with pytest.warns(WeakMarkWarning):
        generate_sequence(tiny_model, None, **text, temperature=1e-3)
    with pytest.raises(GenerationError, match="top_k must be above 1"):
        generate_sequence(tiny_model, None, **text, top_k=1)
