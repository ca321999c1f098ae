"""The keyring file on disk: mode 0600 from its first byte, replaced as a whole or not at all, one writer at a time.

Needs a POSIX system. A reader needs no lock: it sees the file before or after a change, never between.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from assay._errors import KeyringError

_MAX_BYTES = 1 << 24  # a key takes some 600 bytes; the bound keeps a hostile file from filling the memory
_LOCK_SECONDS = 10.0


def resolved(path: str | os.PathLike[str]) -> Path:
    """The file that `path` leads to."""
    # Links are followed now, so that replacing the file replaces what a link points to and not the link.
    return Path(path).expanduser().resolve()


def make_directories(path: Path) -> None:
    """Make the missing directories of a path, each with mode 0700; those that exist stay as they are."""
    # With parents=True, Path.mkdir would give the mode to the last one only.
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path before a message that begins with "it" or "its"."""
    try:
        yield
    except KeyringError as error:
        message = str(error)
        raise KeyringError(message if str(path) in message else f"keyring {path}: {message}") from None


def read(path: Path) -> tuple[bytes, bool]:
    """The file's bytes, and whether its owner alone may read and write it.

    Raises
    ------
    KeyringError
        If the file is missing, unreadable, not a regular file, or larger than any keyring.
    """
    try:
        # Non-blocking, so that a named pipe in the keyring's place cannot hang the caller.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyringError(
            f"path must name a keyring, there is none at {path}. Make one with Keyring.create() or `assay keys new`."
        ) from None
    except OSError as error:
        raise KeyringError(f"{path} cannot be read: {error.strerror}.") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise KeyringError(f"path must name a keyring file, {path} is not a regular file.")
    with os.fdopen(fd, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise KeyringError(f"{path} is larger than {_MAX_BYTES} bytes, hence no keyring.")
    return data, not mode & 0o077


def write(path: Path, data: bytes) -> None:
    """Replace the file by `data`, durably; on an error or a crash the old file stays. The caller holds the lock.

    Raises
    ------
    OSError
        If the directory cannot be written or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    # The lock is held, so a file of this name is what a killed writer left.
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name is durable only when the directory is.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other writers, processes and threads, from changing the file.

    The lock lies on a file beside the keyring, because the keyring itself is replaced; that file stays, since removing
    it would let two writers hold two different locks. The system frees the lock of a killed process.

    Raises
    ------
    KeyringError
        If another writer keeps the lock for ten seconds.
    """
    import fcntl  # POSIX only; here, so that the public part of a keyring can be read anywhere

    lock = path.with_name(path.name + ".lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise KeyringError(f"{path} is being changed by another process. Try again later.") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)
