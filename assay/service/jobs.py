"""Jobs over uploaded corpora: rows that say who works on what until when; the work itself rests on the run's ledger.

A job belongs to the worker whose lease has not run out. A worker that dies loses its lease, another resumes the run
from its ledger, and no document is lost or doubled; two workers at once are kept apart by the ledger's lock.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from assay.service import audit
from assay.service.auth import Caller
from assay.service.database import Job

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED = "queued", "running", "finished", "failed", "cancelled"
TERMINAL: Final = frozenset({FINISHED, FAILED, CANCELLED})
MOST_ATTEMPTS: Final = 5


@dataclass(frozen=True)
class JobFolders:
    """Where a job's files are.

    Attributes
    ----------
    data
        The service's folder.
    """

    data: Path

    def corpus(self, job_id: str) -> Path:
        """The uploaded corpus."""
        return self.data / "jobs" / job_id / "corpus.jsonl"

    def run(self, job_id: str) -> Path:
        """The output of its run."""
        return self.data / "jobs" / job_id / "run"


def new_id() -> str:
    """A random job id."""
    return f"job-{secrets.token_hex(12)}"


def submit(
    sessions: sessionmaker[Any],
    caller: Caller,
    job_id: str,
    *,
    options: dict[str, Any],
    request_sha256: str,
    idempotency_key: str | None,
) -> tuple[Job, bool]:
    """Put a job whose corpus is on the disk into the queue.

    Returns
    -------
    job, whether it is new: with a known idempotency key and the same request it is the job made then.

    Raises
    ------
    ValueError
        If the idempotency key was used for another request.
    """
    now = datetime.now(UTC)
    job = Job(
        id=job_id,
        tenant_id=caller.tenant,
        api_key_id=caller.api_key_id,
        state=QUEUED,
        created=now,
        updated=now,
        idempotency_key=idempotency_key,
        request_sha256=request_sha256,
        options=options,
        progress={},
        attempts=0,
    )
    try:
        with sessions.begin() as session:
            session.add(job)
            session.add(audit.event(caller, "jobs.submit", job_id, keys=len(options["keys"])))
        return job, True
    except IntegrityError:
        known = submitted(sessions, caller.tenant, idempotency_key)
        if known is None:  # something else is wrong with the row
            raise
        if known.request_sha256 != request_sha256:
            raise ValueError("the idempotency key was used for another request. Choose a new one.") from None
        return known, False


def submitted(sessions: sessionmaker[Any], tenant: str, idempotency_key: str | None) -> Job | None:
    """The job that a tenant made with an idempotency key."""
    if idempotency_key is None:
        return None
    with sessions() as session:
        mine = (Job.tenant_id == tenant) & (Job.idempotency_key == idempotency_key)
        found: Job | None = session.scalar(select(Job).where(mine))
        return found


def find(sessions: sessionmaker[Any], tenant: str, job_id: str) -> Job | None:
    """A tenant's job."""
    with sessions() as session:
        found: Job | None = session.scalar(select(Job).where(Job.id == job_id, Job.tenant_id == tenant))
        return found


def listed(sessions: sessionmaker[Any], tenant: str, limit: int = 100) -> Sequence[Job]:
    """A tenant's newest jobs."""
    query = select(Job).where(Job.tenant_id == tenant).order_by(Job.created.desc(), Job.id).limit(limit)
    with sessions() as session:
        found: Sequence[Job] = session.scalars(query).all()
        return found


def cancel(sessions: sessionmaker[Any], tenant: str, job_id: str) -> Job | None:
    """Cancel a job that has not ended; a worker notices at its next sign of life. None if there is no such job."""
    live = (Job.id == job_id) & (Job.tenant_id == tenant) & Job.state.in_((QUEUED, RUNNING))
    with sessions.begin() as session:
        session.execute(update(Job).where(live).values(state=CANCELLED, updated=datetime.now(UTC)))
    return find(sessions, tenant, job_id)


def claim(sessions: sessionmaker[Any], owner: str, lease_seconds: float) -> Job | None:
    """Take the oldest job that waits, or whose worker has given no sign of life; None if there is none."""
    now = time.time()
    free = or_(Job.state == QUEUED, (Job.state == RUNNING) & (Job.lease_until < now))
    with sessions() as session:
        for candidate in session.scalars(select(Job.id).where(free).order_by(Job.created, Job.id).limit(10)).all():
            taken = update(Job).where((Job.id == candidate) & free)
            values = {"state": RUNNING, "lease_owner": owner, "lease_until": now + lease_seconds}
            done = session.execute(taken.values(attempts=Job.attempts + 1, updated=datetime.now(UTC), **values))
            session.commit()
            if done.rowcount == 1:  # else another worker was quicker
                found: Job | None = session.get(Job, candidate, populate_existing=True)
                return found
    return None


def keep(sessions: sessionmaker[Any], job_id: str, owner: str, lease_seconds: float, progress: dict[str, Any]) -> bool:
    """A sign of life; whether the job is still this worker's and wanted."""
    mine = (Job.id == job_id) & (Job.lease_owner == owner) & (Job.state == RUNNING)
    values = {"lease_until": time.time() + lease_seconds, "progress": progress, "updated": datetime.now(UTC)}
    with sessions.begin() as session:
        return bool(session.execute(update(Job).where(mine).values(**values)).rowcount)


def release(sessions: sessionmaker[Any], job_id: str, owner: str, *, progress: dict[str, Any], attempts: int) -> bool:
    """Put a job back into the queue, to be taken at once; whether it was this worker's.

    Parameters
    ----------
    attempts
        How many are counted from now on: an attempt that was asked to stop, or that has come further, is no failure.
    """
    mine = (Job.id == job_id) & (Job.lease_owner == owner) & (Job.state == RUNNING)
    values = {"state": QUEUED, "lease_until": None, "lease_owner": None, "attempts": attempts, "progress": progress}
    with sessions.begin() as session:
        return bool(session.execute(update(Job).where(mine).values(updated=datetime.now(UTC), **values)).rowcount)


def advanced(sessions: sessionmaker[Any], job_id: str, owner: str) -> None:
    """Count a job's attempts anew, because this one has come further than the last."""
    mine = (Job.id == job_id) & (Job.lease_owner == owner) & (Job.state == RUNNING)
    with sessions.begin() as session:
        session.execute(update(Job).where(mine).values(attempts=1))


def sweep(sessions: sessionmaker[Any], data: Path, *, older_than: float = 86400.0) -> int:
    """Remove the files of uploads that never became jobs, because the server died; how many there were.

    Parameters
    ----------
    older_than
        Seconds since the last byte: an upload may still be going on.
    """
    removed = 0
    for folder in sorted((data / "jobs").glob("job-*")):
        with contextlib.suppress(OSError):  # another process was quicker
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest < older_than:
                continue
            with sessions() as session:
                known = session.scalar(select(Job.id).where(Job.id == folder.name))
            if known is None:
                shutil.rmtree(folder)
                removed += 1
    return removed


def end(
    sessions: sessionmaker[Any],
    job_id: str,
    owner: str,
    state: str,
    *,
    progress: dict[str, Any],
    error: str | None = None,
) -> bool:
    """Leave a job in a state, unless it has been cancelled or taken over; whether that happened."""
    mine = (Job.id == job_id) & (Job.lease_owner == owner) & (Job.state == RUNNING)
    values = {"state": state, "progress": progress, "error": error, "lease_until": None, "updated": datetime.now(UTC)}
    with sessions.begin() as session:
        return bool(session.execute(update(Job).where(mine).values(**values)).rowcount)
