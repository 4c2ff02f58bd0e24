"""A request's continuations on their way from the engine, as one stream of steps."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from maxlike.engine.output import Delta, FinishReason, Logprob
from maxlike.engine.sampling_params import SamplingParams
from maxlike.serve.metrics import Stopwatch
from maxlike.serve.replies import PromptTokensDetails, Usage
from maxlike.serve.service import Service, in_thread

Step = list[tuple[int, Delta]]
"""What a step brought: (which prompt, what is new)."""


class Generation:
    """All continuations of a request's prompts.

    Args:
        service: what runs it.
        prompts: token ids.
        params: for each of them.
        priority: as the engine has it.
    """

    def __init__(self, service: Service, prompts: Sequence[list[int]], params: SamplingParams, priority: int = 0):
        self.service, self.prompts, self.params, self.priority = service, prompts, params, priority
        self.id = uuid.uuid4().hex
        self.n_generated = 0
        self._cached = [0] * len(prompts)
        self._watch = Stopwatch(service.metrics)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Step by step; whoever closes it early cancels the request.

        Raises:
            ValueError: the engine cannot run this.
            QueueFullError: too much waits already.
        """
        engine, params = self.service.engine, self.params
        if params.structured_output is not None:
            # Here what must be compiled is, and then it is there.
            await in_thread(engine.check, self.prompts[0], params)
        streams = [engine.generate(prompt, params, f"{self.id}-{i}", priority=self.priority)
                   for i, prompt in enumerate(self.prompts)]
        async with aclosing(_one(streams[0]) if len(streams) == 1 else _together(streams)) as steps:
            async for step in steps:
                for prompt, delta in step:
                    self.n_generated += len(delta.token_ids)
                    self._cached[prompt] = max(self._cached[prompt], delta.cached_tokens)
                self._watch.step(step)
                yield step
        self._watch.stop()

    async def collect(self) -> list[list[Continuation]]:
        """All of it at once: for each prompt its continuations."""
        found = [[Continuation() for _ in range(self.params.n)] for _ in self.prompts]
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                for prompt, delta in step:
                    found[prompt][delta.index].add(delta)
        return found

    def usage(self) -> Usage:
        """Tokens so far."""
        read = sum(map(len, self.prompts))
        return Usage(prompt_tokens=read, completion_tokens=self.n_generated, total_tokens=read + self.n_generated,
                     prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached)))


@dataclass
class Continuation:
    """One continuation, put together of its deltas."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """The next delta."""
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        """So far."""
        return "".join(self.pieces)


async def _one(stream: AsyncIterator[list[Delta]]) -> AsyncGenerator[Step, None]:
    async with aclosing(stream) as deltas:  # type: ignore[type-var]
        async for step in deltas:
            yield [(0, delta) for delta in step]


async def _together(streams: Sequence[AsyncIterator[list[Delta]]]) -> AsyncGenerator[Step, None]:
    """What several streams have ready, at a time."""
    ready: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()

    async def pump(prompt: int, stream: AsyncIterator[list[Delta]]) -> None:
        async with aclosing(stream) as deltas:  # type: ignore[type-var]
            async for step in deltas:
                ready.put_nowait([(prompt, delta) for delta in step])

    def ended(task: asyncio.Task[None]) -> None:
        ready.put_nowait(None if task.cancelled() else task.exception())

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        running = len(tasks)
        while running:
            items = [await ready.get()]
            while not ready.empty():
                items.append(ready.get_nowait())
            step: Step = []
            for item in items:
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    step += item
            if step:
                yield step
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
