"""The engine on a thread of its own, for programs that live in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from flax import nnx

from maxlike.engine.config import EngineConfig
from maxlike.engine.engine import Engine
from maxlike.engine.llm import unit_length
from maxlike.engine.loading import load_engine
from maxlike.engine.metrics import EngineMetrics
from maxlike.engine.output import Delta, EmbeddingOutput
from maxlike.engine.request import Request
from maxlike.engine.sampling_params import SamplingParams
from maxlike.models.config import TransformerConfig
from maxlike.models.tokenizer import Tokenizer
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer


class QueueFullError(Exception):
    """As many requests wait as may; `limit` says how many."""

    def __init__(self, limit: int):
        super().__init__(f"{limit} requests wait already, which is the limit: try again later.")
        self.limit = limit


class EngineDeadError(Exception):
    """The engine's thread has ended with an error, or was closed; no request will be answered."""


class _Stream:
    """What a request's caller waits for; filled and read on the caller's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, n_open: int):
        self.loop, self.n_open = loop, n_open
        self.deltas: list[Delta] = []
        self.embedding: list[float] | None = None
        self.error: BaseException | None = None
        self.changed = asyncio.Event()

    def put(self, deltas: list[Delta], embedding: list[float] | None = None) -> None:
        self.deltas += deltas
        self.embedding = embedding
        self.n_open -= sum(delta.finish_reason is not None for delta in deltas)
        self.changed.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.changed.set()

    async def take(self) -> list[Delta]:
        await self.changed.wait()
        deltas, self.deltas = self.deltas, []
        if self.error is None:
            self.changed.clear()
        elif not deltas:  # else it is for the next to ask
            raise self.error
        return deltas


class AsyncEngine:
    """Runs an `Engine` on a thread; requests come from any event loop, and outputs go back to it.

    Args:
        engine: nobody else may use it from now on.
        max_queue: most requests (of n continuations each) that wait for a place; `None`: no limit.
    """

    def __init__(self, engine: Engine, *, max_queue: int | None = None):
        self._engine, self.max_queue = engine, max_queue
        self.error: BaseException | None = None
        """What the thread ended with."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, _Stream] = {}
        self._updates: set[Future[None]] = set()
        self._draining = self._closing = False
        self._ended = False  # nothing that is posted from now on will be done
        self._thread: threading.Thread | None = None

    @classmethod
    def from_model(cls, model: str | os.PathLike[str], config: EngineConfig | None = None, *,
                   max_queue: int | None = None, **options: Any) -> AsyncEngine:
        """Of a checkpoint. `start` is still to be called, as `with engine:` does.

        Args:
            model, config, options: as `LLM` has them.
            max_queue: most requests that wait for a place; `None`: no limit.

        Raises:
            ValueError: as `LLM`.
        """
        config, load_options = EngineConfig.from_options(config, options)
        return cls(load_engine(model, config, **load_options), max_queue=max_queue)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, `None` where it has none."""
        return self._engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        """How large the engine is, nothing left open."""
        return self._engine.config

    @property
    def model_config(self) -> TransformerConfig:
        """The model's."""
        return self._engine.model_config

    @property
    def metrics(self) -> EngineMetrics:
        """What the engine counts."""
        return self._engine.metrics

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output, in tokens."""
        return self._engine.max_model_len

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread is not None and self.error is None and not (self._draining or self._closing)

    @property
    def n_compiled(self) -> int:
        """Programs compiled so far."""
        return self._engine.runner.n_compiled

    @property
    def compile_s(self) -> float:
        """Seconds that compiling them took at the start."""
        return self._engine.runner.compile_s

    def start(self) -> None:
        """Starts the engine's thread: to be called once, before the first request."""
        assert self._thread is None, "started already"
        self._thread = threading.Thread(target=self._run, name="maxlike-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> AsyncEngine:
        """Started."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Closed."""
        self.close()

    def check(self, prompt: Sequence[int], params: SamplingParams, *, embed: bool = False) -> None:
        """As `Engine.check`, which says what it raises; may take a while where a grammar is to be compiled."""
        self._engine.check(prompt, params, embed=embed)

    async def generate(self, prompt: Sequence[int], params: SamplingParams, request_id: str, *,
                       priority: int = 0) -> AsyncIterator[list[Delta]]:
        """What each step adds to the continuations of a prompt, until all have ended.

        A caller that stops listening (`aclose`, or a cancelled task) ends the request, and its pages are free.

        Args:
            prompt: token ids.
            request_id: a name of its own.
            priority: lower ones go first.

        Raises:
            ValueError: as `Engine.check`, or the name is taken.
            QueueFullError: too many wait.
            EngineDeadError: the engine takes no requests any more, or ended in the midst of this one.
        """
        stream = self._submit(prompt, params, request_id, priority=priority, embed=False, n=params.n)
        try:
            while stream.n_open or stream.deltas:
                yield await stream.take()
        finally:
            self._let_go(request_id, stream)

    async def embed(self, prompt: Sequence[int], request_id: str) -> EmbeddingOutput:
        """A prompt's embedding; raises as `generate`."""
        stream = self._submit(prompt, SamplingParams(max_tokens=0), request_id, priority=0, embed=True, n=1)
        try:
            while stream.n_open:
                await stream.take()
        finally:
            self._let_go(request_id, stream)
        assert stream.embedding is not None
        return EmbeddingOutput(request_id, list(prompt), stream.embedding)

    async def update_weights(self, params: DistributedTransformer | nnx.State | Mapping[str, Any]) -> None:
        """Goes on with other weights, between two steps; see `Engine.update_weights`.

        Raises:
            ValueError: the weights are not this model's.
            EngineDeadError: the engine does not run.
        """
        if self._thread is None or self.error is not None or self._closing:
            raise EngineDeadError(f"The engine takes no weights: {self._why_not()}.")
        done: Future[None] = Future()

        def update() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    self._engine.update_weights(params)
                except ValueError as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)

        self._updates.add(done)
        done.add_done_callback(self._updates.discard)
        if not self._post(update):
            done.cancel()
            raise EngineDeadError(f"The engine takes no weights: {self._why_not()}.")
        await asyncio.wrap_future(done)

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until those there are have ended, `timeout` seconds at most.

        Returns:
            Whether all have.
        """
        self._draining = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._streams and self.error is None:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    def close(self) -> None:
        """Ends the thread after the step that runs, and waits for it; requests that are there fail with
        `EngineDeadError`. An event loop has it called by another thread (`asyncio.to_thread`).
        """
        self._closing = True
        with self._wake:
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    # -- callers' threads

    def _submit(self, prompt: Sequence[int], params: SamplingParams, request_id: str, *, priority: int, embed: bool,
                n: int) -> _Stream:
        if not self.is_ready:
            raise EngineDeadError(f"The engine takes no requests: {self._why_not()}.")
        if self.max_queue is not None and self._n_waiting() >= self.max_queue:
            raise QueueFullError(self.max_queue)
        if request_id in self._streams:
            raise ValueError(f"There is a request {request_id!r} already: give each a name of its own.")
        self._engine.check(prompt, params, embed=embed)
        stream = self._streams[request_id] = _Stream(asyncio.get_running_loop(), n)

        def add() -> None:
            if request_id in self._streams:  # else the caller has gone before the engine came to it
                try:
                    self._engine.add(request_id, prompt, params, priority=priority, embed=embed, client=stream)
                except ValueError as error:
                    _tell(stream.loop, stream.fail, error)

        if not self._post(add):  # it ended while the request was being checked
            del self._streams[request_id]
            raise EngineDeadError(f"The engine takes no requests: {self._why_not()}.")
        return stream

    def _let_go(self, request_id: str, stream: _Stream) -> None:
        """Nobody listens any more: what has not ended is cancelled."""
        self._streams.pop(request_id, None)
        if stream.n_open and stream.error is None:
            self._post(lambda: self._engine.cancel(request_id))

    def _why_not(self) -> str:
        if self.error is not None:
            return f"it ended with {type(self.error).__name__}: {self.error}"
        return "it was closed" if self._closing else "it is being drained" if self._draining else (
            "it was not started: call start(), or use it as in `with engine:`")

    def _n_waiting(self) -> int:
        # While nobody waits, those that the engine has not come to yet will find the free slots.
        running = self._engine.runner.n_slots
        if self._engine.metrics.waiting:
            in_slots = list(self._engine.scheduler.slot_requests)
            running = len({request.request_id for request in in_slots if request is not None})
        return len(self._streams) - running

    def _post(self, action: Callable[[], None]) -> bool:
        """Has the engine's thread do something before its next step; false where there will be none."""
        with self._wake:
            if not self._ended:
                self._inbox.append(action)
                self._wake.notify()
            return not self._ended

    # -- the engine's thread

    def _run(self) -> None:
        try:
            while not self._closing:
                with self._wake:
                    while not (self._inbox or self._engine.has_work() or self._closing):
                        self._wake.wait()
                while self._inbox:
                    self._inbox.popleft()()
                self._deliver(self._engine.step())
        except BaseException as error:  # whatever it is, those who wait are to know
            self.error = error
            raise
        finally:
            with self._wake:
                self._ended = True
            dead = EngineDeadError(f"The engine ended before the request: {self._why_not()}.")
            for stream in list(self._streams.values()):
                _tell(stream.loop, stream.fail, dead)
            for update in list(self._updates):
                if not update.cancelled():
                    update.set_exception(dead)

    def _deliver(self, moved: list[Request]) -> None:
        by_stream: dict[int, tuple[_Stream, list[Request]]] = {}
        for request in moved:
            by_stream.setdefault(id(request.client), (request.client, []))[1].append(request)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, list[Delta], list[float] | None]]] = (
            defaultdict(list))
        for stream, requests in by_stream.values():
            deltas = [request.take_delta() for request in requests]
            embedding = unit_length(requests[0]) if requests[0].embedding is not None else None
            by_loop[stream.loop].append((stream, deltas, embedding))
        for loop, news in by_loop.items():
            _tell(loop, _put_all, news)


def _tell(loop: asyncio.AbstractEventLoop, action: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
        loop.call_soon_threadsafe(action, *args)


def _put_all(news: list[tuple[_Stream, list[Delta], list[float] | None]]) -> None:
    for stream, deltas, embedding in news:
        stream.put(deltas, embedding)
