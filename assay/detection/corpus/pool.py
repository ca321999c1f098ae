"""Worker processes and the shards they hold: one shard per worker, a dead worker replaced.

Processes start through a plain command instead of multiprocessing's spawn: a script that calls `run` then needs no
`if __name__ == "__main__"`, and a notebook or an interpreter reading from a pipe works as well.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import cast

from assay._errors import RunError
from assay.detection.corpus.dispatch import Answer, Lost, Queue, answers
from assay.detection.corpus.ledger import ShardRecord
from assay.detection.corpus.shards import Shard
from assay.detection.corpus.subject import Setup
from assay.detection.corpus.worker import Refusal

# The setup is taken off the socket before the slow imports, so that the parent is not held up.
_COMMAND = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
try:
    setup = connection.recv_bytes()
except (EOFError, OSError):
    raise SystemExit  # the parent was stopped in the middle of starting this process
from assay.detection.corpus.worker import main
main(connection, setup, int(sys.argv[2]))
"""
_STARTS = 3  # workers that may die while starting before the run gives up
_SINGLE_THREADED = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection[object, object]
    gpu: str | None = None
    ready: bool = False
    shard: Shard | None = None


def _start(setup: bytes, gpu: str | None) -> _Worker:
    ours, theirs = socket.socketpair()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        **dict.fromkeys(_SINGLE_THREADED, "1"),
    }
    environment.pop("ASSAY_PASSPHRASE", None)  # no business of theirs
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with theirs, _no_interrupts():
        process = subprocess.Popen(  # noqa: S603  # our own interpreter with a constant program
            [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno()), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
    worker = _Worker(process, Connection(ours.detach()), gpu)
    with contextlib.suppress(ConnectionError):  # it died; its connection reports that like every death
        worker.connection.send_bytes(setup)
    return worker


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Start processes that never see Ctrl-C, which reaches the whole group: the parent alone decides what it means.

    A process inherits what its parent blocks, and so not even its first imports can be interrupted.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pool:
    """Worker processes and what they hold, made by `work` or by a slot of a cluster; a `dispatch.Team`.

    `setup` is a pickled `Setup`, `count` the largest number of processes.
    """

    def __init__(self, setup: bytes, count: int, gpus: Sequence[str] = ()) -> None:
        self.setup = setup
        self.count = count
        self.gpus = gpus
        self.workers: list[_Worker] = []
        self.tried: set[int] = set()
        self.failed_starts = 0

    def answers(self, shards: Iterator[Shard]) -> Iterator[Answer]:
        """The answers to all shards, as they come; the workers stay for further ones."""
        return answers(Queue(shards, self.count), self)

    @property
    def busy(self) -> bool:
        """See `dispatch.Team`."""
        return any(worker.shard is not None for worker in self.workers)

    def hand_out(self, queue: Queue) -> None:
        """See `dispatch.Team`."""
        for worker in self.workers:
            if worker.ready and worker.shard is None and queue:
                worker.shard = queue.take()
                with contextlib.suppress(ConnectionError):  # as above
                    worker.connection.send(worker.shard)
        starting = sum(not worker.ready for worker in self.workers)
        for _ in range(min(len(queue) - starting, self.count - len(self.workers))):
            self.workers.append(_start(self.setup, self._gpu()))

    def receive(self, queue: Queue, timeout: float | None) -> Iterator[Answer]:
        """See `dispatch.Team`."""
        for connection in wait([worker.connection for worker in self.workers], timeout):
            worker = next(worker for worker in self.workers if worker.connection is connection)
            answer = self._answer_of(worker, queue)
            if answer is not None:
                yield answer

    def _gpu(self) -> str | None:
        """The GPU that the fewest workers use."""
        if not self.gpus:
            return None
        used = [worker.gpu for worker in self.workers]
        return min(self.gpus, key=used.count)

    def _answer_of(self, worker: _Worker, queue: Queue) -> Answer | None:
        try:
            answer = worker.connection.recv()
        except (EOFError, ConnectionError):
            return self._bury(worker, queue)
        if answer == "ready":
            worker.ready = True
            return None
        if isinstance(answer, Refusal):
            raise RunError(answer.message)
        worker.shard = None
        return cast(ShardRecord, answer)

    def _bury(self, worker: _Worker, queue: Queue) -> Lost | None:
        worker.connection.close()
        code = worker.process.wait()
        self.workers.remove(worker)
        ending = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts == _STARTS:
                raise RunError(f"worker processes end while they start ({ending}); see the messages above.")
            return None
        shard = worker.shard
        if shard is None:
            return None
        if shard.index in self.tried:
            return Lost(shard, ending)
        self.tried.add(shard.index)
        queue.put_back(shard)
        return None

    def close(self) -> None:
        """Kill the workers."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()


def work(shards: Iterator[Shard], setup: Setup, count: int, gpus: Sequence[str] = ()) -> Generator[Answer, None, None]:
    """Test shards in worker processes.

    Parameters
    ----------
    shards
        Read no further ahead than `count` shards.
    setup
        Given to every worker.
    count
        Largest number of processes; they start as shards come.
    gpus
        Values of CUDA_VISIBLE_DEVICES, shared out evenly among the processes; none: leave it as it is.

    Yields
    ------
    The record of each shard as it is finished, in any order, or `Lost` for one that killed two workers.

    Raises
    ------
    RunError
        If a shard's files cannot be written or workers cannot start.
    """
    pool = Pool(pickle.dumps(setup), count, gpus)
    try:
        yield from pool.answers(shards)
    finally:
        pool.close()
