"""API keys: only hashes at rest, scopes, revocation, and one path for every wrong key."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from service_app import Service
from sqlalchemy import Engine, text
from sqlalchemy.orm import sessionmaker

from assay.service import audit, auth
from assay.service.auth import Authenticator, Caller, create_api_key, revoke_api_key


@pytest.fixture
def authenticator(local_sessions: sessionmaker[Any]) -> Authenticator:
    return Authenticator(local_sessions)


def test_a_key_is_shown_once_and_stored_as_a_hash(engine: Engine, made_sessions: sessionmaker[Any]) -> None:
    id, token = create_api_key(made_sessions, "acme", ["detect"], name="for tests")
    prefix, middle, secret = token.split("_", 2)
    assert (prefix, middle) == ("assay", id)
    assert len(secret) * math.log2(64) >= 256
    with engine.connect() as connection:
        for table in ("api_keys", "tenants", "audit_events"):
            for row in connection.execute(text(f"SELECT * FROM {table}")):
                assert secret not in repr([bytes(v) if isinstance(v, memoryview) else v for v in row])


def test_scopes(authenticator: Authenticator, local_sessions: sessionmaker[Any]) -> None:
    _, token = create_api_key(local_sessions, "acme", ["detect", "embed"])
    found = authenticator.caller(token)
    assert found is not None
    assert [found.may(scope) for scope in auth.SCOPES] == [True, True, False, False]
    _, token = create_api_key(local_sessions, "acme", ["admin"])
    found = authenticator.caller(token)
    assert found is not None
    assert all(found.may(scope) for scope in auth.SCOPES)


@pytest.mark.parametrize(
    ("tenant", "scopes"),
    [("", ["detect"]), ("a b", ["detect"]), ("a" * 65, ["detect"]), ("-a", ["detect"]), ("a", []), ("a", ["root"])],
)
def test_bad_tenants_and_scopes_are_refused(local_sessions: sessionmaker[Any], tenant: str, scopes: list[str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        create_api_key(local_sessions, tenant, scopes)


def test_wrong_tokens_are_nobody(authenticator: Authenticator, local_sessions: sessionmaker[Any]) -> None:
    _, token = create_api_key(local_sessions, "acme", ["admin"])
    _, other = create_api_key(local_sessions, "acme", ["admin"])
    mixed = token[: len("assay_") + 16] + other[len("assay_") + 16 :]
    flipped = token[:-1] + ("A" if token[-1] != "A" else "B")
    wrong = (None, "", "x", token + "x", token[:-1], token.upper(), mixed, flipped, " " + token, token + "\n")
    for one in wrong:
        assert authenticator.caller(one) is None, one
    assert authenticator.caller(token) is not None


def test_every_well_formed_token_is_compared_in_constant_time(
    authenticator: Authenticator, local_sessions: sessionmaker[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown id, a revoked key and a wrong secret take the same comparison of 32 bytes."""
    _, token = create_api_key(local_sessions, "acme", ["admin"])
    revoked, gone = create_api_key(local_sessions, "acme", ["admin"])
    revoke_api_key(local_sessions, "acme", revoked)
    compared = []

    compare = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", spy)  # type: ignore[attr-defined]
    unknown = "assay_" + "a" * 16 + token[len("assay_") + 16 :]
    wrong = token[:-2] + "zz"
    for one in (unknown, gone, wrong, token):
        authenticator.caller(one)
    assert compared == [(32, 32)] * 4
    assert authenticator.caller(unknown) is None
    assert authenticator.caller(gone) is None


def test_the_secret_of_an_unknown_id_is_not_the_empty_hash(authenticator: Authenticator) -> None:
    """What stands in for a missing key is no hash that a caller could meet: SHA-256 gives no 32 zero bytes we know."""
    stored, found = authenticator._look_up("a" * 16)
    assert stored == bytes(32)
    assert found is None


def test_revoked_keys_end(
    authenticator: Authenticator, local_sessions: sessionmaker[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    id, token = create_api_key(local_sessions, "acme", ["detect"])
    assert authenticator.caller(token) is not None
    assert authenticator.knows(token)
    assert not revoke_api_key(local_sessions, "other", id)  # no tenant revokes another's
    assert authenticator.caller(token) is not None
    assert revoke_api_key(local_sessions, "acme", id)
    now = time.monotonic()
    monkeypatch.setattr(auth.time, "monotonic", lambda: now + auth._CACHE_SECONDS + 0.01)  # type: ignore[attr-defined]
    assert not authenticator.knows(token)
    assert authenticator.caller(token) is None
    authenticator.forget()
    assert authenticator.caller(token) is None


class Line:
    """A stream of lines over ASGI, that does something before each."""

    def __init__(self, service: Service, token: str, before: list[Callable[[], object]]) -> None:
        self.before = [*before]
        self.sent: list[bytes] = []
        self.status = 0
        headers = [(b"authorization", f"Bearer {token}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/detect/stream", "query_string": b"", "headers": headers}
        asyncio.run(service.app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if not self.before:
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.to_thread(self.before.pop(0))
        return {"type": "http.request", "body": b'{"text": "a"}\n', "more_body": True}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.sent.append(message.get("body", b""))

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in b"".join(self.sent).splitlines()]


def nothing() -> None:
    """Before a line that follows on the one before it."""


def test_a_stream_ends_with_its_api_key(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may last for hours: who sends it is asked for again, as for any request."""
    service.key(service.headers())
    id, token = create_api_key(service.state.sessions, "acme", ["detect"])
    now = time.monotonic()
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)

    def revoke() -> None:
        nonlocal now
        assert revoke_api_key(service.state.sessions, "acme", id)
        now += 5.1

    answers = Line(service, token, [nothing, nothing, revoke, nothing]).answers
    assert [sorted(one) for one in answers] == [["id", "verdict"], ["id", "verdict"], ["error", "id"]]
    assert "the stream ends here" in answers[-1]["error"]


def test_a_stream_uses_the_keys_of_the_moment(service: Service) -> None:
    headers = service.headers()
    first = service.key(headers)
    token = service.token("acme", "detect")
    answers = Line(
        service,
        token,
        [
            nothing,
            lambda: service.client.post(f"/v1/keys/{first}/revoke", headers=headers),
            nothing,
        ],
    ).answers
    assert answers[0]["verdict"]["key_id"] == first
    assert len(answers) == 2
    assert "there is no key to look for" in answers[1]["error"]


def test_an_upload_ends_with_its_api_key(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.key(service.headers())
    id, token = create_api_key(service.state.sessions, "acme", ["detect"])
    now = time.monotonic()
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)

    def pieces() -> Iterator[bytes]:
        nonlocal now
        yield b'{"text": "a"}\n'
        revoke_api_key(service.state.sessions, "acme", id)
        now += 5.1
        yield b'{"text": "b"}\n'

    headers = {"authorization": f"Bearer {token}"}
    answer = service.client.post("/v1/jobs", content=pieces(), headers=headers)
    assert answer.status_code == 401
    assert list((service.settings.data / "jobs").iterdir()) == []
    assert not [one for one in audit.events(service.state.sessions, "acme") if one.action == "jobs.detect"]


def test_guessing_does_not_fill_the_memory(authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authenticator, "_known", {str(i): (0.0, b"", None) for i in range(10_001)})
    authenticator.caller("assay_" + "b" * 16 + "_" + "c" * 43)
    assert len(authenticator._known) <= 10_001


def test_callers_show_no_secret(authenticator: Authenticator, local_sessions: sessionmaker[Any]) -> None:
    _, token = create_api_key(local_sessions, "acme", ["detect"])
    caller = authenticator.caller(token)
    assert isinstance(caller, Caller)
    assert token.split("_", 2)[2] not in repr(caller)
