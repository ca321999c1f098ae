"""The processes of a service: started together, replaced when they die, stopped together.

None outlives the process that started it, even if that is killed: an orphan would hold the port against a new start.
Each has the end of a pipe whose other end its parent alone holds, and which the kernel closes with the parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

PARENT: Final = "ASSAY_PARENT_PIPE"
"""The number of a process's end of the pipe, in its environment."""

_LOOK: Final = 0.5
_PAUSE: Final = 5.0  # seconds between two starts of one process, so that a broken installation does not spin
_PATIENCE: Final = 40.0  # seconds to end when asked: a server answers what is open, for 30 at most


def end_with_parent(after: Callable[[], object] | None = None) -> None:
    """From now on this process gets SIGTERM when the one that started it is gone; nothing happens without `PARENT`.

    Parameters
    ----------
    after
        Called from a thread after that, if the process is still there.
    """
    number = os.environ.pop(PARENT, None)
    if number is None:  # started by hand
        return
    pipe = int(number)
    os.set_inheritable(pipe, False)

    def watch() -> None:
        os.read(pipe, 1)  # nobody writes: it returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)
        if after is not None:
            after()

    threading.Thread(target=watch, name="assay-parent", daemon=True).start()


@dataclass(frozen=True)
class Command:
    """What a process runs.

    Attributes
    ----------
    module
        Run as `python -m`; it calls `end_with_parent`.
    descriptors
        Those that it inherits; it is told their numbers as arguments.
    """

    module: str
    descriptors: tuple[int, ...] = ()


class Processes:
    """A context in which processes live.

    Parameters
    ----------
    commands
        One for each.
    environment
        Theirs: settings and master key.
    """

    def __init__(self, commands: Sequence[Command], environment: Mapping[str, str]) -> None:
        self._commands = commands
        self._their_end, self._our_end = os.pipe()
        self._environment = dict(environment) | {PARENT: str(self._their_end)}
        self._stop = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watch = threading.Thread(target=self._replace, name="assay-processes", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Process ids of those that live."""
        return [process.pid for process in self._processes if process.poll() is None]

    def __enter__(self) -> Processes:
        self._processes = [self._start(command) for command in self._commands]
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
        os.close(self._our_end)
        os.close(self._their_end)

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        whole = [sys.executable, "-m", command.module, *map(str, command.descriptors)]
        inherited = (*command.descriptors, self._their_end)
        return subprocess.Popen(whole, env=self._environment, pass_fds=inherited)  # noqa: S603  # modules of ours

    def _replace(self) -> None:
        started = [time.monotonic()] * len(self._commands)
        while not self._stop.wait(_LOOK):
            for i, process in enumerate(self._processes):
                if process.poll() is not None and time.monotonic() - started[i] > _PAUSE:
                    self._processes[i], started[i] = self._start(self._commands[i]), time.monotonic()
