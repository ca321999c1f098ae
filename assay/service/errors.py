"""Answers to bad requests: one shape, no echo of what was sent, nothing of the inside."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from assay._errors import AssayError, KeyringError, RevokedKeyError, TextError, UnknownKeyError

_LOG = logging.getLogger("assay.service")
_NAMES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "body_too_large",
    422: "invalid",
    429: "too_many_requests",
    503: "unavailable",
}
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnknownKeyError, 404),
    (RevokedKeyError, 409),
    (KeyringError, 409),
    (TextError, 422),
    (AssayError, 422),
    (ValueError, 422),
)


class Problem(BaseModel):
    """What went wrong.

    Attributes
    ----------
    error
        A short code.
    detail
        One sentence for people.
    fields
        For code "invalid": where in the request, and what is accepted there.
    """

    error: str
    detail: str
    fields: list[str] = []


def problem(
    status: int, detail: str, *, fields: list[str] | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A response that says what went wrong."""
    body = Problem(error=_NAMES.get(status, "error"), detail=detail, fields=fields or [])
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers a route may give besides its own, for its OpenAPI description."""
    described = (400, 401, 403, 413, 422, 429, *statuses)
    return {status: {"model": Problem, "description": _NAMES[status]} for status in sorted(set(described))}


def install(app: FastAPI, routes: Sequence[APIRoute]) -> None:
    """Answer every exception in this shape; the routes tell which methods a path takes."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Only where and what is accepted: the input itself may be long, secret, or no JSON at all.
        fields = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()[:20]]
        return problem(422, "the request does not have the form that is described in /openapi.json.", fields=fields)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # all methods of the path: Starlette names those of one route
            headers = {"allow": ", ".join(_methods(routes, request.scope["path"]))}
        return problem(error.status_code, str(error.detail), headers=headers)

    async def known(request: Request, error: Exception) -> JSONResponse:
        if not _ours(error):
            return failed(request.scope, error)
        status = next(code for kind, code in _STATUS if isinstance(error, kind))
        return problem(status, str(error))

    for kind, _ in _STATUS:
        app.add_exception_handler(kind, known)

    @app.exception_handler(OperationalError)
    async def unavailable(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s: the database does not answer", request.method, _route(request))
        return problem(503, "the database does not answer.")

    @app.exception_handler(ValidationError)
    async def inside(request: Request, error: Exception) -> JSONResponse:
        # A ValueError that no caller has caused: an answer of ours did not have its form.
        return failed(request.scope, error)


def _methods(routes: Sequence[APIRoute], path: str) -> list[str]:
    """What a path takes; a path of its own is no other one's parameter."""
    found = [one for one in routes if one.path == path] or [one for one in routes if one.path_regex.match(path)]
    return sorted({name for one in found for name in one.methods or ()})


def failed(scope: Mapping[str, Any], error: Exception) -> JSONResponse:
    """The answer to what was not foreseen; the log gets its type and place, never its message or the request."""
    trace = _origin(error)
    place = "" if trace is None else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    _LOG.error("%s failed: %s%s", scope.get("method"), type(error).__name__, place)
    return problem(500, "something went wrong inside; it has been logged.")


def _origin(error: Exception) -> TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _ours(error: Exception) -> bool:
    """Whether the message is one of Assay's, which tells what is accepted; a library's may repeat what it got."""
    trace = _origin(error)
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("assay.")


def _route(request: Request) -> str:
    """The route's pattern: a path may hold ids, or whatever a caller wrote there."""
    return getattr(request.scope.get("route"), "path", "none")
