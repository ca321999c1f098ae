"""The OpenAPI description, held against the service by schemathesis: bounded, and the same requests every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from assay.service.app import create_app
from assay.service.auth import create_api_key
from assay.service.envelope import LocalMasterKey
from assay.service.settings import Settings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 12


@schemathesis.serializer("application/x-ndjson")
def lines(_: Any, value: Any) -> bytes:
    """Drawn texts go out as they are: most are no JSON lines, which the service must answer as well."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data: Path = tmp_path_factory.mktemp("openapi")
    # Without a model: completions are tested on their own, and each would cost seconds here.
    made = create_app(Settings(data=data), master=LocalMasterKey(bytes(32)))
    _, made.state.test_token = create_api_key(made.state.assay.sessions, "fuzz", ["admin"])
    yield made
    made.state.assay.guard.close()
    made.state.assay.engine.dispose()


def operations(app: Any) -> list[Any]:
    """Gone through here and not by schemathesis's own fixture, which does not know pytest 9."""
    return [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]


def hold(app: Any, operation: Any) -> None:
    """Drawn requests for an operation: no 500, and every answer is one that the description names."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(headers={"authorization": f"Bearer {app.state.test_token}"}, checks=CHECKS)

    check()


def test_answers_are_as_described(app: Any) -> None:
    found = operations(app)
    assert len(found) > 15
    for operation in found:
        if operation.path != "/v1/completions":  # a model's answers take seconds; they have tests of their own
            hold(app, operation)


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
