"""Shared fixtures: human prose that the repository ships, keys with fixed secrets."""

from __future__ import annotations

import os

# Two test processes on two cores: more threads in each would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gzip
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def make_key() -> Callable[..., SecretKey]:
    """A key whose secret is a hash of a number: fixed across runs."""

    def make(number: int = 0, window: int = 4) -> SecretKey:
        secret = hashlib.sha256(f"test key {number}".encode()).digest()
        return SecretKey(secret, id=f"test-{number}", config=GumbelConfig(window=window))

    return make


@pytest.fixture(scope="session")
def human_text() -> str:
    """About 180,000 characters of prose that the bundled model was not trained on."""
    raw = gzip.decompress((ROOT / "data" / "corpus" / "the-time-machine.txt.gz").read_bytes())
    return " ".join(raw.decode("utf-8").split())


@pytest.fixture(scope="session")
def zipf_ids() -> Callable[[int, int], np.ndarray]:
    """Token ids with the frequencies of natural text: ids(n, seed)."""

    def ids(n: int, seed: int) -> np.ndarray:
        return (np.random.default_rng(seed).zipf(1.2, n) % 2048).astype(np.uint32)

    return ids


def work_in_process(shards: Iterator[Any], setup: Any, count: int, gpus: Any = ()) -> Iterator[Any]:
    """In place of `pool.work`: shards are tested in this process."""
    from assay.detection.corpus import worker

    test = setup.tests.open()
    for shard in shards:
        yield worker.write_shard(shard, *worker.shard_results(shard, test), setup)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpus runs test their shards in this process: for tests of what comes out, which the processes do not change."""
    from assay.detection.corpus import pool

    monkeypatch.setattr(pool, "work", work_in_process)
