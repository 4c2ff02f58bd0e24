"""The OpenAPI description of the server, made of the models that requests are checked by."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from maxlike.serve.admission import OPEN_PATHS
from maxlike.serve.replies import ErrorReply
from maxlike.serve.service import Service

_ERRORS = {
    400: "The request is not as it should be.",
    401: "No API key, or one that the server does not know.",
    404: "There is no such thing here.",
    408: "The request's body did not come in time.",
    413: "The request's body is too long.",
    415: "The request's body is not JSON in UTF-8.",
    429: "Too many requests; Retry-After says when to come again.",
    503: "The server is shutting down.",
}


@dataclass(frozen=True)
class Endpoint:
    """A path, how it is routed, and what is said of it.

    Args:
        method, path: as in HTTP.
        handler: answers it.
        summary: for the OpenAPI.
        body: of the request; `None` where it has none.
        reply: of the answer; `None` where no model describes it.
        media_type: of the answer.
        streams: whether the answer may come as server-sent events instead.
        may_lack: whether 404 is an answer, though the path is there.
        not_ready: whether 503 is an answer with the same body as 200.
    """

    method: str
    path: str
    handler: Callable[[Service, Request], Awaitable[Response]]
    summary: str
    body: type[BaseModel] | None = None
    reply: type[BaseModel] | None = None
    media_type: str = "application/json"
    streams: bool = False
    may_lack: bool = False
    not_ready: bool = False


def describe(endpoints: Sequence[Endpoint], version: str, *, with_key: bool) -> dict[str, Any]:
    """The document, OpenAPI 3.1. `with_key`: the server wants an API key."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(ErrorReply, "serialization")]
    models += [(endpoint.body, "validation") for endpoint in endpoints if endpoint.body is not None]
    models += [(endpoint.reply, "serialization") for endpoint in endpoints if endpoint.reply is not None]
    refs, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    error = {"application/json": {"schema": refs[ErrorReply, "serialization"]}}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = re.sub(r":\w+}", "}", endpoint.path)
        reply = {"schema": {"type": "object"}} if endpoint.media_type == "application/json" else {
            "schema": {"type": "string"}}
        if endpoint.reply is not None:
            reply = {"schema": refs[endpoint.reply, "serialization"]}
        content = {endpoint.media_type: reply}
        if endpoint.streams:
            description = "Each event's data is JSON, the last one [DONE]."
            content["text/event-stream"] = {"schema": {"description": description}}
        responses: dict[str, Any] = {"200": {"description": "As asked for.", "content": content}}
        if endpoint.not_ready:
            responses["503"] = {"description": "No.", "content": content}
        named = re.findall(r"{(\w+)}", path)
        statuses = [401] if with_key and endpoint.path not in OPEN_PATHS else []
        statuses += [404] if endpoint.may_lack else []
        statuses += [400, 404, 408, 413, 415, 429, 503] if endpoint.body is not None else []
        for status in sorted(statuses):
            responses[str(status)] = {"description": _ERRORS[status], "content": error}
        operation: dict[str, Any] = {"operationId": endpoint.handler.__name__, "summary": endpoint.summary,
                                     "responses": responses}
        if endpoint.body is not None:
            operation["requestBody"] = {"required": True, "content": {
                "application/json": {"schema": refs[endpoint.body, "validation"]}}}
        if named:
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                                       for name in named]
        if with_key and endpoint.path not in OPEN_PATHS:
            operation["security"] = [{"key": []}]
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {"openapi": "3.1.0", "info": {"title": "maxlike", "version": version}, "paths": paths,
            "components": components}
