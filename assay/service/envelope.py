"""Envelope encryption: each secret under a data key of its own, each data key under the master key, AES-256-GCM.

The tenant and the key id are associated data of both, so a row copied to another tenant or id does not open.
Reference: NIST SP 800-38D.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from assay._errors import KeyringError

_NONCE = 12
ENVIRONMENT = "ASSAY_MASTER_KEY"


@runtime_checkable
class MasterKey(Protocol):
    """Wraps data keys: a local key, or a key management service behind the same two methods."""

    @property
    def id(self) -> str:
        """Names the key, reveals nothing of it; at most 64 characters."""

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        """A data key of 32 bytes, sealed for a context."""

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The data key.

        Raises
        ------
        KeyringError
            If it was sealed by another key, for another context, or damaged.
        """


class LocalMasterKey:
    """A master key held in memory.

    Parameters
    ----------
    key
        32 bytes from a cryptographic source.

    Raises
    ------
    KeyringError
        If it has another length. The key is not repeated in the message.
    """

    __slots__ = ("_aead", "id")

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) != 32:
            got = len(key) if isinstance(key, bytes) else type(key).__name__
            raise KeyringError(f"a master key must be 32 bytes, got {got}. Make one with `openssl rand -base64 32`.")
        self.id = "local-" + hashlib.blake2b(key=key, person=b"assay-master", digest_size=8).hexdigest()
        self._aead = AESGCM(key)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, create: bool = False) -> LocalMasterKey:
        """The key in a file, 32 bytes in base64; with `create`, a missing file is made with mode 0600.

        Raises
        ------
        KeyringError
            If the file holds anything else, or others may read it.
        OSError
            If it cannot be read.
        """
        place = Path(path)
        if create and not place.exists():
            _create(place, base64.b64encode(secrets.token_bytes(32)) + b"\n")
        if place.stat().st_mode & 0o077:
            raise KeyringError(f"{place} must be readable by its owner alone: chmod 600 it, then replace the key.")
        return cls._decoded(place.read_text(encoding="ascii", errors="replace"), str(place))

    @classmethod
    def from_environment(cls) -> LocalMasterKey | None:
        """The key in ASSAY_MASTER_KEY, which is removed from the environment; None if it is not set."""
        text = os.environ.pop(ENVIRONMENT, None)
        return None if text is None else cls._decoded(text, ENVIRONMENT)

    @classmethod
    def _decoded(cls, text: str, source: str) -> LocalMasterKey:
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise KeyringError(f"{source} must hold 32 bytes in base64, as `openssl rand -base64 32` writes.") from None
        return cls(key)

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        """See `MasterKey.wrap`."""
        return _seal(self._aead, data_key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """See `MasterKey.unwrap`."""
        return _open(self._aead, wrapped, context)

    def __repr__(self) -> str:
        return f"LocalMasterKey(id={self.id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a master key refuses to be pickled: it would leave this process.")


def seal(master: MasterKey, secret: bytes, *, tenant: str, key_id: str) -> tuple[bytes, bytes]:
    """A secret sealed under a fresh data key.

    Returns
    -------
    wrapped data key, sealed secret.
    """
    data_key, context = AESGCM.generate_key(256), _context(tenant, key_id)
    return master.wrap(data_key, context), _seal(AESGCM(data_key), secret, context)


def unseal(master: MasterKey, wrapped: bytes, sealed: bytes, *, tenant: str, key_id: str) -> bytes:
    """The secret.

    Raises
    ------
    KeyringError
        If the master key is another, the rows are another key's, or something was changed.
    """
    context = _context(tenant, key_id)
    return _open(AESGCM(master.unwrap(wrapped, context)), sealed, context)


def _create(place: Path, content: bytes) -> None:
    """A file of mode 0600, whole or not at all; where another process was quicker, its file stays."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, place)
    finally:
        draft.unlink()


def _context(tenant: str, key_id: str) -> bytes:
    parts = (b"assay-service/1", tenant.encode(), key_id.encode())
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _seal(aead: AESGCM, content: bytes, context: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE)
    return nonce + aead.encrypt(nonce, content, context)


def _open(aead: AESGCM, sealed: bytes, context: bytes) -> bytes:
    try:
        return aead.decrypt(sealed[:_NONCE], sealed[_NONCE:], context)
    except (InvalidTag, ValueError):
        raise KeyringError("a stored key does not open: another master key, or the database was changed.") from None
