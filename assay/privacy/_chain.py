"""The ledger's file: lines that name the hash of the line before, each on disk before the next act.

A line is `{"body": ..., "hash": ..., "number": n, "previous": ...}` and a newline; hash = SHA-256 of the other three.
A torn last line was never acknowledged, so no noise left on its account: it is cut off. Other damage is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from assay.privacy.errors import LedgerError

SCHEMA = "assay.privacy-ledger/1"
_START = "0" * 64


def hash_of(number: int, previous: str, body: dict[str, Any]) -> str:
    """SHA-256 of a line's content in one spelling."""
    text = json.dumps([SCHEMA, number, previous, body], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def line_of(number: int, previous: str, body: dict[str, Any]) -> tuple[bytes, str]:
    """A line and its hash."""
    mine = hash_of(number, previous, body)
    row = {"number": number, "previous": previous, "body": body, "hash": mine}
    return json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n", mine


def first_line(body: dict[str, Any]) -> bytes:
    """The line that opens a chain."""
    return line_of(0, _START, body)[0]


def read(raw: bytes, path: Path) -> tuple[list[dict[str, Any]], str, int, bool]:
    """Bodies of a chain, the hash of its last line, its length in bytes, and whether its last newline is missing.

    Raises
    ------
    LedgerError
        If the first line is incomplete, or any line but a torn last one is not what was written.
    """
    *whole, tail = raw.split(b"\n")
    bodies: list[dict[str, Any]] = []
    head, length = _START, 0
    for number, line in enumerate(whole):
        row = _row(line, number, head)
        if row is None:
            raise LedgerError(
                f"{path} is damaged at line {number + 1}: it does not continue the chain. No spend is possible. "
                "Restore the file from a copy, or count its whole budget as spent."
            )
        bodies.append(row["body"])
        head, length = row["hash"], length + len(line) + 1
    # A last line that lacks only its newline is complete: to count it errs on the safe side.
    row = _row(tail, len(bodies), head) if tail else None
    if row is not None:
        bodies.append(row["body"])
        head, length = row["hash"], length + len(tail)
    if not bodies:
        raise LedgerError(f"{path} is not a ledger: its first line is incomplete. Make a new one with Ledger.create().")
    return bodies, head, length, row is not None


def _row(line: bytes, number: int, previous: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        good = (
            isinstance(row, dict)
            and set(row) == {"number", "previous", "body", "hash"}
            and isinstance(row["body"], dict)
            and (row["number"], row["previous"]) == (number, previous)
            and row["hash"] == hash_of(number, previous, row["body"])
        )
    except (ValueError, UnicodeDecodeError, RecursionError):
        return None
    return row if good else None


def publish(path: Path, content: bytes) -> None:
    """Make a new file with this content, mode 0600: whole or absent, never over an existing one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(temporary, path)  # unlike a rename, a link never replaces
        except FileExistsError:
            raise LedgerError(f"path must be free, {path} exists. Use Ledger.open().") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_folder(path.parent)


def write_all(fd: int, content: bytes) -> None:
    """Write all bytes, however few each call takes."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Make names in a folder as durable as the files."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int, path: Path, seconds: float) -> None:
    """Take the file's lock; the system frees it when the holder closes the file or dies.

    Raises
    ------
    LedgerError
        If another process keeps it for so long.
    """
    import fcntl  # POSIX only; without it there is no promise to keep

    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LedgerError(f"{path} is open in another process. Wait for it, or pass wait=.") from None
            time.sleep(0.02)
