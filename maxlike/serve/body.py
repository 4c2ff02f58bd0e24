"""A request's body: read within limits, taken for what it says and nothing else."""

from __future__ import annotations

import asyncio
from email.message import Message
from typing import TypeVar

import pydantic
from pydantic_core import from_json
from starlette.requests import Request

from maxlike.serve.config import ServeConfig
from maxlike.serve.errors import ApiError, from_validation

Model = TypeVar("Model", bound=pydantic.BaseModel)


async def read_body(request: Request, model: type[Model], config: ServeConfig) -> Model:
    """The JSON object in the request's body, as `model` has it.

    Raises:
        ApiError: it is not JSON (400, 415), not what `model` describes (400), too long (413) or too slow (408).
        starlette.requests.ClientDisconnect: the client hung up before it was through.
    """
    _check_content_type(request.headers.get("content-type"))
    try:
        async with asyncio.timeout(config.body_timeout):
            data = await _read(request, config.max_body_bytes)
    except TimeoutError:
        raise ApiError(408, f"The request's body did not come within {config.body_timeout:g} seconds.") from None
    try:
        # Strict: neither NaN, nor half a surrogate pair, nor nesting that would overflow the stack.
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON in UTF-8: {error}.", code="invalid_json") from None
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        raise from_validation(error) from None


async def _read(request: Request, limit: int) -> bytes:
    said = request.headers.get("content-length", "")
    # What is said is refused before it comes, and what comes is counted. The server below throws away the rest.
    if said.isdecimal() and int(said[:20]) > limit:
        raise _too_long(limit)
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > limit:
            raise _too_long(limit)
        parts.append(part)
    return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"The request's body is longer than the {limit} bytes that this server takes.",
                    code="body_too_large")


def _check_content_type(value: str | None) -> None:
    # A web page can make a browser send anything but JSON anywhere without asking; so this is also what keeps pages
    # from using a server on the user's own machine.
    message = Message()
    message["content-type"] = value or ""
    if not value or message.get_content_type() != "application/json":
        raise ApiError(415, f"Content-Type must be application/json; got {value or 'none'}.")
    try:
        charset = message.get_content_charset("utf-8")
    except (TypeError, ValueError):  # it cannot put together a parameter in parts, where some have no number
        charset = value
    if charset not in ("utf-8", "utf8"):
        raise ApiError(415, f"The body must be in UTF-8; got charset {charset}.")
