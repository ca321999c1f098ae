"""Limits: bodies that are too large, callers that are too quick, and detectors that are asked too often.

The oracle guard: an attacker who may query a detector without end can strip a mark or forge one, so callers who hold
only the scope "detect" get rounded evidence and a daily budget for each watermark key.
"""

from __future__ import annotations

import math
import threading
import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import sessionmaker
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assay.service.auth import Caller
from assay.service.database import Budget

_LOG10 = math.log(10.0)
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
STRONGEST = -9  # log10 of the smallest p-value that a caller with the scope "detect" alone is told


class BodyLimit:
    """ASGI middleware: a request body above the limit is answered with 413 and not read further.

    Parameters
    ----------
    app
        What it protects.
    max_bytes
        The limit.
    exempt
        Paths whose bodies are streamed to a file and limited there.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, exempt: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        if scope["type"] != "http" or scope["path"] in self._exempt:
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and int(stated) > self._max_bytes:
            await self._refuse(send)
            return
        read, started, refused = 0, False, False

        async def counted() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                refused = True
                return {"type": "http.disconnect"}
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if refused and not started:
                return  # what the app says of a broken body is replaced below
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except Exception:
            if not refused:
                raise
        if refused and not started:
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        detail = f'{{"error":"body_too_large","detail":"the body must be at most {self._max_bytes} bytes."}}'.encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": detail})


class RateLimiter:
    """A token bucket for each caller, in this process.

    Parameters
    ----------
    per_second, burst
        Refill and size of a bucket.
    """

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, who: str) -> float:
        """Take one token; 0.0 if there was one, else the seconds until there is."""
        now = time.monotonic()
        with self._lock:
            level, at = self._buckets.get(who, (float(self._burst), now))
            level = min(self._burst, level + (now - at) * self._per_second)
            if level < 1.0:
                self._buckets[who] = (level, now)
                return (1.0 - level) / self._per_second
            if len(self._buckets) > 10_000:  # full buckets are those of nobody
                self._buckets = {w: b for w, b in self._buckets.items() if b[0] < self._burst - 1}
            self._buckets[who] = (level - 1.0, now)
            return 0.0


class OracleGuard:
    """Daily budgets of detections, kept in the database, and rounded evidence.

    Parameters
    ----------
    sessions
        Of the database.
    per_day
        Detections of one watermark key by one API key in a day (UTC).
    """

    def __init__(self, sessions: sessionmaker[Any], per_day: int) -> None:
        self._sessions = sessions
        self._per_day = per_day

    def spend(self, caller: Caller, key_ids: list[str], count: int = 1) -> bool:
        """Whether the caller may make `count` detections under each key; if so they are spent, else none is.

        Callers with the scope "keys" or "admin" hold the keys anyway and have no budget.
        """
        if caller.may("keys"):
            return True
        if count > self._per_day:
            return False
        mine = {"tenant_id": caller.tenant, "api_key_id": caller.api_key_id, "day": datetime.now(UTC).date()}
        with self._sessions() as session:
            insert = _INSERT[session.get_bind().dialect.name]
            for key_id in sorted(key_ids):  # in one order, so that two requests cannot wait for each other
                fresh = insert(Budget).values(key_id=key_id, used=count, **mine)
                spent = fresh.on_conflict_do_update(
                    index_elements=["tenant_id", "api_key_id", "key_id", "day"],
                    set_={"used": Budget.used + count},
                    where=Budget.used + count <= self._per_day,
                )
                if session.execute(spent).rowcount != 1:
                    session.rollback()
                    return False
            session.commit()
        return True


def rounded(log_value: float, caller: Caller, *, up: bool) -> float:
    """Evidence as a caller may see it: whole powers of ten, none beyond 1e-9, for callers without the scope "keys".

    Parameters
    ----------
    log_value
        Natural logarithm of a p-value (`up`) or an e-value (not `up`); both are rounded towards no evidence.
    """
    if caller.may("keys"):
        return log_value
    if up:
        return max(math.ceil(max(log_value / _LOG10, STRONGEST) - 1e-9), STRONGEST) * _LOG10
    return min(math.floor(min(log_value / _LOG10, -STRONGEST) + 1e-9), -STRONGEST) * _LOG10
