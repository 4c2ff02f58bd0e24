"""An event loop whose clock jumps to the next thing that is due, and a server that answers on that clock.

What a load generator measures is then known to the last digit, and takes no time.
"""

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Does not wait: it moves the loop's clock on by the time that it should have waited."""

    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "all wait, and nothing is due"
            self.loop.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Begins at 1,000 seconds: a difference that was forgotten shows."""

    def __init__(self) -> None:
        selector = _Jumping()
        selector.loop = self
        self.now = 1000.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)


@dataclass
class Script:
    """How the server answers a request: pairs of seconds to wait and an event's data.

    Bytes go out as they are, and an exception is raised.
    """

    steps: Sequence[tuple[float, dict[str, Any] | str | bytes | Exception]] = ()
    status: int = 200
    wait: float = 0.0  # before the head of the response
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, script: Script, ended: Callable[[], None]):
        self._script = script
        self._ended = ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for wait, data in self._script.steps:
            await asyncio.sleep(wait)
            if isinstance(data, Exception):
                raise data
            if isinstance(data, bytes):
                yield data
            else:
                yield f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()

    async def aclose(self) -> None:
        self._ended()


class ScriptedServer(httpx2.AsyncBaseTransport):
    """Answers the i-th request by `script(i, body)`; keeps bodies, arrivals, and how many were under way at most."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Script]):
        self._script = script
        self.requests: list[httpx2.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self.under_way = 0
        self.most_under_way = 0

    def _end(self) -> None:
        self.under_way -= 1

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(await request.aread())
        i = len(self.bodies)
        self.requests.append(request)
        self.bodies.append(body)
        self.arrivals.append(asyncio.get_running_loop().time())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        script = self._script(i, body)
        await asyncio.sleep(script.wait)
        return httpx2.Response(script.status, headers=script.headers, stream=_Stream(script, self._end))


def text(piece: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk of a completion."""
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish_reason}], "usage": None}


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """The chunk with the counts."""
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **details}}


def steady(n: int, first: float, between: float, prompt: int = 10) -> Script:
    """`n` tokens, one a piece: the first after `first` seconds, then one every `between` seconds."""
    pieces: list[tuple[float, Any]] = [(first if i == 0 else between, text("x", "length" if i == n - 1 else None))
                                       for i in range(n)]
    return Script([*pieces, (0, usage(prompt, n)), (0, "[DONE]")])
