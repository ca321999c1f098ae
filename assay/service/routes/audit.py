"""/v1/audit: the tenant's audit log, for callers with the scope "admin"."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from assay.service import audit
from assay.service.access import Administers, Shared
from assay.service.database import AuditEvent
from assay.service.errors import responses

router = APIRouter(prefix="/v1/audit", tags=["audit"], responses=responses())


class Event(BaseModel):
    """Who did what, when. `detail` holds ids and numbers; nothing of a text, no secret and no verdict."""

    id: int
    at: datetime
    api_key_id: str | None
    action: str
    subject: str | None
    detail: dict[str, Any]

    @classmethod
    def of(cls, event: AuditEvent) -> Event:
        """From the row."""
        return cls(
            id=event.id,
            at=event.at,
            api_key_id=event.api_key_id,
            action=event.action,
            subject=event.subject,
            detail=event.detail,
        )


class Events(BaseModel):
    """Events, oldest first."""

    events: list[Event]


@router.get("")
def list_events(
    shared: Shared,
    caller: Administers,
    after: Annotated[int, Query(ge=0, le=2**62, description="Id of the last event read before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Events:
    """Read the audit log."""
    return Events(
        events=[Event.of(one) for one in audit.events(shared.sessions, caller.tenant, after=after, limit=limit)]
    )
