"""Keyrings: files of watermark and signing keys, encrypted at rest or, for development, openly not.

A keyring in memory is what the file held when it was opened or last changed; every change is saved at once, on top of
what other processes have saved meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from assay._errors import KeyringError, RevokedKeyError, UnknownKeyError
from assay.watermark import _keyfile, _keyseal
from assay.watermark.keys import KeyInfo, KeyState, SecretKey, now, same_secret
from assay.watermark.schemes import SchemeConfig, config_from, newest

_IN_MEMORY = "none: in memory only"


def read_public(path: str | os.PathLike[str]) -> tuple[KeyInfo, ...]:
    """What a keyring file says about its keys, read without the passphrase.

    No guarantee: whoever can write the file can change what it says; `Keyring.open` notices.

    Raises
    ------
    KeyringError
        If there is no keyring at `path`, or it is damaged.
    """
    path = _keyfile.resolved(path)
    with _keyfile.naming(path):
        return _keyseal.infos(_keyseal.decode(_keyfile.read(path)[0]))


def is_encrypted(path: str | os.PathLike[str]) -> bool:
    """Whether the keyring file at `path` says that it needs a passphrase.

    Raises
    ------
    KeyringError
        If there is no keyring at `path`, or it is damaged.
    """
    path = _keyfile.resolved(path)
    with _keyfile.naming(path):
        return bool(_keyseal.decode(_keyfile.read(path)[0])["protection"] == _keyseal.ENCRYPTED)


class Keyring:
    """Keys by id, with their states; made by `create`, `open` or `in_memory`.

    The states say what a key may do: active keys embed, sign and detect; retired keys detect; revoked keys do nothing
    unless they are taken by id, which is for looking into the past. `keyring[id]` gives a key in any state.
    `id in keyring`, `len(keyring)` and iteration over `KeyInfo`, oldest first, work as in a dict.

    Threads and processes may change one file at the same time: a change is applied to the file's newest content.
    """

    def __init__(self, path: Path | None, under: _keyseal.Protection | None, keys: dict[str, SecretKey]) -> None:
        self._path = path
        self._under = under
        self._keys = keys
        self._seen = b""  # the file's bytes that `_keys` came from

    @classmethod
    def in_memory(cls) -> Keyring:
        """An empty keyring without a file: its keys are gone when the process ends."""
        return cls(None, None, {})

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        passphrase: str | None = None,
        development: bool = False,
        scrypt_n: int = 2**17,
    ) -> Keyring:
        """Make an empty keyring file, mode 0600; missing directories are made with mode 0700.

        Parameters
        ----------
        path
            Where; nothing may be there yet.
        passphrase
            Encrypts the secrets. Anyone who has the file can try some three passphrases per second and core: take six
            random words or more.
        development
            True, without a passphrase, writes the secrets in the clear and warns.
        scrypt_n
            Cost of one try: a power of two in [2**10, 2**19]; the default takes 0.3 s and 128 MiB. Below 2**14 is for
            tests.

        Raises
        ------
        KeyringError
            If the file exists, the passphrase is empty, or neither or both of `passphrase` and `development` are given.
        OSError
            If the file cannot be written.
        """
        if development is (passphrase is not None):
            raise KeyringError("give either a passphrase, or development=True for a keyring without encryption.")
        under = None
        if passphrase is not None:
            under = _keyseal.protection(passphrase, _keyseal.new_settings(scrypt_n))
        del passphrase  # so that no traceback below shows it
        keyring = cls(_keyfile.resolved(path), under, {})
        assert keyring._path is not None  # noqa: S101  # for the type checker
        _keyfile.make_directories(keyring._path.parent)
        with _keyfile.locked(keyring._path):
            if keyring._path.exists():
                raise KeyringError(f"path must be free, {keyring._path} exists. Use Keyring.open().")
            keyring._write(keyring._path, {})
        if under is None:
            _warn_development(keyring._path)
        return keyring

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, passphrase: str | None = None) -> Keyring:
        """Open a keyring file and check every byte that matters in it.

        Guarantee: if an encrypted keyring opens, then its keys, states and dates are together what someone who knew the
        passphrase last saved; an older copy of the whole file put in its place is not noticed.

        Parameters
        ----------
        path
            A file that `create` made.
        passphrase
            Of an encrypted keyring. It must be None for a development keyring: otherwise a file with keys that others
            know could be put in the place of an encrypted one.

        Raises
        ------
        KeyringError
            If there is no keyring, the passphrase is wrong or missing, or the file was changed, damaged, or is a
            development keyring that others may read or write.
        """
        keyring = cls(_keyfile.resolved(path), None, {})
        assert keyring._path is not None  # noqa: S101  # for the type checker
        with _keyfile.naming(keyring._path):
            data, private = _keyfile.read(keyring._path)
            document = _keyseal.decode(data)
            if document["protection"] == _keyseal.ENCRYPTED:
                if passphrase is None:
                    raise KeyringError("it is encrypted and needs its passphrase=.")
                keyring._under = _keyseal.protection(passphrase, _keyseal.settings_of(document))
            elif passphrase is not None:
                raise KeyringError("it is not encrypted, yet a passphrase was given. Is this the right file?")
            del passphrase  # so that no traceback below shows it
            _check_mode(keyring._path, private, encrypted=keyring._under is not None)
            keyring._keys = _keyseal.unseal(document, keyring._under)
        keyring._seen = data
        if keyring._under is None:
            _warn_development(keyring._path)
        return keyring

    @property
    def path(self) -> Path | None:
        """The file, or None for a keyring in memory."""
        return self._path

    @property
    def protection(self) -> str:
        """How the secrets are kept: "scrypt + AES-256-GCM", "none: development only" or "none: in memory only"."""
        if self._path is None:
            return _IN_MEMORY
        return _keyseal.ENCRYPTED if self._under else _keyseal.DEVELOPMENT

    def __getitem__(self, id: str) -> SecretKey:
        return _get(self._keys, id)

    def __contains__(self, id: object) -> bool:
        return id in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[KeyInfo]:
        return iter([key.info for key in self._keys.values()])

    def __repr__(self) -> str:
        path = None if self._path is None else str(self._path)
        return f"Keyring(path={path!r}, protection={self.protection!r}, keys={list(self._keys)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Keyring refuses to be pickled or copied: secrets would leave it. Pass its path and open that.")

    def active(self, scheme: str | None = None) -> tuple[SecretKey, ...]:
        """The active keys, oldest first: `active("ed25519")[-1]` is the newest signing key.

        Parameters
        ----------
        scheme
            Name of a scheme, such as "gumbel" or "ed25519"; None for all watermark schemes.

        Raises
        ------
        ValueError
            If the scheme is unknown.
        """
        return self._select(("active",), scheme)

    def for_detection(self, scheme: str | None = None) -> tuple[SecretKey, ...]:
        """The watermark keys whose mark may be in a text: active and retired ones, oldest first; never signing keys.

        Parameters
        ----------
        scheme
            Name of a watermark scheme; None for all.

        Raises
        ------
        ValueError
            If the scheme is unknown or for signing.
        """
        if scheme is not None and newest(scheme).purpose != "watermark":
            raise ValueError(f"scheme must be a watermark scheme, got {scheme!r}; signing keys detect nothing.")
        return self._select(("active", "retired"), scheme)

    def _select(self, states: tuple[KeyState, ...], scheme: str | None) -> tuple[SecretKey, ...]:
        purpose = "watermark" if scheme is None else newest(scheme).purpose
        return tuple(
            key
            for key in self._keys.values()
            if key.state in states and key.config.purpose == purpose and scheme in (None, key.config.scheme)
        )

    def add(self, key: SecretKey) -> None:
        """Add a key that was made elsewhere, and save.

        Raises
        ------
        KeyringError
            If the id or the secret is in the keyring already.
        ValueError
            If the key's scheme is not registered, so that the keyring could not be read again.
        """
        with self._change() as keys:
            _insert(keys, key)

    def new(self, id: str | None = None, config: SchemeConfig | None = None) -> SecretKey:
        """Make a key, add it and save; see `SecretKey.generate` for the defaults.

        Raises
        ------
        KeyringError
            If the id is taken.
        """
        key = SecretKey.generate(id, config)
        self.add(key)
        return key

    def rotate(self, id: str, new_id: str | None = None) -> SecretKey:
        """Retire an active key and make its successor with the same settings, in one step; both are saved or neither.

        Returns
        -------
        The new key. Texts marked with the old one are still detected: `for_detection` has both.

        Raises
        ------
        UnknownKeyError
            If there is no such key.
        RevokedKeyError
            If the key is not active.
        KeyringError
            If `new_id` is taken.
        """
        with self._change() as keys:
            old = _active(keys, id, "rotated")
            key = SecretKey.generate(new_id, old.config)
            keys[id] = old.with_state("retired", now())
            _insert(keys, key)
        return key

    def retire(self, id: str) -> None:
        """Let an active key embed and sign no more; it still detects. Saves.

        Raises
        ------
        UnknownKeyError
            If there is no such key.
        RevokedKeyError
            If the key is not active.
        """
        with self._change() as keys:
            keys[id] = _active(keys, id, "retired").with_state("retired", now())

    def revoke(self, id: str) -> None:
        """Let a key do nothing more: others may know its secret. Its record and secret stay for inquiries. Saves.

        Raises
        ------
        UnknownKeyError
            If there is no such key.
        RevokedKeyError
            If it is revoked already.
        """
        with self._change() as keys:
            key = _get(keys, id)
            if key.state == "revoked":
                raise RevokedKeyError(f"key {id!r} is revoked already, since {key.info.revoked}.")
            keys[id] = key.with_state("revoked", now())

    def save(self) -> None:
        """Write the file anew, under fresh nonces. Changes save themselves; this restores a lost file.

        Raises
        ------
        KeyringError
            If the keyring has no file, or another keyring is in its place.
        OSError
            If the file cannot be written; the old one is untouched.
        """
        if self._path is None:
            raise KeyringError("a keyring in memory has no file to save to. Use Keyring.create() and add the keys.")
        with _keyfile.locked(self._path):
            if self._path.exists():
                self._reload(self._path)
            self._write(self._path, self._keys)

    def export_public(self) -> dict[str, Any]:
        """What others may know: the description of every key and the public half of every signing key.

        Returns
        -------
        A JSON-ready dict: "format", "version" and "keys", a list of `KeyInfo.to_dict`, with "public_key" (64
        hexadecimal digits) for keys of scheme "ed25519".
        """
        from assay.watermark.signing import public_key

        keys = []
        for key in self._keys.values():
            entry = key.info.to_dict()
            if key.config.purpose == "signing":
                entry["public_key"] = public_key(key).hex()
            keys.append(entry)
        return {"format": "assay-public-keys", "version": 1, "keys": keys}

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict[str, SecretKey]]:
        """A copy of the newest keys to change; kept and saved if the block succeeds, forgotten if it raises."""
        if self._path is None:
            keys = dict(self._keys)
            yield keys
            self._keys = keys
            return
        with _keyfile.locked(self._path):
            self._reload(self._path)
            keys = dict(self._keys)
            yield keys
            self._write(self._path, keys)

    def _reload(self, path: Path) -> None:
        """Take over what another process has saved. The caller holds the lock."""
        with _keyfile.naming(path):
            data = _keyfile.read(path)[0]
            if data == self._seen:
                return
            document = _keyseal.decode(data)
            if document["protection"] != self.protection or (
                self._under and _keyseal.settings_of(document) != self._under.settings
            ):
                raise KeyringError("another keyring has taken its place since it was opened. Open it again.")
            self._keys = _keyseal.unseal(document, self._under)
            self._seen = data

    def _write(self, path: Path, keys: dict[str, SecretKey]) -> None:
        data = _keyseal.encode(keys.values(), self._under)
        _keyfile.write(path, data)
        self._keys, self._seen = keys, data


def _check_mode(path: Path, private: bool, *, encrypted: bool) -> None:
    if private:
        return
    message = f"others than its owner may read or write it. Run: chmod 600 '{path}'"
    if not encrypted:
        raise KeyringError(f"it is not encrypted, and {message}")
    warnings.warn(f"keyring {path}: {message}", UserWarning, stacklevel=3)


def _warn_development(path: Path) -> None:
    warnings.warn(
        f"keyring {path} is not encrypted: development only. Whoever reads the file can forge and remove the marks.",
        UserWarning,
        stacklevel=3,
    )


def _get(keys: dict[str, SecretKey], id: str) -> SecretKey:
    if id not in keys:
        known = ", ".join(map(repr, keys)) if keys else "none"
        raise UnknownKeyError(f"id must name a key of the keyring, got {id!r}. Known: {known}.")
    return keys[id]


def _active(keys: dict[str, SecretKey], id: str, what: str) -> SecretKey:
    key = _get(keys, id)
    if key.state != "active":
        raise RevokedKeyError(
            f"only an active key can be {what}, key {id!r} is {key.state}. Make a new one with new(config=...)."
        )
    return key


def _insert(keys: dict[str, SecretKey], key: SecretKey) -> None:
    if not isinstance(key, SecretKey):
        raise TypeError(f"key must be a SecretKey, got {type(key).__name__}.")
    config = key.config
    if config_from(config.scheme, config.version, config.parameters()) != config:
        raise ValueError(f"config {config!r} does not survive being written down and read back.")
    if key.id in keys:
        raise KeyringError(f"id must be free, the keyring has a key {key.id!r}. Choose another id.")
    for other in keys.values():
        if same_secret(other, key):
            raise KeyringError(f"the secret of key {key.id!r} is in the keyring already, as {other.id!r}.")
    keys[key.id] = key
