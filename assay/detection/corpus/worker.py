"""A worker process: takes shards from its connection, tests their documents, leaves each shard's files on the disk.

What it tests for arrives over the connection, in memory; derived PRF keys never reach a file, an argument or a log.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
import orjson

from assay._errors import AssayError, TextError
from assay.detection.corpus.ledger import ShardRecord, shard_paths, write_atomically
from assay.detection.corpus.reading import Document, Reject
from assay.detection.corpus.shards import Shard
from assay.detection.corpus.subject import DocumentTests, Setup, Test, UntestableError, WorkerBroken

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_DOCUMENT_COLUMNS: Final[Mapping[str, type]] = MappingProxyType({"doc_id": str, "source": str, "file": str, "row": int})


@dataclass(frozen=True)
class Refusal:
    """A message for the user that ends the run."""

    message: str


def all_columns(tests: DocumentTests) -> dict[str, type]:
    """Columns of a shard, with their types; the combined results add log_qvalue, qvalue and flagged."""
    return {**_DOCUMENT_COLUMNS, **tests.columns}


def serve(connection: Connection, setup: Setup, test: Test, parent: int) -> None:
    """Answer each shard with its `ShardRecord`, or with a `Refusal`, until the end."""
    connection.send("ready")
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        answer: ShardRecord | Refusal
        try:
            columns, rejects = shard_results(shard, test)
            # A parent that was killed leaves workers behind; they must not write into what may be another run by now.
            if os.getppid() != parent:
                return
            answer = write_shard(shard, columns, rejects, setup)
        except OSError as error:
            answer = Refusal(
                f"a shard could not be written: {error.strerror or type(error).__name__} ({setup.folder}). "
                "Once the cause is gone, the same command resumes the run."
            )
        connection.send(answer)


def main(connection: Connection, pickled: bytes, parent: int) -> NoReturn:
    """Entry point of the process that `pool` starts."""
    # Blocked since the start; ignored from here on, whatever a library does to the mask.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup: Setup = pickle.loads(pickled)  # noqa: S301  # from the parent, over an anonymous socket
    try:
        test = setup.tests.open()
    except (AssayError, ValueError, OSError) as error:
        connection.send(Refusal(str(error)))
        os._exit(1)
    # From here on messages of the tokenizer library could quote a document.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        serve(connection, setup, test, parent)
    os._exit(0)


def shard_results(shard: Shard, test: Test) -> tuple[dict[str, Any], list[Reject]]:
    """Test a shard's documents; one that cannot be tested becomes a reject and does not touch the others.

    Returns
    -------
    columns
        One sequence per name in `all_columns`, a row per document that could be tested.
    rejects
        The shard's rejects and those found here, in order.
    """
    documents, rejects = shard.documents, list(shard.rejects)
    try:
        tested = test(documents)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, WorkerBroken)):
            raise
        # The tokenizer library panics with a BaseException. One by one, the others' results do not suffer.
        documents, found = _test_singly(documents, test)
        rejects = sorted([*rejects, *found], key=lambda reject: (reject.file, reject.row))
        tested = test(documents)
    columns = {
        "doc_id": [document.doc_id for document in documents],
        "source": [document.source for document in documents],
        "file": [document.name for document in documents],
        "row": np.array([document.row for document in documents], dtype=np.int64),
        **tested,
    }
    return columns, rejects


def _test_singly(documents: Sequence[Document], test: Test) -> tuple[list[Document], list[Reject]]:
    good, rejects = [], []
    for document in documents:
        try:
            test([document])
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit, WorkerBroken)):
                raise
            why = _why(error)
            rejects.append(Reject(document.file, document.row, document.consumed, document.name, document.row, *why))
        else:
            good.append(document)
    return good, rejects


def _why(error: BaseException) -> tuple[str, str]:
    """Reason and detail of a reject."""
    if isinstance(error, UntestableError):
        return error.reason, error.detail
    if isinstance(error, TextError):
        return "lone surrogate", ""
    return "test failed", type(error).__name__  # only the type: the message may quote the text


def arrow_schema(columns: Mapping[str, type]) -> Any:
    """Arrow schema of columns of str, int and float."""
    import pyarrow as pa

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


def write_shard(shard: Shard, columns: dict[str, Any], rejects: Sequence[Reject], setup: Setup) -> ShardRecord:
    """Write a shard's results and rejects, whole or not at all, and describe them for the manifest."""
    import pyarrow as pa
    from pyarrow import parquet

    results_path, rejects_path = shard_paths(setup.folder, shard.index)
    rejects_sha256 = None
    if rejects:
        lines = b"".join(orjson.dumps(_reject_row(reject)) + b"\n" for reject in rejects)
        write_atomically(rejects_path, lines)
        rejects_sha256 = sha256(lines).hexdigest()
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns, schema=arrow_schema(all_columns(setup.tests))), buffer, compression="zstd")
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
