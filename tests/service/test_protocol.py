"""A stranger's connection: what is endless or slow before there is a request ends it, and nothing else does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from assay.service import protocol
from assay.service.protocol import MOST_BYTES, LimitedProtocol

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\n"
ENDLESS = 32 * 2**20
BUFFERS = 16 * 2**20  # what the system takes before anybody reads it


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body; /early without reading it."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    await send({"type": "http.response.body", "body": b"%8d" % size})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    settings: Any = {"http": LimitedProtocol, "port": 0, "log_level": "critical", "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(application, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def answer(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything that comes back until the other side closes, or says nothing more for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(pause)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while piece := client.recv(65536):
            received += piece
        return received


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        (HEAD, b"x: " + b"y" * 1000 + b"\r\n"),
        (HEAD + b"x: ", b"y" * 1000),
        (HEAD, b"y" * 1000),
        (b"GET /", b"y" * 1000),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"y" * 1000),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ", b"y" * 1000),
        (b"POST /early HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", b"y" * 1000),
    ],
    ids=["headers", "header", "name", "address", "extension", "trailers", "trailer", "trailer after the answer"],
)
def test_what_has_no_end_is_ended(port: int, before: bytes, piece: bytes) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(before)
        with contextlib.suppress(ConnectionError):
            while sent < ENDLESS:
                client.sendall(piece * 64)
                sent += 64 * len(piece)
    assert sent < BUFFERS


def test_what_is_long_enough_for_everybody_is_answered(port: int) -> None:
    header = b"x: " + b"y" * (MOST_BYTES - 200) + b"\r\n"
    assert answer(port, HEAD + header, b"content-length: 1\r\n\r\n", b"a", pause=0.05).endswith(b"       1")
    body = b"z" * 20_000_000
    assert answer(port, HEAD + b"content-length: 20000000\r\n\r\n", body).endswith(b"20000000")
    bits = b"1\r\na\r\n" * 50_000
    assert answer(port, HEAD + b"transfer-encoding: chunked\r\n\r\n", bits, b"0\r\n\r\n").endswith(b"   50000")
    # Requests that follow on each other on one connection, each with a head.
    once = HEAD + b"x: " + b"y" * 1000 + b"\r\ncontent-length: 1\r\n\r\na"
    assert answer(port, *[once] * 200).count(b"200 OK") == 200


def test_a_head_that_does_not_come_is_not_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    for said in (b"", HEAD, HEAD + b"content-length: 1\r\n\r\naGET / HT"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(said)
            begun = time.monotonic()
            while client.recv(65536):
                pass
            assert time.monotonic() - begun > 0.4
    # A body, and the answer to it, may take their time.
    whole = (HEAD + b"content-length: 2\r\n\r\n", b"a", b"b")
    assert answer(port, *whole, pause=0.4).endswith(b"       2")
