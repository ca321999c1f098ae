"""The audit log: every use of a key and every change, by whom, with what outcome; no text, no secret, no verdict."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from assay.service.auth import Caller
from assay.service.database import AuditEvent


def record(
    sessions: sessionmaker[Any], caller: Caller, action: str, subject: str | None = None, **detail: str | int | bool
) -> None:
    """Append one event.

    Parameters
    ----------
    sessions
        Of the database.
    caller
        Who acts.
    action
        Such as "keys.create" or "detect".
    subject
        What is acted on: a key id, a job id.
    detail
        Numbers and names; nothing of a text.
    """
    with sessions.begin() as session:
        session.add(event(caller, action, subject, **detail))


def event(caller: Caller, action: str, subject: str | None = None, **detail: str | int | bool) -> AuditEvent:
    """An event, to be added in the transaction of the change that it tells of."""
    return AuditEvent(
        at=datetime.now(UTC),
        tenant_id=caller.tenant,
        api_key_id=caller.api_key_id,
        action=action,
        subject=subject,
        detail=detail,
    )


def events(sessions: sessionmaker[Any], tenant: str, *, after: int = 0, limit: int = 100) -> list[AuditEvent]:
    """A tenant's events with ids above `after`, oldest first, at most `limit`."""
    query = (
        select(AuditEvent)
        .where(AuditEvent.tenant_id == tenant, AuditEvent.id > after)
        .order_by(AuditEvent.id)
        .limit(limit)
    )
    with sessions() as session:
        return list(session.scalars(query).all())
