"""Answers to bad requests: one shape, no echo of what was sent, nothing of the inside."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
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


def install(app: FastAPI) -> None:
    """Answer every exception in this shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Only where and what is accepted: the input itself may be long, secret, or no JSON at all.
        fields = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()[:20]]
        return problem(422, "the request does not have the form that is described in /openapi.json.", fields=fields)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    async def known(request: Request, error: Exception) -> JSONResponse:
        status = next(code for kind, code in _STATUS if isinstance(error, kind))
        return problem(status, str(error))

    for kind, _ in _STATUS:
        app.add_exception_handler(kind, known)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # The type alone: a message or a traceback may hold a text or a secret.
        _LOG.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
        return problem(500, "something went wrong inside; it has been logged.")
