"""The ASGI application: endpoints behind a gate."""

from __future__ import annotations

import functools
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxlike.engine.async_engine import EngineDeadError, QueueFullError
from maxlike.serve.admission import ClientGoneError, Gate
from maxlike.serve.endpoints import ENDPOINTS
from maxlike.serve.errors import ApiError, answer_error, answer_fault
from maxlike.serve.metrics import ServeMetrics
from maxlike.serve.service import Service

CLIENT_GONE = 499
"""What stands in the figures for a request whose client hung up."""


def make_app(service: Service) -> Starlette:
    """The application (ASGI), with all endpoints of `maxlike.serve.endpoints`.

    Args:
        service: what the endpoints stand on; its engine is to be started by whoever runs the application.
    """
    config = service.config
    middleware = [Middleware(_CountAnswers, metrics=service.metrics)]
    if config.cors_origins:
        # Before the gate: a browser asks without a key whether it may ask with one.
        middleware.append(Middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"],
                                     allow_headers=["*"], expose_headers=["Retry-After"]))
    middleware.append(Middleware(Gate, admission=service.admission, config=config))
    handlers: dict[Any, Any] = {error: answer_error
                                for error in (ApiError, EngineDeadError, HTTPException, QueueFullError, ValueError)}
    handlers |= {ClientGoneError: _nobody_there, ClientDisconnect: _nobody_there, Exception: answer_fault}

    routes = [Route(endpoint.path, functools.partial(endpoint.handler, service), methods=[endpoint.method])
              for endpoint in ENDPOINTS]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _nobody_there(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


class _CountAnswers:
    """ASGI middleware around everything: counts answers by their status."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
