"""/v1/completions and /v1/models: text from the configured model with the mark of a tenant's key, as OpenAI's API.

What would lose the mark or weaken it (greedy decoding, beams, penalties that are not offered) is refused, not ignored.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from assay._errors import AssayError, RevokedKeyError, UnknownKeyError
from assay.detection.text import check_text
from assay.service import audit
from assay.service.access import Embeds, Shared
from assay.service.auth import Caller
from assay.service.bodies import KeyId, described, json_body
from assay.service.errors import Problem
from assay.service.generation import BusyError, Completion, Generator, Sampling, UnavailableError
from assay.service.state import State
from assay.watermark.keys import SecretKey


class Fault(BaseModel):
    """What went wrong, for people and for programs.

    Attributes
    ----------
    message
        One sentence or two.
    type
        "invalid_request_error", or "server_error" where the request is not to blame.
    param, code
        Always None; clients of this API expect the fields.
    """

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: None = None
    code: None = None


class Refusal(BaseModel):
    """As OpenAI's error object: their clients show the message."""

    error: Fault


class _OpenAIRoute(APIRoute):
    """Answers errors as clients of this API expect them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, guarded."""
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                # Only where and what is accepted, nothing of what was sent.
                found = [
                    f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors()[:9]
                ]
                return _refusal(422, "; ".join(found))
            except StarletteHTTPException as error:
                return _refusal(error.status_code, str(error.detail), error.headers)
            except AssayError as error:
                statuses = {UnknownKeyError: 404, RevokedKeyError: 409}
                return _refusal(statuses.get(type(error), 422), str(error))

        return guarded


def _refusal(status: int, message: str, headers: Any = None) -> JSONResponse:
    kind: Literal["invalid_request_error", "server_error"] = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(Refusal(error=Fault(message=message, type=kind)).model_dump(), status, headers)


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": "refused"} for status in (400, 401, 403, 404, 409, 422, 429, 503)
}
router = APIRouter(
    prefix="/v1",
    tags=["completions"],
    route_class=_OpenAIRoute,
    responses={**_REFUSALS, 413: {"model": Problem, "description": "body_too_large"}},
)

_MOST_TOKENS = 8192
# Fields of OpenAI's API that would change or lose the mark, with the one value that is accepted.
_FIXED: dict[str, tuple[Any, str]] = {
    "n": (1, "one completion is made for each request"),
    "best_of": (1, "choosing among texts would change the law of the mark"),
    "num_beams": (1, "beam search ranks whole texts and would undo the keyed draw"),
    "use_beam_search": (False, "beam search ranks whole texts and would undo the keyed draw"),
    "echo": (False, "the answer holds the completion alone"),
    "logprobs": (None, "log-probabilities are not offered"),
    "suffix": (None, "text is written from left to right"),
    "presence_penalty": (0, "penalties are not offered"),
    "frequency_penalty": (0, "penalties are not offered"),
    "logit_bias": (None, "biases are not offered"),
}

Text = Annotated[str, Field(max_length=200_000)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class Wanted(BaseModel):
    """As OpenAI's `POST /v1/completions`, with `assay_key` and `assay_payload`.

    Attributes
    ----------
    model
        The name that GET /v1/models tells.
    prompt
        A text, or token ids.
    temperature
        Above 0: greedy decoding has no randomness to key.
    assay_key
        Id of the key to mark with; default the newest active one.
    assay_payload
        What the text is to carry, for keys of scheme "payload-gumbel".
    """

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=300)]
    prompt: Text | Annotated[list[TokenId], Field(max_length=100_000)]
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    temperature: (
        Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, json_schema_extra={"exclusiveMinimum": 0})] | None
    ) = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    user: Annotated[str | None, Field(max_length=1000, description="Accepted and not kept.")] = None
    n: Annotated[int | None, Field(json_schema_extra={"enum": [1, None]})] = None
    best_of: Annotated[int | None, Field(json_schema_extra={"enum": [1, None]})] = None
    num_beams: Annotated[int | None, Field(json_schema_extra={"enum": [1, None]})] = None
    use_beam_search: Annotated[bool | None, Field(json_schema_extra={"enum": [False, None]})] = None
    echo: Annotated[bool | None, Field(json_schema_extra={"enum": [False, None]})] = None
    logprobs: Annotated[int | None, Field(json_schema_extra={"enum": [None]})] = None
    suffix: Annotated[str | None, Field(max_length=1000, json_schema_extra={"enum": [None]})] = None
    presence_penalty: Annotated[float | None, Field(allow_inf_nan=False, json_schema_extra={"enum": [0, None]})] = None
    frequency_penalty: Annotated[float | None, Field(allow_inf_nan=False, json_schema_extra={"enum": [0, None]})] = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=1000, json_schema_extra={"enum": [{}, None]})] = (
        None
    )
    assay_key: KeyId | None = None
    assay_payload: Annotated[int | None, Field(ge=0, lt=2**53)] = None

    @field_validator("prompt", "stop")
    @classmethod
    def _texts_are_valid(cls, given: Any) -> Any:
        for one in [given] if isinstance(given, str) else given or ():
            if isinstance(one, str):
                check_text(one)
        return given


class Choice(BaseModel):
    """A completion, or a piece of one."""

    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Made(BaseModel):
    """As OpenAI's completion object, with the id of the key that marked the text."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None
    assay_key: str


class Model(BaseModel):
    """A model that writes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["assay"] = "assay"


class Models(BaseModel):
    """The one model of this service, or none."""

    object: Literal["list"] = "list"
    data: list[Model]


async def _generator(request: Request, shared: Shared) -> Generator:
    """The application's generator, made at the first call; on the event loop, so that there is one."""
    kept = request.app.state
    if not hasattr(kept, "generator"):
        kept.generator = Generator(shared.settings.model)
        kept.generator_since = int(time.time())
    found: Generator = kept.generator
    return found


Writes = Annotated[Generator, Depends(_generator)]


@router.get("/models")
def list_models(request: Request, caller: Embeds, generator: Writes) -> Models:
    """The models that can be asked."""
    if generator.name is None:
        return Models(data=[])
    return Models(data=[Model(id=generator.name, created=request.app.state.generator_since)])


@router.get("/models/{model:path}")
def one_model(request: Request, caller: Embeds, generator: Writes, model: str) -> Model:
    """A model."""
    if generator.name is None or model != generator.name:
        raise HTTPException(404, "there is no such model: see GET /v1/models.")
    return Model(id=model, created=request.app.state.generator_since)


@router.post(
    "/completions",
    response_model=Made,
    openapi_extra=described(Wanted),
    responses={200: {"content": {"text/event-stream": {}}, "description": "A completion; pieces of it with `stream`."}},
)
async def complete(
    shared: Shared, caller: Embeds, generator: Writes, wanted: Annotated[Wanted, Depends(json_body(Wanted))]
) -> Any:
    """Write on from a prompt, under a key; with `stream`, as server-sent events."""
    completion, key = await run_in_threadpool(_begin, shared, caller, generator, wanted)
    head: dict[str, Any] = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.model,
        "assay_key": key.id,
    }
    if wanted.stream:
        usage = (wanted.stream_options or {}).get("include_usage", False)
        return StreamingResponse(
            _events(completion, head, usage), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )
    try:
        text = await run_in_threadpool(lambda: "".join(completion))
    except BaseException:
        completion.cancel()
        raise
    choice = Choice(text=text, finish_reason=completion.finish_reason)
    return Made(**head, choices=[choice], usage=_usage(completion))


def _begin(shared: State, caller: Caller, generator: Generator, wanted: Wanted) -> tuple[Completion, SecretKey]:
    if wanted.model != generator.name and generator.name is not None:
        raise HTTPException(404, "there is no such model: see GET /v1/models.")
    for name, (accepted, why) in _FIXED.items():
        if getattr(wanted, name) not in (None, accepted, {}):
            raise HTTPException(422, f"{name} must be {accepted!r} or left out: {why}.")
    if wanted.temperature == 0:
        raise HTTPException(
            422,
            "temperature must be above 0: greedy decoding has no randomness to key, so the text would carry no mark. "
            "A low temperature such as 0.3 stays close to it.",
        )
    key = _key(shared, caller, wanted.assay_key)
    stop = (wanted.stop,) if isinstance(wanted.stop, str) else tuple(wanted.stop or ())
    sampling = Sampling(
        max_tokens=wanted.max_tokens or 16,
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        seed=wanted.seed,
        stop=stop,
        payload=wanted.assay_payload,
    )
    # First the entry, then the use of the key: none is missing, whatever breaks.
    audit.record(shared.sessions, caller, "completions", key.id, max_tokens=sampling.max_tokens)
    try:
        completion = generator.begin(wanted.prompt, key, sampling)
    except BusyError as error:
        raise HTTPException(503, str(error), {"retry-after": "5"}) from None
    except UnavailableError as error:
        raise HTTPException(503, str(error)) from None
    except AssayError:
        raise
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    return completion, key


def _key(shared: State, caller: Caller, id: str | None) -> SecretKey:
    if id is not None:
        key = shared.keys.key(caller.tenant, id)
        if key.config.purpose != "watermark":
            raise HTTPException(422, f"key {key.id!r} is for signing and marks nothing.")
        return key
    usable = [
        info.id
        for info in shared.keys.infos(caller.tenant)
        if info.state == "active" and info.config.purpose == "watermark"
    ]
    if not usable:
        raise HTTPException(404, "there is no active key to mark with: make one with POST /v1/keys.")
    return shared.keys.key(caller.tenant, usable[-1])


async def _events(completion: Completion, head: dict[str, Any], usage: bool) -> AsyncIterator[bytes]:
    def chunk(text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return _event({**head, "choices": [choice], **({"usage": None} if usage else {})})

    pieces: Iterator[str] = iter(completion)
    try:
        async for piece in iterate_in_threadpool(pieces):
            yield chunk(piece)
        yield chunk("", completion.finish_reason)
        if usage:
            yield _event({**head, "choices": [], "usage": _usage(completion).model_dump()})
        yield b"data: [DONE]\n\n"
    except Exception:  # the answer has begun: the status can no longer tell
        yield _event({"error": {"message": "generation failed inside; it has been logged.", "type": "error"}})
        raise
    finally:
        completion.cancel()  # where the client has gone; no effect at the end


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _usage(completion: Completion) -> Usage:
    read, written = completion.prompt_tokens, completion.completion_tokens
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
