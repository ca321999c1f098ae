"""/v1/detect: one text, a batch, or a stream of JSON lines, tested for the marks of the tenant's keys."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Final

import orjson
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from assay._errors import TextError
from assay.detection.detect import detect
from assay.detection.result import TestResult
from assay.detection.text import check_text
from assay.service import metrics
from assay.service.access import Detects, Shared
from assay.service.accounts import Charge
from assay.service.auth import Caller
from assay.service.bodies import KeyId, described, json_body
from assay.service.errors import responses
from assay.service.limits import rounded
from assay.service.state import State
from assay.watermark.keys import SecretKey

router = APIRouter(prefix="/v1/detect", tags=["detect"], responses=responses(404))

KeyIds = Annotated[list[KeyId] | None, Field(max_length=64, min_length=1)]
_INLINE: Final = 20_000  # characters times keys tested on the event loop: milliseconds in which nobody else is answered
_LONGEST_ID: Final = 1000
_LINES: Final = {"type": "string", "description": "JSON lines with the field text, and id if wanted."}
_GROUP: Final = 64  # lines of a stream charged together


def _valid(text: str) -> str:
    try:
        return check_text(text)
    except TextError as error:
        raise ValueError(str(error)) from None


class Wanted(BaseModel):
    """A text, and the keys to look for."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(description="The text; at most 1,000,000 characters by default.")]
    keys: KeyIds = None
    """Ids; default: every active and retired key."""

    _text_is_valid = field_validator("text")(_valid)


class WantedBatch(BaseModel):
    """Several texts."""

    model_config = ConfigDict(extra="forbid")
    texts: Annotated[list[str], Field(min_length=1)]
    keys: KeyIds = None

    @field_validator("texts")
    @classmethod
    def _texts_are_valid(cls, texts: list[str]) -> list[str]:
        return [_valid(text) for text in texts]


class Verdict(BaseModel):
    """What a test says.

    For callers without the scope "keys" evidence is rounded to whole powers of ten, none beyond 1e-9, and `log_evalue`
    is null where the e-value is below 1, which is no evidence.
    """

    test: str
    key_id: str | None
    scheme: str | None
    log_pvalue: float
    pvalue: float
    log_evalue: float | None
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
        log_e = rounded(min(result.log_evalue, 1e300), caller, up=False)
        seen = TestResult(**{**vars(result), "log_pvalue": log_p, "components": ()})
        return cls(
            test=result.test,
            key_id=result.key_id,
            scheme=result.scheme,
            log_pvalue=log_p,
            pvalue=math.exp(log_p),
            log_evalue=None if math.isinf(log_e) else log_e,
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


@router.post("", response_model=Verdict, openapi_extra=described(Wanted))
async def test_one(shared: Shared, caller: Detects, wanted: Annotated[Wanted, Depends(json_body(Wanted))]) -> Response:
    """Test one text."""
    _check_length(shared, wanted.text)
    keys = await _keys_now(shared, caller, wanted.keys)
    await _charge(shared, caller, "detect", keys, 1)
    (found,) = await _test(shared, caller, [wanted.text], keys)
    # Written out here: FastAPI would check a model that was just made, field by field.
    return Response(found.model_dump_json(), media_type="application/json")


@router.post("/batch", response_model=Verdicts, openapi_extra=described(WantedBatch))
async def test_batch(
    shared: Shared, caller: Detects, wanted: Annotated[WantedBatch, Depends(json_body(WantedBatch))]
) -> Response:
    """Test several texts."""
    if len(wanted.texts) > shared.settings.max_batch:
        raise HTTPException(422, f"texts must be at most {shared.settings.max_batch}, got {len(wanted.texts)}.")
    for text in wanted.texts:
        _check_length(shared, text)
    keys = await _keys_now(shared, caller, wanted.keys)
    await _charge(shared, caller, "detect.batch", keys, len(wanted.texts))
    found = await _test(shared, caller, wanted.texts, keys)
    return Response(Verdicts(verdicts=found).model_dump_json(), media_type="application/json")


@router.post(
    "/stream",
    response_class=StreamingResponse,
    openapi_extra={"requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": _LINES}}}},
)
async def test_stream(shared: Shared, caller: Detects, request: Request) -> StreamingResponse:
    """Test lines as they come: `{"text": ..., "id": ...}` in, a verdict or an error with that id out."""
    await _keys_now(shared, caller, None)  # 404 while there is a status to answer with

    async def answers() -> AsyncIterator[bytes]:
        try:
            async for lines in _lines(request, shared.settings.max_body_bytes):
                for start in range(0, len(lines), _GROUP):
                    yield await _answers(shared, caller, lines[start : start + _GROUP])
        except HTTPException as end:
            yield orjson.dumps({"id": None, "error": f"{end.detail} the stream ends here."}) + b"\n"

    return _Duplex(answers(), media_type="application/x-ndjson")


def one(shared: State, caller: Caller, wanted: Wanted) -> Verdict:
    """Test one text, charged and entered in the audit log, from a thread of one's own."""
    _check_length(shared, wanted.text)
    keys = _keys(shared, caller, wanted.keys)
    _granted(shared.guard.charge_all([_bill(caller, "detect", keys, 1)])[0])
    return _tested(shared, caller, [wanted.text], keys)[0]


class _Duplex(StreamingResponse):
    """A streamed answer to a streamed request: the answer itself reads the request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Without the base's watch for a disconnect, which would take pieces of the body; reading notices it."""
        await self.stream_response(send)


async def _lines(request: Request, longest: int) -> AsyncIterator[list[bytes | None]]:
    """Lines of the body, as many at a time as came; None in place of one that is too long, which ends the stream."""
    held = bytearray()
    async for piece in request.stream():
        lines: list[bytes | None] = []
        if b"\n" in piece:  # else nothing is copied: pieces may be many and short
            *whole, rest = (held + piece).split(b"\n")
            lines, held = [bytes(line) for line in whole if line.strip()], rest
        else:
            held += piece
        if len(held) > longest:
            yield [*lines, None]
            return
        if lines:
            yield lines
    if held.strip():
        yield [bytes(held)]


async def _answers(shared: State, caller: Caller, lines: list[bytes | None]) -> bytes:
    """The answers to lines, tested after the texts among them are charged; 401 or 404 if there can be no more."""
    if not await shared.authenticator.still(caller):
        raise HTTPException(401, "this API key was revoked:")
    keys = await _keys_now(shared, caller, None)
    read = [_read(shared, line) for line in lines]
    texts = sum(error is None for _, _, error in read)
    for _ in lines:  # a stream waits where a request would be refused
        while (wait := shared.rates.wait(caller.api_key_id)) > 0:
            await asyncio.sleep(wait)
    # All or none is charged; if it is none, one by one, so that a budget is used to its end.
    together = texts > 0 and await shared.guard.charge(_bill(caller, "detect.stream", keys, texts))
    for i, (id, text, error) in enumerate(read):
        if error is None and not together:
            try:
                await _charge(shared, caller, "detect.stream", keys, 1)
            except HTTPException as refusal:
                read[i] = id, text, refusal.detail
    found = iter(await _test(shared, caller, [text for _, text, error in read if error is None], keys))
    answers: list[dict[str, Any]] = [
        {"id": id, "verdict": next(found).model_dump()} if error is None else {"id": id, "error": error}
        for id, _, error in read
    ]
    return b"".join(orjson.dumps(answer) + b"\n" for answer in answers)


def _read(shared: State, line: bytes | None) -> tuple[str | int | None, str, str | None]:
    """Id and text of a line, and what is wrong with it."""
    if line is None:
        return None, "", f"a line must be at most {shared.settings.max_body_bytes} bytes; the stream ends here."
    try:
        given = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None, "", "a line must be JSON in UTF-8, without NaN, infinities or lone surrogates."
    if not isinstance(given, dict):
        return None, "", 'a line must be a JSON object with the field "text".'
    id, text = given.get("id"), given.get("text")
    if not isinstance(id, str | int | None) or (isinstance(id, str) and len(id) > _LONGEST_ID):
        return None, "", f"id must be a whole number, or a string of at most {_LONGEST_ID} characters."
    if not isinstance(text, str):
        return id, "", 'a line must be a JSON object with the field "text".'
    try:
        _check_length(shared, text)
    except HTTPException as error:
        return id, "", error.detail
    return id, text, None


async def _keys_now(shared: State, caller: Caller, ids: list[str] | None) -> list[SecretKey]:
    if shared.keys.knows(caller.tenant, ids):
        return _keys(shared, caller, ids)
    return await run_in_threadpool(_keys, shared, caller, ids)


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


def _bill(caller: Caller, action: str, keys: Sequence[SecretKey], texts: int) -> Charge:
    return Charge(caller, tuple(key.id for key in keys), texts, action)


async def _charge(shared: State, caller: Caller, action: str, keys: list[SecretKey], texts: int) -> None:
    _granted(await shared.guard.charge(_bill(caller, action, keys, texts)))


def _granted(granted: bool) -> None:
    if not granted:
        raise HTTPException(
            429,
            "this API key has used its detections of today: unlimited queries would let a mark be stripped or forged.",
            {"retry-after": "3600"},
        )


def _check_length(shared: State, text: str) -> None:
    most = shared.settings.max_text_characters
    if len(text) > most:
        raise HTTPException(422, f"text must be at most {most} characters, got {len(text)}.")


async def _test(shared: State, caller: Caller, texts: Sequence[str], keys: list[SecretKey]) -> list[Verdict]:
    """Verdicts on texts, in a thread unless they are short, all of them together."""
    if sum(map(len, texts)) * len(keys) <= _INLINE:
        return _tested(shared, caller, texts, keys)
    return await run_in_threadpool(_tested, shared, caller, texts, keys)


def _tested(shared: State, caller: Caller, texts: Sequence[str], keys: list[SecretKey]) -> list[Verdict]:
    found = []
    for text in texts:
        result = detect(text, keys, tokenizer=shared.tokenizer)
        metrics.DETECTIONS.inc()
        metrics.TOKENS.inc(result.n_tokens)
        found.append(Verdict.of(result, caller))
    return found
