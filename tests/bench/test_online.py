"""The load generator on a clock of our own: every figure is known beforehand, to the last digit."""

import asyncio
import itertools
import math
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest

from maxlike.bench.client import Client, RequestRecord
from maxlike.bench.figures import LevelFigures, Objectives
from maxlike.bench.lengths import Lengths
from maxlike.bench.load import Load
from maxlike.bench.online import run_load, run_online
from maxlike.bench.workload import Prompt, Workload, WorkloadConfig
from tests.bench.virtual_time import Script, ScriptedServer, run_virtually, steady, text, usage

PROMPT = Prompt("hello", None, 16)
Steps = list[tuple[float, Any]]


def client_of(server: ScriptedServer, **options: Any) -> Client:
    return Client("http://server", "a-model", transport=server, **options)


def send(script: Script, prompt: Prompt = PROMPT, **options: Any) -> RequestRecord:
    async def main() -> RequestRecord:
        async with client_of(ScriptedServer(lambda i, body: script), **options) as client:
            return await client.send(client.body(prompt), prompt)

    return run_virtually(main())


def measure(script: Callable[[int, dict[str, Any]], Script], load: Load, n: int) -> tuple[
        ScriptedServer, list[RequestRecord]]:
    server = ScriptedServer(script)

    async def main() -> list[RequestRecord]:
        async with client_of(server) as client:
            return await run_load(client, [PROMPT] * n, load, seed=1)

    return server, run_virtually(main())


# -- one request


def test_times_of_one_request() -> None:
    record = send(Script([(0.5, text("a")), (0.1, text("b")), (0.3, text("c", "length")), (2.0, usage(7, 3, cached=4)),
                          (0, "[DONE]")], wait=0.25))
    assert record.error is None
    assert record.ttft == pytest.approx(0.75)
    assert record.e2e == pytest.approx(1.15)  # the usage comes later, and the output had ended
    assert record.tpot == pytest.approx(0.2)
    assert np.diff(record.chunks) == pytest.approx([0.1, 0.3])
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (7, 3, 4)
    assert record.finish_reason == "length"


def test_several_tokens_a_piece_are_counted_by_usage() -> None:
    record = send(Script([(0.4, text("a b")), (0.6, text("c d e")), (0, text("", "stop")), (0, usage(5, 9)),
                          (0, "[DONE]")]))
    assert record.output_tokens == 9
    assert len(record.chunks) == 2
    assert record.tpot == pytest.approx(0.6 / 8)


def test_what_carries_no_text_is_no_first_token() -> None:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    record = send(Script([
        (0.1, chunk({"role": "assistant", "content": ""})), (0.1, b": a comment\n\n"), (0.3, chunk({"content": "a"})),
        (0.2, chunk({"tool_calls": [{"index": 0}]})), (0.1, chunk({}, "stop")), (0, usage(3, 2)), (0, "[DONE]")]),
        endpoint="chat")
    assert record.ttft == pytest.approx(0.5)
    assert np.diff(record.chunks) == pytest.approx([0.2])
    assert record.e2e == pytest.approx(0.8)


def test_reasoning_is_output() -> None:
    record = send(Script([(0.2, {"choices": [{"delta": {"reasoning_content": "hm"}}]}),
                          (0.3, {"choices": [{"delta": {"content": "ah"}, "finish_reason": "stop"}]}), (0, "[DONE]")]))
    assert record.ttft == pytest.approx(0.2)


def test_an_output_without_text() -> None:
    record = send(Script([(0.5, text("", "stop")), (0, usage(3, 1)), (0, "[DONE]")]))
    assert record.error is None
    assert record.ttft == record.e2e == pytest.approx(0.5)
    assert (record.tpot, record.chunks, record.output_tokens) == (None, [], 1)


def test_without_usage_pieces_are_counted() -> None:
    record = send(Script([(0.1, text("a")), (0.1, text("b", "length")), (0, "[DONE]")]), Prompt((1, 2, 3), 3, 16))
    assert not record.has_usage
    assert (record.prompt_tokens, record.output_tokens) == (3, 2)


def test_usage_with_every_chunk_is_a_running_count() -> None:
    chunks: Steps = [(0.1, text("a") | {"usage": {"prompt_tokens": 4, "completion_tokens": i}}) for i in (1, 2, 3)]
    assert send(Script([*chunks, (0, "[DONE]")])).output_tokens == 3


def test_the_stream_may_be_cut_anywhere() -> None:
    stream = 'data: {"choices": [{"text": "é\u2028ü"}]}\r\n\r\n'.encode() + (
        b'event: x\ndata: {"choices": [\ndata:  {"text": "", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
    for cut in range(len(stream)):
        record = send(Script([(0.1, stream[:cut]), (0.1, stream[cut:])]))
        assert (record.error, len(record.chunks), record.finish_reason) == (None, 1, "stop"), cut


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (Script([(0, '{"error": {"message": "Too many requests.\\nWait."}}')], status=429), "HTTP 429", "data:"),
        (Script([(0, b'{"error": {"message": "Too many.\\nWait."}}')], status=429), "HTTP 429", "Too many. Wait."),
        (Script([(0, b'{"error": "no"}')], status=400), "HTTP 400", "no"),
        (Script([(0, b'{"detail": "no"}')], status=422), "HTTP 422", '{"detail": "no"}'),
        (Script([(0, b"\xff" * 100_000)], status=500), "HTTP 500", "�" * 300),
        (Script([], status=302), "HTTP 302", ""),
        (Script([(0.2, text("a")), (0.1, text("b"))]), "stream broke off", "after 2 pieces of text"),
        (Script([]), "stream broke off", "after 0 pieces"),
        (Script([(0, text("a")), (0, "{nope"), (0, "[DONE]")]), "malformed stream", "not JSON"),
        (Script([(0, "[" * 10_000)]), "malformed stream", "not JSON"),
        (Script([(0, "3")]), "malformed stream", "no JSON object: 3"),
        (Script([(0, '{"choices": {"text": "a"}}')]), "malformed stream", "no list of objects"),
        (Script([(0, '{"choices": [null]}')]), "malformed stream", "no list of objects"),
        (Script([(0, '{"choices": [{"delta": 5}]}')]), "malformed stream", "no list of objects"),
        (Script([(0, '{"usage": {"completion_tokens": 5}}')]), "malformed stream", "usage without its counts"),
        (Script([(0, '{"usage": 7}')]), "malformed stream", "usage without its counts"),
        (Script([(0, text("a")), (0, '{"error": {"message": "engine died", "code": 500}}'), (0, "[DONE]")]),
         "error in the stream", "engine died"),
        (Script([(0, '{"error": "gone"}')]), "error in the stream", "gone"),
        (Script([(0, b"{}")], headers={"content-type": "application/json"}), "malformed stream", "application/json"),
        (Script([(0.1, text("a")), (1e6, "[DONE]")]), "timeout", "no end after 600 s"),
        (Script([], wait=1e6), "timeout", "no end after 600 s"),
    ],
)
def test_failures(script: Script, error: str, message: str) -> None:
    record = send(script)
    assert record.error == error
    assert message in record.message
    assert record.finished >= record.sent


def test_an_end_without_done_will_do() -> None:
    assert send(Script([(0.1, text("a", "stop"))])).error is None
    assert send(Script([(0.1, text("a")), (0, "[DONE]")])).error is None


def test_what_comes_after_the_end_changes_nothing() -> None:
    end: Steps = [(0.1, text("a", "length")), (0.5, {"choices": [{"delta": {}}]}), (0, usage(3, 1)), (0, "[DONE]")]
    for rest in ("{nope", text("b"), httpx2.ReadError("gone")):
        record = send(Script([*end, (9, rest)]))
        assert (record.error, len(record.chunks)) == (None, 1)
        assert record.e2e == pytest.approx(0.1)
    assert send(Script([*end[:-1], (0, httpx2.ReadError("gone"))])).error == "connection lost"


# -- what is asked


def test_what_is_asked() -> None:
    server = ScriptedServer(lambda i, body: steady(1, 0, 0))

    async def main() -> None:
        async with client_of(server, api_key="secret", extra_body={"temperature": 0.5, "seed": 1}) as client:
            await client.send(client.body(Prompt((5, 6), 2, 9)), Prompt((5, 6), 2, 9))

    run_virtually(main())
    assert server.bodies == [{"model": "a-model", "prompt": [5, 6], "max_tokens": 9, "stream": True, "seed": 1,
                              "stream_options": {"include_usage": True}, "temperature": 0.5, "ignore_eos": True}]
    (request,) = server.requests
    assert (request.method, str(request.url)) == ("POST", "http://server/v1/completions")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["accept-encoding"] == "identity"


def test_what_is_asked_of_a_chat() -> None:
    messages = ({"role": "system", "content": "x"},)
    server = ScriptedServer(lambda i, body: steady(1, 0, 0))

    async def main() -> None:
        client = Client("http://server/proxy/v1/", "m", endpoint="chat", ignore_eos=False, transport=server)
        async with client:
            for content in ("hi", messages):
                await client.send(client.body(Prompt(content, None, 9)), PROMPT)
            with pytest.raises(ValueError, match="leave out --chat"):
                client.body(Prompt((1, 2), 2, 9))

    run_virtually(main())
    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": "hi"}], list(messages)]
    assert all("ignore_eos" not in body and "prompt" not in body for body in server.bodies)
    assert str(server.requests[0].url) == "http://server/proxy/v1/chat/completions"
    assert "authorization" not in server.requests[0].headers
    with pytest.raises(ValueError, match="add --chat"):
        Client("http://server", "m").body(Prompt(messages, None, 9))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://a:b", "/v1"])
def test_urls_refused(url: str) -> None:
    with pytest.raises(ValueError, match="A server's URL is expected"):
        Client(url, "m")


# -- many requests


def test_requests_at_a_rate_do_not_wait_for_answers() -> None:
    load = Load(4.0)
    server, records = measure(lambda i, body: steady(3, 100.0, 1.0), load, 40)
    due = load.arrivals(40, np.random.default_rng(1))
    assert np.asarray(server.arrivals) - server.arrivals[0] == pytest.approx(due)
    assert server.most_under_way == 40
    figures = LevelFigures.of(load, records)
    assert figures.duration_s == pytest.approx(due[-1] + 102)
    assert figures.ttft_ms is not None and figures.tpot_ms is not None and figures.send_delay_ms is not None
    assert (figures.ttft_ms.mean, figures.ttft_ms.p99) == (pytest.approx(100e3), pytest.approx(100e3))
    assert figures.tpot_ms.median == pytest.approx(1e3)
    assert figures.send_delay_ms.max < 1e-6


def test_all_at_once() -> None:
    server, _ = measure(lambda i, body: steady(2, 1.0, 1.0), Load(math.inf), 64)
    assert set(server.arrivals) == {1000.0}
    assert server.most_under_way == 64


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_a_fixed_number_is_under_way(concurrency: int) -> None:
    # Requests take 1 to 5 seconds.
    server, records = measure(lambda i, body: steady(1, 1.0 + i % 5, 0), Load(concurrency=concurrency), 20)
    assert server.most_under_way == min(concurrency, 20)
    # Whenever one ends, the next begins.
    free = [1000.0] * min(concurrency, 20)
    for i, arrival in enumerate(server.arrivals):
        earliest = min(range(len(free)), key=free.__getitem__)
        assert arrival == pytest.approx(free[earliest])
        free[earliest] = arrival + 1.0 + i % 5
    assert [record.e2e for record in records] == pytest.approx([1.0 + i % 5 for i in range(20)])


def test_failures_are_counted_and_not_in_the_figures() -> None:
    def script(i: int, body: dict[str, Any]) -> Script:
        if i % 4 == 1:
            return Script([(0, b'{"error": {"message": "queue is full"}}')], status=429, wait=0.01)
        if i == 2:
            return Script([(9.0, text("a"))])
        return steady(5, 1.0, 0.5, prompt=20)

    ended: list[RequestRecord] = []
    server = ScriptedServer(script)

    async def main() -> list[RequestRecord]:
        async with client_of(server) as client:
            return await run_load(client, [PROMPT] * 12, Load(math.inf), on_end=ended.append)

    records = run_virtually(main())
    assert {id(record) for record in ended} == {id(record) for record in records}
    figures = LevelFigures.of(Load(math.inf), records)
    assert (figures.sent, figures.completed, figures.failed, figures.rejected) == (12, 8, 4, 3)
    assert [(error.kind, error.count) for error in figures.errors] == [("HTTP 429", 3), ("stream broke off", 1)]
    assert figures.errors[0].example == "queue is full"
    assert figures.duration_s == pytest.approx(9.0)  # the failure that lasted longest counts
    assert (figures.prompt_tokens, figures.output_tokens) == (160, 40)
    assert figures.requests_per_s == pytest.approx(8 / 9)
    assert figures.output_tokens_per_s == pytest.approx(40 / 9)
    assert figures.e2e_ms is not None
    assert figures.e2e_ms.max == pytest.approx(3000)
    assert LevelFigures.of(Load(math.inf), records, Objectives(ttft=5000)).good_share == pytest.approx(8 / 12)


def test_goodput() -> None:
    # Time to first token 1 to 10 s, all else equal: 0.5 s a token, 2 s of them.
    records = measure(lambda i, body: steady(5, 1.0 + i, 0.5), Load(math.inf), 10)[1]
    figures = LevelFigures.of(Load(math.inf), records, Objectives.parse("ttft:4000,tpot:500.1"))
    assert figures.good_share == pytest.approx(0.4)
    assert figures.goodput_requests_per_s == pytest.approx(4 / 12)
    assert LevelFigures.of(Load(math.inf), records, Objectives(tpot=499)).good_share == 0
    assert LevelFigures.of(Load(math.inf), records, Objectives(e2e=5500)).good_share == pytest.approx(0.3)


def workload(n: int = 6) -> Workload:
    config = WorkloadConfig(num_prompts=n, input_len=Lengths.parse("4"), output_len=Lengths.parse("3"))
    return Workload(config, "ids", vocabulary=np.arange(1000))


def test_one_load_after_the_other_with_new_prompts() -> None:
    server = ScriptedServer(lambda i, body: steady(3, 1.0, 0.25))
    seen: list[Any] = []

    def on_load(load: Load) -> Callable[[RequestRecord], None]:
        seen.append(load)
        return lambda record: seen.append(None)

    loads = [Load(2.0), Load(concurrency=2), Load(math.inf)]

    async def main() -> list[LevelFigures]:
        async with client_of(server) as client:
            return await run_online(client, workload(), loads, warm_up=2, on_load=on_load, on_figures=seen.append)

    figures = run_virtually(main())
    assert [level.load for level in figures] == loads
    assert [level.sent for level in figures] == [6, 6, 6]  # the warm-up is in none
    assert len(server.bodies) == 2 + 18
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 20
    expected: list[Any] = list(itertools.chain.from_iterable(
        [load, *[None] * 6, level] for load, level in zip(loads, figures, strict=True)))
    assert seen == expected
    assert figures[1].duration_s == pytest.approx(3 * 1.5)
    # Each load begins when all of the one before it have ended.
    ends = [1000.0 + 1.5, 1000.0 + 1.5 + figures[0].duration_s]
    assert server.arrivals[2] == pytest.approx(ends[0])
    assert server.arrivals[8] == pytest.approx(ends[1])


def test_the_same_for_a_seed() -> None:
    def bodies() -> tuple[list[Any], list[float]]:
        server = ScriptedServer(lambda i, body: steady(1, 0.0, 0.0))

        async def main() -> None:
            async with client_of(server) as client:
                await run_online(client, workload(), [Load(2.0), Load(2.0)], warm_up=0)

        run_virtually(main())
        return server.bodies, server.arrivals

    assert bodies() == bodies()
    arrivals = bodies()[1]
    assert np.diff(arrivals[:6]) != pytest.approx(np.diff(arrivals[6:]))  # each load has its own


def test_a_warm_up_that_fails_ends_it() -> None:
    server = ScriptedServer(lambda i, body: Script([(0, b'{"error": {"message": "no model m"}}')], status=404))

    async def main() -> None:
        async with client_of(server) as client:
            await run_online(client, workload(), [Load(1.0)], warm_up=1)

    with pytest.raises(ValueError, match=r"No request of the warm-up.*: HTTP 404: no model m"):
        run_virtually(main())
    assert len(server.bodies) == 1


def test_cancelled_it_leaves_nothing_under_way() -> None:
    server = ScriptedServer(lambda i, body: steady(100, 1.0, 1.0))

    async def main() -> None:
        async with client_of(server) as client:
            task = asyncio.create_task(run_load(client, [PROMPT] * 8, Load(math.inf)))
            await asyncio.sleep(5.5)
            assert server.under_way == 8
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert server.under_way == 0

    run_virtually(main())
