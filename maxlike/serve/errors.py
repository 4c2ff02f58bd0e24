"""What goes wrong, as OpenAI's clients expect to read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from maxlike.engine.async_engine import EngineDeadError, QueueFullError
from maxlike.serve.protocol import ChatRequest, CompletionRequest

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "internal_error",
          503: "service_unavailable_error"}
RETRY_AFTER = {"Retry-After": "1"}
"""Of what passes: a full queue, a server that is about to be replaced."""

_HINTS = {
    "audio": "The server speaks text only.",
    "dimensions": "Embeddings have the model's width.",
    "function_call": "Use tool_choice.",
    "functions": "Use tools.",
    "guided_choice": "Use structured_outputs.choice.",
    "guided_grammar": "Use structured_outputs.grammar.",
    "guided_json": "Use structured_outputs.json or response_format.",
    "guided_regex": "Use structured_outputs.regex.",
    "modalities": "The server speaks text only.",
    "suffix": "The model continues texts; it does not fill gaps in them.",
    "reasoning_effort": "Give what the chat template takes in chat_template_kwargs.",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status code.
        message: what was given, what was expected, what to do.
        param: the field of the request that is wrong.
        code: a name for programs to go by.
        headers: beside the usual ones.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": _TYPES.get(self.status, "invalid_request_error"),
                          "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as a whole answer."""
        return Response(to_json(self.body()), self.status, self.headers, "application/json")


def as_api_error(error: Exception) -> ApiError | None:
    """What to answer to an error that a request's own content or the moment brings about; `None` for all others."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers=RETRY_AFTER)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "The engine has stopped; the server has to be started anew.", code="engine_dead")
    if isinstance(error, ValueError) and not isinstance(error, pydantic.ValidationError):  # those are of our replies
        return ApiError(400, str(error), param=_field_in(str(error)))
    return None


def from_validation(error: pydantic.ValidationError) -> ApiError:
    """What is wrong with a body, in a line: all fields that are unknown, or the first that is not as it should be."""
    problems = error.errors(include_url=False)
    unknown = [_path(problem["loc"]) for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:
        hints = [hint for name in unknown for hint in _hint(name)]
        several = "s" if len(unknown) > 1 else ""
        return ApiError(400, " ".join([f"Unknown field{several}: {', '.join(unknown)[:500]}.", *hints]),
                        param=unknown[0], code="unknown_field")
    problem = problems[0]
    name = _path(problem["loc"])
    match problem["type"]:
        case "missing":
            return ApiError(400, f"{name} is missing.", param=name, code="missing_field")
        case "model_type" if not name:
            return ApiError(400, f"The body must be a JSON object; got {_short(problem['input'])}.")
        case "value_error":
            message = str(problem["ctx"]["error"])
            return ApiError(400, f"{name}: {message}" if name else message, param=name or _field_in(message))
        case "none_required":
            return ApiError(400, " ".join([f"{name} is not supported: leave it out.", *_hint(name)]), param=name)
    message = problem["msg"].removeprefix("Input ")
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return ApiError(400, f"{name} {message}; got {_short(problem['input'])}.{more}", param=name or None)


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for all that a request raises."""
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            message = f"There is no {request.url.path} here."
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}."
        else:
            message = error.detail
        return ApiError(error.status_code, message, headers=error.headers).response()
    known = as_api_error(error)
    if known is None:
        raise error
    return known.response()


async def answer_fault(request: Request, error: Exception) -> Response:
    """The last resort: an error of ours. Starlette raises it again, and it is logged."""
    # uvicorn closes the connection then; clients had better know.
    return ApiError(500, "The server failed on this request; its log says more.",
                    headers={"Connection": "close"}).response()


def _hint(name: str) -> list[str]:
    return [_HINTS[name]] if name in _HINTS else []


def _field_in(message: str) -> str | None:
    """The field that a message begins with, as ours do."""
    found = re.match(r"[a-z][a-z_]*", message)
    known = found is not None and found[0] in {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    return found[0] if found is not None and known else None


def _path(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
