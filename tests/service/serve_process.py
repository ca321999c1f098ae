"""`assay serve` as people start it, for tests: a process with its workers, a client, and ways to end them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import httpx

LIMIT_S = 120.0


class Server:
    """A started `assay serve`."""

    def __init__(
        self, data: Path, *options: str, port: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.data = data
        self.port = free_port() if port is None else port
        self.log = data.parent / f"log-{self.port}-{uuid4().hex[:6]}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "assay", "serve", "--data", str(data), "--port", str(self.port), *options],
                env=os.environ | (environment or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=LIMIT_S)
        self.wait_for(self._answers)
        token = (data / "first-api-key").read_text().strip()
        self.client.headers["authorization"] = f"Bearer {token}"

    def _answers(self) -> bool:
        log = self.log.read_text()
        assert self.process.poll() is None, log
        if "listening at" not in log:  # what answers at its port is an older one
            return False
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(self, what: Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT_S
        while not what():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def children(self, pattern: str) -> list[int]:
        """Process ids of the server's children whose command line holds a pattern."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid), "-f", pattern], capture_output=True)
        return [int(line) for line in found.stdout.split()]

    def workers(self) -> list[int]:
        """Process ids of the job workers, which are children of the server."""
        return self.children("assay.service.worker")

    def state(self, job: str) -> str:
        return self.client.get(f"/v1/jobs/{job}").json()["state"]

    def kill(self) -> None:
        """kill -9 of the server alone; its workers find out by themselves."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """kill -9 of the server and of every process that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=LIMIT_S)


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def gone(pid: int) -> bool:
    """Whether a process has ended.

    A killed one is a zombie as soon as its first thread has died; until the last has, its sockets are open.
    """
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] and threads == 1
    except OSError:
        return True
