"""/healthz, /readyz and /metrics: whether the process lives, whether it can answer, and what it has done."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from assay.service.access import Shared
from assay.service.errors import Problem

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """All is well."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
def healthz() -> Health:
    """Whether the process lives."""
    return Health()


@router.get("/readyz", responses={503: {"model": Problem, "description": "unavailable"}})
def readyz(shared: Shared) -> Health:
    """Whether the database answers."""
    try:
        with shared.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError:
        raise HTTPException(503, "the database does not answer.") from None
    return Health()


@router.get("/metrics", response_class=PlainTextResponse)
def metrics() -> PlainTextResponse:
    """Counters and times of this process, as Prometheus reads them; no tenant, no key, no text."""
    return PlainTextResponse(generate_latest(), media_type=CONTENT_TYPE_LATEST)
