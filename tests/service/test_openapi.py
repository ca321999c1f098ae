"""The OpenAPI description, held against the service by schemathesis: bounded, and the same requests every time.

All its checks but one: a request that has the described form may still name a key or a job that does not exist, so not
every one can be accepted (positive_data_acceptance).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS as REGISTERED
from schemathesis.core.failures import FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi import checks as _registers_them  # noqa: F401

from assay.service.app import create_app
from assay.service.auth import create_api_key
from assay.service.envelope import LocalMasterKey
from assay.service.generation import Completion, Generator, Sampling
from assay.service.routes import STREAMED, accepted
from assay.service.settings import Settings
from assay.watermark.gumbel import GumbelConfig

CHECKS = REGISTERED.get_by_names([name for name in REGISTERED.get_all_names() if name != "positive_data_acceptance"])
EXAMPLES = 4
BOTH = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


class Instant(Generator):
    """Reads every request as the real one does, and then writes one letter: a model would take seconds."""

    def _generate(self, ids: list[int], mark: Any, sampling: Sampling, completion: Completion) -> None:
        completion.completion_tokens, completion.finish_reason = 1, "length"
        completion._events.put("a")


@schemathesis.serializer("application/x-ndjson")
def lines(_: Any, value: Any) -> bytes:
    """Drawn texts go out as they are: most are no JSON lines, which the service must answer as well."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data: Path = tmp_path_factory.mktemp("openapi")
    without_end = {"requests_per_second": 1e6, "burst": 10**6}
    made = create_app(Settings(data=data, **without_end), master=LocalMasterKey(bytes(32)))  # type: ignore[arg-type]
    made.state.generator, made.state.generator_since = Instant("default"), 1
    _, made.state.test_token = create_api_key(made.state.assay.sessions, "fuzz", ["admin"])
    made.state.assay.keys.create("fuzz", GumbelConfig(), "k")
    yield made
    made.state.generator.close()
    made.state.assay.guard.close()
    made.state.assay.engine.dispose()


def operations(app: Any) -> list[Any]:
    """Gone through here and not by schemathesis's own fixture, which does not know pytest 9."""
    return [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]


def ask(app: Any, case: Any) -> None:
    """A request, and all checks on its answer."""
    # Where the headers are to be wrong, the right key would mend them.
    headers_as_drawn = case.meta is not None and case.meta.is_negative_at(ParameterLocation.HEADER)
    headers = {} if headers_as_drawn else {"Authorization": f"Bearer {app.state.test_token}"}
    # A streamed body is refused line by line, in an answer that has begun.
    checks = [one for one in CHECKS if case.path not in STREAMED or one.__name__ != "negative_data_rejection"]
    case.call_and_validate(headers=headers, checks=checks)


def hold(app: Any, operation: Any, mode: GenerationMode = GenerationMode.POSITIVE) -> None:
    """Drawn requests for an operation: no 500, and every answer is one that the description names."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        ask(app, case)

    check()


@pytest.mark.parametrize("mode", BOTH)
def test_answers_are_as_described(app: Any, mode: GenerationMode) -> None:
    """Requests of the described form, and requests that break it in one place."""
    found = operations(app)
    assert len(found) == len([one for one in accepted() if one.include_in_schema])
    for operation in found:
        if mode.is_positive or operation.body or list(operation.iter_parameters()):  # else there is nothing to break
            hold(app, operation, mode)


def edges(operation: Any) -> Iterator[Any]:
    """Each limit of the description, just inside and just outside; methods that a path does not take; no key at all."""
    config = operation.schema.config.generation_for(operation=operation)
    yield from operation.schema.iter_coverage_cases(operation, generation_modes=BOTH, generation_config=config)


@pytest.mark.slow
def test_every_bound_and_every_method(app: Any) -> None:
    cases = [case for operation in operations(app) for case in edges(operation)]
    assert len(cases) > 500
    for case in cases:
        ask(app, case)


@pytest.mark.parametrize("answer", [RuntimeError("not foreseen"), [3]])
def test_answers_that_are_not_described_are_found(app: Any, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check rejects a route that fails, and one that answers in another form."""

    def infos(tenant: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(app.state.assay.keys, "infos", infos)
    listing = next(one for one in operations(app) if (one.method, one.path) == ("get", "/v1/keys"))
    with pytest.raises(FailureGroup):
        hold(app, listing)


def test_a_bound_that_is_not_kept_is_found(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edges reject a description that says less than the service takes."""
    narrow = copy.deepcopy(app.openapi())
    limit = next(one for one in narrow["paths"]["/v1/audit"]["get"]["parameters"] if one["name"] == "limit")
    limit["schema"]["maximum"] = 10
    monkeypatch.setattr(app, "openapi_schema", narrow)
    listing = next(one for one in operations(app) if one.path == "/v1/audit")
    failed = 0
    for case in edges(listing):
        try:
            ask(app, case)
        except FailureGroup:
            failed += 1
    assert failed > 0


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("OPTIONS", "/v1/reports", "GET, POST"),
        ("DELETE", "/v1/keys", "GET, POST"),
        ("PUT", "/v1/jobs", "GET, POST"),
        ("GET", "/v1/reports/verify", "POST"),
        ("DELETE", f"/v1/jobs/job-{'0' * 24}", "GET"),
        ("PATCH", "/v1/telemetry/budget", "PUT"),
        ("DELETE", "/jobs", "GET, POST"),
        ("GET", "/logout", "POST"),
    ],
)
def test_405_names_every_method_of_the_path(app: Any, method: str, path: str, allowed: str) -> None:
    answer = TestClient(app).request(method, path, headers={"authorization": f"Bearer {app.state.test_token}"})
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def names(schema: Any) -> Iterator[str]:
    """Every field that a schema of the description names, at any depth."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for inside in schema.values():
            yield from names(inside)
    elif isinstance(schema, list):
        for inside in schema:
            yield from names(inside)


def test_no_request_names_an_address_a_file_or_a_pattern(app: Any) -> None:
    """What a service is told to fetch, open or match is how others reach through it."""
    bad = re.compile(r"ur[il]|path|file|folder|host|regex|pattern|hook|callback")
    asked = 0
    for path, methods in app.openapi()["paths"].items():
        for method, route in methods.items():
            given = [one["name"] for one in route.get("parameters", [])] + list(names(route.get("requestBody", {})))
            asked += len(given)
            assert not [name for name in given if bad.search(name)], (method, path)
            assert '"format": "uri"' not in json.dumps(route.get("requestBody", {}))
    assert asked > 50
    assert bad.search("image_url")


def test_every_route_that_asks_who_calls_says_so(app: Any) -> None:
    """The description names the security scheme, and the answers to those who are nobody, too quick or too long."""
    described = app.openapi()
    assert described["components"]["securitySchemes"]
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            if path in ("/healthz", "/readyz", "/metrics"):
                continue
            assert route["security"], (method, path)
            assert {"401", "403", "413", "422", "429"} <= route["responses"].keys(), (method, path)
