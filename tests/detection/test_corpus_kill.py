"""kill -9 of the real command at random moments: after the last resume nothing is lost, doubled or different."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from killing import LIMIT_S, command, finish, outcome, rows_in_manifest, write_corpus
from pyarrow import parquet

from assay.watermark.keys import SecretKey

DOCUMENTS = 1500
SHARD_ROWS = 25
SHARDS = DOCUMENTS // SHARD_ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_key: Callable[..., SecretKey], human_text: str) -> Path:
    """A keyring, and 1500 passages in four files with every 100th row bad."""
    folder = tmp_path_factory.mktemp("kill")
    write_corpus(folder, make_key(1), human_text, documents=DOCUMENTS, files=4, shortest=20, longest=300)
    return folder


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    return command(folder, out, "--workers", "2", "--shard-rows", str(SHARD_ROWS))


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> tuple[bytes, bytes]:
    finish(start(folder, "uninterrupted"))
    return outcome(folder / "uninterrupted")


def storm(folder: Path, out: str, kills: int, seed: int) -> list[int]:
    """Kill the command `kills` times, then let it finish; returns the manifest rows present after each kill.

    Every moment is drawn as a number of further manifest rows and a fraction of a second, so that slow machines are hit
    in the middle as well. Every other kill spares the workers: they go on as orphans while the next start takes over.
    """
    rng = np.random.default_rng(seed)
    present = []
    for kill in range(kills):
        process = start(folder, out)
        goal = rows_in_manifest(folder / out) + int(rng.integers(0, 2 * SHARDS // kills))
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None and rows_in_manifest(folder / out) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        if kill % 2:
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):  # it had finished
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
        present.append(rows_in_manifest(folder / out))
    finish(start(folder, out))
    return present


def check(folder: Path, out: str, uninterrupted: tuple[bytes, bytes]) -> None:
    rows = parquet.read_table(folder / out / "results.parquet")
    ids = Counter(rows["doc_id"].to_pylist())
    assert ids == Counter(str(i) for i in range(DOCUMENTS) if i % 100)
    assert (folder / out / "rejects.jsonl").read_bytes().count(b"\n") == DOCUMENTS // 100
    assert outcome(folder / out) == uninterrupted


def test_kill_at_random_moments(folder: Path, uninterrupted: tuple[bytes, bytes]) -> None:
    present = storm(folder, "killed", kills=3, seed=1)
    assert any(1 < rows < SHARDS for rows in present)  # at least one hit the middle
    check(folder, "killed", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_kills(folder: Path, uninterrupted: tuple[bytes, bytes], seed: int) -> None:
    storm(folder, f"killed-{seed}", kills=12, seed=100 + seed)
    check(folder, f"killed-{seed}", uninterrupted)
