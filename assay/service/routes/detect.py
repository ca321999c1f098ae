"""/v1/detect: one text, a batch, or a stream of JSON lines, tested for the marks of the tenant's keys."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Annotated

import orjson
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from assay._errors import TextError
from assay.detection.detect import detect
from assay.detection.result import TestResult
from assay.detection.text import check_text
from assay.service import audit, metrics
from assay.service.access import Detects, Shared
from assay.service.app import State
from assay.service.auth import Caller
from assay.service.errors import responses
from assay.service.limits import rounded
from assay.watermark.keys import SecretKey

router = APIRouter(prefix="/v1/detect", tags=["detect"], responses=responses(404))

_KEYS = 64


def _valid(text: str) -> str:
    try:
        return check_text(text)
    except TextError as error:
        raise ValueError(str(error)) from None


class Wanted(BaseModel):
    """A text, and the keys to look for."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(description="The text; at most 1,000,000 characters by default.")]
    keys: Annotated[list[str] | None, Field(max_length=_KEYS, min_length=1)] = None
    """Ids; default: every active and retired key."""

    _text_is_valid = field_validator("text")(_valid)


class WantedBatch(BaseModel):
    """Several texts."""

    model_config = ConfigDict(extra="forbid")
    texts: Annotated[list[str], Field(min_length=1)]
    keys: Annotated[list[str] | None, Field(max_length=_KEYS, min_length=1)] = None

    @field_validator("texts")
    @classmethod
    def _texts_are_valid(cls, texts: list[str]) -> list[str]:
        return [_valid(text) for text in texts]


class Verdict(BaseModel):
    """What a test says. Rounded to whole powers of ten, none beyond 1e-9, for callers without the scope "keys"."""

    test: str
    key_id: str | None
    scheme: str | None
    log_pvalue: float
    pvalue: float
    log_evalue: float
    n_tokens: int
    n_scored: int
    null: str
    sentence: str
    assumptions: list[str]
    rounded: bool

    @classmethod
    def of(cls, result: TestResult, caller: Caller) -> Verdict:
        """What the caller may see of a result."""
        log_p = rounded(max(result.log_pvalue, -1e300), caller, up=True)
        log_e = rounded(min(max(result.log_evalue, -1e300), 1e300), caller, up=False)
        seen = TestResult(**{**vars(result), "log_pvalue": log_p, "log_evalue": log_e, "components": ()})
        return cls(
            test=result.test,
            key_id=result.key_id,
            scheme=result.scheme,
            log_pvalue=log_p,
            pvalue=math.exp(log_p),
            log_evalue=log_e,
            n_tokens=result.n_tokens,
            n_scored=result.n_scored,
            null=result.null,
            sentence=seen.sentence(),
            assumptions=list(result.assumptions),
            rounded=not caller.may("keys"),
        )


class Verdicts(BaseModel):
    """One verdict per text, in order."""

    verdicts: list[Verdict]


@router.post("")
def one(shared: Shared, caller: Detects, wanted: Wanted) -> Verdict:
    """Test one text."""
    keys = _keys(shared, caller, wanted.keys)
    _spend(shared, caller, keys, 1)
    found = _test(shared, caller, wanted.text, keys)
    audit.record(shared.sessions, caller, "detect", None, keys=len(keys), texts=1)
    return found


@router.post("/batch")
def batch(shared: Shared, caller: Detects, wanted: WantedBatch) -> Verdicts:
    """Test several texts."""
    if len(wanted.texts) > shared.settings.max_batch:
        raise HTTPException(422, f"texts must be at most {shared.settings.max_batch}, got {len(wanted.texts)}.")
    keys = _keys(shared, caller, wanted.keys)
    _spend(shared, caller, keys, len(wanted.texts))
    found = [_test(shared, caller, text, keys) for text in wanted.texts]
    audit.record(shared.sessions, caller, "detect.batch", None, keys=len(keys), texts=len(found))
    return Verdicts(verdicts=found)


@router.post(
    "/stream",
    response_class=StreamingResponse,
    openapi_extra={"requestBody": {"required": True, "content": {"application/x-ndjson": {}}}},
)
async def stream(shared: Shared, caller: Detects, request: Request) -> StreamingResponse:
    """Test lines as they come: `{"text": ..., "id": ...}` in, a verdict or an error with that id out."""
    keys = await run_in_threadpool(_keys, shared, caller, None)

    async def answers() -> AsyncIterator[bytes]:
        count = 0
        async for line in _lines(request, shared.settings.max_body_bytes):
            count += 1
            yield await run_in_threadpool(_answer, shared, caller, keys, line)
        await run_in_threadpool(
            audit.record, shared.sessions, caller, "detect.stream", None, keys=len(keys), texts=count
        )

    return _Duplex(answers(), media_type="application/x-ndjson")


class _Duplex(StreamingResponse):
    """A streamed answer to a streamed request: the answer itself reads the request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Without the base's watch for a disconnect, which would take pieces of the body; reading notices it."""
        await self.stream_response(send)


async def _lines(request: Request, longest: int) -> AsyncIterator[bytes | None]:
    """Lines of the body; None in place of one that is too long, which ends the stream."""
    held = b""
    async for piece in request.stream():
        *whole, held = (held + piece).split(b"\n")
        for line in whole:
            if line.strip():
                yield line
        if len(held) > longest:
            yield None
            return
    if held.strip():
        yield held


def _answer(shared: State, caller: Caller, keys: list[SecretKey], line: bytes | None) -> bytes:
    id = None
    try:
        if line is None:
            raise ValueError(f"a line must be at most {shared.settings.max_body_bytes} bytes; the stream ends here.")
        given = orjson.loads(line)
        if not isinstance(given, dict) or not isinstance(given.get("text"), str):
            raise ValueError('a line must be a JSON object with the field "text".')
        id = given.get("id")
        if not isinstance(id, str | int | None):
            id = None
        _spend(shared, caller, keys, 1)
        verdict = _test(shared, caller, given["text"], keys).model_dump()
    except orjson.JSONDecodeError:
        return orjson.dumps({"id": None, "error": "a line must be JSON."}) + b"\n"
    except (HTTPException, ValueError) as error:
        detail = error.detail if isinstance(error, HTTPException) else str(error)
        return orjson.dumps({"id": id, "error": detail}) + b"\n"
    return orjson.dumps({"id": id, "verdict": verdict}) + b"\n"


def _keys(shared: State, caller: Caller, ids: list[str] | None) -> list[SecretKey]:
    if ids is None:
        keys = shared.keys.for_detection(caller.tenant)
    else:
        keys = [shared.keys.key(caller.tenant, id) for id in dict.fromkeys(ids)]
    if not keys:
        raise HTTPException(404, "there is no key to look for: make one with POST /v1/keys.")
    for key in keys:
        if key.config.purpose != "watermark":
            raise HTTPException(422, f"key {key.id!r} is for signing and marks nothing.")
    return keys


def _spend(shared: State, caller: Caller, keys: list[SecretKey], texts: int) -> None:
    if not shared.guard.spend(caller, [key.id for key in keys], texts):
        raise HTTPException(
            429,
            "this API key has used its detections of today: unlimited queries would let a mark be stripped or forged.",
            {"retry-after": "3600"},
        )


def _test(shared: State, caller: Caller, text: str, keys: list[SecretKey]) -> Verdict:
    if len(text) > shared.settings.max_text_characters:
        raise HTTPException(
            422, f"text must be at most {shared.settings.max_text_characters} characters, got {len(text)}."
        )
    result = detect(text, keys, tokenizer=shared.tokenizer)
    metrics.DETECTIONS.inc()
    metrics.TOKENS.inc(result.n_tokens)
    return Verdict.of(result, caller)
