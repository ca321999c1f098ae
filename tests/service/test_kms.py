"""A key management service behind `MasterKey`: the service wraps and unwraps with it, and keeps no master key."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_app import Service

from assay._errors import KeyringError
from assay.service.app import create_app
from assay.service.envelope import ENVIRONMENT, LocalMasterKey, MasterKey
from assay.service.settings import Settings
from assay.service.state import open_state
from assay.service.worker import work


class Remote:
    """What a client of such a service looks like: it sends data keys and their context, and may be refused."""

    id = "kms-eu-1/assay"

    def __init__(self) -> None:
        self._inside = LocalMasterKey(b"\x07" * 32)
        self.contexts: list[bytes] = []
        self.down = False

    def wrap(self, data_key: bytes, context: bytes) -> bytes:
        return self._asked(context).wrap(data_key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        return self._asked(context).unwrap(wrapped, context)

    def _asked(self, context: bytes) -> LocalMasterKey:
        self.contexts.append(context)
        if self.down:
            raise ConnectionError("https://user:password@kms.internal refused")
        return self._inside


@pytest.fixture
def remote() -> Remote:
    return Remote()


@pytest.fixture
def service(tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    app = create_app(Settings(data=tmp_path / "data"), master=remote)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Service(app, client, app.state.assay.settings, app.state.assay.engine)


def test_keys_are_wrapped_by_the_remote_service(service: Service, remote: Remote) -> None:
    assert isinstance(remote, MasterKey)
    headers = service.headers()
    id = service.key(headers)
    assert service.client.post("/v1/detect", json={"text": "a", "keys": [id]}, headers=headers).status_code == 200
    assert len(remote.contexts) == 2  # wrapped once, unwrapped once
    assert all(b"acme" in one and id.encode() in one for one in remote.contexts)
    assert not (service.settings.data / "master.key").exists()
    with service.engine.connect() as connection:
        stored = connection.exec_driver_sql("SELECT master_key_id, sealed_secret FROM watermark_keys").one()
    assert stored[0] == remote.id
    # The secret is nowhere in the database without it.
    secret = service.state.keys.key("acme", id)._secret
    assert secret not in stored[1]
    assert not any(secret in path.read_bytes() for path in service.settings.data.iterdir() if path.is_file())
    # Another process with the same service opens it; one with a local key does not.
    again = open_state(service.settings, master=remote)
    assert again.keys.key("acme", id).info == service.state.keys.key("acme", id).info
    local = open_state(service.settings, master=LocalMasterKey(bytes(32)))
    with pytest.raises(KeyringError, match="another master key"):
        local.keys.key("acme", id)
    for one in (again, local):
        one.engine.dispose()


def test_jobs_use_it_too(service: Service) -> None:
    """A worker of one's own: `work(open_state(settings, master=...))`."""
    headers = service.headers()
    service.key(headers)
    corpus = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(3))
    job = service.client.post("/v1/jobs", content=corpus, headers=headers).json()["id"]
    assert work(service.state, once=True) == 1
    assert service.client.get(f"/v1/jobs/{job}", headers=headers).json()["state"] == "finished"


def test_when_it_does_not_answer(service: Service, remote: Remote, caplog: Any) -> None:
    """No key is made or used, and neither the answer nor the log tells where the service is."""
    headers = service.headers()
    id = service.key(headers)
    service.state.keys._known.clear()
    remote.down = True
    with caplog.at_level(logging.DEBUG):
        answers = [
            service.client.post("/v1/keys", json={"id": "new"}, headers=headers),
            service.client.post("/v1/detect", json={"text": "a", "keys": [id]}, headers=headers),
        ]
    for answer in answers:
        assert answer.status_code == 500
        assert "kms" not in answer.text
    assert "password" not in caplog.text
    remote.down = False
    assert [one["id"] for one in service.client.get("/v1/keys", headers=headers).json()["keys"]] == [id]
    assert service.client.post("/v1/detect", json={"text": "a", "keys": [id]}, headers=headers).status_code == 200
