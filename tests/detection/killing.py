"""Corpus runs by the real command, to be killed and resumed: the corpus, the command, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey

LIMIT_S = 240


def write_corpus(
    folder: Path, key: SecretKey, human_text: str, *, documents: int, files: int, shortest: int, longest: int
) -> None:
    """A keyring, and passages of so many characters in some files, with every 100th row bad."""
    with pytest.warns(UserWarning, match="not encrypted"):
        Keyring.create(folder / "keys.json", development=True).add(key)
    rng = np.random.default_rng(2)
    (folder / "corpus").mkdir()
    rows = []
    for i in range(documents):
        start = int(rng.integers(len(human_text) - longest))
        rows.append(json.dumps({"id": i, "text": human_text[start : start + int(rng.integers(shortest, longest))]}))
    for i in range(0, documents, 100):
        rows[i] = "{bad"
    for k in range(files):
        (folder / f"corpus/{k}.jsonl").write_text("\n".join(rows[k::files]))


def command(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    """Test the corpus in a folder; the process leads a group of its own, and its environment holds a passphrase."""
    arguments = ["corpus", "--key", "test-1", "--out", out, "--id-column", "id", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "assay", "detect", *arguments],
        cwd=folder,
        env=os.environ | {"ASSAY_KEYRING": "keys.json", "ASSAY_PASSPHRASE": "hunter2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a run with rejects."""
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3, messages.decode()


def outcome(out: Path) -> tuple[bytes, bytes]:
    return (out / "results.parquet").read_bytes(), (out / "rejects.jsonl").read_bytes()


def rows_in_manifest(out: Path) -> int:
    try:
        return (out / "ledger/manifest.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
