"""A running application of the tests, with its client and API keys."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from assay.service.app import State
from assay.service.auth import Caller, create_api_key
from assay.service.settings import Settings


@dataclass
class Service:
    """An application with its client and API keys."""

    app: FastAPI
    client: TestClient
    settings: Settings
    engine: Engine

    @property
    def state(self) -> State:
        return self.app.state.assay

    def token(self, tenant: str = "acme", *scopes: str) -> str:
        return create_api_key(self.state.sessions, tenant, scopes or ["admin"])[1]

    def headers(self, tenant: str = "acme", *scopes: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token(tenant, *scopes)}"}

    def caller(self, tenant: str = "acme", *scopes: str) -> Caller:
        found = self.state.authenticator.caller(self.token(tenant, *scopes))
        assert found is not None
        return found

    def key(self, headers: dict[str, str], **wanted: object) -> str:
        answer = self.client.post("/v1/keys", json=wanted, headers=headers)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]
