"""/v1/reports: audit reports on finished jobs, signed if asked for; and a check of reports that others signed."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Response
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field, field_validator

from assay.detection.text import check_text
from assay.report.signature import SIGNATURE_JSON
from assay.service import jobs, reports
from assay.service.access import Detects, KeepsKeys, Shared
from assay.service.auth import Caller
from assay.service.bodies import KeyId, described, json_body
from assay.service.database import StoredReport
from assay.service.errors import responses
from assay.service.state import State
from assay.watermark.keys import SecretKey

router = APIRouter(prefix="/v1/reports", tags=["reports"], responses=responses(404, 409))

ReportId = Annotated[str, InPath(pattern=r"^report-[0-9a-f]{24}$")]
FileName = Literal["report.json", "report.html", "report.sig.json"]


class NewReport(BaseModel):
    """What to make.

    Attributes
    ----------
    job_id
        A finished job.
    title
        Heading of the report.
    excerpts
        How many flagged documents to show with their text; with 0 the report holds no text.
    sign_with
        Id of an active key of scheme "ed25519"; None for an unsigned report.
    """

    model_config = ConfigDict(extra="forbid")
    job_id: Annotated[str, Field(pattern=r"^job-[0-9a-f]{24}$")]
    title: Annotated[str, Field(min_length=1, max_length=200)] = "Watermark audit"
    excerpts: Annotated[int, Field(ge=0, le=50)] = 10
    sign_with: KeyId | None = None

    @field_validator("title")
    @classmethod
    def _title_is_valid(cls, title: str) -> str:
        return check_text(title)


class ReportView(BaseModel):
    """A stored report."""

    id: str
    job_id: str | None
    created: datetime
    signed: bool

    @classmethod
    def of(cls, stored: StoredReport, shared: State) -> ReportView:
        """From the row."""
        signed = (reports.folder(shared.settings.data, stored.id) / SIGNATURE_JSON).is_file()
        return cls(id=stored.id, job_id=stored.job_id, created=stored.created, signed=signed)


class ReportViews(BaseModel):
    """The tenant's newest reports."""

    reports: list[ReportView]


class Sent(BaseModel):
    """A report from elsewhere: the contents of its files, byte for byte.

    Attributes
    ----------
    report_json, signature, report_html
        report.json, report.sig.json and, if it is to be checked too, report.html.
    public_key
        64 hexadecimal digits of the expected signer, known from elsewhere. Without it the check proves that nothing was
        changed, not who signed.
    """

    model_config = ConfigDict(extra="forbid")
    report_json: str
    signature: str
    report_html: str | None = None
    public_key: Annotated[str | None, Field(pattern=r"^[0-9A-Fa-f]{64}$")] = None

    @field_validator("report_json", "signature", "report_html")
    @classmethod
    def _texts_are_valid(cls, text: str | None) -> str | None:
        return None if text is None else check_text(text)


class Checked(BaseModel):
    """What a check found; see `assay.report.Verification`."""

    valid: bool
    signer_checked: bool
    key_id: str | None
    public_key: str | None
    checked: list[str]
    problems: list[str]
    sentence: str


@router.post("", status_code=201, openapi_extra=described(NewReport))
def create(
    shared: Shared, caller: KeepsKeys, wanted: Annotated[NewReport, Depends(json_body(NewReport))]
) -> ReportView:
    """Make a report on a finished job."""
    return ReportView.of(make(shared, caller, wanted), shared)


@router.get("")
def list_reports(shared: Shared, caller: KeepsKeys) -> ReportViews:
    """The newest hundred reports."""
    return ReportViews(reports=[ReportView.of(one, shared) for one in reports.listed(shared.sessions, caller.tenant)])


@router.post("/verify", openapi_extra=described(Sent))
def verify(shared: Shared, caller: Detects, sent: Annotated[Sent, Depends(json_body(Sent))]) -> Checked:
    """Check a report's signature; nothing is kept."""
    found = reports.check(sent.report_json, sent.signature, report_html=sent.report_html, public_key=sent.public_key)
    return Checked(**vars(found), sentence=found.sentence())


@router.get("/verify", include_in_schema=False)
def not_read(caller: Detects) -> None:
    """Reports are sent to be verified; without this the path would be taken for a report's id."""
    raise HTTPException(405, "send the report with POST.")


@router.get("/{id}")
def status(shared: Shared, caller: KeepsKeys, id: ReportId) -> ReportView:
    """What a report is."""
    return ReportView.of(stored(shared, caller, id), shared)


@router.get(
    "/{id}/{name}", response_class=Response, responses={200: {"content": {"application/json": {}, "text/html": {}}}}
)
def fetch(shared: Shared, caller: KeepsKeys, id: ReportId, name: FileName) -> Response:
    """One of a report's files, byte for byte as it was signed."""
    return file_response(shared, caller, id, name)


def make(shared: State, caller: Caller, wanted: NewReport) -> StoredReport:
    """A report as asked for, stored and entered in the audit log."""
    job = jobs.find(shared.sessions, caller.tenant, wanted.job_id)
    if job is None:
        raise HTTPException(404, f"there is no job {wanted.job_id!r}.")
    if job.state != jobs.FINISHED:
        raise HTTPException(409, f"job {job.id!r} is {job.state}: only a finished job has a report.")
    keys = [shared.keys.key(caller.tenant, id) for id in job.options["keys"]]
    signer: SecretKey | None = None
    if wanted.sign_with is not None:
        signer = shared.keys.key(caller.tenant, wanted.sign_with)
        if signer.config.purpose != "signing":
            raise HTTPException(422, f"key {signer.id!r} is no signing key: make one with scheme 'ed25519'.")
    return reports.build(
        shared.sessions,
        shared.settings.data,
        caller,
        job,
        [key for key in keys if key.state != "revoked"],
        tokenizer=shared.tokenizer,
        title=wanted.title,
        excerpts=wanted.excerpts,
        sign_with=signer,
    )


def stored(shared: State, caller: Caller, id: str) -> StoredReport:
    """The tenant's report of that id, or 404."""
    found = reports.find(shared.sessions, caller.tenant, id)
    if found is None:
        raise HTTPException(404, f"there is no report {id!r}.")
    return found


def file_response(shared: State, caller: Caller, id: str, name: str) -> Response:
    """A file of the tenant's report, or 404."""
    stored(shared, caller, id)
    content = reports.file_of(shared.settings.data, id, name)
    if content is None:
        raise HTTPException(404, f"report {id!r} has no file {name!r}: it is not signed.")
    if name.endswith(".json"):
        disposition = f'attachment; filename="{name}"'
        return Response(content, media_type="application/json", headers={"content-disposition": disposition})
    return Response(content, media_type="text/html", headers={"content-security-policy": _policy()})


@cache
def _policy() -> str:
    """The page carries its style sheet inside: it is admitted by its hash, and nothing else is."""
    css = resources.files("assay.report").joinpath("report.css").read_bytes()
    digest = base64.b64encode(hashlib.sha256(css).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
