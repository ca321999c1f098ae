"""Envelope encryption: opens with the same master key, tenant and key id, unchanged, and in no other way."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay._errors import KeyringError
from assay.service.envelope import ENVIRONMENT, LocalMasterKey, MasterKey, seal, unseal

KEY = bytes(range(32))
SECRET = b"s" * 32


@pytest.fixture
def master() -> LocalMasterKey:
    return LocalMasterKey(KEY)


def test_sealed_opens(master: LocalMasterKey) -> None:
    assert isinstance(master, MasterKey)
    wrapped, sealed = seal(master, SECRET, tenant="a", key_id="k")
    assert unseal(master, wrapped, sealed, tenant="a", key_id="k") == SECRET
    assert SECRET not in sealed
    # A data key and nonces of its own each time.
    again = seal(master, SECRET, tenant="a", key_id="k")
    assert wrapped != again[0]
    assert sealed != again[1]


@pytest.mark.parametrize(("tenant", "key_id"), [("b", "k"), ("a", "j"), ("ak", ""), ("", "ak")])
def test_another_tenant_or_id_does_not_open(master: LocalMasterKey, tenant: str, key_id: str) -> None:
    wrapped, sealed = seal(master, SECRET, tenant="a", key_id="k")
    with pytest.raises(KeyringError, match="does not open"):
        unseal(master, wrapped, sealed, tenant=tenant, key_id=key_id)


def test_tenant_and_id_are_kept_apart(master: LocalMasterKey) -> None:
    """ "ab" + "c" and "a" + "bc" give the same string and must not give the same context."""
    wrapped, sealed = seal(master, SECRET, tenant="ab", key_id="c")
    with pytest.raises(KeyringError):
        unseal(master, wrapped, sealed, tenant="a", key_id="bc")


def test_another_master_key_does_not_open(master: LocalMasterKey) -> None:
    wrapped, sealed = seal(master, SECRET, tenant="a", key_id="k")
    other = LocalMasterKey(bytes(32))
    assert other.id != master.id
    with pytest.raises(KeyringError, match="another master key"):
        unseal(other, wrapped, sealed, tenant="a", key_id="k")


@given(st.integers(0, 2**31), st.integers(0, 7), st.booleans())
def test_any_changed_bit_is_noticed(place: int, bit: int, in_wrapped: bool) -> None:
    master = LocalMasterKey(KEY)
    parts = [bytearray(part) for part in seal(master, SECRET, tenant="a", key_id="k")]
    part = parts[0 if in_wrapped else 1]
    part[place % len(part)] ^= 1 << bit
    with pytest.raises(KeyringError):
        unseal(master, bytes(parts[0]), bytes(parts[1]), tenant="a", key_id="k")


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 27])
def test_a_cut_value_is_refused(master: LocalMasterKey, cut: int) -> None:
    wrapped, sealed = seal(master, SECRET, tenant="a", key_id="k")
    with pytest.raises(KeyringError):
        unseal(master, wrapped, sealed[:cut], tenant="a", key_id="k")
    with pytest.raises(KeyringError):
        unseal(master, wrapped[:cut], sealed, tenant="a", key_id="k")


def test_the_key_shows_nowhere(master: LocalMasterKey) -> None:
    shown = f"{master!r} {master} {master.id}"
    assert KEY.hex() not in shown
    assert base64.b64encode(KEY).decode() not in shown
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(master)
    with pytest.raises(TypeError, match="pickled"):
        copy.deepcopy(master)
    assert not hasattr(master, "__dict__")


@pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33), "x" * 32, None])
def test_a_master_key_of_another_length_is_refused(bad: object) -> None:
    with pytest.raises(KeyringError, match="32 bytes") as caught:
        LocalMasterKey(bad)  # type: ignore[arg-type]
    assert "xxxx" not in str(caught.value)


def test_a_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "master.key"
    made = LocalMasterKey.from_file(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert LocalMasterKey.from_file(path, create=True).id == made.id
    assert [one.name for one in path.parent.iterdir()] == ["master.key"]
    path.chmod(0o640)
    with pytest.raises(KeyringError, match="owner alone"):
        LocalMasterKey.from_file(path)


def test_processes_that_start_together_share_one_file(tmp_path: Path) -> None:
    program = (
        "import sys, time; from assay.service.envelope import LocalMasterKey as K;"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()));"
        "print(K.from_file(sys.argv[1], create=True).id)"
    )

    moment = str(time.time() + 2.0)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "m"), moment], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    answers = {process.communicate(timeout=60)[0] for process in started}
    assert len(answers) == 1
    assert answers.pop().startswith("local-")


@pytest.mark.parametrize("content", [b"", b"no base64 !", b"AAAA", b"\xff\xfe"])
def test_a_file_with_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyringError, match="32 bytes"):
        LocalMasterKey.from_file(path)


def test_the_environment_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, base64.b64encode(KEY).decode())
    found = LocalMasterKey.from_environment()
    assert found is not None
    assert found.id == LocalMasterKey(KEY).id
    assert ENVIRONMENT not in os.environ
    assert LocalMasterKey.from_environment() is None
