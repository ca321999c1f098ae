"""Keyring files: what survives, what is refused, what a crash or a second writer can do, what never shows."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from rich.console import Console
from rich.traceback import Traceback

from assay._errors import KeyringError, RevokedKeyError, UnknownKeyError
from assay.watermark import _keyfile
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keyring import Keyring, is_encrypted, read_public
from assay.watermark.keys import SecretKey
from assay.watermark.schemes import SchemeConfig
from assay.watermark.signing import Ed25519Config, public_key, sign

SECRET = bytes.fromhex("9b1e5c4d8f0a37e26d41c8b79350fa1e2c6b7d8897a4135f60e2cbd914f8a3b7")
PASSPHRASE = "correct horse battery staple"
WRONG = "a mistyped passphrase"
CHEAP = 2**10  # scrypt cost: 2 ms


def shown(secret: bytes, text: str) -> bool:
    ints = list(secret)
    forms = [
        secret.hex()[:16],
        secret.hex().upper()[:16],
        base64.b64encode(secret).decode()[:12],
        repr(secret)[2:22],
        ", ".join(map(str, ints[:6])),
        " ".join(map(str, ints[:6])),
        secret.decode("latin-1")[:6],
    ]
    return any(form in text for form in forms)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "keyring.json"


@pytest.fixture
def keyring(path: Path) -> Keyring:
    """Three keys: "a" retired, its successor "b", and a signing key "s"."""
    made = Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    made.add(SecretKey(SECRET, id="a", config=GumbelConfig(window=6)))
    made.new("s", Ed25519Config())
    made.rotate("a", "b")
    return made


def opened(path: Path) -> Keyring:
    return Keyring.open(path, passphrase=PASSPHRASE)


def document(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


# ---------------------------------------------------------------- the life of keys


def test_round_trip(keyring: Keyring, path: Path) -> None:
    again = opened(path)
    assert list(again) == list(keyring) == list(read_public(path))
    assert [again[info.id] == keyring[info.id] for info in again] == [True] * 3
    assert again["a"] == SecretKey(
        SECRET, id="a", config=GumbelConfig(window=6), state="retired",
        created=again["a"].info.created, retired=again["a"].info.retired,
    )  # fmt: skip
    assert (len(again), "a" in again, "z" in again) == (3, True, False)
    assert again.path == path
    assert again.protection == "scrypt + AES-256-GCM"
    assert is_encrypted(path)


def test_unknown_ids_are_told_the_known_ones(keyring: Keyring) -> None:
    for call in (keyring.__getitem__, keyring.rotate, keyring.retire, keyring.revoke):
        with pytest.raises(UnknownKeyError, match=r"got 'z'\. Known: 'a', 's', 'b'") as caught:
            call("z")
        assert isinstance(caught.value, LookupError)
    with pytest.raises(UnknownKeyError, match="Known: none"):
        Keyring.in_memory()["z"]


def test_rotation(keyring: Keyring) -> None:
    old, new = keyring["a"], keyring["b"]
    assert (old.state, new.state) == ("retired", "active")
    assert new.config == old.config == GumbelConfig(window=6)
    assert new.info.fingerprint != old.info.fingerprint
    assert old.info.retired is not None
    assert old.info.retired.tzinfo is UTC
    assert abs(datetime.now(UTC) - old.info.retired) < timedelta(minutes=1)
    third = keyring.rotate("b")
    assert keyring[third.id] == third
    assert [key.id for key in keyring.active()] == [third.id]
    assert [key.id for key in keyring.for_detection()] == ["a", "b", third.id]


def test_rotating_a_signing_key_keeps_its_scheme(keyring: Keyring) -> None:
    successor = keyring.rotate("s", "s2")
    assert successor.config == Ed25519Config()
    assert keyring.active("ed25519") == (successor,)
    with pytest.raises(RevokedKeyError, match="must be active to sign"):
        sign(b"", keyring["s"])


def test_states_allow_what_they_should(keyring: Keyring) -> None:
    with pytest.raises(RevokedKeyError, match="only an active key can be rotated, key 'a' is retired"):
        keyring.rotate("a")
    with pytest.raises(RevokedKeyError, match="only an active key can be retired"):
        keyring.retire("a")
    keyring.revoke("a")
    keyring.revoke("b")
    with pytest.raises(RevokedKeyError, match="is revoked already, since 20"):
        keyring.revoke("b")
    with pytest.raises(RevokedKeyError, match="key 'b' is revoked"):
        keyring.retire("b")
    assert keyring.for_detection() == ()
    assert keyring.active() == ()
    assert keyring["a"].info.retired is not None
    assert keyring["a"].info.revoked is not None
    assert keyring["b"].state == "revoked"  # taken by id, a revoked key is still there


def test_signing_keys_detect_nothing(keyring: Keyring) -> None:
    assert "s" not in {
        key.id for key in (*keyring.for_detection(), *keyring.for_detection("gumbel"), *keyring.active())
    }
    assert [key.id for key in keyring.active("ed25519")] == ["s"]
    with pytest.raises(ValueError, match="signing keys detect nothing"):
        keyring.for_detection("ed25519")
    for call in (keyring.active, keyring.for_detection):
        with pytest.raises(ValueError, match=r"scheme must be one of \[.*'ed25519'.*'gumbel'"):
            call("gumble")


@dataclass(frozen=True, kw_only=True)
class UnregisteredConfig(SchemeConfig):
    scheme: ClassVar[str] = "unregistered"
    version: ClassVar[int] = 1


def test_what_cannot_be_added(keyring: Keyring, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyringError, match="id must be free, the keyring has a key 'a'"):
        keyring.new("a")
    with pytest.raises(KeyringError, match="id must be free"):
        keyring.rotate("b", "s")
    with pytest.raises(KeyringError, match="secret of key 'c' is in the keyring already, as 'a'"):
        keyring.add(SecretKey(SECRET, id="c", config=Ed25519Config()))
    with pytest.raises(ValueError, match="unregistered/1"):
        keyring.new("d", UnregisteredConfig())
    with pytest.raises(TypeError, match="key must be a SecretKey, got str"):
        keyring.add("key")  # type: ignore[arg-type]
    # A refused change changes nothing, neither in memory nor in the file: "b" is not retired.
    assert path.read_bytes() == before
    assert keyring["b"].state == "active"
    assert len(keyring) == 3


def test_in_memory() -> None:
    keyring = Keyring.in_memory()
    key = keyring.new("a")
    keyring.rotate("a", "b")
    keyring.revoke("a")
    assert [info.state for info in keyring] == ["revoked", "active"]
    assert keyring["a"].info.fingerprint == key.info.fingerprint
    assert keyring.path is None
    assert "in memory only" in repr(keyring)
    with pytest.raises(KeyringError, match="no file to save to"):
        keyring.save()
    with pytest.raises(KeyringError, match="id must be free"):
        keyring.rotate("b", "a")
    assert keyring["b"].state == "active"


def test_export_public(keyring: Keyring, path: Path) -> None:
    exported = json.loads(json.dumps(keyring.export_public()))
    assert exported["format"] == "assay-public-keys"
    entries = {entry["id"]: entry for entry in exported["keys"]}
    assert entries["s"].pop("public_key") == public_key(keyring["s"]).hex()
    assert list(entries.values()) == [info.to_dict() for info in read_public(path)]


# ---------------------------------------------------------------- the file


def test_format_by_hand(keyring: Keyring, path: Path) -> None:
    """The file opened with nothing but `cryptography`: the format is what the documentation says."""
    content = document(path)
    kdf = content["kdf"]
    scrypt = Scrypt(salt=bytes.fromhex(kdf["salt"]), length=32, n=kdf["n"], r=kdf["r"], p=kdf["p"])
    cipher = AESGCM(scrypt.derive(PASSPHRASE.encode()))
    record = content["keys"][0]
    secret = cipher.decrypt(bytes.fromhex(record["nonce"]), bytes.fromhex(record["secret"]), b"assay-keyring/1 key a")
    assert secret == SECRET
    seal = content.pop("seal")
    everything = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    tag = cipher.encrypt(bytes.fromhex(seal["nonce"]), b"", b"assay-keyring/1 seal " + everything)
    assert tag.hex() == seal["tag"]


def test_default_cost_is_what_is_promised(path: Path) -> None:
    Keyring.create(path, passphrase=PASSPHRASE)
    assert {name: document(path)["kdf"][name] for name in "nrp"} == {"n": 2**17, "r": 8, "p": 1}
    assert len(bytes.fromhex(document(path)["kdf"]["salt"])) == 16


def test_no_nonce_or_salt_twice(path: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    keyring = Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    for _ in range(5):
        keyring.new()
        content = document(path)
        seen += [record["nonce"] for record in content["keys"]] + [content["seal"]["nonce"]]
    assert len(set(seen)) == len(seen) == 20
    Keyring.create(tmp_path / "other.json", passphrase=PASSPHRASE, scrypt_n=CHEAP)
    assert document(tmp_path / "other.json")["kdf"]["salt"] != document(path)["kdf"]["salt"]


def test_modes_and_neighbours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        modes.append(os.fstat(fd).st_mode)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    old = os.umask(0)
    try:
        keyring = Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
        path.chmod(0o666)
        keyring.new()
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    far = path.parent / "every" / "missing" / "one" / "keyring.json"
    Keyring.create(far, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    assert [stat.S_IMODE(place.stat().st_mode) for place in far.parents[:3]] == [0o700] * 3
    shutil.rmtree(path.parent / "every")
    modes = modes[:4]
    assert [name.name for name in sorted(path.parent.iterdir())] == ["keyring.json", "keyring.json.lock"]
    # Each save syncs the new file, private before its first byte is durable, and then the directory.
    assert [stat.S_IMODE(mode) for mode in modes if stat.S_ISREG(mode)] == [0o600, 0o600]
    assert [stat.S_ISDIR(mode) for mode in modes] == [False, True, False, True]


def test_created_private_not_made_private(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    real = os.open

    def watched(name: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        calls.append((Path(name).name, flags, mode))
        return real(name, flags, mode, **more)

    monkeypatch.setattr(os, "open", watched)
    Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    created = [(name, flags, mode) for name, flags, mode in calls if flags & os.O_CREAT]
    assert [(name, mode) for name, _, mode in created] == [("keyring.json.lock", 0o600), ("keyring.json.tmp", 0o600)]
    assert created[1][1] & os.O_EXCL


def test_a_readable_file_is_reported(keyring: Keyring, path: Path) -> None:
    path.chmod(0o640)
    with pytest.warns(UserWarning, match="others than its owner may read or write it. Run: chmod 600"):
        opened(path)
    path.chmod(0o600)
    opened(path)


def test_links_stay(keyring: Keyring, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(path)
    opened(link).new("c")
    assert link.is_symlink()
    assert "c" in opened(path)


def test_create_overwrites_nothing(keyring: Keyring, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyringError, match=r"exists. Use Keyring.open\(\)"):
        Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a passphrase, or development=True"),
        ({"passphrase": "x", "development": True}, "either a passphrase, or development=True"),
        ({"passphrase": ""}, "non-empty string, got an empty one"),
        ({"passphrase": b"bytes"}, "non-empty string, got bytes"),
        ({"passphrase": "x", "scrypt_n": 2**9}, "n=512"),
        ({"passphrase": "x", "scrypt_n": 2**20}, "n=1048576"),
        ({"passphrase": "x", "scrypt_n": 3000}, "power of two"),
        ({"passphrase": "x", "scrypt_n": 1024.0}, "integers"),
    ],
)
def test_refused_creations(path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KeyringError, match=message):
        Keyring.create(path, **arguments)
    assert not path.exists()


def test_passphrases(path: Path, tmp_path: Path) -> None:
    Keyring.create(path, passphrase="Zürich", scrypt_n=CHEAP)
    Keyring.open(path, passphrase="Zu\u0308rich")  # the same letters, typed on another system
    with pytest.raises(KeyringError, match="passphrase is wrong"):
        Keyring.open(path, passphrase="Zurich")
    with pytest.raises(KeyringError, match="needs its passphrase="):
        Keyring.open(path)
    other = tmp_path / "other.json"
    Keyring.create(other, passphrase="not utf-8: \udcff", scrypt_n=CHEAP)
    Keyring.open(other, passphrase="not utf-8: \udcff")


# ---------------------------------------------------------------- tampering


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*at, key))
        if not value:
            yield at
    else:
        yield at


def changed(value: Any) -> Any:
    """Another value of the same kind, as close as can be."""
    if isinstance(value, str) and len(value) > 8 and all(digit in "0123456789abcdef" for digit in value):
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    if isinstance(value, str):
        return {"active": "retired", "retired": "active"}.get(
            value, value.replace("2026", "2025") + "x"[: "20" not in value]
        )
    if isinstance(value, int):
        return value * 2
    return {None: "2026-11-21T00:00:00+00:00"}.get(value) if not isinstance(value, dict) else {"window": 4}


def test_every_value_in_the_file_is_authenticated(keyring: Keyring, path: Path) -> None:
    original = document(path)
    places = list(leaves(original))
    assert len(places) > 40
    for place in places:
        content = copy.deepcopy(original)
        parent = content
        for step in place[:-1]:
            parent = parent[step]
        assert parent[place[-1]] != changed(parent[place[-1]]), place
        parent[place[-1]] = changed(parent[place[-1]])
        path.write_text(json.dumps(content))
        with pytest.raises(KeyringError):
            opened(path)
    path.write_text(json.dumps(original))
    assert len(opened(path)) == 3  # the layout of the JSON is free, its content is not


def tampered(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = document(path)
    change(content)
    path.write_text(json.dumps(content))


def revive(content: dict[str, Any]) -> None:
    content["keys"][0] |= {"state": "active", "retired": None}


def swap_secrets(content: dict[str, Any]) -> None:
    first, second = content["keys"][0], content["keys"][2]
    for name in ("nonce", "secret", "fingerprint"):
        first[name], second[name] = second[name], first[name]


def reverse(content: dict[str, Any]) -> None:
    content["keys"].reverse()


def drop_one(content: dict[str, Any]) -> None:
    del content["keys"][1]


def repeat_one(content: dict[str, Any]) -> None:
    content["keys"].append(content["keys"][0])


def add_note(content: dict[str, Any]) -> None:
    content["keys"][0]["note"] = "trust me"


def drop_seal(content: dict[str, Any]) -> None:
    del content["seal"]


@pytest.mark.parametrize("change", [revive, swap_secrets, reverse, drop_one, repeat_one, add_note, drop_seal])
def test_tampering_is_told_from_a_wrong_passphrase(keyring: Keyring, path: Path, change: Any) -> None:
    tampered(path, change)
    with pytest.raises(KeyringError, match="the passphrase is right, but the file was changed outside Assay"):
        opened(path)
    with pytest.raises(KeyringError, match="the passphrase is wrong"):
        Keyring.open(path, passphrase="guess")


def test_all_keys_deleted(keyring: Keyring, path: Path) -> None:
    tampered(path, lambda content: content["keys"].clear())
    with pytest.raises(KeyringError, match="wrong, or the file is damaged"):
        opened(path)


def test_records_of_two_saves_do_not_mix(keyring: Keyring, path: Path) -> None:
    # An old record, genuine at its time, brought back into a newer file: the retired key would embed again.
    old = document(path)["keys"][2]
    keyring.revoke("b")
    tampered(path, lambda content: content["keys"].__setitem__(2, old))
    with pytest.raises(KeyringError, match="changed outside"):
        opened(path)


def test_tampering_is_noticed_by_the_next_change(keyring: Keyring, path: Path) -> None:
    tampered(path, revive)
    before = path.read_bytes()
    with pytest.raises(KeyringError, match="changed outside"):
        keyring.new()
    assert path.read_bytes() == before


def test_an_unencrypted_file_cannot_take_the_place_of_an_encrypted_one(keyring: Keyring, path: Path) -> None:
    path.unlink()
    with pytest.warns(UserWarning, match="development only"):
        Keyring.create(path, development=True).new("a")
    with pytest.raises(KeyringError, match="not encrypted, yet a passphrase was given"):
        opened(path)
    with pytest.raises(KeyringError, match="another keyring has taken its place"):
        keyring.new()


def test_another_encrypted_keyring_in_its_place(keyring: Keyring, path: Path) -> None:
    path.unlink()
    Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    with pytest.raises(KeyringError, match="another keyring has taken its place since it was opened"):
        keyring.new()


def test_a_lost_file_is_restored_by_save(keyring: Keyring, path: Path) -> None:
    path.unlink()
    with pytest.raises(KeyringError, match="there is none at"):
        keyring.new()
    keyring.save()
    assert list(opened(path)) == list(keyring)


@pytest.mark.parametrize(
    ("kdf", "message"),
    [
        ({"n": 2**40}, "n \\* r \\* p at most"),
        ({"n": 2**20}, "n \\* r \\* p at most"),
        ({"r": 2**24}, "n \\* r \\* p at most"),
        ({"p": 10**6}, "n \\* r \\* p at most"),
        ({"p": 10**4000}, "n \\* r \\* p at most"),
        ({"n": 1}, "power of two of at least 1024"),
        ({"n": 1025}, "power of two"),
        ({"n": -1024}, "at least 1"),
        ({"n": "1024"}, "integers"),
        ({"n": True}, "integers|power of two"),
        ({"r": 8.0}, "integers"),
        ({"p": 0}, "at least 1"),
        ({"salt": "00"}, "salt must be 16 bytes"),
        ({"salt": 5}, "'salt' is damaged"),
        ({"name": "pbkdf2"}, "must be scrypt"),
    ],
)
def test_hostile_costs_are_refused_before_they_are_paid(
    keyring: Keyring, path: Path, kdf: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(path, lambda content: content["kdf"].update(kdf))
    monkeypatch.setattr("assay.watermark._keyseal.Scrypt", None)  # calling it would be another error
    with pytest.raises(KeyringError, match=message):
        opened(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a keyring"),
        (b"\xff\xfe\x00", "not a keyring"),
        (b"[1, 2]", "not a keyring"),
        (b"[" * 100_000, "not a keyring"),
        (b"1" * 5000, "not a keyring"),
        (b'{"format": "assay-public-keys", "version": 1}', "not a keyring"),
        (b'{"format": "assay-keyring", "version": 2}', "A newer Assay may read it"),
        (b'{"format": "assay-keyring", "version": 1, "protection": "rot13"}', "protection must be"),
        (b'{"format": "assay-keyring", "version": 1, "protection": "none: development only"}', "list of keys"),
        (b'{"format": "assay-keyring", "version": 1, "protection": "none: development only", "keys": [7]}', "list of"),
        (b'{"format": "assay-keyring", "version": 1, "protection": "scrypt + AES-256-GCM", "keys": []}', "scrypt"),
    ],
)
def test_not_keyrings(path: Path, content: bytes, message: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyringError, match=message):
        Keyring.open(path, passphrase=PASSPHRASE if b"AES" in content else None)


def test_not_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ""):
        with pytest.raises(KeyringError, match="not a regular file"):
            read_public(tmp_path / name)
    with pytest.raises(KeyringError, match="there is none at"):
        read_public(tmp_path / "missing")
    with pytest.raises(KeyringError, match="cannot be read: Not a directory"):
        read_public(__file__ + "/keyring.json")
    (tmp_path / "large").write_bytes(bytes(101))
    monkeypatch.setattr(_keyfile, "_MAX_BYTES", 100)
    with pytest.raises(KeyringError, match="larger than 100 bytes"):
        read_public(tmp_path / "large")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("id", 5),
        ("scheme", ["gumbel"]),
        ("scheme", "nope"),
        ("parameters", {"window": "4"}),
        ("created", None),
        ("state", {}),
    ],
)
def test_damaged_records_are_keyring_errors(keyring: Keyring, path: Path, entry: str, value: object) -> None:
    tampered(path, lambda content: content["keys"][1].update({entry: value}))
    with pytest.raises(KeyringError, match="a key in it is damaged"):
        read_public(path)


# ---------------------------------------------------------------- development keyrings


@pytest.fixture
def development(path: Path) -> Path:
    with pytest.warns(UserWarning, match="is not encrypted: development only"):
        keyring = Keyring.create(path, development=True)
    keyring.add(SecretKey(SECRET, id="a", config=GumbelConfig()))
    return path


def test_development_keyrings_say_so(development: Path) -> None:
    assert document(development)["protection"] == "none: development only"
    assert document(development)["keys"][0]["secret"] == SECRET.hex()
    assert stat.S_IMODE(development.stat().st_mode) == 0o600
    assert not is_encrypted(development)
    with pytest.warns(UserWarning, match="is not encrypted: development only"):
        keyring = Keyring.open(development)
    assert "none: development only" in repr(keyring)
    assert keyring["a"] == SecretKey(SECRET, id="a", config=GumbelConfig(), created=keyring["a"].info.created)


def test_readable_development_keyrings_are_refused(development: Path) -> None:
    for mode in (0o640, 0o604, 0o602):
        development.chmod(mode)
        with pytest.raises(KeyringError, match="not encrypted, and others than its owner may read or write it"):
            Keyring.open(development)


def test_damaged_development_secrets(development: Path) -> None:
    for secret, message in [("00" * 32, "fingerprint"), ("00", "damaged"), ("zz", "damaged"), (7, "damaged")]:
        tampered(development, lambda content, secret=secret: content["keys"][0].update(secret=secret))  # type: ignore[misc]
        with pytest.raises(KeyringError, match=message):
            Keyring.open(development)


# ---------------------------------------------------------------- secrets stay inside


def test_no_secret_in_file_export_or_repr(keyring: Keyring, path: Path) -> None:
    console = Console(file=io.StringIO(), width=300)
    console.print(keyring, keyring["a"], list(keyring))
    texts = [path.read_text(), repr(keyring), str(keyring), json.dumps(keyring.export_public()), str(vars(keyring))]
    texts += [console.file.getvalue(), str(read_public(path))]  # type: ignore[attr-defined]
    for text in texts:
        assert not shown(SECRET, text)
        assert PASSPHRASE not in text
    for action in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="refuses to be pickled or copied"):
            action(keyring)


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def library_tracebacks(error: BaseException) -> str:
    """Every way to print the traceback with local variables, of the frames in the package."""
    frames = []
    tb = error.__traceback__
    while tb is not None:
        if "/assay/" in tb.tb_frame.f_code.co_filename:
            frames.append(tb)
        tb = tb.tb_next
    assert frames
    first = frames[0]
    plain = "".join(traceback.TracebackException(type(error), error, first, capture_locals=True).format())
    console = Console(file=io.StringIO(), width=400)
    console.print(Traceback.from_exception(type(error), error, first, show_locals=True))
    return plain + console.file.getvalue() + str(error)  # type: ignore[attr-defined]


def test_no_secret_or_passphrase_in_tracebacks(keyring: Keyring, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Callable[[], object]] = [
        lambda: keyring["z"],
        lambda: keyring.new("a"),
        lambda: keyring.rotate("a"),
        lambda: keyring.add(SecretKey(SECRET, id="dup", config=GumbelConfig())),
        lambda: keyring.for_detection("x"),
        lambda: Keyring.open(path, passphrase=WRONG),
        lambda: Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP),
        lambda: (tampered(path, revive), opened(path)),
        lambda: keyring.new(),
        lambda: (
            monkeypatch.setattr(os, "fsync", full_disk),
            Keyring.create(path.with_name("x"), passphrase=PASSPHRASE),
        ),
    ]
    for call in calls:
        with pytest.raises((KeyringError, ValueError, OSError, UnknownKeyError)) as caught:
            call()
        text = library_tracebacks(caught.value)
        assert not shown(SECRET, text), text
        assert PASSPHRASE not in text, text
        assert WRONG not in text, text


# ---------------------------------------------------------------- crashes and second writers


@pytest.mark.parametrize("failing", ["fsync", "replace", "fdopen"])
def test_a_failed_save_leaves_the_old_file(
    keyring: Keyring, path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    real = getattr(os, failing)

    def fails(*arguments: Any) -> Any:
        if failing == "fdopen" and arguments[1] != "wb":
            return real(*arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fails)
        with pytest.raises(OSError, match="No space left"):
            keyring.revoke("b")
    assert path.read_bytes() == before
    assert keyring["b"].state == "active"
    assert sorted(name.name for name in path.parent.iterdir()) == ["keyring.json", "keyring.json.lock"]
    keyring.revoke("b")
    assert opened(path)["b"].state == "revoked"


def test_what_a_killed_writer_left_is_removed(keyring: Keyring, path: Path) -> None:
    (path.parent / "keyring.json.tmp").write_bytes(b"half a key")
    keyring.new("c")
    assert "c" in opened(path)
    assert not (path.parent / "keyring.json.tmp").exists()


def test_changes_of_two_openers_add_up(keyring: Keyring, path: Path) -> None:
    other = opened(path)
    other.new("c")
    keyring.revoke("b")
    other.new("d")
    assert {info.id: info.state for info in opened(path)} == {
        "a": "retired", "s": "active", "b": "revoked", "c": "active", "d": "active",
    }  # fmt: skip
    # A change that the other one has made is seen, not overwritten.
    with pytest.raises(RevokedKeyError, match="is revoked already"):
        other.revoke("b")


def test_threads(path: Path) -> None:
    Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=CHEAP)
    shared = opened(path)
    errors: list[BaseException] = []

    def work(keyring: Keyring) -> None:
        try:
            for _ in range(6):
                keyring.new()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(keyring,)) for keyring in (shared, shared, opened(path), opened(path))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(opened(path)) == 24


def test_a_writer_that_waits_too_long_gives_up(keyring: Keyring, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_keyfile, "_LOCK_SECONDS", 0.05)
    with _keyfile.locked(path), pytest.raises(KeyringError, match="being changed by another process"):
        opened(path).new()
    keyring.new("after")
    assert len(opened(path)) == 4  # readers never wait


# Forks, kills and reports; a process of its own, because forking is only safe where no thread runs.
CRASHES = textwrap.dedent(
    """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from assay.watermark import _keyfile
    from assay.watermark.keyring import Keyring

    path, writer = Path(sys.argv[1]), sys.argv[2]
    random.seed(20261121)
    found = {"old": 0, "new": 0, "broken": 0, "points": 0}

    def naive(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[len(data) // 2 :])
            file.flush()
            os.fsync(file.fileno())

    if writer == "naive":
        _keyfile.write = naive

    def opened():
        return Keyring.open(path, passphrase="p")

    def judge(before, after):
        try:
            ids = [info.id for info in opened()]
        except Exception:
            found["broken"] += 1
            path.unlink(missing_ok=True)
            Keyring.create(path, passphrase="p", scrypt_n=1024)
            return
        found["old" if ids == before else "new" if ids == after else "broken"] += 1

    def forked(child):
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(0)
        return pid

    # One: kill a writer before and after each of its calls to the system.
    def counted(limit):
        left = [limit]
        def step():
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        for name in ("open", "fdopen", "fsync", "replace", "close"):
            def wrapped(*a, real=getattr(os, name), **k):
                step()
                out = real(*a, **k)
                step()
                return out
            setattr(os, name, wrapped)

    Keyring.create(path, passphrase="p", scrypt_n=1024).new("first")
    status, limit = -1, 0
    while status != 0 and limit < 100:
        keyring = opened()
        before = [info.id for info in keyring]
        id = f"point-{limit}"
        def child():
            counted(limit)
            keyring.new(id)
        status = os.waitpid(forked(child), 0)[1]
        judge(before, before + [id])
        limit += 1
    found["points"] = limit

    # Two: kill a busy writer at random moments. It reports each key after it is saved, so the file may be one ahead.
    for round in range(40):
        keyring = opened()
        before = len(keyring)
        reading, writing = os.pipe()
        def child():
            for number in range(10000):
                keyring.new(f"round-{round}-{number}")
                os.write(writing, b".")
        pid = forked(child)
        os.close(writing)
        time.sleep(random.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        saved = len(os.read(reading, 65536))
        os.close(reading)
        names = [info.id for info in keyring] + [f"round-{round}-{number}" for number in range(saved + 1)]
        judge(names[:-1], names)
        if len(opened()) > 60:
            path.unlink()
            Keyring.create(path, passphrase="p", scrypt_n=1024)

    # Three: four processes at once lose nothing.
    path.unlink()
    Keyring.create(path, passphrase="p", scrypt_n=1024)
    def child():
        keyring = opened()
        for number in range(8):
            keyring.new()
    pids = [forked(child) for _ in range(4)]
    for pid in pids:
        os.waitpid(pid, 0)
    try:
        found["together"] = len(opened())
    except Exception:
        found["together"] = -1
    print(json.dumps(found))
    """
)


def crashes(path: Path, writer: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(path), writer],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_killed_writers_leave_the_old_or_the_new_file(tmp_path: Path) -> None:
    found = crashes(tmp_path / "keyring.json", "real")
    assert found["broken"] == 0
    assert found["points"] > 10
    assert found["old"] > 5
    assert found["new"] > 3
    assert found["together"] == 32


def test_the_crash_test_can_fail(tmp_path: Path) -> None:
    # The near-miss: a writer that overwrites the file in place is caught.
    assert crashes(tmp_path / "keyring.json", "naive")["broken"] > 0
