"""The job workers of a server: processes that are started with it, replaced when they die, and stopped with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Final

from assay.service.worker import PARENT

_LOOK: Final = 0.5
_PAUSE: Final = 5.0  # seconds between two starts of one worker, so that a broken installation does not spin
_PATIENCE: Final = 20.0  # seconds for a worker to end when asked


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
