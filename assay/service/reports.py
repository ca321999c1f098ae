"""Stored reports: a row with the JSON, and a folder with the files as they were saved, and signed if so asked.

The row is written last: a report exists when its files do. Reports hold exact evidence and parts of texts, so that the
routes hand them only to callers who hold the keys anyway.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from assay.report import Report, Verification, canonical, verify
from assay.report.signature import REPORT_HTML, REPORT_JSON, SIGNATURE_JSON
from assay.service import audit
from assay.service.auth import Caller
from assay.service.database import Job, StoredReport
from assay.service.jobs import JobFolders
from assay.watermark.keys import SecretKey

FILES: Final = (REPORT_JSON, REPORT_HTML, SIGNATURE_JSON)
# Pictures are drawn by matplotlib, which is not safe in several threads at once.
_DRAWING = threading.Lock()


def folder(data: Path, report_id: str) -> Path:
    """Where a report's files are."""
    return data / "reports" / report_id


def build(
    sessions: sessionmaker[Any],
    data: Path,
    caller: Caller,
    job: Job,
    keys: Sequence[SecretKey],
    *,
    tokenizer: Any,
    title: str = "Watermark audit",
    excerpts: int = 10,
    sign_with: SecretKey | None = None,
) -> StoredReport:
    """A report on a finished job, stored and entered in the audit log, both or neither.

    Parameters
    ----------
    sessions, data
        Of the database, and the service's folder.
    caller
        Who makes it.
    job
        A finished one.
    keys
        The job's keys, to score the excerpts.
    tokenizer
        As the job used it.
    title, excerpts, sign_with
        As in `Report.from_run` and `Report.save`.

    Raises
    ------
    ValueError, RevokedKeyError, RunError
        As those do.
    """
    report_id = f"report-{secrets.token_hex(12)}"
    target = folder(data, report_id)
    try:
        with _DRAWING:
            made = Report.from_run(
                JobFolders(data).run(job.id), keys=keys, tokenizer=tokenizer, title=title, excerpts=excerpts
            )
            made = _without_path(made, JobFolders(data).corpus(job.id))
            made.save(target, sign_with=sign_with)
        stored = StoredReport(
            id=report_id,
            tenant_id=job.tenant_id,
            job_id=job.id,
            created=datetime.now(UTC),
            content=made.to_json(),
        )
        with sessions.begin() as session:
            session.add(stored)
            signed_with = "" if sign_with is None else sign_with.id
            session.add(audit.event(caller, "reports.create", report_id, job=job.id, signed_with=signed_with))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return stored


def _without_path(report: Report, corpus: Path) -> Report:
    """The report with the corpus under its bare name: where the service keeps files is nobody's business."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bare(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [bare(one) for one in value]
        return corpus.name + value.removeprefix(path) if isinstance(value, str) and value.startswith(path) else value

    path = str(corpus)
    return Report.from_json(canonical.encode(bare(report.to_dict())))


def find(sessions: sessionmaker[Any], tenant: str, report_id: str) -> StoredReport | None:
    """A tenant's report."""
    mine = (StoredReport.id == report_id) & (StoredReport.tenant_id == tenant)
    with sessions() as session:
        found: StoredReport | None = session.scalar(select(StoredReport).where(mine))
        return found


def listed(sessions: sessionmaker[Any], tenant: str, limit: int = 100) -> Sequence[StoredReport]:
    """A tenant's newest reports."""
    query = select(StoredReport).where(StoredReport.tenant_id == tenant)
    with sessions() as session:
        found: Sequence[StoredReport] = session.scalars(
            query.order_by(StoredReport.created.desc(), StoredReport.id).limit(limit)
        ).all()
        return found


def file_of(data: Path, report_id: str, name: str) -> bytes | None:
    """One of a report's files; None where it has none of that name."""
    path = folder(data, report_id) / name
    return path.read_bytes() if name in FILES and path.is_file() else None


def check(
    report_json: str, signature: str, *, report_html: str | None = None, public_key: str | None = None
) -> Verification:
    """Check a report that somebody sent; see `assay.report.verify`.

    Parameters
    ----------
    report_json, signature, report_html
        The files' contents; without the page only the JSON is checked.
    public_key
        64 hexadecimal digits of the expected signer; None proves integrity only.
    """
    given = {REPORT_JSON: report_json, SIGNATURE_JSON: signature, REPORT_HTML: report_html}
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in given.items():
            if content is not None:
                Path(scratch, name).write_bytes(content.encode())
        return verify(scratch if report_html is not None else Path(scratch, REPORT_JSON), public_key)
