"""The trellis against brute force over all payloads: the best one, and the mean of exp(score)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from assay.detection.trellis import best_payload, log_mean_exp


def brute_force(scores: np.ndarray) -> np.ndarray:
    """The score of every payload, its registers spelled out from their definition."""
    bits, memory = len(scores), scores.shape[1].bit_length() - 1
    out = np.zeros(1 << bits)
    for payload in range(1 << bits):
        for j in range(bits):
            shown = [payload >> ((j - d) % bits) & 1 for d in range(memory)]
            out[payload] += scores[j, sum(bit << d for d, bit in enumerate(shown))]
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_both_recursions_equal_brute_force(bits: int, memory: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 3, (bits, 1 << min(memory, bits)))
    if seed % 3 == 0:
        scores[rng.random(scores.shape) < 0.1] = -np.inf
    every = brute_force(scores)
    payload, score = best_payload(scores)
    assert score == pytest.approx(every.max())
    assert every[payload] == pytest.approx(every.max())
    assert log_mean_exp(scores) == pytest.approx(special.logsumexp(every) - bits * math.log(2), abs=1e-9)


def test_a_path_that_does_not_bite_its_tail_is_not_taken() -> None:
    # Near-miss: without tail biting the best path would start and end in different states and gain 100.
    scores = np.zeros((3, 4))
    scores[0, 0b10] = scores[0, 0b11] = 100.0  # bit 2 is 1 as seen from step 0
    scores[2, 0b01] = scores[2, 0b11] = -60.0  # and costs 60 where it is written
    assert best_payload(scores)[1] == pytest.approx(40.0) == brute_force(scores).max()


def test_scores_of_any_size() -> None:
    scores = np.random.default_rng(0).normal(0, 1, (8, 16))
    for scale in (1e-300, 1.0, 30.0):
        every = brute_force(scale * scores)
        exact = special.logsumexp(every) - 8 * math.log(2)
        assert log_mean_exp(scale * scores) == pytest.approx(exact, rel=1e-9, abs=1e-9)
    # Where paths underflow terms are lost and none is added; where all do, the largest stands for them.
    for scale in (300.0, 1e5):
        every = brute_force(scale * scores) - 8 * math.log(2)
        assert -math.inf < log_mean_exp(scale * scores) <= special.logsumexp(every) + 1e-9 * scale
    assert log_mean_exp(1e5 * scores) == pytest.approx(every.max())
    assert log_mean_exp(np.full((3, 2), -np.inf)) == -np.inf
    assert log_mean_exp(np.zeros((32, 256))) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("shape", [(0, 2), (3, 1), (3, 6), (2, 8)])
def test_bad_shapes(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        best_payload(np.zeros(shape))


def test_bad_scores() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite or -inf"):
            log_mean_exp(np.full((3, 4), bad))
