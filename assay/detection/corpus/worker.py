"""A worker process: takes shards from its connection, tests their documents, leaves each shard's files on the disk.

The keys arrive over the connection, in memory, as derived PRF keys; they never reach a file, an argument or a log.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import orjson

from assay._errors import TextError
from assay.detection.corpus.ledger import ShardRecord, shard_paths, write_atomically
from assay.detection.corpus.reading import Document, Reject
from assay.detection.corpus.shards import Shard
from assay.detection.testers import tester
from assay.detection.text import LoadedTokenizer
from assay.kernels.chacha import Words
from assay.watermark.schemes import SchemeConfig

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

COLUMNS = (
    "doc_id",
    "source",
    "file",
    "row",
    "n_tokens",
    "n_scored",
    "n_repeats_dropped",
    "statistic",
    "log_pvalue",
    "pvalue",
    "log_evalue",
    "key_id",
    "scheme",
)
"""Columns of a shard; the combined results add log_qvalue, qvalue and flagged."""


@dataclass(frozen=True)
class DetectionKey:
    """What a worker knows of a key: its public name and the PRF key derived from it.

    Attributes
    ----------
    id, config
        Key id and the scheme's settings.
    words
        uint32, from `assay.watermark.keys.use_key`. Secret.
    """

    id: str
    config: SchemeConfig
    words: Words

    def __repr__(self) -> str:
        return f"DetectionKey(id={self.id!r}, config={self.config!r}, words=<hidden>)"


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs: tokenizer, keys, and the folder for its files."""

    tokenizer: LoadedTokenizer
    keys: tuple[DetectionKey, ...]
    folder: Path


def serve(connection: Connection, setup: Setup, parent: int) -> None:
    """Answer each shard with its `ShardRecord`, or with the message of an error that ends the run, until the end."""
    connection.send("ready")
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        try:
            columns, rejects = shard_results(shard, setup)
            # A parent that was killed leaves workers behind; they must not write into what may be another run by now.
            if os.getppid() != parent:
                return
            answer: ShardRecord | str = write_shard(shard, columns, rejects, setup.folder)
        except OSError as error:
            answer = f"{error.strerror or type(error).__name__} ({setup.folder})"
        connection.send(answer)


def main(connection: Connection, pickled: bytes, parent: int) -> NoReturn:
    """Entry point of the process that `pool` starts."""
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup = pickle.loads(pickled)  # noqa: S301  # from the parent, over an anonymous socket
    text_results(["A broken installation shows here, before it can spoil a shard."], setup)
    # From here on messages of the tokenizer library could quote a document.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        serve(connection, setup, parent)
    os._exit(0)


def shard_results(shard: Shard, setup: Setup) -> tuple[dict[str, Any], list[Reject]]:
    """Test a shard's documents; one that cannot be tested becomes a reject and does not touch the others.

    Returns
    -------
    columns
        One sequence per name in `COLUMNS`, a row per document that could be tested.
    rejects
        The shard's rejects and those found here, in order.
    """
    documents, rejects = shard.documents, list(shard.rejects)
    try:
        tested = text_results([document.text for document in documents], setup)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        # The tokenizer library panics with a BaseException. One by one, the others' results do not suffer.
        documents, found = _test_singly(documents, setup)
        rejects = sorted([*rejects, *found], key=lambda reject: (reject.file, reject.row))
        tested = text_results([document.text for document in documents], setup)
    columns = {
        "doc_id": [document.doc_id for document in documents],
        "source": [document.source for document in documents],
        "file": [document.name for document in documents],
        "row": np.array([document.row for document in documents], dtype=np.int64),
        **tested,
    }
    return columns, rejects


def _test_singly(documents: Sequence[Document], setup: Setup) -> tuple[list[Document], list[Reject]]:
    good, rejects = [], []
    for document in documents:
        try:
            text_results([document.text], setup)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            # Only the error's type: its message may quote the text.
            why = ("lone surrogate", "") if isinstance(error, TextError) else ("test failed", type(error).__name__)
            rejects.append(Reject(document.file, document.row, document.consumed, document.name, document.row, *why))
        else:
            good.append(document)
    return good, rejects


def text_results(texts: Sequence[str], setup: Setup) -> dict[str, Any]:
    """The model-free test of every key on every text; the most significant key of each text, Holm-corrected.

    Returns
    -------
    The columns of `COLUMNS` from n_tokens on; a row equals `assay.detect(text, keys)`.
    """
    ids, offsets = setup.tokenizer.encode_batch(texts)
    tests = [tester(key.config).documents_test(ids, offsets, key.words, key.config) for key in setup.keys]
    log_pvalues = np.stack([test.log_pvalue for test in tests])
    best = np.argmin(log_pvalues, axis=0)

    def of_best(name: str) -> npt.NDArray[Any]:
        rows = np.stack([getattr(test, name) for test in tests])
        chosen: npt.NDArray[Any] = np.take_along_axis(rows, best[None], axis=0)[0]
        return chosen

    # Holm's adjusted p-value of the smallest of m is m times it; the e-value takes the same 1 / m as its weight.
    penalty = np.log(len(tests))
    log_pvalue = np.minimum(of_best("log_pvalue") + penalty, 0.0)
    return {
        "n_tokens": tests[0].n_tokens,
        "n_scored": of_best("n_scored"),
        "n_repeats_dropped": of_best("n_repeats_dropped"),
        "statistic": of_best("statistic"),
        "log_pvalue": log_pvalue,
        "pvalue": np.exp(log_pvalue),
        "log_evalue": of_best("log_evalue") - penalty,
        "key_id": [setup.keys[index].id for index in best],
        "scheme": [setup.keys[index].config.tag for index in best],
    }


def shard_schema() -> Any:
    """Arrow schema of a shard's file."""
    import pyarrow as pa

    strings = {"doc_id", "source", "file", "key_id", "scheme"}
    integers = {"row", "n_tokens", "n_scored", "n_repeats_dropped"}
    kinds = [pa.string() if name in strings else pa.int64() if name in integers else pa.float64() for name in COLUMNS]
    return pa.schema(list(zip(COLUMNS, kinds, strict=True)))


def write_shard(shard: Shard, columns: dict[str, Any], rejects: Sequence[Reject], folder: Path) -> ShardRecord:
    """Write a shard's results and rejects, whole or not at all, and describe them for the manifest."""
    import pyarrow as pa
    from pyarrow import parquet

    results_path, rejects_path = shard_paths(folder, shard.index)
    rejects_sha256 = None
    if rejects:
        lines = b"".join(orjson.dumps(_reject_row(reject)) + b"\n" for reject in rejects)
        write_atomically(rejects_path, lines)
        rejects_sha256 = sha256(lines).hexdigest()
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns, schema=shard_schema()), buffer, compression="zstd")
    data = buffer.getvalue()
    write_atomically(results_path, data)
    last = shard.last
    return ShardRecord(
        shard=shard.index,
        documents=len(columns["doc_id"]),
        rejects=len(rejects),
        sha256=sha256(data).hexdigest(),
        rejects_sha256=rejects_sha256,
        n_tokens=int(np.sum(columns["n_tokens"])),
        end=(last.file, last.row),
        consumed=last.consumed,
    )


def _reject_row(reject: Reject) -> dict[str, Any]:
    return {"file": reject.name, "line": reject.line, "reason": reject.reason, "detail": reject.detail}
