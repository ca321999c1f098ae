"""JSON bodies read after the caller is known, strictly: no NaN, no lone surrogate, no endless nesting.

FastAPI's own reading of a body comes before any check of the caller and accepts all three.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

Model = TypeVar("Model", bound=BaseModel)

KEY_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
KeyId = Annotated[str, Field(pattern=KEY_ID)]
"""Id of a key in a body. Whatever no key can have goes no further, such as NUL, which PostgreSQL refuses."""


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency: the body as a model; name it after the caller, since dependencies are met in order.

    Raises
    ------
    RequestValidationError
        If the body is not JSON in UTF-8, or has another form; answered with 422, without echo.
    """

    async def read(request: Request) -> Model:
        content = await request.body()
        try:
            return model.model_validate(orjson.loads(content))
        except orjson.JSONDecodeError:
            message = "must be JSON in UTF-8, without NaN, infinities or lone surrogates"
            raise RequestValidationError([{"loc": ("body",), "msg": message, "type": "json_invalid"}]) from None
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None

    return read


def described(model: type[BaseModel]) -> dict[str, Any]:
    """The body in the OpenAPI description, for a route's `openapi_extra`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}
