"""Bad requests over HTTP: one shape, no echo, nothing of the inside; security headers on every answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi import HTTPException
from hypothesis import HealthCheck, example, given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from service_app import Service

MARK = "uniquely-recognisable-input"
BAD_BODIES = {
    "no JSON": f'{{"text": {MARK}'.encode(),
    "NaN": b'{"text": NaN}',
    "Infinity": b'{"text": "a", "keys": Infinity}',
    "lone surrogate": b'{"text": "' + MARK.encode() + b'\\ud800"}',
    "lone surrogate in a key": b'{"text": "a", "keys": ["\\ud800"]}',
    "NUL in a key": b'{"text": "a", "keys": ["\\u0000"]}',
    "invalid UTF-8": b'{"text": "' + MARK.encode() + b'\xff\xfe"}',
    "UTF-16": json.dumps({"text": MARK}).encode("utf-16"),
    "deeply nested": b"[" * 100_000,
    "nested and closed": b"[" * 100_000 + b"]" * 100_000,
    "number": b"1",
    "list": json.dumps([MARK]).encode(),
    "empty": b"",
    "missing": b"{}",
    "wrong type": b'{"text": 3}',
    "null": b'{"text": null}',
    "unknown field": json.dumps({"text": "a", MARK: MARK}).encode(),
    "no keys": b'{"text": "a", "keys": []}',
    "many keys": json.dumps({"text": "a", "keys": ["k"] * 65}).encode(),
    "path": json.dumps({"text": "a", "keys": ["../../etc/passwd"]}).encode(),
    "large": json.dumps({"text": 1, "more": MARK * 30_000}).encode(),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from fastapi.testclient import TestClient

    from assay.service.app import create_app
    from assay.service.envelope import LocalMasterKey
    from assay.service.settings import Settings

    settings = Settings(data=tmp_path_factory.mktemp("errors"))
    app = create_app(settings, master=LocalMasterKey(bytes(32)))
    with TestClient(app, raise_server_exceptions=False) as client:
        service = Service(app, client, settings, app.state.assay.engine)
        headers = service.headers()
        service.key(headers, id="k")
        yield service, headers


@pytest.mark.parametrize("what", BAD_BODIES)
def test_bad_bodies_are_refused_without_echo(running: tuple[Service, dict[str, str]], what: str) -> None:
    service, headers = running
    answer = service.client.post("/v1/detect", content=BAD_BODIES[what], headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"] == "invalid"
    assert len(answer.content) < 2500
    if what != "unknown field":  # the name of a field that is not accepted is where, not what
        assert MARK not in answer.text


@pytest.mark.parametrize("sent", ["whole", "in pieces"])
def test_fifty_megabytes_are_refused_and_not_repeated(running: tuple[Service, dict[str, str]], sent: str) -> None:
    service, headers = running
    body = b'{"text": 3, "more": "' + MARK.encode() + b"x" * 50_000_000 + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    content = body if sent == "whole" else pieces()
    answer = service.client.post("/v1/detect", content=content, headers=headers)
    assert answer.status_code == 413
    assert len(answer.content) < 200


def test_bodies_are_not_read_for_strangers(running: tuple[Service, dict[str, str]]) -> None:
    """Without a key the answer is 401, whatever the body: nobody makes the service parse without being known."""
    service, _ = running
    for body in BAD_BODIES.values():
        assert service.client.post("/v1/detect", content=body).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/jobs/../../etc/passwd", 404),
        ("GET", "/v1/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/v1/jobs/job-xyz", 422),
        ("GET", "/v1/jobs/job-" + "0" * 24, 404),
        ("POST", "/v1/keys/%00/rotate", 422),
        ("POST", "/v1/keys/none/rotate", 404),
        ("DELETE", "/v1/keys", 405),
        ("POST", "/v1/jobs?fdr=nan", 422),
        ("POST", "/v1/jobs?fdr=0", 422),
        ("POST", "/v1/jobs?shard_rows=0", 422),
        ("POST", "/v1/jobs?id_column=%00", 422),
        ("POST", "/v1/jobs?keys=none", 404),
        ("POST", "/v1/jobs", 422),
        ("GET", "/v1/audit?after=-1", 422),
        ("GET", "/docs", 404),
    ],
)
def test_bad_paths_and_queries(running: tuple[Service, dict[str, str]], method: str, path: str, status: int) -> None:
    service, headers = running
    answer = service.client.request(method, path, headers=headers)
    assert answer.status_code == status, answer.text
    assert "root:" not in answer.text


def test_a_scheme_s_refusal_is_told(running: tuple[Service, dict[str, str]]) -> None:
    service, headers = running
    for wanted in ({"scheme": "none"}, {"parameters": {"window": -1}}, {"parameters": {"bad": 1}}, {"id": "k"}):
        answer = service.client.post("/v1/keys", json=wanted, headers=headers)
        assert answer.status_code in (409, 422), answer.text
        assert "must" in answer.json()["detail"]


def test_scopes_are_asked_for(running: tuple[Service, dict[str, str]]) -> None:
    service, _ = running
    detect, keys = service.headers("acme", "detect"), service.headers("acme", "keys")
    assert service.client.get("/v1/keys", headers=detect).status_code == 403
    assert service.client.post("/v1/detect", json={"text": "a"}, headers=keys).status_code == 403
    assert service.client.get("/v1/audit", headers=keys).status_code == 403
    answer = service.client.get("/v1/keys")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    for header in ("Bearer", "Basic abc", "Bearer assay_x", "Bearer \xe9".encode("latin-1")):
        assert service.client.get("/v1/keys", headers={"authorization": header}).status_code == 401


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(MARK),
        ValueError(MARK),
        KeyError(MARK),
        UnicodeEncodeError("utf-8", MARK, 0, 1, "no"),
        HTTPException(503, "busy"),
    ],
)
def test_what_was_not_foreseen_tells_nothing(
    running: tuple[Service, dict[str, str]], error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """An exception of a library may quote a text or a secret: neither the answer nor the log does."""
    service, headers = running

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(service.state.keys, "infos", fail)
    with caplog.at_level(logging.DEBUG):
        answer = service.client.get("/v1/keys", headers=headers)
    assert answer.status_code == (503 if isinstance(error, HTTPException) else 500)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert MARK not in answer.text
    assert MARK not in caplog.text
    if answer.status_code == 500:
        assert type(error).__name__ in caplog.text


@pytest.mark.parametrize("id", ["\x00", "a\x00b", "<b>", "é", "", "a" * 65])
def test_ids_that_no_key_can_have(start: Callable[..., Service], database_url: str, id: str) -> None:
    """PostgreSQL takes no NUL in a text: such an id must not come so far. None is repeated."""
    service = start(database_url=database_url)
    headers = service.headers()
    bodies = {
        "/v1/completions": {"model": "default", "prompt": "a", "assay_key": id},
        "/v1/reports": {"job_id": "job-" + "0" * 24, "sign_with": id},
        "/v1/detect": {"text": "a", "keys": [id]},
        "/v1/keys": {"id": id},
    }
    for path, body in bodies.items():
        answer = service.client.post(path, json=body, headers=headers)
        assert answer.status_code == 422, (path, answer.text)
        assert "x00" not in answer.text.replace("u0000", "x00")
        assert "<b>" not in answer.text


def test_security_headers_on_every_answer(running: tuple[Service, dict[str, str]]) -> None:
    service, headers = running
    for answer in (
        service.client.get("/healthz"),
        service.client.get("/nowhere"),
        service.client.get("/v1/keys"),
        service.client.get("/v1/keys", headers=headers),
        service.client.post("/v1/detect", content=b"{", headers=headers),
        service.client.get("/openapi.json"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "no-store" in answer.headers["cache-control"]
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy


def test_health_and_metrics(running: tuple[Service, dict[str, str]]) -> None:
    service, headers = running
    assert service.client.get("/healthz").json() == {"status": "ok"}
    assert service.client.get("/readyz").json() == {"status": "ok"}
    service.client.get("/v1/jobs/job-" + "a" * 24, headers=headers)
    found = service.client.get("/metrics").text
    assert 'assay_requests_total{route="/v1/jobs/{id}",status="404"}' in found
    assert "job-" not in found
    assert "acme" not in found
    from sqlalchemy.exc import OperationalError

    class Down:
        def connect(self) -> Any:
            raise OperationalError("SELECT", {}, Exception("postgresql://user:password@host"))

    whole = service.state
    service.app.state.assay = replace(whole, engine=Down())  # type: ignore[arg-type]
    try:
        answer = service.client.get("/readyz")
    finally:
        service.app.state.assay = whole
    assert answer.status_code == 503
    assert "password" not in answer.text


LONGEST = 1_000_000


@given(st.one_of(st.text(), st.text(alphabet=st.characters(categories=["Cs", "Cc", "Co", "Lo", "Mn"]))))
@example("")
@example("a")
@example("\x00")
@example(" \t\r\n\u2003\ufeff")
@example("\u202e\u2066\u05d0\u0628 abc \u202c\u2069")
@example("e" + "\u0301" * 5000)
@example("\U0001f469\u200d\U0001f4bb" * 500)
@example("\udc00\ud800" + MARK * 3)
@example("\u4e00" * 50_000)
@example(MARK[0] * (LONGEST + 1))
@bounded(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_is_tested_or_refused(running: tuple[Service, dict[str, str]], text: str) -> None:
    """Valid Unicode gives 200 and a p-value in [0, 1]; lone surrogates and what is too long give 422, without echo.

    One, batch and stream agree.
    """
    service, headers = running
    valid = not any(0xD800 <= ord(char) <= 0xDFFF for char in text) and len(text) <= LONGEST
    one = service.client.post("/v1/detect", content=json.dumps({"text": text}), headers=headers)
    many = service.client.post("/v1/detect/batch", content=json.dumps({"texts": [text]}), headers=headers)
    line = service.client.post("/v1/detect/stream", content=json.dumps({"text": text, "id": 7}), headers=headers)
    assert one.status_code == many.status_code == (200 if valid else 422)
    answer = json.loads(line.text)
    if not valid:
        assert "verdict" not in answer
        for told in (one, many, line):
            assert len(told.content) < 1000
            assert MARK not in told.text
        return
    assert 0 <= one.json()["pvalue"] <= 1
    assert many.json()["verdicts"] == [one.json()]
    assert answer == {"id": 7, "verdict": one.json()}
