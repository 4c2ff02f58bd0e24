"""Who is let in, how many at once, and the end: refusing new work, waiting for what runs, cutting off the rest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from maxlike.serve.config import ServeConfig
from maxlike.serve.errors import RETRY_AFTER, ApiError

T = TypeVar("T")

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""What needs no key: the page, which asks for one, and what a load balancer asks."""


class ClientGoneError(Exception):
    """The client has hung up: there is nobody to answer."""


class Admission:
    """The requests that are being worked on.

    `draining` is set once no new work is taken. All of it happens on the event loop's thread.
    """

    def __init__(self, config: ServeConfig):
        self._limit = config.max_concurrent_requests
        self.in_flight = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut_off = asyncio.Event()

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """A place for one request, for as long as the context lasts.

        Raises:
            ApiError: the server is draining (503), or all places are taken (429).
        """
        if self.draining:
            raise ApiError(503, "The server is shutting down and takes no new requests.", code="draining",
                           headers={**RETRY_AFTER, "Connection": "close"})
        if self.in_flight >= self._limit:
            raise ApiError(429, f"The server is working on {self.in_flight} requests, as many as it takes at once.",
                           code="too_many_requests", headers=RETRY_AFTER)
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def drain(self, timeout: float) -> int:
        """Takes no new work from now on, and waits for what runs; returns how many requests had to be cut off."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        return self.cut_off()

    def cut_off(self) -> int:
        """Ends what still runs, at once; its clients are told. Returns how many requests that are."""
        self.draining = True
        self._cut_off.set()
        return self.in_flight

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """Awaits `work` for as long as somebody waits for it; else it is cancelled, and has ended on return.

        `receive` is the request's, whose body has been read.

        Raises:
            ClientGoneError: the client hung up.
            ApiError: the time to drain is over (503).
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_hang_up(receive))
        cut = asyncio.ensure_future(self._cut_off.wait())
        try:
            await asyncio.wait((task, gone, cut), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGoneError
            raise ApiError(503, "The server shut down before this request was through.", code="draining",
                           headers={**RETRY_AFTER, "Connection": "close"})
        finally:
            for future in (task, gone, cut):
                future.cancel()
            # The engine has let go of the request before we do.
            await asyncio.gather(task, gone, cut, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """ASGI middleware before everything else: no key, no place, no work."""

    def __init__(self, app: ASGIApp, admission: Admission, config: ServeConfig):
        self._app, self._admission = app, admission
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if scope["path"] not in OPEN_PATHS:
                self._check_key(Headers(scope=scope).get("authorization", ""))
            # What only looks is always answered: a full or draining server is still to be watched.
            with self._admission.enter() if scope["method"] == "POST" else contextlib.nullcontext():
                await self._app(scope, receive, send)
        except ApiError as error:  # ours alone: the application answers its own
            await error.response()(scope, receive, send)

    def _check_key(self, header: str) -> None:
        if not self._keys:
            return
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        # All are compared, and in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "This server wants an API key: send the header 'Authorization: Bearer KEY'."
                           if not header else "The API key is not one that this server knows.",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
