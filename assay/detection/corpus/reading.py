"""Corpus files as a flat stream of documents and rejects, from any position on.

A row that is not a document becomes a `Reject` with file, line and reason, never its text; nothing stops the stream.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import zstandard

from assay._errors import TextError
from assay.detection.corpus.sources import InputFile, check_unchanged, open_input
from assay.detection.corpus.streams import BUFFER, Gzip, Hashed, Zstandard

_ROWS_PER_BATCH = 1024
_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Names of the columns (JSON fields) to read.

    Attributes
    ----------
    text
        The document.
    id
        Its id, a string or an integer; None: file name and row.
    source
        What the report groups by, a string, an integer or null; None: the file, or the folder of a .txt file.
    """

    text: str = "text"
    id: str | None = None
    source: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """A JSON-ready dict."""
        return asdict(self)


class Document(NamedTuple):
    """One document.

    Attributes
    ----------
    file, name
        Index and name of its file.
    row
        From 1: line of a JSON-lines file, row of a Parquet file; 1 for a text file.
    consumed
        Bytes of the file read so far.
    doc_id, source, text
        See `Columns`.
    """

    file: int
    row: int
    consumed: int
    name: str
    doc_id: str
    source: str | None
    text: str


class Reject(NamedTuple):
    """One row, or the rest of a file, that could not be tested; `line` is `row`, or None where it is the file."""

    file: int
    row: int
    consumed: int
    name: str
    line: int | None
    reason: str
    detail: str


Row = Document | Reject
Position = tuple[int, int]
"""File and row that were read last; (0, 0) is the beginning."""


def read(
    inputs: Sequence[InputFile],
    columns: Columns,
    *,
    after: Position = (0, 0),
    finished: Callable[[int, str | None], None] = lambda file, sha256: None,
) -> Iterator[Row]:
    """All rows after a position, in order.

    Parameters
    ----------
    inputs
        The files, in order.
    columns
        What to read of each row.
    after
        Rows up to and including this one are left out; JSON lines among them are skipped without being parsed.
    finished
        Called with the file's index and SHA-256 (None where it could not be read) when the last row has been taken.

    Raises
    ------
    RunError
        If a file changed since `inputs` was made. Nothing else stops the stream.
    """
    first, skip = after
    for index in range(first, len(inputs)):
        yield from _read_file(index, inputs[index], columns, skip if index == first else 0, finished)


def _read_file(
    index: int, file: InputFile, columns: Columns, skip: int, finished: Callable[[int, str | None], None]
) -> Iterator[Row]:
    formats = {"text": _text_file, "lines": _json_lines, "parquet": _parquet}
    progress = _Progress(row=0)
    sha256 = None
    try:
        check_unchanged(file)
        with open_input(file) as handle:
            raw = Hashed(handle)
            try:
                yield from formats[file.format](index, file, columns, skip, raw, progress)
            except _DAMAGED as error:
                if progress.row + 1 > skip:
                    yield _file_reject(index, file, progress.row, error)
            sha256 = raw.sha256()
        check_unchanged(file)
    except OSError as error:
        sha256 = None
        if progress.row + 1 > skip:
            yield _file_reject(index, file, progress.row, error)
    finished(index, sha256)


@dataclass
class _Progress:
    row: int


_DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError, ValueError)


def _file_reject(index: int, file: InputFile, rows: int, error: Exception) -> Reject:
    if isinstance(error, OSError) and error.errno is not None:
        reason, why = "file cannot be read", error.strerror or type(error).__name__
    else:
        reason, why = "file is damaged", type(error).__name__
    return Reject(index, rows + 1, max(0, file.size), file.name, None, reason, f"{why}, after row {rows}")


def read_packed(path: Path) -> bytes:
    """The content of one file, unpacked if its name ends in .gz, .zst or .zstd.

    Raises
    ------
    TextError
        If it is not packed as its name says, or ends too early.
    OSError
        If it cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            return _unpacked(path.name, Hashed(handle)).read()
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise TextError(
            f"text: {path} cannot be unpacked as its name says ({type(error).__name__}): it is damaged, cut short or "
            "of another format. Unpack it yourself and give the file that comes out."
        ) from None


def _unpacked(name: str, raw: Hashed) -> io.BufferedReader:
    """The content of a file of this name; EOFError where a packed one ends too early."""
    name = name.lower()
    if name.endswith(".gz"):
        packed = gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER))
        return io.BufferedReader(Gzip(packed), BUFFER)
    return io.BufferedReader(Zstandard(raw) if name.endswith((".zst", ".zstd")) else raw, BUFFER)


def _text_file(
    index: int, file: InputFile, columns: Columns, skip: int, raw: Hashed, progress: _Progress
) -> Iterator[Row]:
    if skip:
        return
    data = _unpacked(file.name, raw).read()
    progress.row = 1
    try:
        # utf-8-sig: a byte order mark says how the file is encoded and is no part of the text.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(index, 1, file.size, file.name, None, "invalid UTF-8", f"at byte {error.start}")
        return
    yield Document(index, 1, file.size, file.name, file.name, file.name.rpartition("/")[0] or ".", text)


def _json_lines(
    index: int, file: InputFile, columns: Columns, skip: int, raw: Hashed, progress: _Progress
) -> Iterator[Row]:
    for row, line in enumerate(_unpacked(file.name, raw), 1):
        progress.row = row
        if row <= skip:
            continue
        if row == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if line.strip():
                reason, detail = _what_is_wrong(line, error)
                yield Reject(index, row, raw.consumed, file.name, row, reason, detail)
            continue
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            yield Reject(index, row, raw.consumed, file.name, row, "not a JSON object", f"the line holds a {kind}")
            continue
        yield _judge(
            index,
            row,
            raw.consumed,
            file,
            columns,
            fields.get(columns.text, _MISSING),
            fields.get(columns.id, _MISSING) if columns.id is not None else None,
            fields.get(columns.source, _MISSING) if columns.source is not None else None,
        )


def _what_is_wrong(line: bytes, error: orjson.JSONDecodeError) -> tuple[str, str]:
    """Reason and detail without any of the line's content; the parser's messages name positions only."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return "invalid UTF-8", f"at byte {bad.start} of the line"
    if "surrogate" in error.msg:
        return "lone surrogate", f"at character {error.pos} of the line"
    return "invalid JSON", f"{error.msg}, at character {error.pos} of the line"


def _parquet(
    index: int, file: InputFile, columns: Columns, skip: int, raw: Hashed, progress: _Progress
) -> Iterator[Row]:
    import pyarrow as pa

    try:
        yield from _parquet_rows(index, file, columns, skip, progress)
    except pa.ArrowException as error:
        raise ValueError(type(error).__name__) from error


def _parquet_rows(index: int, file: InputFile, columns: Columns, skip: int, progress: _Progress) -> Iterator[Row]:
    from pyarrow import parquet

    # By path where there is one: pyarrow then reads columns without the interpreter's lock.
    with contextlib.ExitStack() as stack:
        place = file.path if file.store is None else stack.enter_context(open_input(file))
        source = stack.enter_context(parquet.ParquetFile(place))
        reject = _schema_reject(source.schema_arrow, columns)
        if reject is not None:
            if not skip:
                yield Reject(index, 1, file.size, file.name, None, *reject)
            progress.row = 1
            return
        wanted = list(dict.fromkeys(name for name in (columns.text, columns.id, columns.source) if name is not None))
        total = max(1, source.metadata.num_rows)
        for group in range(source.num_row_groups):
            count = source.metadata.row_group(group).num_rows
            if progress.row + count <= skip:
                progress.row += count
                continue
            for batch in source.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=wanted):
                lists = [
                    _values(batch.column(name)) if name is not None else [None] * batch.num_rows
                    for name in (columns.text, columns.id, columns.source)
                ]
                for text, doc_id, origin in zip(*lists, strict=True):
                    progress.row += 1
                    if progress.row > skip:
                        consumed = file.size * progress.row // total
                        yield _judge(index, progress.row, consumed, file, columns, text, doc_id, origin)


def _schema_reject(schema: Any, columns: Columns) -> tuple[str, str] | None:
    import pyarrow as pa

    for role, name in (("text", columns.text), ("id", columns.id), ("source", columns.source)):
        if name is not None and name not in schema.names:
            return f"no {role} column", f"{name!r} is not among the columns {', '.join(map(repr, schema.names))}"
        if name is not None and schema.names.count(name) > 1:
            return f"no {role} column", f"{name!r} names several columns"
    kind = schema.field(columns.text).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    textual = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(check(inner) for check in (*textual, *binary)):
        return "text is not a string", f"column {columns.text!r} holds {kind}"
    return None


def _values(column: Any) -> list[Any]:
    """A column as Python values; strings that are not UTF-8 stay bytes, for `_judge` to reject one by one."""
    import pyarrow as pa

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return list(column.cast(pa.large_binary()).to_pylist())


def _judge(
    index: int, row: int, consumed: int, file: InputFile, columns: Columns, text: Any, doc_id: Any, source: Any
) -> Row:
    def reject(reason: str, detail: str) -> Reject:
        return Reject(index, row, consumed, file.name, row, reason, detail)

    if isinstance(text, bytes):  # Parquet writers of old store strings as bytes
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return reject("invalid UTF-8", f"at byte {error.start} of the text")
    if not isinstance(text, str):
        if text is _MISSING:
            return reject("no text column", f"no field {columns.text!r}")
        if text is None:
            return reject("text is null", f"field {columns.text!r}")
        return reject("text is not a string", f"field {columns.text!r} holds a {type(text).__name__}")
    if columns.id is None:
        doc_id = f"{file.name}:{row}"
    elif not isinstance(doc_id, str):
        if doc_id is _MISSING:
            return reject("no id column", f"no field {columns.id!r}")
        if not isinstance(doc_id, int) or isinstance(doc_id, bool):
            return reject("id is not a string or integer", f"field {columns.id!r} holds a {type(doc_id).__name__}")
        doc_id = str(doc_id)
    if columns.source is None:
        source = file.name
    elif source is not None and not isinstance(source, str):
        if source is _MISSING:
            return reject("no source column", f"no field {columns.source!r}")
        if not isinstance(source, int) or isinstance(source, bool):
            return reject("source is not a string or integer", f"field {columns.source!r}: {type(source).__name__}")
        source = str(source)
    return Document(index, row, consumed, file.name, doc_id, source, text)
