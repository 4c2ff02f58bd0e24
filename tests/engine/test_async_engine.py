"""The engine's thread: streams, callers that leave, a queue that is full, an end in order and one in disorder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlike.engine.async_engine import AsyncEngine, EngineDeadError, QueueFullError
from maxlike.engine.engine import Engine
from maxlike.engine.sampling_params import SamplingParams
from tests.compilation_cache import compiling_once
from tests.engine.engines import alone, engine_of, near_ties, source_tokens, tokenizer

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def cached(programs: Path) -> Iterator[None]:
    with compiling_once(programs):
        yield


def make() -> Engine:
    return engine_of(max_num_seqs=4, max_num_batched_tokens=32, page_size=16, max_model_len=256, num_pages=64)


def with_engine(test: Callable[[AsyncEngine], Awaitable[None]], **options: Any) -> AsyncEngine:
    """Runs a test on an engine, which then has nothing left."""
    engine = AsyncEngine(make(), **options)
    engine.start()

    async def within_time() -> None:
        await asyncio.wait_for(test(engine), 120)

    try:
        asyncio.run(within_time())
    finally:
        engine.close()
    return engine


async def collect(engine: AsyncEngine, name: str, n: int = 20, params: SamplingParams = SHORT) -> list[int]:
    tokens: list[int] = []
    async for deltas in engine.generate(source_tokens(n), params, name):
        for delta in deltas:
            tokens += delta.token_ids
    return tokens


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_streams_side_by_side() -> None:
    async def test(engine: AsyncEngine) -> None:
        outputs = await asyncio.gather(*(collect(engine, str(n), n) for n in range(10, 20)))
        for n, tokens in zip(range(10, 20), outputs, strict=True):
            assert len(tokens) == 12
            near_ties(source_tokens(n), tokens)

    engine = with_engine(test)
    assert engine.metrics.pages_used == 0 and engine.metrics.finished == {"length": 10}


def test_a_stream_has_text_and_ends_of_all_continuations() -> None:
    async def test(engine: AsyncEngine) -> None:
        texts, tokens, ends = ["", ""], [[], []], []
        params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=9, logprobs=1, prompt_logprobs=0)
        prompts = []
        async for deltas in engine.generate(source_tokens(40), params, "n"):
            for delta in deltas:
                texts[delta.index] += delta.text
                tokens[delta.index] += delta.token_ids
                assert delta.logprobs is not None and len(delta.logprobs) == len(delta.token_ids)
                ends += [delta.index] if delta.finish_reason else []
                prompts += [delta.prompt_logprobs] if delta.prompt_logprobs else []
        assert sorted(ends) == [0, 1] and [len(logprobs) for logprobs in prompts] == [40]
        assert texts == [tokenizer().decode(ids) for ids in tokens]

    with_engine(test)


def test_embedding() -> None:
    async def test(engine: AsyncEngine) -> None:
        output = await engine.embed(source_tokens(30), "e")
        assert len(output.embedding) == 192 and abs(sum(x * x for x in output.embedding) - 1) < 1e-5

    with_engine(test)


def test_callers_that_leave_free_their_pages() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate(source_tokens(60), LONG, "closed")
        await anext(stream)
        task = asyncio.create_task(collect(engine, "cancelled", params=LONG))
        waiting = [asyncio.create_task(collect(engine, f"waits {i}", params=LONG)) for i in range(5)]
        await until(lambda: engine.metrics.running == 4)
        await stream.aclose()  # type: ignore[attr-defined]
        for each in (task, *waiting):
            each.cancel()
        await until(lambda: engine.metrics.pages_used == 0 and not engine.metrics.waiting)
        assert len(await collect(engine, "after")) == 12

    engine = with_engine(test)
    assert engine.metrics.finished["length"] == 1 and engine.metrics.finished["abort"] >= 4


def test_bad_requests_raise_where_they_are_made() -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="prompt is empty"):
            await collect(engine, "empty", 0)
        with pytest.raises(ValueError, match="beyond the vocabulary"):
            await engine.embed([5000], "e")
        task = asyncio.create_task(collect(engine, "twin", params=LONG))
        await until(lambda: engine.metrics.running == 1)
        with pytest.raises(ValueError, match="'twin' already"):
            await collect(engine, "twin")
        task.cancel()

    with_engine(test)


def test_a_full_queue_says_so() -> None:
    async def test(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, str(i), params=LONG)) for i in range(6)]
        await until(lambda: engine.metrics.running == 4 and engine.metrics.waiting == 2)
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            await collect(engine, "one too many")
        assert [len(tokens) for tokens in await asyncio.gather(*tasks)] == [200] * 6

    with_engine(test, max_queue=2)


def test_draining_finishes_what_runs_and_takes_no_more() -> None:
    async def test(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, str(i), params=LONG)) for i in range(6)]
        await until(lambda: engine.metrics.running == 4)
        assert not await engine.drain(0.001)
        assert not engine.is_ready
        with pytest.raises(EngineDeadError, match="being drained"):
            await collect(engine, "late")
        assert await engine.drain()
        assert [len(tokens) for tokens in await asyncio.gather(*tasks)] == [200] * 6

    with_engine(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_all_who_wait() -> None:
    async def test(engine: AsyncEngine) -> None:
        def broken() -> Any:
            raise RuntimeError("the device is gone")

        tasks = [asyncio.create_task(collect(engine, str(i), params=LONG)) for i in range(3)]
        await until(lambda: engine.metrics.running == 3)
        engine._engine.step = broken  # type: ignore[method-assign]
        for task in tasks:
            with pytest.raises(EngineDeadError, match="RuntimeError: the device is gone"):
                await task
        with pytest.raises(EngineDeadError, match="the device is gone"):
            await collect(engine, "late")
        assert isinstance(engine.error, RuntimeError) and not engine.is_ready

    with_engine(test)


def test_other_weights_between_steps() -> None:
    async def test(engine: AsyncEngine) -> None:
        before = await collect(engine, "before")
        norm = np.asarray(engine._engine.model.norm.weight.get_value())
        await engine.update_weights({"norm.weight": -norm})
        assert await collect(engine, "other") != before
        with pytest.raises(ValueError, match="nonsense is unknown"):
            await engine.update_weights({"nonsense": norm})
        with pytest.raises(ValueError, match=r"norm.weight has shape \(1,\), the model's \(192,\)"):
            await engine.update_weights({"norm.weight": [1.0]})
        await engine.update_weights({"norm.weight": norm})
        assert await collect(engine, "after") == before

    with_engine(test)


def test_closing_ends_those_who_wait() -> None:
    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, "open", params=LONG))
        await until(lambda: engine.metrics.running == 1)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDeadError, match="closed"):
            await task

    with_engine(test)
    assert not any(thread.name == "maxlike-engine" for thread in threading.enumerate())


def test_requests_from_several_event_loops() -> None:
    engine = AsyncEngine(make())
    engine.start()
    outputs: dict[int, list[int]] = {}

    def program(n: int) -> None:
        outputs[n] = asyncio.run(collect(engine, f"loop {n}", n))

    threads = [threading.Thread(target=program, args=(n,)) for n in (10, 11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    lonely = make()
    assert outputs == {n: alone(lonely, source_tokens(n), SHORT) for n in (10, 11, 12)}


def test_what_came_with_the_end_is_given_out_and_then_the_end() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate(source_tokens(10), LONG, "open")
        await anext(stream)
        step = engine._engine.step
        stepped = threading.Event()

        def closing() -> Any:
            moved = step()
            stepped.set()
            return moved

        engine._engine.step = closing  # type: ignore[method-assign]
        stepped.wait()
        engine.close()  # in the loop's thread: the last tokens and the end come to the stream together
        with pytest.raises(EngineDeadError, match="closed"):
            async for _ in stream:
                pass

    with_engine(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_weights_that_the_engine_does_not_come_to() -> None:
    async def test(engine: AsyncEngine) -> None:
        def broken() -> Any:
            raise RuntimeError("the device is gone")

        engine._post(broken)
        with pytest.raises(EngineDeadError, match="the device is gone"):
            await engine.update_weights({})

    with_engine(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_ends_while_a_request_is_checked() -> None:
    async def test(engine: AsyncEngine) -> None:
        def check(*args: Any, **kwargs: Any) -> None:
            engine.close()

        engine._engine.check = check  # type: ignore[method-assign]
        with pytest.raises(EngineDeadError, match="closed"):
            await collect(engine, "late")
        assert not engine._streams

    with_engine(test)


def test_a_queue_counts_prompts_not_continuations() -> None:
    async def test(engine: AsyncEngine) -> None:
        many = SamplingParams(n=4, temperature=0, max_tokens=200, ignore_eos=True)
        tasks = [asyncio.create_task(collect(engine, str(i), params=many)) for i in range(3)]
        await until(lambda: engine.metrics.running == 4 and engine.metrics.waiting == 8)
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            await collect(engine, "one too many")
        for task in tasks:
            task.cancel()

    with_engine(test, max_queue=2)
