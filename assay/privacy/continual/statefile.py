"""Files in which a running release survives its process: arrays and settings, never pickled, replaced in one step.

A state file holds undisclosed noise and exact counts: it is as secret as the data (mode 0600). It must never be
restored from a copy and run on: the same steps would be released with two different noises.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy import _chain
from assay.privacy.errors import LedgerError

SCHEMA = "assay.privacy-state/1"
Arrays = dict[str, npt.NDArray[Any]]


class StateFile:
    """A state file, locked against other processes until `close`."""

    _fd = -1

    def __init__(self, path: str | os.PathLike[str], *, new: bool) -> None:
        self.path = Path(path)
        if new and self.path.exists():
            raise LedgerError(f"path must be free, {self.path} exists. Resume it, or choose another.")
        if not new and not self.path.exists():
            raise LedgerError(f"there is no state at {self.path}.")
        lock = self.path.with_name(self.path.name + ".lock")
        self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _chain.lock(self._fd, self.path, 0.0)
        except BaseException:
            self.close()
            raise
        self._pid = os.getpid()

    def check_open(self) -> None:
        """Refuse to go on where nothing could be written."""
        if self._fd < 0 or os.getpid() != self._pid:
            raise LedgerError(f"{self.path} is closed or belongs to another process. Resume it in this one.")

    def write(self, kind: str, settings: dict[str, Any], arrays: Arrays) -> None:
        """Replace the content: when this returns it is on disk; when the machine stops before, the old one is whole."""
        self.check_open()
        buffer = io.BytesIO()
        # The zip's own checksums cover each array, but not its directory: a damaged one can lose an array unnoticed.
        content = {"schema": SCHEMA, "kind": kind, "settings": settings, "arrays": _shapes(arrays)}
        head = json.dumps(content, sort_keys=True).encode("ascii")
        named: dict[str, Any] = {"head": np.frombuffer(head, dtype=np.uint8), **arrays}
        np.savez(buffer, **named)
        temporary = self.path.with_name(self.path.name + ".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _chain.write_all(fd, buffer.getvalue())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, self.path)
        _chain.sync_folder(self.path.parent)

    def read(self, kind: str) -> tuple[dict[str, Any], Arrays]:
        """Settings and arrays.

        Raises
        ------
        LedgerError
            If the file is damaged or of another kind.
        """
        try:
            with np.load(io.BytesIO(self.path.read_bytes()), allow_pickle=False) as held:
                arrays = {name: held[name] for name in held.files}
            head = json.loads(arrays.pop("head").tobytes())
            settings = head["settings"]
            if head["arrays"] != _shapes(arrays):
                raise ValueError("arrays are missing or have another shape")
        except Exception as error:  # a damaged zip raises many kinds
            raise LedgerError(f"{self.path} is not a state file or is damaged ({type(error).__name__}).") from None
        if head.get("schema") != SCHEMA or head.get("kind") != kind:
            raise LedgerError(f"{self.path} holds {head.get('kind')!r} ({head.get('schema')!r}), not {kind!r}.")
        return settings, arrays

    def close(self) -> None:
        """Let others open it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # A release that could not be begun, or was dropped without `close`, must not lock its file for good.
        self.close()


class Unbroken:
    """A block that, left by an exception, is never entered again.

    A step that broke off (an interrupt, a full disk) may have counted its records or drawn its noise already. Were it
    repeated, a record would count twice, or a step be released with two noises.
    """

    def __init__(self) -> None:
        self._sound = True

    def check(self) -> None:
        """Raise LedgerError after a block that broke off."""
        if not self._sound:
            raise LedgerError(
                "a step broke off, so what it counted and drew is unknown. Resume from the state file, whose last "
                "release is whole; without one this release is over, and its cost is spent."
            )

    def __enter__(self) -> None:
        self.check()
        self._sound = False

    def __exit__(self, kind: object, *_: object) -> None:
        self._sound = kind is None


def _shapes(arrays: Arrays) -> dict[str, list[Any]]:
    """Type and shape of every array, as JSON gives them back."""
    return {name: [held.dtype.str, *held.shape] for name, held in arrays.items()}
