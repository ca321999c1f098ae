"""The keyring's JSON: scrypt, then AES-256-GCM per secret with the key id as associated data, and a seal over the rest.

The seal is the AES-GCM tag of an empty message whose associated data is the canonical JSON of everything else in the
file, ciphertexts included: a changed state or date, a swapped, added or missing record breaks it.
Reference: RFC 7914 (scrypt); NIST SP 800-38D (GCM).
"""

from __future__ import annotations

import json
import secrets
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from assay._errors import KeyringError
from assay.watermark.keys import KeyInfo, SecretKey

ENCRYPTED = "scrypt + AES-256-GCM"
DEVELOPMENT = "none: development only"

_FORMAT = "assay-keyring"
_VERSION = 1
_KEY_CONTEXT = b"assay-keyring/1 key "
_SEAL_CONTEXT = b"assay-keyring/1 seal "
_NONCE_BYTES = 12
_SALT_BYTES = 16
_MIN_N = 2**10
# n r p = 2**22 costs four times the default's time and at most 512 MiB; a file that asks for more is refused.
_MAX_WORK = 2**22

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScryptSettings:
    """What scrypt needs besides the passphrase; all of it may be known to anyone.

    Attributes
    ----------
    n, r, p
        Cost: n a power of two, at least 2**10, and n r p at most 2**22. Memory is 128 n r bytes.
    salt
        16 bytes.
    """

    n: int
    r: int
    p: int
    salt: bytes

    def __post_init__(self) -> None:
        n, r, p = self.n, self.r, self.p
        if not all(type(value) is int and value >= 1 for value in (n, r, p)):
            raise KeyringError(f"scrypt n, r and p must be integers of at least 1, got {n!r}, {r!r} and {p!r}.")
        # Compared one by one first: a product of numbers with thousands of digits is an attack of its own.
        if max(n, r, p) > _MAX_WORK or n < _MIN_N or n & (n - 1) or n * r * p > _MAX_WORK:
            raise KeyringError(
                f"scrypt n must be a power of two of at least {_MIN_N} with n * r * p at most {_MAX_WORK}, "
                f"got n={n!s:.12}, r={r!s:.12}, p={p!s:.12}."
            )
        if not isinstance(self.salt, bytes) or len(self.salt) != _SALT_BYTES:
            raise KeyringError(f"the scrypt salt must be {_SALT_BYTES} bytes.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {"name": "scrypt", "n": self.n, "r": self.r, "p": self.p, "salt": self.salt.hex()}


@dataclass(frozen=True)
class Protection:
    """A cipher, keyed, and the settings that gave its key. Its repr shows no secret."""

    settings: ScryptSettings
    cipher: AESGCM


def protection(passphrase: str, settings: ScryptSettings) -> Protection:
    """Turn the passphrase into the file's cipher; takes about 0.3 s and 128 MiB at the default cost.

    Raises
    ------
    KeyringError
        If the passphrase is empty or no string. The message does not repeat it.
    """
    if not isinstance(passphrase, str) or not passphrase:
        got = "an empty one" if passphrase == "" else type(passphrase).__name__
        raise KeyringError(f"passphrase must be a non-empty string, got {got}.")
    scrypt = Scrypt(salt=settings.salt, length=32, n=settings.n, r=settings.r, p=settings.p)
    # NFC: one typed passphrase gives one key, whichever way the system composes its letters. Lone surrogates stand for
    # bytes that are not UTF-8 in an environment variable.
    encoded = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogatepass")
    return Protection(settings, AESGCM(scrypt.derive(encoded)))


def new_settings(n: int) -> ScryptSettings:
    """Settings of cost `n` with a fresh salt; r = 8, p = 1."""
    return ScryptSettings(n=n, r=8, p=1, salt=secrets.token_bytes(_SALT_BYTES))


def _canonical(document: Document) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _seal_data(document: Document) -> bytes:
    return _SEAL_CONTEXT + _canonical({name: value for name, value in document.items() if name != "seal"})


def encode(keys: Iterable[SecretKey], under: Protection | None) -> bytes:
    """The file's bytes. Every nonce is fresh, so no two saves share one.

    Parameters
    ----------
    keys
        In the order in which they are listed.
    under
        The cipher; None writes the secrets in the clear and says so.
    """
    document: Document = {
        "format": _FORMAT,
        "version": _VERSION,
        "protection": ENCRYPTED if under else DEVELOPMENT,
    }
    if under is None:
        document["keys"] = [key.info.to_dict() | {"secret": key._secret.hex()} for key in keys]
    else:
        document["kdf"] = under.settings.to_dict()
        document["keys"] = [_sealed(key, under.cipher) for key in keys]
        nonce = secrets.token_bytes(_NONCE_BYTES)
        tag = under.cipher.encrypt(nonce, b"", _seal_data(document))
        document["seal"] = {"nonce": nonce.hex(), "tag": tag.hex()}
    return json.dumps(document, indent=1).encode() + b"\n"


def _sealed(key: SecretKey, cipher: AESGCM) -> dict[str, Any]:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    secret = cipher.encrypt(nonce, key._secret, _KEY_CONTEXT + key.id.encode())
    return key.info.to_dict() | {"nonce": nonce.hex(), "secret": secret.hex()}


def decode(data: bytes) -> Document:
    """The document in a keyring file, its outline checked and nothing in it believed yet.

    Raises
    ------
    KeyringError
        If the bytes are no keyring of a version that is known here.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise KeyringError("it is not a keyring, or it is damaged.")
    if document.get("version") != _VERSION:
        got = document.get("version")
        raise KeyringError(f"its version must be {_VERSION}, got {got!r}. A newer Assay may read it.")
    if document.get("protection") not in (ENCRYPTED, DEVELOPMENT):
        raise KeyringError(f"its protection must be {ENCRYPTED!r} or {DEVELOPMENT!r}.")
    records = document.get("keys")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise KeyringError("its list of keys is damaged.")
    return document


def infos(document: Document) -> tuple[KeyInfo, ...]:
    """What the file says about its keys. Only `unseal` shows whether that is true.

    Raises
    ------
    KeyringError
        If a record is damaged or of an unknown scheme, or an id occurs twice.
    """
    try:
        found = tuple(KeyInfo.from_dict(record) for record in document["keys"])
    except (ValueError, TypeError) as error:
        raise KeyringError(f"a key in it is damaged: {error}") from None
    if len({info.id for info in found}) < len(found):
        raise KeyringError("a key id occurs twice in it.")
    return found


def settings_of(document: Document) -> ScryptSettings:
    """The scrypt settings that an encrypted file names.

    Raises
    ------
    KeyringError
        If they are missing or out of bounds.
    """
    kdf = document.get("kdf")
    if not isinstance(kdf, dict) or kdf.get("name") != "scrypt" or not kdf.keys() >= {"n", "r", "p"}:
        raise KeyringError("its key derivation must be scrypt with n, r and p.")
    return ScryptSettings(n=kdf["n"], r=kdf["r"], p=kdf["p"], salt=_bytes(kdf, "salt"))


def _bytes(record: dict[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(record[name])
    except (KeyError, TypeError, ValueError):
        raise KeyringError(f"its entry {name!r} is damaged.") from None


def unseal(document: Document, under: Protection | None) -> dict[str, SecretKey]:
    """The keys by id, in the file's order, after the seal and every secret were checked.

    Raises
    ------
    KeyringError
        If the passphrase is wrong or anything in the file was changed.
    """
    if under is not None:
        _check_seal(document, under.cipher)
    keys = {}
    for info, record in zip(infos(document), document["keys"], strict=True):
        try:
            keys[info.id] = SecretKey(
                _bytes(record, "secret") if under is None else _opened(record, info.id, under.cipher),
                id=info.id,
                config=info.config,
                state=info.state,
                created=info.created,
                retired=info.retired,
                revoked=info.revoked,
            )
        except (InvalidTag, ValueError):
            raise KeyringError(f"the secret of key {info.id!r} is damaged.") from None
        if keys[info.id].info != info:
            raise KeyringError(f"the secret of key {info.id!r} does not have the fingerprint in the file.")
    return keys


def _opened(record: dict[str, Any], id: str, cipher: AESGCM) -> bytes:
    return cipher.decrypt(_bytes(record, "nonce"), _bytes(record, "secret"), _KEY_CONTEXT + id.encode())


def _check_seal(document: Document, cipher: AESGCM) -> None:
    seal = document.get("seal")
    try:
        if not isinstance(seal, dict):
            raise KeyringError("its seal is missing.")
        cipher.decrypt(_bytes(seal, "nonce"), _bytes(seal, "tag"), _seal_data(document))
    except (InvalidTag, ValueError, RecursionError):
        if any(_opens(record, cipher) for record in document["keys"]):
            raise KeyringError(
                "the passphrase is right, but the file was changed outside Assay. Restore it from a backup."
            ) from None
        raise KeyringError("the passphrase is wrong, or the file is damaged.") from None


def _opens(record: dict[str, Any], cipher: AESGCM) -> bool:
    try:
        _opened(record, record["id"], cipher)
    except (InvalidTag, ValueError, KeyError, AttributeError):
        return False
    return True
