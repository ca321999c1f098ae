"""A job worker: a process that takes jobs and runs them, `python -m assay.service.worker`; `assay serve` starts some.

While a run goes on, a thread renews the lease. When the lease is lost or the job cancelled, the run is interrupted; it
can be resumed, because every shard that counts is in its ledger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from types import FrameType
from typing import Any

import orjson
from sqlalchemy.exc import SQLAlchemyError

from assay._errors import AssayError, RunError
from assay.service import jobs
from assay.service.database import Job
from assay.service.settings import Settings
from assay.service.state import State, open_state
from assay.service.supervise import end_with_parent

_LOG = logging.getLogger("assay.service.worker")
_POLL = 0.5
_IN_USE = "another process is writing"  # in the message of a run whose ledger is locked


def work(state: State, *, once: bool = False, stop: threading.Event | None = None) -> int:
    """Take jobs until told to stop; with `once` until none waits.

    Parameters
    ----------
    state
        Of the service.
    once
        Return when no job waits.
    stop
        Return when it is set; a job that runs is put back into the queue.

    Returns
    -------
    Jobs taken.
    """
    owner = f"{os.getpid()}-{secrets.token_hex(4)}"
    stop = stop or threading.Event()
    taken = 0
    while not stop.is_set():
        job = jobs.claim(state.sessions, owner, state.settings.lease_seconds)
        if job is None:
            if once:
                break
            stop.wait(_POLL)
            continue
        taken += 1
        _LOG.info("job %s, attempt %d", job.id, job.attempts)
        lease = _Lease(state, job, owner)
        try:
            _run(state, job, owner, lease)
        except KeyboardInterrupt:
            if not lease.lost:
                jobs.release(state.sessions, job.id, owner, progress=lease.progress(), attempts=job.attempts - 1)
                raise
            _LOG.info("job %s was cancelled or taken over", job.id)
    return taken


def _run(state: State, job: Job, owner: str, lease: _Lease) -> None:
    if job.attempts > jobs.MOST_ATTEMPTS:
        message = f"{jobs.MOST_ATTEMPTS} workers died of it."
        jobs.end(state.sessions, job.id, owner, jobs.FAILED, progress=job.progress, error=message)
        return
    error: str | None = None
    with lease:
        try:
            summary = _test(state, job)
        except RunError as refusal:
            error = str(refusal)
            if _IN_USE in error:  # a worker that lost its lease has not ended yet
                jobs.release(state.sessions, job.id, owner, progress=lease.progress(), attempts=job.attempts - 1)
                time.sleep(_POLL)
                return
        except (AssayError, ValueError) as refusal:
            error = str(refusal)
        except Exception as failure:
            # The type alone: a message may quote a text.
            _LOG.error("job %s: %s", job.id, type(failure).__name__)
            error = "something went wrong inside; it has been logged."
    if error is None:
        jobs.end(state.sessions, job.id, owner, jobs.FINISHED, progress=summary)
    else:
        # Tenants need not know where the service keeps its files.
        error = error.replace(str(state.settings.data.resolve()), "...")
        jobs.end(state.sessions, job.id, owner, jobs.FAILED, progress=lease.progress(), error=error)


def _test(state: State, job: Job) -> dict[str, Any]:
    from assay.detection.corpus import run

    # Resolved: a run is pinned to the name of its corpus, however the folder was named when it began.
    folders = jobs.JobFolders(state.settings.data.resolve())
    ids = job.options["keys"]
    keys = [state.keys.key(job.tenant_id, id) for id in ids]
    summary = run(
        folders.corpus(job.id),
        keys,
        out=folders.run(job.id),
        tokenizer=state.tokenizer,
        text_column="text",
        id_column=job.options["id_column"],
        source_column=job.options["source_column"],
        fdr=job.options["fdr"],
        shard_rows=job.options["shard_rows"],
        workers=1,
        progress=False,
    )
    return {"documents": summary.documents, "flagged": summary.flagged, "rejects": summary.rejects}


class _Lease:
    """Renews a job's lease from a thread, and interrupts the main thread when it is lost."""

    def __init__(self, state: State, job: Job, owner: str) -> None:
        self.lost = False
        self._state = state
        self._job = job
        self._owner = owner
        self._done = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> _Lease:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def progress(self) -> dict[str, Any]:
        """Documents whose shard is in the ledger."""
        manifest = jobs.JobFolders(self._state.settings.data).run(self._job.id) / "ledger" / "manifest.jsonl"
        documents = rejects = 0
        with contextlib.suppress(OSError), manifest.open("rb") as lines:
            for line in lines:
                with contextlib.suppress(orjson.JSONDecodeError):  # a row that is being written
                    row = orjson.loads(line)
                    if row.get("kind") == "shard":
                        documents, rejects = documents + row["documents"], rejects + row["rejects"]
        return {"documents": documents, "rejects": rejects}

    def _renew(self) -> None:
        seconds = self._state.settings.lease_seconds
        begun, until = self._job.progress.get("documents", 0), time.monotonic() + seconds
        while not self._done.wait(min(seconds / 3, 2.0)):
            progress = self.progress()
            try:
                mine = jobs.keep(self._state.sessions, self._job.id, self._owner, seconds, progress)
                if mine and progress["documents"] > begun:
                    begun = progress["documents"]
                    jobs.advanced(self._state.sessions, self._job.id, self._owner)
            except SQLAlchemyError:  # the database may come back before the lease runs out
                mine = time.monotonic() < until
            else:
                until = time.monotonic() + seconds
            if not mine:
                self.lost = True
                if not self._done.is_set():
                    # A real signal: _thread.interrupt_main would not end a wait for a shard.
                    signal.pthread_kill(self._main, signal.SIGINT)
                return


def main() -> None:
    """Entry point of a worker process; settings and master key come from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()

    def asked(number: int, frame: FrameType | None) -> None:
        stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, asked)
    # A shell that starts the service in the background ignores SIGINT, which a lost lease needs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        state = open_state(Settings.from_environment())
        jobs.sweep(state.sessions, state.settings.data)
        work(state, stop=stop)


if __name__ == "__main__":
    main()
