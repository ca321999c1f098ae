"""The port of a service: taken ones are named, and no process holds one for long when its parent was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_process import LIMIT_S, Server, free_port, gone

from assay.service.server import HOLDS_PORT, listen

BUSY_S = 10.0  # what a full machine may add


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_a_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"^port {port} of 127\.0\.0\.1 is taken: .*--port"):
            listen("127.0.0.1", port, patience=0.2)
    listen("127.0.0.1", port, patience=0.0).close()


def test_a_port_that_becomes_free_is_waited_for() -> None:
    other = listen("127.0.0.1", 0)
    port = other.getsockname()[1]
    threading.Timer(0.5, other.close).start()
    with listen("127.0.0.1", port) as mine:
        assert mine.getsockname()[1] == port


def test_an_address_of_another_machine_is_no_taken_port() -> None:
    with pytest.raises(OSError, match=r"^cannot listen at 192\.0\.2\.1 port 8000: "):
        listen("192.0.2.1", 8000)


def test_serve_tells_that_the_port_is_taken(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "assay", "serve", "--data", str(tmp_path / "data"), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: port {port} of 127.0.0.1 is taken")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def sockets(pid: int) -> set[str]:
    """The sockets that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.add(os.readlink(path))
    return {one for one in found if one.startswith("socket:")}


# A parent that starts one server process, which does what `{body}` says in place of serving.
PARENT = """
import sys, time
from assay.service.server import listen
from assay.service.supervise import Command, Processes
import os
listener = listen("127.0.0.1", int(sys.argv[1]))
with Processes([Command("stuck", (listener.fileno(),))], os.environ) as made:
    print(*made.pids, flush=True)
    time.sleep(1000)
"""
STUCK = """
import signal, sys, time
from assay.service import server
def stuck(listener):
    {body}
    print("there", flush=True)
    time.sleep(1000)
server.run = stuck
server.main()
"""


@pytest.mark.parametrize(
    ("body", "at_least"), [("pass", 0.0), ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", HOLDS_PORT - 1.5)]
)
def test_whatever_hangs_gives_the_port_up(tmp_path: Path, body: str, at_least: float) -> None:
    """While it starts, a server process ends at once; one that does not hear SIGTERM is ended."""
    (tmp_path / "stuck.py").write_text(STUCK.format(body=body))
    port = free_port()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(port)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (child,) = (int(one) for one in said - {"there"})
    try:
        assert not is_free(port)
        parent.kill()
        killed = time.monotonic()
        parent.wait()
        while not is_free(port):
            assert time.monotonic() - killed < HOLDS_PORT + BUSY_S
            time.sleep(0.02)
        assert time.monotonic() - killed >= at_least
        while not gone(child):
            assert time.monotonic() - killed < HOLDS_PORT + BUSY_S
            time.sleep(0.02)
    finally:
        parent.kill()
        if not gone(child):
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_a_killed_server_can_be_started_again_at_once(serve: Callable[..., Server]) -> None:
    """Its server processes and its worker end by themselves, the worker's job waits; the new one has the port soon."""
    server = serve("--processes", "2", ASSAY_LEASE_SECONDS="600")
    server.client.post("/v1/keys", json={}).raise_for_status()
    corpus = b"".join(b'{"text": "line %d"}\n' % i for i in range(20_000))
    job = server.client.post("/v1/jobs?shard_rows=2", content=corpus).json()["id"]
    server.wait_for(lambda: server.state(job) == "running")
    family = server.children(".")
    assert len(family) == 3
    (worker,) = server.workers()
    # What all server processes hold is the port; a worker may have sockets of its own, to those who test for it.
    listening = set.intersection(*(sockets(pid) for pid in set(family) - {worker}))
    assert listening
    assert not sockets(worker) & listening
    server.kill()
    killed = time.monotonic()
    while not is_free(server.port):
        assert time.monotonic() - killed < HOLDS_PORT + BUSY_S
        time.sleep(0.02)
    again = serve("--processes", "2", "--job-workers", "0", port=server.port)
    again.wait_for(lambda: all(gone(pid) for pid in family))
    assert again.state(job) == "queued"
    assert again.stop() == 0
    assert "Traceback" not in server.log.read_text() + again.log.read_text()
