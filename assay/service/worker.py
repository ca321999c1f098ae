"""A job worker: a process that takes jobs and runs them, `python -m assay.service.worker`; `assay serve` starts some.

While a run goes on, a thread renews the lease. When the lease is lost or the job cancelled, the run is interrupted; it
can be resumed, because every shard that counts is in its ledger.
"""

from __future__ import annotations

import _thread
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

from assay._errors import AssayError, RunError
from assay.service import jobs
from assay.service.app import State, open_state
from assay.service.database import Job
from assay.service.settings import Settings

_LOG = logging.getLogger("assay.service.worker")
_POLL = 0.5


def work(state: State, *, once: bool = False, stop: threading.Event | None = None) -> int:
    """Take jobs until told to stop; with `once` until none waits.

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
        _run(state, job, owner)
    return taken


def _run(state: State, job: Job, owner: str) -> None:
    folders = jobs.JobFolders(state.settings.data)
    if job.attempts > jobs.MOST_ATTEMPTS:
        message = f"{jobs.MOST_ATTEMPTS} workers died of it."
        jobs.end(state.sessions, job.id, owner, jobs.FAILED, progress=job.progress, error=message)
        return
    with _Lease(state, job, owner) as lease:
        try:
            summary = _test(state, job, folders)
        except KeyboardInterrupt:
            if not lease.lost:
                raise  # the process was asked to stop; the lease runs out and another worker goes on
            _LOG.info("job %s was cancelled or taken over", job.id)
            return
        except RunError as error:
            if "in use" in str(error):  # its last worker still lives; the lease keeps others away meanwhile
                time.sleep(_POLL)
                jobs.end(state.sessions, job.id, owner, jobs.QUEUED, progress=lease.progress())
                return
            jobs.end(state.sessions, job.id, owner, jobs.FAILED, progress=lease.progress(), error=str(error))
            return
        except (AssayError, ValueError) as error:
            jobs.end(state.sessions, job.id, owner, jobs.FAILED, progress=lease.progress(), error=str(error))
            return
    jobs.end(state.sessions, job.id, owner, jobs.FINISHED, progress=summary)


def _test(state: State, job: Job, folders: jobs.JobFolders) -> dict[str, Any]:
    from assay.detection.corpus import run

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
        while not self._done.wait(min(seconds / 3, 2.0)):
            if not jobs.keep(self._state.sessions, self._job.id, self._owner, seconds, self.progress()):
                self.lost = True
                _thread.interrupt_main()
                return


def main() -> None:
    """Entry point of a worker process; settings and master key come from the environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()

    def asked(number: int, frame: FrameType | None) -> None:
        stop.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, asked)
    with contextlib.suppress(KeyboardInterrupt):
        work(open_state(Settings.from_environment()), stop=stop)


if __name__ == "__main__":
    main()
