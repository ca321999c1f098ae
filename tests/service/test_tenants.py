"""Tenants see nothing of each other by any route, and a walk over all of them writes nothing secret anywhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from service_app import Service

from assay.service import audit
from assay.service.worker import work

TEXT = "A most private sentence about hallmarks and assay offices. " * 10
CORPUS = b"".join(json.dumps({"text": f"{TEXT} {i}"}).encode() + b"\n" for i in range(5))
UNKNOWN = {"key": "k-000000000000", "job": "job-" + "0" * 24, "report": "report-" + "0" * 24}
Call = Callable[[Service, dict[str, str], dict[str, str]], Any]


def post(path: str, body: Callable[[dict[str, str]], Any] = lambda ids: None) -> Call:
    return lambda service, ids, headers: service.client.post(path.format(**ids), json=body(ids), headers=headers)


def get(path: str) -> Call:
    return lambda service, ids, headers: service.client.get(path.format(**ids), headers=headers)


def upload(path: str, content: bytes) -> Call:
    return lambda service, ids, headers: service.client.post(path.format(**ids), content=content, headers=headers)


# How each route is called with ids. A route that is not here fails the test below: say how another's ids get into it.
# "ids": the answer must be that for ids that nobody has. "own": the route takes no ids and must name none of another's.
CALLS: dict[tuple[str, str], tuple[str, Call]] = {
    ("get", "/healthz"): ("own", get("/healthz")),
    ("get", "/readyz"): ("own", get("/readyz")),
    ("get", "/metrics"): ("own", get("/metrics")),
    ("get", "/v1/audit"): ("own", get("/v1/audit?limit=1000")),
    ("post", "/v1/keys"): ("own", post("/v1/keys", lambda ids: {})),
    ("get", "/v1/keys"): ("own", get("/v1/keys")),
    ("post", "/v1/keys/{id}/rotate"): ("ids", post("/v1/keys/{key}/rotate")),
    ("post", "/v1/keys/{id}/revoke"): ("ids", post("/v1/keys/{key}/revoke")),
    ("post", "/v1/detect"): ("ids", post("/v1/detect", lambda ids: {"text": TEXT, "keys": [ids["key"]]})),
    ("post", "/v1/detect/batch"): (
        "ids",
        post("/v1/detect/batch", lambda ids: {"texts": [TEXT], "keys": [ids["key"]]}),
    ),
    ("post", "/v1/detect/stream"): ("own", upload("/v1/detect/stream", CORPUS)),
    ("post", "/v1/jobs"): ("ids", upload("/v1/jobs?keys={key}", CORPUS)),
    ("get", "/v1/jobs"): ("own", get("/v1/jobs")),
    ("get", "/v1/jobs/{id}"): ("ids", get("/v1/jobs/{job}")),
    ("post", "/v1/jobs/{id}/cancel"): ("ids", post("/v1/jobs/{job}/cancel")),
    ("get", "/v1/jobs/{id}/results"): ("ids", get("/v1/jobs/{job}/results")),
    ("get", "/v1/models"): ("own", get("/v1/models")),
    ("post", "/v1/completions"): (
        "ids",
        post(
            "/v1/completions",
            lambda ids: {"model": "default", "prompt": "An", "max_tokens": 2, "assay_key": ids["key"]},
        ),
    ),
    ("get", "/v1/models/{model}"): ("own", get("/v1/models/default")),
    ("get", "/v1/telemetry"): ("own", get("/v1/telemetry")),
    ("put", "/v1/telemetry/budget"): (
        "own",
        lambda service, ids, headers: service.client.put("/v1/telemetry/budget", json={"epsilon": 1}, headers=headers),
    ),
    ("post", "/v1/telemetry/days/{day}"): ("own", post("/v1/telemetry/days/2020-02-02", lambda ids: {})),
    ("post", "/v1/reports"): ("ids", post("/v1/reports", lambda ids: {"job_id": ids["job"]})),
    ("get", "/v1/reports"): ("own", get("/v1/reports")),
    ("post", "/v1/reports/verify"): (
        "own",
        post("/v1/reports/verify", lambda ids: {"report_json": "{}", "signature": "{}"}),
    ),
    ("get", "/v1/reports/{id}"): ("ids", get("/v1/reports/{report}")),
    ("get", "/v1/reports/{id}/{name}"): ("ids", get("/v1/reports/{report}/report.json")),
}


def owner(service: Service) -> tuple[dict[str, str], dict[str, str]]:
    """A tenant with a key, a finished job and, where there are reports, one: its headers and its ids."""
    headers = service.headers("owner")
    ids = {"key": service.key(headers)}
    submitted = service.client.post("/v1/jobs", content=CORPUS, headers=headers)
    assert submitted.status_code == 202, submitted.text
    ids["job"] = submitted.json()["id"]
    work(service.state, once=True)
    assert service.client.get(f"/v1/jobs/{ids['job']}", headers=headers).json()["state"] == "finished"
    made = service.client.post("/v1/reports", json={"job_id": ids["job"], "excerpts": 1}, headers=headers)
    assert made.status_code == 201, made.text
    ids["report"] = made.json()["id"]
    return headers, ids


def test_no_route_shows_another_tenant_s_things(start: Callable[..., Service], caplog: Any, capfd: Any) -> None:
    """Every route of the OpenAPI description, called by a stranger who holds every scope and knows every id."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "matplotlib")  # it logs every font of the machine
    service = start()
    headers, ids = owner(service)
    stranger = service.headers("stranger")
    service.key(stranger, id="own")
    routes = {
        (method, path)
        for path, methods in service.client.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    assert routes <= CALLS.keys(), f"say in CALLS how {sorted(routes - CALLS.keys())} is called"
    before = _owned(service, headers, ids)
    for route in sorted(routes):
        kind, call = CALLS[route]
        answer = call(service, ids, stranger)
        for id in ids.values():
            assert id not in answer.text or kind == "ids", (route, answer.text)
        if kind == "ids":
            unknown = call(service, UNKNOWN, stranger)
            assert answer.status_code == unknown.status_code == 404, (route, answer.text, unknown.text)
            same = answer.text
            for name, id in ids.items():
                same = same.replace(id, UNKNOWN[name])
            assert same == unknown.text, route  # an id that another has is told from one that nobody has by nothing
    assert _owned(service, headers, ids) == before
    assert {event.tenant_id for event in audit.events(service.state.sessions, "owner")} == {"owner"}

    # Nothing of the texts, the tokens or the keys is in what was logged or printed meanwhile.
    secret = service.state.keys.key("owner", ids["key"])._secret
    for written in (caplog.text, *capfd.readouterr()):
        assert "most private sentence" not in written
        for hidden in (headers["authorization"][-43:], stranger["authorization"][-43:], secret.hex(), repr(secret)):
            assert hidden not in written


def _owned(service: Service, headers: dict[str, str], ids: dict[str, str]) -> list[Any]:
    paths = ("/v1/keys", f"/v1/jobs/{ids['job']}", f"/v1/jobs/{ids['job']}/results", "/v1/reports")
    return [service.client.get(path, headers=headers).text for path in paths]


def test_every_use_of_a_key_is_in_the_audit_log(service: Service) -> None:
    """Each action that opens a key leaves an event that names the key and who used it, refused ones too."""
    headers, ids = owner(service)
    service.client.post("/v1/detect", json={"text": TEXT}, headers=headers)
    service.client.post("/v1/detect/batch", json={"texts": [TEXT] * 3}, headers=headers)
    service.client.post("/v1/detect/stream", content=CORPUS, headers=headers)
    successor = service.client.post(f"/v1/keys/{ids['key']}/rotate", headers=headers).json()["id"]
    service.client.post(f"/v1/keys/{ids['key']}/revoke", headers=headers)
    listed = service.client.get("/v1/audit", headers=headers).json()["events"]
    expected = [
        ("keys.create", ids["key"], {"scheme": "gumbel/1"}),
        ("jobs.detect", ids["job"], {"keys": [ids["key"]], "texts": 6}),
        ("jobs.submit", ids["job"], {"keys": 1}),
        ("detect", None, {"keys": [ids["key"]], "texts": 1}),
        ("detect.batch", None, {"keys": [ids["key"]], "texts": 3}),
        ("detect.stream", None, {"keys": [ids["key"]], "texts": 5}),
        ("keys.rotate", ids["key"], {"successor": successor}),
        ("keys.revoke", ids["key"], {}),
    ]
    found = [(event["action"], event["subject"], event["detail"]) for event in listed]
    assert [one for one in found if not one[0].startswith("reports")] == expected
    assert TEXT[:20] not in json.dumps(listed)
    assert service.client.get(f"/v1/audit?after={listed[-1]['id']}", headers=headers).json() == {"events": []}
