"""A running application of the tests, with its client and API keys; marked text for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from assay.detection.text import load_tokenizer
from assay.service.auth import Caller, create_api_key
from assay.service.settings import Settings
from assay.service.state import State
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of


def marked_text(key: SecretKey, *, tokens: int, unmarked: bytes) -> str:
    """Words of the bundled vocabulary, drawn under the key; they come back as the same tokens."""
    tokenizer = load_tokenizer("default")
    vocabulary = tokenizer.backend.get_vocab()
    words = sorted(id for piece, id in vocabulary.items() if re.fullmatch(r"Ġ[a-z]{3,}", piece))[:500]
    rng = np.random.default_rng(0)
    draw = sampler_of(key.config, use_key(key), unmarked_key(unmarked))
    history = list(rng.choice(words, 4))
    for _ in range(tokens):
        row = np.full(len(vocabulary), -np.inf)
        row[rng.choice(words, 40, replace=False)] = 0.0
        history.append(int(draw(np.array([history], dtype=np.int64), row[None], None)[0]))
    return str(tokenizer.backend.decode(history)).strip()


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
