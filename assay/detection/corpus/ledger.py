"""The ledger of a corpus run: what is pinned, which shards are done, and files that are whole or absent.

A shard counts once its manifest row is on the disk, and the row is written after the shard's files are; whatever a
crash leaves without a row is done again under the same name. Nothing is lost, nothing is counted twice.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from assay._errors import RunError
from assay.detection.corpus.reading import Position
from assay.detection.corpus.sources import InputFile

SCHEMA = "assay.corpus-ledger/1"
_BUFFER = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What the manifest says of a finished shard.

    Attributes
    ----------
    shard
        Its index.
    documents, rejects
        Rows in its two files.
    sha256, rejects_sha256
        Hashes of the two files; the second is None where there are no rejects and no file.
    n_tokens
        Tokens of its documents.
    end, consumed
        Where the corpus goes on after it, and the bytes read of that file.
    """

    shard: int
    documents: int
    rejects: int
    sha256: str
    rejects_sha256: str | None
    n_tokens: int
    end: Position
    consumed: int


@dataclass
class Ledger:
    """An open ledger. Made by `open_ledger`, which holds the lock meanwhile.

    Attributes
    ----------
    folder
        `ledger/` in the output folder.
    started
        UTC time of the first start, ISO 8601.
    shards
        Finished shards whose files are there and unchanged, by index.
    inputs
        SHA-256 by input index, of the files read to the end; None where one could not be read.
    finished
        The last manifest row of a complete run, else None.
    """

    folder: Path
    started: str
    shards: dict[int, ShardRecord] = field(default_factory=dict)
    inputs: dict[int, str | None] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    _manifest: int = -1

    def record_shard(self, record: ShardRecord) -> None:
        """Count a shard whose files are on the disk; on return the row is on the disk as well."""
        self._append({"kind": "shard", **asdict(record)}, durable=True)
        self.shards[record.shard] = record

    def record_input(self, index: int, sha256: str | None) -> None:
        """Note an input file's hash. It reaches the disk with the next shard; else the file is read again."""
        if index not in self.inputs:
            self._append({"kind": "input", "file": index, "sha256": sha256}, durable=False)
            self.inputs[index] = sha256

    def record_finished(self, outputs: dict[str, str]) -> None:
        """Declare the run complete, with the hash of each output file."""
        row = {"kind": "finished", "outputs": outputs}
        self._append(row, durable=True)
        self.finished = row

    def first_missing(self) -> tuple[int, Position]:
        """Index of the first shard that is not done, and where the corpus goes on before it."""
        index = 0
        while index in self.shards:
            index += 1
        return index, (self.shards[index - 1].end if index else (0, 0))

    def discard_shards(self) -> None:
        """Remove the shard files of a complete run, whose rows are all in the combined output."""
        for path in (self.folder / "shards").iterdir():
            path.unlink(missing_ok=True)  # the temporary file of a worker that was left behind may go by itself

    def _append(self, row: dict[str, Any], *, durable: bool) -> None:
        _write_all(self._manifest, orjson.dumps(row) + b"\n")
        if durable:
            os.fsync(self._manifest)


@contextmanager
def open_ledger(out: Path, pins: dict[str, Any], inputs: Sequence[InputFile]) -> Iterator[Ledger]:
    """The ledger of an output folder, new or resumed, locked against every other process.

    Parameters
    ----------
    out
        Output folder; made if missing.
    pins
        JSON-ready description of everything that decides the results, apart from the inputs. No secrets.
    inputs
        The input files, pinned by name, size and time of change.

    Raises
    ------
    RunError
        If the folder cannot be written, another process works in it, it holds results without a ledger, or it was
        begun with other pins or inputs; the message names what differs.
    """
    folder = out / "ledger"
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(
            f"out must be a folder that can be written, got {str(out)!r}: {error.strerror}. Choose another --out."
        ) from error
    try:
        _lock(lock, out)
        listing = b"".join(
            orjson.dumps({"path": file.name, "size": file.size, "mtime_ns": file.mtime_ns}) + b"\n" for file in inputs
        )
        pins = pins | {"inputs": {"files": len(inputs), "sha256": hashlib.sha256(listing).hexdigest()}}
        ledger = _resume(out, folder, pins, listing) or _begin(out, folder, pins, listing)
        try:
            yield ledger
        finally:
            os.close(ledger._manifest)
    finally:
        os.close(lock)


def _lock(lock: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:
        raise RunError("corpus runs need a POSIX system (Linux, macOS, WSL): this one has no file locks.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(
            f"out: another process is writing to {str(out)!r}. Wait until it has ended, or choose another --out."
        ) from error


def _begin(out: Path, folder: Path, pins: dict[str, Any], listing: bytes) -> Ledger:
    # A manifest without a valid first row is what a crash in this function leaves; it decides nothing yet.
    if (out / "results.parquet").exists() and not (folder / "inputs.jsonl").exists():
        raise RunError(f"out: {str(out)!r} holds results of something else. Choose another --out, or move them away.")
    write_atomically(folder / "inputs.jsonl", listing)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    header = {"kind": "run", "schema": SCHEMA, "started": started, "pins": pins}
    write_atomically(folder / "manifest.jsonl", orjson.dumps(header) + b"\n")
    return Ledger(folder, started, _manifest=_open_manifest(folder))


def _resume(out: Path, folder: Path, pins: dict[str, Any], listing: bytes) -> Ledger | None:
    path = folder / "manifest.jsonl"
    for leftover in [*out.glob(".*.tmp"), *folder.glob(".*.tmp"), *folder.glob("shards/.*.tmp")]:
        leftover.unlink(missing_ok=True)
    if not path.exists():
        return None
    rows, whole = _valid_rows(path)
    if not rows or rows[0].get("kind") != "run":
        return None
    _compare(out, folder, rows[0], pins, listing, finished=rows[-1]["kind"] == "finished")
    ledger = Ledger(folder, rows[0]["started"], _manifest=_open_manifest(folder))
    os.ftruncate(ledger._manifest, whole)
    for row in rows[1:]:
        if row["kind"] == "shard":
            del row["kind"]
            ledger.shards[row["shard"]] = ShardRecord(**row | {"end": tuple(row["end"])})
        elif row["kind"] == "input":
            ledger.inputs[row["file"]] = row["sha256"]
        else:
            ledger.finished = row
    if ledger.finished is not None and not _outputs_whole(out, ledger.finished["outputs"]):
        ledger.finished = None
    if ledger.finished is None:
        ledger.shards = {index: record for index, record in ledger.shards.items() if _shard_whole(folder, record)}
    return ledger


def _valid_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows up to the first that is torn, and their length in bytes. To drop a row costs work, never correctness."""
    rows: list[dict[str, Any]] = []
    whole = 0
    with open(path, "rb") as handle:
        for line in handle:
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                break
            if not line.endswith(b"\n") or not isinstance(row, dict):
                break
            rows.append(row)
            whole += len(line)
    return rows, whole


def _compare(
    out: Path, folder: Path, header: dict[str, Any], pins: dict[str, Any], listing: bytes, *, finished: bool
) -> None:
    if header.get("schema") != SCHEMA:
        raise RunError(
            f"out: {str(out)!r} was begun by a version of Assay whose ledger this one does not read "
            f"({header.get('schema')!r}). Finish it with that version, or choose another --out."
        )
    before, now = _flat(header["pins"]), _flat(pins)
    changes = [
        f"{name} was {before.get(name, 'not there')!r} and is {now.get(name, 'not there')!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith("inputs.")
    ]
    if header["pins"]["inputs"] != pins["inputs"]:
        changes += _changed_inputs((folder / "inputs.jsonl").read_bytes(), listing)
    if finished and len(changes) == 1 and before["options.fdr"] != now["options.fdr"]:
        fdr = now["options.fdr"]
        by_report = f", or run `assay report {out} --fdr {fdr} --out REPORT`" if "keys" in pins else ""
        raise RunError(
            f"out: {str(out)!r} holds a finished run with another rate: {changes[0]}. No text needs to be tested "
            f"again: take the rows of results.parquet whose qvalue is at most {fdr}{by_report}."
        )
    if changes:
        raise RunError(
            f"out: {str(out)!r} was begun with something else, and its results would be mixed: {'; '.join(changes)}. "
            "Run the command it was begun with, choose another --out, or remove that folder to start again."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _changed_inputs(before: bytes, now: bytes, shown: int = 3) -> list[str]:
    old, new = ({row["path"]: row for row in map(orjson.loads, text.splitlines())} for text in (before, now))
    differences = [f"input {path} is gone" for path in old if path not in new]
    differences += [f"input {path} is new" for path in new if path not in old]
    differences += [f"input {path} changed" for path in old if path in new and old[path] != new[path]]
    if not differences:
        differences = ["the inputs come in another order"]
    if len(differences) > shown:
        differences[shown:] = [f"and {len(differences) - shown} more inputs differ"]
    return differences


def _outputs_whole(out: Path, outputs: dict[str, str]) -> bool:
    return all((out / name).is_file() and file_sha256(out / name) == sha256 for name, sha256 in outputs.items())


def _shard_whole(folder: Path, record: ShardRecord) -> bool:
    shard, rejects = shard_paths(folder / "shards", record.shard)
    expected = [(shard, record.sha256)] + [(rejects, record.rejects_sha256)] * (record.rejects_sha256 is not None)
    return all(path.is_file() and file_sha256(path) == sha256 for path, sha256 in expected)


def shard_paths(shards: Path, index: int) -> tuple[Path, Path]:
    """Names of a shard's results and rejects; the same on every run."""
    return shards / f"shard-{index:08d}.parquet", shards / f"shard-{index:08d}.rejects.jsonl"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent, whenever the machine stops, and on the disk on return."""
    with writing_atomically(path) as temporary, open(temporary, "wb") as handle:
        handle.write(data)


@contextmanager
def writing_atomically(path: Path) -> Iterator[Path]:
    """A temporary name to write under; at the end it reaches the disk and takes the place of `path` in one step."""
    # Random, because process ids repeat among the machines of a cluster.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_manifest(folder: Path) -> int:
    return os.open(folder / "manifest.jsonl", os.O_WRONLY | os.O_APPEND)


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
