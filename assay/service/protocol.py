"""HTTP/1.1 as uvicorn speaks it, with limits to what a client may say, and how slowly, before anything can be answered.

uvicorn's parser in C keeps a request's head, and what comes between and after the pieces of its body, however long they
are and however slowly they come: a stranger could fill the memory, or hold every connection.
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES: Final = 65_536
HEAD_SECONDS: Final = 30.0


class LimitedProtocol(HttpToolsProtocol):
    """A connection that is closed after `MOST_BYTES` that bring no request on, or `HEAD_SECONDS` without a whole head.

    What the system handed over in one piece with something else is not counted: a few hundred kilobytes.
    """

    _unfinished = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then count what has come since the request last came further."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MOST_BYTES and not self.transport.is_closing():
            self.send_400_response(f"What comes before or beside a body must be at most {MOST_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """A head begins, which may follow on another request."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._unfinished = 0
        self._head_is_there()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body; these the application limits."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there."""
        self._unfinished = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _head_is_there(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
