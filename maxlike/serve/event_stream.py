"""Server-sent events: an answer that goes out as it comes about."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from maxlike.engine.async_engine import EngineDeadError, QueueFullError
from maxlike.serve.admission import Admission, ClientGoneError
from maxlike.serve.errors import ApiError, as_api_error

DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One event: `data: JSON`, and an empty line."""
    return b"data: " + to_json(data) + b"\n\n"


class EventStream(Response):
    """Sends what `chunks` yields, a write each. The generator is closed when the client hangs up.

    An error before the first chunk is raised, for an answer with its own status; after it, it is the stream's last
    event. (One that is our fault breaks the connection off instead.)
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], admission: Admission):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache",
                                                                  "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._admission, self._started = chunks, admission, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all of it."""
        try:
            await self._admission.run(self._send_all(send), receive)
        except ClientGoneError:
            if not self._started:
                raise
            return
        except (ApiError, EngineDeadError, QueueFullError, ValueError) as error:
            if not self._started:
                raise
            known = as_api_error(error)
            assert known is not None
            await self._write(send, event(known.body()) + DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await self._write(send, chunk)

    async def _write(self, send: Send, chunk: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
