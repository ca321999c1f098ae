"""Object stores (S3 and what else pyarrow reads): inputs by URI, results copied up at the end.

Guarantee: an object is either read whole, as it was listed, or the run stops with a `RunError` and can be resumed: a
broken connection never becomes a reject. An object store has no rename and no append, so the ledger never lives in one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from assay._errors import RunError
from assay.detection.corpus.streams import BUFFER

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXAMPLE = "'s3://bucket/folder' (also gs://, abfs://, hdfs:// as pyarrow.fs.FileSystem.from_uri reads them)"


class Object(NamedTuple):
    """An object as it was when it was listed.

    Attributes
    ----------
    store, path
        The pyarrow file system and the path in it.
    name
        Its URI without options; it can be given as an input again.
    size, mtime_ns
        Bytes and time of change.
    """

    store: Any
    path: str
    name: str
    size: int
    mtime_ns: int


def is_uri(argument: str) -> bool:
    """Whether an argument names a place by URI and not by a path."""
    return _URI.match(argument) is not None


def find_objects(uri: str) -> tuple[list[Object], bool]:
    """The object of this name, or all below it, sorted by the parts of their paths, as the files of a folder are.

    Returns
    -------
    objects
        None of them has a part that begins with a dot below what was named.
    folder
        Whether the URI names a folder.

    Raises
    ------
    RunError
        If the URI is not understood, nothing has the name, or the store cannot be asked.
    """
    from pyarrow import fs

    argument = "paths"
    store, path = _open_store(uri, argument)
    with _asking(argument, _shown(uri)):
        info = store.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise RunError(
                f"paths: there is no object and no folder {_shown(uri)!r}. Patterns are for files; name the folder."
            )
        found = [info] if info.is_file else store.get_file_info(fs.FileSelector(path, recursive=True))
    scheme = urlsplit(uri).scheme
    objects = [
        Object(store, each.path, f"{scheme}://{quote(each.path)}", each.size, each.mtime_ns)
        for each in found
        if each.is_file and not any(part.startswith(".") for part in each.path[len(path) :].split("/"))
    ]
    return sorted(objects, key=lambda each: each.path.split("/")), not info.is_file


def size_and_time(store: Any, path: str, name: str) -> tuple[int, int] | None:
    """Bytes and time of change of an object now, or None where it is gone."""
    with _asking("paths", name):
        info = store.get_file_info(path)
    return (info.size, info.mtime_ns) if info.is_file else None


class OpenObject(io.RawIOBase):
    """An object as a binary file, whose failures end the run instead of passing for damage of the content."""

    def __init__(self, store: Any, path: str, name: str) -> None:
        self._name = name
        with _asking("paths", name):
            self._handle = store.open_input_file(path)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into the buffer; 0 at the end."""
        with _asking("paths", self._name):
            return int(self._handle.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        return int(self._handle.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._handle.tell())

    def close(self) -> None:
        """Let go of the object."""
        if not self.closed and hasattr(self, "_handle"):
            self._handle.close()
        super().close()


def check_destination(uri: str) -> None:
    """Refuse a place that results could not be copied to, before hours of work are spent on them.

    Raises
    ------
    RunError
        If the URI is not understood or its store does not answer.
    """
    if not is_uri(uri):
        raise RunError(f"copy_to must be a URI such as {_EXAMPLE}, got {uri!r}. For a folder, use out.")
    store, path = _open_store(uri, "copy_to")
    with _asking("copy_to", _shown(uri)):
        store.get_file_info(path)


def copy_up(folder: Path, names: Iterable[str], uri: str) -> None:
    """Copy files of a folder to a store, each whole or not at all, and read them back.

    The last name is the sign that the others are there: it is removed first and written last.

    Raises
    ------
    RunError
        If the store refuses, or an object is not what was sent. The files in the folder remain.
    """
    from pyarrow import fs

    store, path = _open_store(uri, "copy_to")
    *first, last = names
    with _asking("copy_to", _shown(uri)):
        if store.type_name != "s3":  # where folders are no more than parts of names
            store.create_dir(path, recursive=True)
        if store.get_file_info(f"{path}/{last}").is_file:
            store.delete_file(f"{path}/{last}")
        for name in (*first, last):
            target = f"{path}/{name}"
            fs.copy_files(str(folder / name), target, fs.LocalFileSystem(), store)
            # pyarrow closes, and so completes, an upload whose source failed under it.
            with open(folder / name, "rb") as ours, store.open_input_stream(target, compression=None) as theirs:
                if _sha256(ours) != _sha256(theirs):
                    raise RunError(
                        f"copy_to: {_shown(uri)}/{name} is not what was sent. The same command copies it again."
                    )


def _sha256(stream: Any) -> bytes:
    digest = hashlib.sha256()
    while piece := stream.read(BUFFER):
        digest.update(piece)
    return digest.digest()


def _open_store(uri: str, argument: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    if "@" in urlsplit(uri).netloc:
        # Never shown: names of inputs go to results, reports and the manifest.
        raise RunError(f"{argument}: a URI must not hold credentials. Give them by environment or role.")
    try:
        store, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        why = str(error).replace(uri, _shown(uri)).split("\n")[0]
        raise RunError(f"{argument} must be paths or URIs such as {_EXAMPLE}, got {_shown(uri)!r}: {why}.") from None
    return store, path.rstrip("/")


def _shown(uri: str) -> str:
    """The URI without its options, which may hold tokens."""
    return uri.partition("?")[0].rstrip("/")


@contextlib.contextmanager
def _asking(argument: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{argument}: the store of {name} does not do what it was asked: {str(error)[:300]}. "
            "Once the cause is gone, the same command resumes the run."
        ) from error
