"""The processes of a service: job workers are started with it, replaced when they die, and stopped with it.

None outlives the process that started it, even if that is killed: an orphan would hold the port against a new start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from assay.service.worker import PARENT

if TYPE_CHECKING:
    from fastapi import FastAPI

SUPERVISOR: Final = "ASSAY_SERVER_PARENT"
"""The process id of `assay serve`, for the server processes that it starts."""

_LOOK: Final = 0.5
_PAUSE: Final = 5.0  # seconds between two starts of one worker, so that a broken installation does not spin
_PATIENCE: Final = 20.0  # seconds for a worker to end when asked


def create_app() -> FastAPI:
    """The application in one of several server processes: the process ends in good order when `assay serve` is gone."""
    from assay.service import app

    made = app.create_app()
    supervisor = int(os.environ[SUPERVISOR])

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="assay-supervisor", daemon=True).start()
    return made


class Workers:
    """A context in which `count` worker processes live.

    Parameters
    ----------
    count
        How many.
    environment
        Theirs: settings and master key.
    """

    def __init__(self, count: int, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment) | {PARENT: str(os.getpid())}
        self._count = count
        self._stop = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watch = threading.Thread(target=self._replace, name="assay-workers", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [process.pid for process in self._processes if process.poll() is None]

    def __enter__(self) -> Workers:
        self._processes = [self._start() for _ in range(self._count)]
        self._watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._watch.join()
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + _PATIENCE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "assay.service.worker"], env=self._environment)

    def _replace(self) -> None:
        started = [time.monotonic()] * self._count
        while not self._stop.wait(_LOOK):
            for i, process in enumerate(self._processes):
                if process.poll() is not None and time.monotonic() - started[i] > _PAUSE:
                    self._processes[i], started[i] = self._start(), time.monotonic()
