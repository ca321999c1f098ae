"""Keys: 256-bit secrets, or integers of another system, with an id, the scheme they are for, a state and dates.

The secret never appears in a repr, a pickle, an export, a log or an exception. Three places use it: `use_key` here, the
signatures of `signing` and the sealing of `keyring`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from assay.kernels.chacha import Words
from assay.watermark.foreign import SALT_BYTES, ForeignConfig, packed, unpacked
from assay.watermark.schemes import SchemeConfig, config_from, newest

KeyState = Literal["active", "retired", "revoked"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PERSON = b"assay-prf-v1"
_FOREIGN_PERSON = b"assay-foreign-v1"
_FINGERPRINT_PERSON = b"assay-key-print"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


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
        Times of the changes of state, kept in UTC; None where there was none.

    Raises
    ------
    ValueError
        If a field is not of the kind described here.
    """

    id: str
    config: SchemeConfig
    fingerprint: str
    state: KeyState = "active"
    created: datetime
    retired: datetime | None = None
    revoked: datetime | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise ValueError(
                f"id must be 1-64 letters, digits, '.', '_' or '-' and begin with a letter or digit, got {self.id!r}."
            )
        if not isinstance(self.config, SchemeConfig):
            raise ValueError(
                f"config must be scheme settings such as GumbelConfig(), got {type(self.config).__name__}."
            )
        if not isinstance(self.fingerprint, str) or not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ValueError("fingerprint must be 32 lower-case hexadecimal digits.")
        if self.state not in get_args(KeyState):
            raise ValueError(f"state must be 'active', 'retired' or 'revoked', got {self.state!r}.")
        for name in ("created", "retired", "revoked"):
            object.__setattr__(self, name, _utc(name, getattr(self, name)))
        if self.created is None:
            raise ValueError("created must be a time, got None.")

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
        """The description that `to_dict` wrote; other entries are left alone.

        Raises
        ------
        ValueError
            If an entry is missing or out of range, or the scheme is unknown.
        """
        missing = _FIELDS - data.keys()
        if missing:
            raise ValueError(f"the description of a key must have {sorted(_FIELDS)}, {sorted(missing)} are missing.")
        return cls(
            id=data["id"],
            config=config_from(data["scheme"], data["version"], data["parameters"]),
            fingerprint=data["fingerprint"],
            state=data["state"],
            created=_parsed_time("created", data["created"]),
            retired=_parsed_time("retired", data["retired"]) if data["retired"] is not None else None,
            revoked=_parsed_time("revoked", data["revoked"]) if data["revoked"] is not None else None,
        )


_FIELDS = frozenset(("id", "scheme", "version", "parameters", "fingerprint", "state", "created", "retired", "revoked"))


def _utc(name: str, time: datetime | None) -> datetime | None:
    if time is None:
        return None
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise ValueError(f"{name} must be a time with its zone, got {time!r}. Use datetime.now(UTC).")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} must be a time in the years 1 to 9999 of UTC, got {time!r}.") from None


def _parsed_time(name: str, text: object) -> datetime:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be an ISO 8601 time, got {type(text).__name__}.")
    return datetime.fromisoformat(text)


def now() -> datetime:
    """The present in UTC, to the second: the resolution of a key's dates."""
    return datetime.now(UTC).replace(microsecond=0)


class SecretKey:
    """A watermark key: public description plus a 256-bit secret that it never shows.

    Parameters
    ----------
    secret
        32 bytes from a cryptographic source. Use `SecretKey.generate` unless the secret comes from a keyring. For keys
        of other systems, which are integers, use `SecretKey.from_integers`.
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

    _secret: bytes
    info: KeyInfo

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
        object.__setattr__(self, "_secret", secret)
        del secret  # so that a traceback that prints local variables does not print it when a check below fails
        if not isinstance(self._secret, bytes) or len(self._secret) not in _secret_sizes(config):
            size = f"{len(self._secret)} bytes" if isinstance(self._secret, bytes) else type(self._secret).__name__
            raise ValueError(f"secret must be 32 bytes, got {size}. Use SecretKey.generate() to make one.")
        info = KeyInfo(
            id=id,
            config=config,
            # Of imported integers it is salted, so that it cannot be searched for short ones.
            fingerprint=hashlib.blake2b(
                self._secret[32:], key=self._secret[:32], person=_FINGERPRINT_PERSON, digest_size=16
            ).hexdigest(),
            state=state,
            created=created if created is not None else now(),
            retired=retired,
            revoked=revoked,
        )
        object.__setattr__(self, "info", info)

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
            config = newest("gumbel")()
        return cls(secrets.token_bytes(32), id=id if id is not None else f"k-{secrets.token_hex(6)}", config=config)

    @classmethod
    def from_integers(cls, config: SchemeConfig, integers: Iterable[int], *, id: str | None = None) -> SecretKey:
        """A key that another system uses: the integers themselves key the scheme, so that both read each other's texts.

        Parameters
        ----------
        config
            Settings of the scheme, such as `HfKgwConfig(vocab_size=50257)`.
        integers
            `config.n_integers` integers in the scheme's range; see the scheme's page for what they are called there.
        id
            As `generate`.

        Raises
        ------
        ValueError
            If the scheme is not one of another system, or there are too many or too few integers, or one is out of
            range. The message does not repeat them.

        Notes
        -----
        The fingerprint is salted: importing the same integers twice gives two keys that mark alike and are not equal.
        """
        if not isinstance(config, ForeignConfig):
            del integers
            raise ValueError(
                f"config must be settings of another system's scheme, got {type(config).__name__}. "
                "Assay's own schemes take SecretKey.generate()."
            )
        material = packed(config, integers)
        del integers  # so that no traceback below shows them
        if isinstance(material, str):
            raise ValueError(material)
        own_id = id if id is not None else f"k-{secrets.token_hex(6)}"
        return cls(secrets.token_bytes(SALT_BYTES) + material, id=own_id, config=config)

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
        """The same secret in another state, the change dated `at` (with its zone; kept in UTC)."""
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

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"SecretKey is immutable; {name!r} cannot be set. Use with_state() or a new key.")

    def __repr__(self) -> str:
        if not hasattr(self, "info"):  # a traceback may show a key whose making was refused
            return "SecretKey(<refused>, secret=<hidden>)"
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

    def __getstate__(self) -> NoReturn:
        self.__reduce__()

    def __copy__(self) -> SecretKey:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> SecretKey:
        # transformers deep-copies generation settings on every call; an immutable key may be shared.
        return self


class KeepsKeys:
    """Base of objects that hold PRF keys, which mark and detect as the secret does: they refuse to be pickled."""

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} refuses to be pickled: PRF keys would go with it. Make it from the key where it is "
            "needed."
        )


def use_key(key: SecretKey) -> Words:
    """The PRF key of one (scheme, version, settings, key id): no two of them ever share PRF outputs.

    K_use = BLAKE2b-256(key=secret, person="assay-prf-v1", data=fields), each field preceded by its length as a
    little-endian 32-bit number, so that no two lists of fields give the same data.

    Keys of other systems' schemes are the exception: theirs are the integers that the scheme itself uses, whatever the
    id, because another system has to find the same mark.

    Returns
    -------
    uint32, shape (8,): little-endian words; for other systems' schemes shape (2 n,), the low and high word of each of
    the n integers. Secret: it must not be logged or stored.

    Raises
    ------
    ValueError
        If the key is for signing.
    """
    if key.config.purpose != "watermark":
        raise ValueError(
            f"key must be for a watermark scheme, got {key.config.tag!r} (key {key.id!r}); a signing key never keys a "
            "watermark. Make one with SecretKey.generate(config=GumbelConfig()) or `assay keys new`."
        )
    if isinstance(key.config, ForeignConfig):
        return np.frombuffer(_foreign_material(key, key.config), dtype="<u4").astype(np.uint32)
    data = _encoded(key.config.tag.encode(), key.config.canonical(), key.id.encode())
    digest = hashlib.blake2b(data, key=key._secret, person=_PERSON, digest_size=32).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


def integers_of(key: SecretKey) -> tuple[int, ...]:
    """The integers of a key of another system's scheme, to be put into that system's settings. They are the secret.

    Raises
    ------
    ValueError
        If the key is for a scheme of Assay's own.
    """
    if not isinstance(key.config, ForeignConfig):
        raise ValueError(f"key must be for another system's scheme, got {key.config.tag!r} (key {key.id!r}).")
    return unpacked(key.config, _foreign_material(key, key.config))


def same_secret(one: SecretKey, other: SecretKey) -> bool:
    """Whether two keys hold the same secret, or the same integers for the same scheme."""
    if one.info.fingerprint == other.info.fingerprint:
        return True
    if not isinstance(one.config, ForeignConfig) or one.config != other.config:
        return False
    return hmac.compare_digest(_foreign_material(one, one.config), _foreign_material(other, one.config))


def _foreign_material(key: SecretKey, config: ForeignConfig) -> bytes:
    """The integers, 8 little-endian bytes each: as imported, or derived from the secret and all that is public."""
    if len(key._secret) > SALT_BYTES:
        return key._secret[SALT_BYTES:]
    integers = []
    for index in range(config.n_integers):
        data = _encoded(config.tag.encode(), config.canonical(), key.id.encode(), index.to_bytes(4, "little"))
        digest = hashlib.blake2b(data, key=key._secret, person=_FOREIGN_PERSON, digest_size=8).digest()
        integers.append(int.from_bytes(digest, "little") % 2**config.bits)
    return b"".join(value.to_bytes(8, "little") for value in integers)


def _secret_sizes(config: object) -> tuple[int, ...]:
    return (32, SALT_BYTES + 8 * config.n_integers) if isinstance(config, ForeignConfig) else (32,)


def _encoded(*fields: bytes) -> bytes:
    """The fields, each after its length: for a fixed number of fields no encoding is a prefix of another."""
    return b"".join(len(field).to_bytes(4, "little") + field for field in fields)
