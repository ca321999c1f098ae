"""A server process: HTTP at a socket that is handed to it, `python -m assay.service.server DESCRIPTOR`.

When the process that started it is gone, it takes no more connections and closes the socket, answers what is open, and
ends. Nothing of it holds the port longer than `HOLDS_PORT` seconds after that, whatever hangs in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from typing import Final

from assay.service.supervise import end_with_parent

HOLDS_PORT: Final = 5.0
_OPEN_REQUESTS: Final = 30  # seconds in which they are answered at the end
_BACKLOG: Final = 2048
_LOOK: Final = 0.1


def listen(host: str, port: int, *, patience: float = 2 * HOLDS_PORT) -> socket.socket:
    """A listening socket.

    Parameters
    ----------
    host, port
        Where; port 0 takes a free one.
    patience
        Seconds to wait for a port that is taken: the processes of a server that was killed may hold it for a moment.

    Raises
    ------
    OSError
        If the port stays taken, or there is no listening at this address. The message says what to do.
    """
    until = time.monotonic() + patience
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as refused:
            if refused.errno != errno.EADDRINUSE:
                raise OSError(f"cannot listen at {host} port {port}: {refused.strerror}.") from None
            if time.monotonic() >= until:
                raise OSError(
                    f"port {port} of {host} is taken: another program listens there. End it, or choose another port "
                    "with --port."
                ) from None
        time.sleep(_LOOK)


def run(listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT: then the socket is closed, and what is open is answered, for 30 s at most.

    Settings and master key come from the environment.
    """
    import uvicorn

    from assay.service.app import create_app
    from assay.service.protocol import LimitedProtocol

    # Made here and not by uvicorn: until it runs, SIGTERM ends the process at once.
    config = uvicorn.Config(
        create_app(),
        server_header=False,
        date_header=False,
        access_log=False,
        timeout_graceful_shutdown=_OPEN_REQUESTS,
        http=LimitedProtocol,
    )
    with contextlib.suppress(KeyboardInterrupt):  # it sends itself the signals again that it has obeyed
        uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    """Entry point of a server process."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)

    def hold_nothing() -> None:
        time.sleep(HOLDS_PORT - 1.0)
        if listener.fileno() < 0:  # it is closed: what is open may be answered
            time.sleep(_OPEN_REQUESTS)
        os._exit(1)

    end_with_parent(hold_nothing)
    run(listener)


if __name__ == "__main__":
    main()
