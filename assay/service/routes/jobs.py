"""/v1/jobs: upload a corpus, watch its run, cancel it, read its results."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import shutil
from collections.abc import AsyncIterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from assay.service import audit, jobs
from assay.service.access import Detects, Shared
from assay.service.accounts import Charge
from assay.service.auth import Caller
from assay.service.database import Job
from assay.service.errors import responses
from assay.service.limits import STRONGEST, rounded
from assay.service.routes.detect import KeyIds, _keys
from assay.service.settings import Settings
from assay.service.state import State

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=responses(404, 409))

JobId = Annotated[str, InPath(pattern=r"^job-[0-9a-f]{24}$")]
_NAME = Query(pattern=r"^[^\x00-\x1f]{1,64}$")
_LEVELS = frozenset(float(f"1e-{digits}") for digits in range(1, STRONGEST + 1))
_CORPUS = {"type": "string", "description": "JSON lines with the field text."}
_TOMORROW = {"retry-after": "3600"}


class JobView(BaseModel):
    """A job. `state` is queued, running, finished, failed or cancelled; the last three are final."""

    id: str
    state: str
    created: datetime
    updated: datetime
    keys: list[str]
    fdr: float
    progress: dict[str, int]
    error: str | None

    @classmethod
    def of(cls, job: Job) -> JobView:
        """From the row."""
        return cls(
            id=job.id,
            state=job.state,
            created=job.created,
            updated=job.updated,
            keys=job.options["keys"],
            fdr=job.options["fdr"],
            progress=job.progress,
            error=job.error,
        )


class JobViews(BaseModel):
    """The tenant's newest jobs."""

    jobs: list[JobView]


@router.post(
    "",
    status_code=202,
    openapi_extra={"requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": _CORPUS}}}},
)
async def submit(
    shared: Shared,
    caller: Detects,
    request: Request,
    response: Response,
    keys: Annotated[KeyIds, Query()] = None,
    fdr: Annotated[float, Query(gt=0, lt=1)] = 0.01,
    id_column: Annotated[str | None, _NAME] = None,
    source_column: Annotated[str | None, _NAME] = None,
    shard_rows: Annotated[int, Query(ge=1, le=1_000_000)] = 2000,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> JobView:
    """Upload a corpus of JSON lines with the field `text` and test every line.

    The same `Idempotency-Key` with the same request gives the same job again, whatever happened to the first answer.
    """
    options = {"fdr": fdr, "id_column": id_column, "source_column": source_column, "shard_rows": shard_rows}
    try:
        job, fresh = await enter(shared, caller, request.stream(), keys, options, idempotency_key)
    except ClientDisconnect:
        raise HTTPException(400, "the upload broke off.") from None
    if not fresh:
        response.status_code = 200
    return JobView.of(job)


async def enter(
    shared: State,
    caller: Caller,
    pieces: AsyncIterable[bytes],
    keys: list[str] | None,
    options: dict[str, Any],
    idempotency_key: str | None,
) -> tuple[Job, bool]:
    """Store a corpus, charge its lines and put its job into the queue; the job, and whether it is new.

    Parameters
    ----------
    pieces
        The corpus, written to the disk as it comes.
    keys
        Ids; None for every active and retired key.
    options
        "fdr", "id_column", "source_column", "shard_rows".
    idempotency_key
        With a known one and the same request it is the job made then.
    """
    _check_fdr(caller, options["fdr"])
    ids = await run_in_threadpool(_key_ids, shared, caller, keys)
    options = {"keys": ids, **options}
    job_id = jobs.new_id()
    folder = shared.settings.data / "jobs" / job_id
    try:
        corpus = jobs.JobFolders(shared.settings.data).corpus(job_id)
        digest, lines = await _store(pieces, corpus, shared.settings)
        if not await shared.authenticator.still(caller):  # an upload may take hours
            raise HTTPException(401, "this API key was revoked.")
        request_sha256 = hashlib.sha256(orjson.dumps([options, digest], option=orjson.OPT_SORT_KEYS)).hexdigest()
        if await run_in_threadpool(jobs.submitted, shared.sessions, caller.tenant, idempotency_key) is None:
            charge = Charge(caller, tuple(ids), lines, "jobs.detect", job_id)
            if not await shared.guard.charge(charge):
                raise HTTPException(
                    429, "this corpus has more lines than this API key has detections left today.", _TOMORROW
                )
        job, fresh = await run_in_threadpool(
            jobs.submit,
            shared.sessions,
            caller,
            job_id,
            options=options,
            request_sha256=request_sha256,
            idempotency_key=idempotency_key,
        )
    except ValueError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise HTTPException(409, str(error)) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not fresh:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)
    return job, fresh


@router.get("")
def list_jobs(shared: Shared, caller: Detects) -> JobViews:
    """The newest hundred jobs."""
    return JobViews(jobs=[JobView.of(job) for job in jobs.listed(shared.sessions, caller.tenant)])


@router.get("/{id}")
def status(shared: Shared, caller: Detects, id: JobId) -> JobView:
    """How a job stands."""
    return JobView.of(_job(shared, caller, id))


@router.post("/{id}/cancel")
def cancel(shared: Shared, caller: Detects, id: JobId) -> JobView:
    """Cancel a job; one that has ended stays as it is."""
    job = jobs.cancel(shared.sessions, caller.tenant, id)
    if job is None:
        raise HTTPException(404, f"there is no job {id!r}.")
    audit.record(shared.sessions, caller, "jobs.cancel", id)
    return JobView.of(job)


@router.get("/{id}/results", response_class=StreamingResponse)
def results(shared: Shared, caller: Detects, id: JobId) -> StreamingResponse:
    """One JSON line per document of a finished job, in the order of the corpus; evidence as in /v1/detect."""
    job = _job(shared, caller, id)
    if job.state != jobs.FINISHED:
        raise HTTPException(
            409, f"job {id!r} is {job.state}: it has no results{'' if job.state in jobs.TERMINAL else ' yet'}."
        )
    path = jobs.JobFolders(shared.settings.data).run(id) / "results.parquet"
    return StreamingResponse(_rows(path, caller), media_type="application/x-ndjson")


def _rows(path: Path, caller: Caller) -> Iterator[bytes]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096):
            lines = []
            for row in batch.to_pylist():
                # Where the service keeps the corpus is its own affair; the run names documents and sources by it.
                path_name = row.pop("file")
                row["doc_id"] = row["doc_id"].removeprefix(f"{path_name}:")
                row["source"] = None if row["source"] == path_name else row["source"]
                if not caller.may("keys"):
                    for name, up in (("log_pvalue", True), ("log_qvalue", True), ("log_evalue", False)):
                        row[name] = rounded(row[name], caller, up=up)
                    row["pvalue"], row["qvalue"] = math.exp(row["log_pvalue"]), math.exp(row["log_qvalue"])
                    del row["statistic"]
                lines.append(orjson.dumps(row))
            yield b"\n".join(lines) + b"\n" if lines else b""


def _check_fdr(caller: Caller, fdr: float) -> None:
    """Refuse levels between those that evidence is rounded to: flags at many of them would tell its digits."""
    if not caller.may("keys") and fdr not in _LEVELS:
        raise HTTPException(422, "fdr must be 0.1, 0.01 and so on to 1e-9 for an API key without the scope 'keys'.")


async def _store(pieces: AsyncIterable[bytes], path: Path, settings: Settings) -> tuple[str, int]:
    """The corpus into a file, on the disk when this returns; its SHA-256 and how many lines it has at most.

    A line is as long as a body at most: the worker has it whole in memory, and so its process and other tenants' jobs.
    """
    most, longest = settings.max_upload_bytes, settings.max_body_bytes
    digest, size, lines, unended = hashlib.sha256(), 0, 1, 0
    path.parent.mkdir(mode=0o700, parents=True)
    with path.open("wb") as file:
        async for piece in pieces:
            size += len(piece)
            if size > most:
                raise HTTPException(413, f"the corpus must be at most {most} bytes.")
            first, *others = map(len, piece.split(b"\n"))
            if max(unended + first, *others, 0) > longest:
                raise HTTPException(413, f"a line of the corpus must be at most {longest} bytes.")
            unended = others[-1] if others else unended + first
            lines += len(others)
            digest.update(piece)
            await asyncio.to_thread(file.write, piece)
        if size == 0:
            raise HTTPException(422, "the corpus is empty: send JSON lines as the body.")
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    return digest.hexdigest(), lines


def _key_ids(shared: State, caller: Caller, ids: list[str] | None) -> list[str]:
    return sorted({key.id for key in _keys(shared, caller, ids)})


def _job(shared: State, caller: Caller, id: str) -> Job:
    job = jobs.find(shared.sessions, caller.tenant, id)
    if job is None:
        raise HTTPException(404, f"there is no job {id!r}.")
    return job
