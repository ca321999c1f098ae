"""Byte streams of input files: hashed on the way, unpacked as far as they go, never silently cut short."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER = 1 << 20
# A zstd block of a few bytes can stand for 128 KiB; small pieces bound what one of them can unfold to.
_PACKED_PIECE = 1 << 13


class _Stream(io.RawIOBase):
    def readable(self) -> bool:
        return True


class Hashed(_Stream):
    """A file that hashes the bytes that are read from it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()
        self.consumed = 0

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into the buffer and hash what was read; 0 at the end."""
        count: int = self._handle.readinto(buffer)  # type: ignore[attr-defined]  # a file opened in binary mode has it
        self._digest.update(memoryview(buffer)[:count])
        self.consumed += count
        return count

    def sha256(self) -> str:
        """The hash of the whole file: what was left unread is read now."""
        rest = bytearray(BUFFER)
        while self.readinto(rest):
            pass
        return self._digest.hexdigest()


class Gzip(_Stream):
    """Decompressed gzip, as far as it goes: a larger read would drop what it has when it meets the damage."""

    def __init__(self, packed: gzip.GzipFile) -> None:
        self._packed = packed

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Unpack into the buffer; 0 at the end, EOFError where the file ends too early."""
        target = memoryview(buffer)
        piece = self._packed.read1(len(target))
        target[: len(piece)] = piece
        return len(piece)


class Zstandard(_Stream):
    """Decompressed zstd frames. Unlike the library's own reader it notices a file that ends inside a frame."""

    def __init__(self, packed: Hashed) -> None:
        self._packed = packed
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Unpack into the buffer; 0 at the end, EOFError where the file ends too early."""
        while not self._ready:
            piece = self._packed.read(_PACKED_PIECE)
            if not piece:
                if self._inside:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._ready = memoryview(b"".join(self._unpack(piece)))
        target = memoryview(buffer)
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            yield self._frame.decompress(piece)
            self._inside = not self._frame.eof
            piece = b""
            if self._frame.eof:
                piece = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
