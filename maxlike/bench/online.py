"""A load generator: sends requests to a server as a load says, and records what becomes of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from maxlike.bench.client import Client, RequestRecord
from maxlike.bench.figures import LevelFigures, Objectives
from maxlike.bench.load import Load
from maxlike.bench.workload import Prompt, Workload

_ARRIVALS = 3  # their stream of random numbers, beside those of the workload


async def run_load(client: Client, prompts: Sequence[Prompt], load: Load, *, seed: int | Sequence[int] = 0,
                   on_end: Callable[[RequestRecord], None] | None = None) -> list[RequestRecord]:
    """Sends all prompts, and returns their records in the same order once the last has ended.

    `on_end` is called with each record when its request ends. Cancelled, it cancels the requests under way, whose
    connections then close.

    Raises:
        ValueError: the endpoint takes no such prompt; nothing was sent then.
    """
    bodies = [client.body(prompt) for prompt in prompts]  # beforehand: it takes time, and finds mistakes
    records: dict[int, RequestRecord] = {}

    async def send(i: int, due: float | None = None) -> None:
        records[i] = await client.send(bodies[i], prompts[i], due)
        if on_end is not None:
            on_end(records[i])

    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            waiting = iter(range(len(prompts)))

            async def worker() -> None:
                for i in waiting:  # shared: each takes the next
                    await send(i)

            for _ in range(min(load.concurrency, len(prompts))):
                group.create_task(worker())
        else:
            loop = asyncio.get_running_loop()
            start = loop.time()
            for i, at in enumerate(load.arrivals(len(prompts), np.random.default_rng(seed)).tolist()):
                if (wait := start + at - loop.time()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(send(i, start + at))
    return [records[i] for i in range(len(prompts))]


async def run_online(client: Client, workload: Workload, loads: Sequence[Load], *, warm_up: int,
                     objectives: Objectives | None = None,
                     on_load: Callable[[Load], Callable[[RequestRecord], None]] | None = None,
                     on_figures: Callable[[LevelFigures], None] | None = None) -> list[LevelFigures]:
    """The figures of each load, one after the other, behind `warm_up` requests that are not counted.

    The server is idle when a load begins. `on_load` is called then and may watch the records come; `on_figures` is
    called when it has ended.

    Raises:
        ValueError: all requests of the warm-up fail (an error is told), or the endpoint takes no such prompt.
    """
    if warm_up:
        records = await run_load(client, workload.prompts(0, warm_up), Load(concurrency=warm_up))
        if all(record.error is not None for record in records):
            raise ValueError(f"No request of the warm-up succeeded, and nothing was measured: {records[0].error}: "
                             f"{records[0].message}")
    figures = []
    for stage, load in enumerate(loads, 1):
        prompts = workload.prompts(stage)
        watch = None if on_load is None else on_load(load)
        seed = [workload.config.seed, _ARRIVALS, stage]
        busy = time.thread_time()
        records = await run_load(client, prompts, load, seed=seed, on_end=watch)
        figures.append(LevelFigures.of(load, records, objectives, time.thread_time() - busy))
        if on_figures is not None:
            on_figures(figures[-1])
    return figures
