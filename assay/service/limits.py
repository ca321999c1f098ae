"""Limits: bodies that are too large, callers that are too quick, and evidence that says too much.

An attacker who sees exact evidence can climb it, and so strip a mark or forge one: callers who hold only the scope
"detect" get rounded evidence, and a daily budget (`accounts.OracleGuard`).
"""

from __future__ import annotations

import math
import threading
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assay.service.auth import Caller

_LOG10 = math.log(10.0)
STRONGEST = 9  # powers of ten of evidence that a caller with the scope "detect" alone is told at most


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


def rounded(log_value: float, caller: Caller, *, up: bool) -> float:
    """Evidence as a caller may see it: whole powers of ten, none beyond 1e-9, for callers without the scope "keys".

    What is told never overstates: p-values are rounded up, e-values down.

    Parameters
    ----------
    log_value
        Natural logarithm of a p-value (`up`) or an e-value (not `up`).

    Returns
    -------
    A natural logarithm; minus infinity for an e-value below 1, which is no evidence and would tell an attacker how far
    a text still is from some.
    """
    if caller.may("keys"):
        return log_value
    # Evidence as a number of decimal digits; p-values and e-values count in opposite directions.
    digits = -log_value if up else log_value
    whole = min(max(math.floor(digits / _LOG10) if math.isfinite(digits) else STRONGEST * (digits > 0), 0), STRONGEST)
    if whole > 0 and whole * _LOG10 > digits:  # the division was rounded up to a whole number
        whole -= 1
    if up:
        return -whole * _LOG10 if whole else 0.0
    return whole * _LOG10 if digits >= 0 else -math.inf
