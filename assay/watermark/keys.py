"""Keys: 256-bit secrets with an id, the scheme they are for, a state and dates.

The secret never appears in a repr, a pickle-free export, a log or an exception; only `use_key` touches it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn

import numpy as np

from assay.kernels.chacha import Words
from assay.watermark.schemes import SchemeConfig, config_from

KeyState = Literal["active", "retired", "revoked"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PERSON = b"assay-prf-v1"
_FINGERPRINT_PERSON = b"assay-key-print"


@dataclass(frozen=True, kw_only=True)
class KeyInfo:
    """All that may be known about a key in public.

    Attributes
    ----------
    id
        1-64 letters, digits, '.', '_' or '-', beginning with a letter or digit.
    config
        Settings of the scheme that the key is for; scheme, version and settings are bound into the PRF.
    fingerprint
        128 bits in hexadecimal that identify the secret and reveal nothing of it.
    state
        "active" keys embed and detect; "retired" keys detect only; "revoked" keys do neither unless named explicitly.
    created, retired, revoked
        UTC times of the changes of state; None where there was none.
    """

    id: str
    config: SchemeConfig
    fingerprint: str
    state: KeyState = "active"
    created: datetime
    retired: datetime | None = None
    revoked: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        return {
            "id": self.id,
            "scheme": self.config.scheme,
            "version": self.config.version,
            "parameters": self.config.parameters(),
            "fingerprint": self.fingerprint,
            "state": self.state,
            "created": self.created.isoformat(),
            "retired": self.retired.isoformat() if self.retired else None,
            "revoked": self.revoked.isoformat() if self.revoked else None,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KeyInfo:
        """The description that `to_dict` wrote."""
        return cls(
            id=data["id"],
            config=config_from(data["scheme"], data["version"], data["parameters"]),
            fingerprint=data["fingerprint"],
            state=data["state"],
            created=datetime.fromisoformat(data["created"]),
            retired=datetime.fromisoformat(data["retired"]) if data["retired"] else None,
            revoked=datetime.fromisoformat(data["revoked"]) if data["revoked"] else None,
        )


class SecretKey:
    """A watermark key: public description plus a 256-bit secret that it never shows.

    Parameters
    ----------
    secret
        32 bytes from a cryptographic source. Use `SecretKey.generate` unless the secret comes from a keyring.
    id
        See `KeyInfo.id`.
    config
        Scheme settings.
    state, created, retired, revoked
        See `KeyInfo`.

    Raises
    ------
    ValueError
        If the id, the state or the length of the secret is not accepted. The secret is not repeated in the message.
    """

    __slots__ = ("_secret", "info")

    def __init__(
        self,
        secret: bytes,
        *,
        id: str,
        config: SchemeConfig,
        state: KeyState = "active",
        created: datetime | None = None,
        retired: datetime | None = None,
        revoked: datetime | None = None,
    ) -> None:
        if not isinstance(secret, bytes) or len(secret) != 32:
            size = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(secret).__name__
            raise ValueError(f"secret must be 32 bytes, got {size}. Use SecretKey.generate() to make one.")
        if not isinstance(id, str) or not _ID.fullmatch(id):
            raise ValueError(
                f"id must be 1-64 letters, digits, '.', '_' or '-' and begin with a letter or digit, got {id!r}."
            )
        if state not in ("active", "retired", "revoked"):
            raise ValueError(f"state must be 'active', 'retired' or 'revoked', got {state!r}.")
        self._secret = secret
        self.info = KeyInfo(
            id=id,
            config=config,
            fingerprint=hashlib.blake2b(key=secret, person=_FINGERPRINT_PERSON, digest_size=16).hexdigest(),
            state=state,
            created=created if created is not None else datetime.now(UTC).replace(microsecond=0),
            retired=retired,
            revoked=revoked,
        )

    @classmethod
    def generate(cls, id: str | None = None, config: SchemeConfig | None = None) -> SecretKey:
        """A new key from the operating system's randomness.

        Parameters
        ----------
        id
            Key id; default "k-" and 12 random hexadecimal digits.
        config
            Scheme settings; default `GumbelConfig()`.
        """
        if config is None:
            from assay.watermark.gumbel import GumbelConfig

            config = GumbelConfig()
        return cls(
            secrets.token_bytes(32), id=id if id is not None else f"k-{secrets.token_hex(6)}", config=config
        )

    @property
    def id(self) -> str:
        """The key id."""
        return self.info.id

    @property
    def config(self) -> SchemeConfig:
        """The scheme settings."""
        return self.info.config

    @property
    def state(self) -> KeyState:
        """The key's state."""
        return self.info.state

    def with_state(self, state: KeyState, at: datetime) -> SecretKey:
        """The same secret in another state, the change dated `at` (UTC)."""
        dates = {"retired": self.info.retired, "revoked": self.info.revoked}
        if state in dates:
            dates[state] = at
        return SecretKey(
            self._secret,
            id=self.id,
            config=self.config,
            state=state,
            created=self.info.created,
            retired=dates["retired"],
            revoked=dates["revoked"],
        )

    def __repr__(self) -> str:
        return f"SecretKey(id={self.id!r}, scheme={self.config.tag!r}, state={self.state!r}, secret=<hidden>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretKey):
            return NotImplemented
        return self.info == other.info and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((self.info.id, self.info.fingerprint))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "SecretKey refuses to be pickled or copied into a config: the secret would leave the keyring. "
            "Pass the key as a call argument, or pass the keyring's path and the key id."
        )

    def __deepcopy__(self, memo: dict[int, object]) -> SecretKey:
        # transformers deep-copies generation settings on every call; an immutable key may be shared.
        return self


def use_key(key: SecretKey) -> Words:
    """The PRF key of one (scheme, version, settings, key id): no two of them ever share PRF outputs.

    K_use = BLAKE2b-256(key=secret, person="assay-prf-v1", data=fields), each field preceded by its length as a
    little-endian 32-bit number, so that no two lists of fields give the same data.

    Returns
    -------
    uint32, shape (8,): little-endian words. Secret: it must not be logged or stored.
    """
    data = b"".join(
        len(field).to_bytes(4, "little") + field
        for field in (key.config.tag.encode(), key.config.canonical(), key.id.encode())
    )
    digest = hashlib.blake2b(data, key=key._secret, person=_PERSON, digest_size=32).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


