"""Marked texts, and models for them, for the schemes with yes-or-no marks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from assay.detection.model_view import ModelView
from assay.watermark.dipmark import DipmarkConfig
from assay.watermark.fixed_list import FixedListConfig
from assay.watermark.green_list import GreenListConfig
from assay.watermark.gumbel import unmarked_key
from assay.watermark.schemes import sampler_of
from assay.watermark.tournament import TournamentConfig

VOCABULARY = 2048
CONFIGS = {
    "green-list": GreenListConfig(),
    "green-list hard": GreenListConfig(gamma=0.5, delta=None),
    "green-list self": GreenListConfig(seeding="self"),
    "fixed-list": FixedListConfig(),
    "tournament": TournamentConfig(),
    "dipmark": DipmarkConfig(),
}


def module_of_tests(config: Any) -> ModuleType:
    return import_module("assay.detection." + config.scheme.replace("-", "_"))


def module_of(config: Any) -> ModuleType:
    return import_module(type(config).__module__)


def prf_key(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 2**32, 8, dtype=np.uint32)


def view(rows: np.ndarray, tokens: np.ndarray, piece: int = 64) -> ModelView:
    """A model that gives token t of the text the law exp(rows[t])."""

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(rows), piece):
            yield first, rows[first : first + piece]

    return ModelView(lambda: rows[np.arange(len(rows)), tokens].astype(np.float64), pieces)


def law(rng: np.random.Generator, concentration: float, candidates: int = 40) -> np.ndarray:
    """Log-probabilities of a law on some of the vocabulary, float32."""
    row = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    chosen = rng.choice(VOCABULARY, candidates, replace=False)
    row[chosen] = np.log(np.maximum(rng.dirichlet(np.full(candidates, concentration)), 1e-30))
    return row


def guess(ids: np.ndarray, seed: int) -> ModelView:
    """A model that is wrong about a text, with some probability for each of its tokens."""
    rng = np.random.default_rng(seed)
    rows = np.stack([law(rng, 0.3) for _ in ids])
    rows[np.arange(len(ids)), ids] = np.log(rng.uniform(0.01, 1, len(ids)))
    rows -= np.log(np.exp(rows.astype(np.float64)).sum(axis=1, keepdims=True)).astype(np.float32)
    return view(rows, ids)


def write(config: Any, key: np.ndarray, n: int, concentration: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a marked text after a prompt of four ids, and the laws of its tokens."""
    rng = np.random.default_rng(seed)
    draw = sampler_of(config, key, unmarked_key(b"marked"))
    ids = np.zeros((1, n + 4), dtype=np.int64)
    ids[0, :4] = rng.integers(0, VOCABULARY, 4)
    rows = np.stack([law(rng, concentration) for _ in range(n)])
    for t in range(n):
        ids[0, t + 4] = draw(ids[:, : t + 4], rows[t : t + 1], None)[0]
    return ids[0].astype(np.uint32), rows
