"""The web page: log in, test a text, see jobs and reports. Server-rendered; it needs no JavaScript and has none."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException

from assay._errors import AssayError
from assay.detection.text import check_text, decode_text
from assay.service import audit, jobs, reports
from assay.service.access import Shared
from assay.service.accounts import Charge
from assay.service.auth import Caller
from assay.service.pages import sessions, verdict
from assay.service.pages.render import page, style
from assay.service.pages.sessions import WebSessions
from assay.service.routes import detect
from assay.service.routes import jobs as job_routes
from assay.service.routes import reports as report_routes
from assay.service.routes.jobs import JobId
from assay.service.routes.reports import NewReport, ReportId
from assay.service.state import State

SESSION, VISITOR = "assay_session", "assay_visitor"
_SHORT = 65_536  # bytes of a form without a file
_FIELD = re.compile(r"[^\x00-\x1f]{0,64}")
_WORDS = {403: "Not allowed", 404: "Not found", 409: "Not now", 422: "This cannot be tested", 429: "Too much for now"}


class _Page(APIRoute):
    """Answers errors with a page, without echo of what was sent."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, guarded."""
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError:
                return _failed(request, 404, "There is no such page.")
            except StarletteHTTPException as error:
                if error.status_code == 401:
                    return RedirectResponse("/", 303)
                return _failed(request, error.status_code, str(error.detail))
            except AssayError as error:
                return _failed(request, 404 if isinstance(error, LookupError) else 422, str(error))
            except ValueError:  # of a library: its message may repeat what was sent
                return _failed(request, 422, "The form holds something that cannot be read.")

        return guarded


router = APIRouter(include_in_schema=False, route_class=_Page, default_response_class=HTMLResponse)


def _web_sessions(shared: State) -> WebSessions:
    return WebSessions(shared.settings.data / "web-sessions", shared.sessions)


def _caller(request: Request, shared: Shared) -> Caller | None:
    """Who is logged in, within their rate."""
    found = _web_sessions(shared).caller(request.cookies.get(SESSION))
    if found is not None:
        _within_rate(shared, found)
    return found


def _within_rate(shared: State, caller: Caller) -> None:
    if shared.rates.wait(caller.api_key_id) > 0:
        raise HTTPException(429, "Too many requests; wait a moment.")


def _known(caller: Annotated[Caller | None, Depends(_caller)]) -> Caller:
    if caller is None:
        raise HTTPException(401, "log in.")
    return caller


Visitor = Annotated[Caller | None, Depends(_caller)]
Known = Annotated[Caller, Depends(_known)]


@router.get("/")
def home(request: Request, shared: Shared, caller: Visitor) -> Response:
    """The form for a text, or for the API key."""
    if caller is None:
        return _login(request)
    return _test_form(request, shared, caller)


@router.post("/login")
async def login(request: Request, shared: Shared) -> Response:
    """Take an API key and begin a session."""
    form = await _form(request, VISITOR)
    given = form.get("api_key")
    caller = await run_in_threadpool(shared.authenticator.caller, given.strip() if isinstance(given, str) else None)
    if caller is None:
        return _login(request, "This is not a valid API key.", status=401)
    _within_rate(shared, caller)
    found = _web_sessions(shared)
    await run_in_threadpool(found.end, request.cookies.get(SESSION))
    token = await run_in_threadpool(found.begin, caller)
    await run_in_threadpool(audit.record, shared.sessions, caller, "page.login")
    answer = RedirectResponse("/", 303)
    _set_cookie(answer, request, SESSION, token)
    answer.delete_cookie(VISITOR)
    return answer


@router.post("/logout")
async def logout(request: Request, shared: Shared, caller: Known) -> Response:
    """End the session, here and on the server."""
    await _form(request, SESSION)
    await run_in_threadpool(_web_sessions(shared).end, request.cookies.get(SESSION))
    await run_in_threadpool(audit.record, shared.sessions, caller, "page.logout")
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(SESSION)
    return answer


@router.post("/test")
async def test(request: Request, shared: Shared, caller: Known) -> Response:
    """The verdict on a text."""
    form = await _form(request, SESSION)
    _need(caller, "detect")
    uploaded, pasted, key = form.get("file"), form.get("text"), form.get("key")
    uploaded = uploaded if isinstance(uploaded, bytes) else b""
    pasted = pasted if isinstance(pasted, str) else ""
    try:
        if bool(uploaded) == bool(pasted.strip()):
            raise ValueError("Paste a text or choose a file: one of the two.")
        # Browsers send the line ends of a text area as CR LF, whatever was pasted; files come as they are.
        text = check_text(decode_text(uploaded) if uploaded else pasted.replace("\r\n", "\n"))
    except ValueError as error:
        return await run_in_threadpool(_test_form, request, shared, caller, str(error))
    wanted = detect.Wanted(text=text, keys=[key] if isinstance(key, str) and key else None)
    return await run_in_threadpool(_verdict, request, shared, caller, wanted)


@router.get("/jobs")
def list_jobs(request: Request, shared: Shared, caller: Known, refresh: str = "") -> Response:
    """The newest jobs, with how far they are, and the form for a new one."""
    _need(caller, "detect")
    return _jobs(request, shared, caller, refresh=refresh == "on")


@router.post("/jobs")
async def upload(request: Request, shared: Shared, caller: Known) -> Response:
    """Take a corpus and put its job into the queue; sent twice by the same form it is one job."""
    form = await _form(request, SESSION)
    _need(caller, "detect")
    corpus, id_column, once = form.get("corpus"), form.get("id_column"), form.get("once")
    id_column = id_column.strip() if isinstance(id_column, str) else ""
    if not isinstance(corpus, bytes) or not corpus.strip():
        return await run_in_threadpool(_jobs, request, shared, caller, problem="Choose a file of JSON lines.")
    if not _FIELD.fullmatch(id_column):
        problem = "The name of a field has at most 64 characters, none of them invisible."
        return await run_in_threadpool(_jobs, request, shared, caller, problem=problem)
    options = {"fdr": 0.01, "id_column": id_column or None, "source_column": None, "shard_rows": 2000}
    sent = hashlib.sha256(b"\0".join([str(once).encode(), id_column.encode(), corpus])).hexdigest()
    await job_routes.enter(shared, caller, _once(corpus), None, options, f"page-{sent}")
    return RedirectResponse("/jobs", 303)


@router.post("/jobs/{id}/report")
async def make_report(request: Request, shared: Shared, caller: Known, id: JobId) -> Response:
    """Make a report and show it."""
    await _form(request, SESSION)
    _need(caller, "keys")
    made = await run_in_threadpool(report_routes.make, shared, caller, NewReport(job_id=id))
    return RedirectResponse(f"/reports/{made.id}", 303)


@router.get("/reports")
def list_reports(request: Request, shared: Shared, caller: Known) -> Response:
    """The newest reports."""
    _need(caller, "keys")
    found = reports.listed(shared.sessions, caller.tenant)
    signed = {one.id for one in found if report_routes.ReportView.of(one, shared).signed}
    return _page(request, caller, "reports", reports=found, signed=signed)


@router.get("/reports/{id}")
def report(shared: Shared, caller: Known, id: ReportId) -> Response:
    """A report."""
    _need(caller, "keys")
    return report_routes.file_response(shared, caller, id, "report.html")


@router.get("/reports/{id}/{name}")
def report_file(shared: Shared, caller: Known, id: ReportId, name: report_routes.FileName) -> Response:
    """A file of a report."""
    _need(caller, "keys")
    return report_routes.file_response(shared, caller, id, name)


@router.get("/static/page.css")
def style_sheet() -> Response:
    """The style sheet; its address carries a tag that changes with it."""
    return Response(style()[0], media_type="text/css", headers={"cache-control": "public, max-age=86400"})


def _page(request: Request, caller: Caller | None, name: str, status: int = 200, **values: Any) -> HTMLResponse:
    token = request.cookies.get(SESSION, "")
    shown = {"here": request.url.path, "form_token": sessions.form_token(token), "caller": caller, **values}
    return HTMLResponse(page(name, **shown), status)


def _login(request: Request, problem: str | None = None, status: int = 200) -> Response:
    given = request.cookies.get(VISITOR)
    token = given if given is not None and sessions.is_token(given) else sessions.new_token()
    answer = _page(request, None, "login", status, problem=problem, form_token=sessions.form_token(token))
    _set_cookie(answer, request, VISITOR, token)
    return answer


def _test_form(request: Request, shared: State, caller: Caller, problem: str | None = None) -> Response:
    keys = []
    if caller.may("keys"):
        infos = shared.keys.infos(caller.tenant)
        keys = [info for info in infos if info.config.purpose == "watermark" and info.state != "revoked"]
    most = shared.settings.max_text_characters
    return _page(request, caller, "test", 422 if problem else 200, problem=problem, keys=keys, most=most, here="/")


def _jobs(
    request: Request, shared: State, caller: Caller, *, refresh: bool = False, problem: str | None = None
) -> Response:
    may_report = caller.may("keys")
    by_job: dict[str | None, list[Any]] = {}
    for one in reports.listed(shared.sessions, caller.tenant) if may_report else ():
        by_job.setdefault(one.job_id, []).append(one)
    return _page(
        request,
        caller,
        "jobs",
        422 if problem else 200,
        jobs=jobs.listed(shared.sessions, caller.tenant),
        reports=by_job,
        may_report=may_report,
        refresh=refresh,
        problem=problem,
        once=secrets.token_hex(16),
        most=shared.settings.max_body_bytes // 2**20,
    )


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _verdict(request: Request, shared: State, caller: Caller, wanted: detect.Wanted) -> Response:
    found = detect.one(shared, caller, wanted)
    keys = len(wanted.keys or shared.keys.for_detection(caller.tenant))
    strength, words = verdict.headline(found.log_pvalue, found.n_scored)
    spans, why_not = _spans(shared, caller, wanted.text, found.key_id, keys)
    shown = None if spans is None else verdict.pieces(wanted.text, spans)
    return _page(
        request,
        caller,
        "verdict",
        verdict=found,
        strength=strength,
        words=words,
        n_keys=keys,
        pieces=shown,
        n_marked=len(spans or ()),
        any_marked=bool(spans),
        why_not=why_not,
        here="/",
    )


def _spans(
    shared: State, caller: Caller, text: str, key_id: str | None, keys: int
) -> tuple[list[tuple[int, int]] | None, str]:
    """Marked ranges of characters, or None and why. Where the mark lies is a further answer, and counts as one."""
    if key_id is None:
        return None, "The test does not belong to one key, so that no part can be shown."
    if not shared.guard.charge_all([Charge(caller, (key_id,), 1, "detect.parts")])[0]:
        return None, "The detections of today are used up, so that the text was not searched."
    found = verdict.marked_spans(text, shared.keys.key(caller.tenant, key_id), shared.tokenizer, keys=keys)
    return (
        found,
        f"Parts are shown for texts of 1 to {verdict.MOST_TOKENS:,} tokens and schemes that mark token by token.",
    )


def _failed(request: Request, status: int, problem: str) -> Response:
    caller = _web_sessions(request.app.state.assay).caller(request.cookies.get(SESSION))
    return _page(request, caller, "error", status, words=_WORDS.get(status, "Something is wrong"), problem=problem)


def _need(caller: Caller, scope: str) -> None:
    if not caller.may(scope):
        raise HTTPException(403, f"Your API key lacks the scope {scope!r}.")


async def _form(request: Request, cookie: str) -> dict[str, str | bytes]:
    """Fields and files of a form that this service's own page sent: it knows what only that page can know."""
    token = request.cookies.get(cookie)
    limit = request.app.state.assay.settings.max_body_bytes
    if not request.headers.get("content-type", "").startswith("multipart/") and len(await request.body()) > _SHORT:
        # It would be decoded on the event loop, at a few megabytes a second, also for strangers.
        raise HTTPException(413, "The form is too large.")
    async with request.form(max_files=1, max_fields=10, max_part_size=limit) as form:
        values = {name: await one.read() if isinstance(one, UploadFile) else one for name, one in form.items()}
    sent = str(values.get("form_token"))
    known = sessions.is_token(token) and hmac.compare_digest(sent.encode(), sessions.form_token(str(token)).encode())
    # Browsers say where a request comes from; other clients do not.
    if not known or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "The form is no longer valid. Go back, load the page anew and send it again.")
    return values


def _set_cookie(answer: Response, request: Request, name: str, value: str) -> None:
    answer.set_cookie(
        name,
        value,
        max_age=sessions.SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
