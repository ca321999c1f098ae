"""Keys in the database: sealed, found again, rotated, revoked, bound to their tenant; every change in the audit log."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import sessionmaker

from assay._errors import KeyringError, RevokedKeyError, UnknownKeyError
from assay.service import audit, keystore
from assay.service.auth import Authenticator, Caller, create_api_key
from assay.service.envelope import LocalMasterKey
from assay.service.keystore import KeyStore
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import use_key
from assay.watermark.signing import Ed25519Config

MASTER = LocalMasterKey(bytes(range(32)))


@pytest.fixture
def store(made_sessions: sessionmaker[Any]) -> KeyStore:
    for tenant in ("acme", "other"):
        create_api_key(made_sessions, tenant, ["detect"])
    return KeyStore(made_sessions, MASTER)


@pytest.fixture
def caller(made_sessions: sessionmaker[Any]) -> Caller:
    found = Authenticator(made_sessions).caller(create_api_key(made_sessions, "acme", ["keys"])[1])
    assert found is not None
    return found


def test_life_of_a_key(store: KeyStore, made_sessions: sessionmaker[Any], caller: Caller) -> None:
    """Made, found by another process, rotated, revoked; the old one detects until it is revoked; all of it logged."""
    info = store.create("acme", GumbelConfig(window=3), "first", caller=caller)
    fresh = KeyStore(made_sessions, MASTER)
    key = fresh.key("acme", "first")
    assert key.config == GumbelConfig(window=3)
    assert key.info == info
    assert np.array_equal(use_key(key), use_key(store.key("acme", "first")))
    successor = store.rotate("acme", "first", caller=caller)
    assert successor.config == key.config
    assert successor.fingerprint != info.fingerprint
    assert [one.state for one in store.infos("acme")] == ["retired", "active"]
    assert {one.id for one in store.for_detection("acme")} == {"first", successor.id}
    with pytest.raises(RevokedKeyError, match="retired"):
        store.rotate("acme", "first")
    revoked = store.revoke("acme", "first", caller=caller)
    assert revoked == store.revoke("acme", "first")  # again changes nothing
    assert [one.id for one in store.for_detection("acme")] == [successor.id]
    assert store.key("acme", "first").state == "revoked"  # named explicitly it is still found
    events = audit.events(made_sessions, "acme")
    assert [(event.action, event.subject) for event in events] == [
        ("keys.create", "first"),
        ("keys.rotate", "first"),
        ("keys.revoke", "first"),
    ]
    assert {event.api_key_id for event in events} == {caller.api_key_id}


def test_tenants_share_ids_not_keys(store: KeyStore) -> None:
    ours, theirs = store.create("acme", GumbelConfig(), "same"), store.create("other", GumbelConfig(), "same")
    assert ours.fingerprint != theirs.fingerprint
    store.create("acme", GumbelConfig(), "mine")
    for change in (store.key, store.rotate, store.revoke):
        with pytest.raises(UnknownKeyError):
            change("other", "mine")
    with pytest.raises(KeyringError, match="taken"):
        store.create("acme", GumbelConfig(), "same")


def test_a_row_moved_to_another_tenant_does_not_open(store: KeyStore, engine: Engine) -> None:
    """What someone with write access to the database, but no master key, could try."""
    store.create("acme", GumbelConfig(), "k")
    with engine.begin() as connection:
        connection.execute(text("UPDATE watermark_keys SET tenant_id = 'other'"))
    with pytest.raises(KeyringError, match="does not open"):
        store.key("other", "k")


def test_changed_settings_are_noticed(store: KeyStore, made_sessions: sessionmaker[Any]) -> None:
    """The scheme's settings are not sealed; the fingerprint binds them to the secret, or the key opens unchanged."""
    from assay.service.database import WatermarkKey

    store.create("acme", GumbelConfig(), "k")
    with made_sessions.begin() as session:
        row = session.get(WatermarkKey, ("acme", "k"))
        row.info = {**row.info, "fingerprint": "0" * 32}
    with pytest.raises(KeyringError, match="does not match"):
        store.key("acme", "k")


def test_secrets_are_not_in_the_database(store: KeyStore, engine: Engine) -> None:
    store.create("acme", GumbelConfig(), "k")
    secret = store.key("acme", "k")._secret
    with engine.connect() as connection:
        for row in connection.execute(text("SELECT * FROM watermark_keys")):
            for value in row:
                raw = bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode()
                assert secret not in raw
                assert secret.hex().encode() not in raw


def test_another_process_s_change_is_seen_within_five_seconds(
    store: KeyStore, made_sessions: sessionmaker[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("acme", GumbelConfig(), "k")
    assert [key.id for key in store.for_detection("acme")] == ["k"]
    assert store.knows("acme", None)
    assert store.knows("acme", ["k"])
    KeyStore(made_sessions, MASTER).revoke("acme", "k")
    now = time.monotonic()
    monkeypatch.setattr(keystore.time, "monotonic", lambda: now + 5.01)  # type: ignore[attr-defined]
    assert not store.knows("acme", None)
    assert not store.knows("acme", ["k"])
    assert store.for_detection("acme") == []
    assert store.key("acme", "k").state == "revoked"


def test_changes_of_this_process_are_seen_at_once(store: KeyStore) -> None:
    assert store.for_detection("acme") == []
    store.create("acme", GumbelConfig(), "k")
    store.create("acme", Ed25519Config(), "signer")
    assert [key.id for key in store.for_detection("acme")] == ["k"]  # a signing key marks nothing
    store.revoke("acme", "k")
    assert store.for_detection("acme") == []
