"""What a route asks of a request: who calls, with which scope, and whether they call too often."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from assay.service.auth import Caller, Scope
from assay.service.state import State

_bearer = HTTPBearer(auto_error=False, description="An API key: assay_<id>_<secret>.")


async def state(request: Request) -> State:
    """The application's state."""
    found: State = request.app.state.assay
    return found


Shared = Annotated[State, Depends(state)]


def caller_with(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    """A dependency: the caller, who must hold a scope."""

    async def caller(shared: Shared, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
        token = None if given is None else given.credentials
        known = shared.authenticator.knows(token)  # then there is nothing to wait for, and no thread is needed
        found = (
            shared.authenticator.caller(token) if known else await run_in_threadpool(shared.authenticator.caller, token)
        )
        if found is None:
            raise HTTPException(
                401, "an API key is needed: Authorization: Bearer assay_...", {"www-authenticate": "Bearer"}
            )
        wait = shared.rates.wait(found.api_key_id)
        if wait > 0:
            raise HTTPException(429, "too many requests; wait.", {"retry-after": str(math.ceil(wait))})
        if not found.may(scope):
            raise HTTPException(403, f"this API key lacks the scope {scope!r}.")
        return found

    return caller


Detects = Annotated[Caller, Depends(caller_with("detect"))]
Embeds = Annotated[Caller, Depends(caller_with("embed"))]
KeepsKeys = Annotated[Caller, Depends(caller_with("keys"))]
Administers = Annotated[Caller, Depends(caller_with("admin"))]
