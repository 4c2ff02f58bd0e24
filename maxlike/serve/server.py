"""The process: listening, and ending well."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from maxlike.serve.app import make_app
from maxlike.serve.config import ServeConfig
from maxlike.serve.service import Service

if TYPE_CHECKING:
    from types import FrameType

_LAST_WORDS = 5
"""Seconds that clients have to take what is left for them."""
_IDLE = 60
"""Seconds that a connection is kept for a client's next request. Clients give theirs up sooner, OpenAI's after five: so
none is closed as they turn to it."""


def bind(config: ServeConfig) -> socket.socket:
    """A socket at the server's address, not listening yet: whoever loads a model for minutes had better know before.

    Raises:
        ValueError: the address cannot be had.
    """
    with contextlib.ExitStack() as undo:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            bound = undo.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise ValueError(f"The server cannot have {config.host}:{config.port}: {error.strerror}. Choose another "
                             "host or port; port 0 takes any that is free.") from error
        undo.pop_all()
    return bound


def run_server(service: Service, bound: socket.socket) -> int:
    """Serves until a signal comes, which only the main thread hears of; returns the exit code.

    The first SIGTERM or SIGINT ends it well: from then on `/ready` and new work are answered with 503, and what runs
    may finish for as long as `drain_timeout` says; the code is 0. The second ends it at once, with 128 and the
    signal's number. Prints where it listens.

    Raises:
        ValueError: somebody else has taken the address meanwhile.
    """
    config = uvicorn.Config(make_app(service), lifespan="off", ws="none", log_level="warning", access_log=False,
                            server_header=False, timeout_keep_alive=_IDLE, timeout_graceful_shutdown=_LAST_WORDS)
    server = _Server(config, service)
    try:
        asyncio.run(server.serve(sockets=[bound]))
    except OSError as error:
        raise ValueError(f"The server cannot listen: {error.strerror}.") from error
    return server.exit_code


class _Server(uvicorn.Server):
    """uvicorn's server, but for its signals: it would stop listening first, and die of the signal last."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.exit_code = 0
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"maxlike: {self._service.name} is served at http://{host}:{port}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._stop, number)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        admission = self._service.admission
        if self._draining is None:
            running = admission.in_flight
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            _tell(f"shutting down once {running} request{'s are' if running != 1 else ' is'} through, or after "
                  f"{self._service.config.drain_timeout:g} s; a second signal does it at once")
        else:
            admission.cut_off()
            self.exit_code = 128 + number
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        cut = await self._service.admission.drain(self._service.config.drain_timeout)
        self.should_exit = True
        if cut:
            _tell(f"{cut} request{'s were' if cut != 1 else ' was'} cut off")


def _tell(what: str) -> None:
    """To stderr; where nobody reads that any more, the server ends all the same."""
    with contextlib.suppress(OSError):
        print(f"maxlike: {what}", file=sys.stderr, flush=True)
