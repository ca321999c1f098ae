"""ASGI middleware around every request: security headers on the answer, counts and times for /metrics."""

from __future__ import annotations

import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assay.service import errors, metrics

_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Observed:
    """Adds headers that an answer does not carry yet, and counts the answer.

    Parameters
    ----------
    app
        What it wraps.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status, started = 500, False

        async def dressed(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in HEADERS.items() if name not in given]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            await self._app(scope, receive, dressed)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            # Handled here: a server would log the traceback, whose last line may hold a text or a secret.
            answer = errors.failed(scope, error)
            if not started:  # else the connection is closed on a broken answer
                await answer(scope, receive, dressed)
        finally:
            # The route's pattern, not the path: a path holds ids.
            route = getattr(scope.get("route"), "path", "none")
            metrics.REQUESTS.labels(route, str(status)).inc()
            metrics.SECONDS.labels(route).observe(time.perf_counter() - begun)
