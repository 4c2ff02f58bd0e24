"""Who is let in, how many, and what happens when a client hangs up."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from maxlike.engine.async_engine import EngineDeadError
from maxlike.serve.config import ServeConfig
from maxlike.serve.service import Service
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving, until

POSTS = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture(scope="module")
def locked() -> Iterator[tuple[httpx2.Client, FakeEngine]]:
    engine = FakeEngine()
    with serving(engine, api_keys=("first-key", "second")) as (client, _):
        yield client, engine


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-key2", "first-key", "Basic first-key",
     "Bearer first-key second", "Bearer \xe9"],
)
def test_without_a_key_no_work_is_done(locked: tuple[httpx2.Client, FakeEngine], header: str | None) -> None:
    client, engine = locked
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    replies = [client.post(path, json=body, headers=headers) for path, body in POSTS.items()]
    replies += [client.get(path, headers=headers) for path in
                ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/v1/nothing", "/nothing")]
    # Not even a body is read.
    replies.append(client.post("/v1/completions", content=b"nonsense", headers=headers))
    for reply in replies:
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"
    assert not engine.calls


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer second", "Bearer  second"])
def test_with_a_key_all_is_open(locked: tuple[httpx2.Client, FakeEngine], header: str) -> None:
    client, _ = locked
    headers = {"Authorization": header}
    assert all(client.post(path, json=body, headers=headers).status_code == 200 for path, body in POSTS.items())
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_what_needs_no_key(locked: tuple[httpx2.Client, FakeEngine], path: str) -> None:
    assert locked[0].get(path).status_code == 200


def test_a_full_server_turns_away_but_can_be_watched() -> None:
    engine = FakeEngine()
    engine.may_go_on.clear()
    with serving(engine, max_concurrent_requests=2) as (client, service):
        threads = [threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": {"prompt": "x"}})
                   for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.calls) == 2)
        reply = client.post("/v1/completions", json={"prompt": "x"})
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "too_many_requests"
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        engine.may_go_on.set()
        for thread in threads:
            thread.join()
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert service.admission.in_flight == 0
    assert len(engine.calls) == 3


def test_more_than_the_queue_takes_will_never_do(
    client: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "max_queue", 6)
    chat = POSTS["/v1/chat/completions"]
    for path, few, many in (
        ("/v1/completions", {"prompt": ["x"] * 6}, {"prompt": ["x"] * 7}),
        ("/v1/completions", {"prompt": ["x"] * 2, "n": 3}, {"prompt": ["x"] * 2, "n": 4}),
        ("/v1/chat/completions", chat | {"n": 6}, chat | {"n": 7}),
        ("/v1/embeddings", {"input": ["x"] * 6}, {"input": ["x"] * 7}),
    ):
        reply = client.post(path, json=many)
        assert reply.status_code == 400 and "6 at most" in reply.json()["error"]["message"]
        assert client.post(path, json=few).status_code == 200


@contextmanager
def raw_request(client: httpx2.Client, path: str, body: str) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        yield connection


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", '{"prompt": "x"}'),
        ("/v1/completions", '{"prompt": "x", "stream": true}'),
        ("/v1/completions", '{"prompt": ["x", "y", "z"], "n": 2}'),
        ("/v1/completions", '{"prompt": ["x", "y", "z"], "n": 2, "stream": true}'),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "hi"}]}'),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "hi"}], "stream": true}'),
        ("/v1/embeddings", '{"input": ["x", "y"]}'),
    ],
)
def test_a_client_that_hangs_up_ends_its_request(
    client: httpx2.Client, engine: FakeEngine, service: Service, path: str, body: str
) -> None:
    engine.may_go_on.clear()
    n_calls = 3 if '"z"' in body else 2 if "input" in body else 1
    with raw_request(client, path, body) as connection:
        until(lambda: len(engine.calls) == n_calls)
        if "stream" in body:
            assert connection.recv(1)  # it is under way
        assert service.admission.in_flight == 1
    # It is over at once, though the engine would never have gone on.
    until(lambda: [call.ended for call in engine.calls] == ["cancelled"] * n_calls)
    until(lambda: service.admission.in_flight == 0)


def test_a_stream_comes_piece_by_piece(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.may_go_on.clear()
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        chunks = reply.iter_raw()
        first = next(chunks)
        assert b'"role":"assistant"' in first and b"[DONE]" not in first
        engine.may_go_on.set()
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def test_a_client_that_hangs_up_in_the_midst_of_its_body(client: httpx2.Client, service: Service) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100\r\n\r\n{")
        until(lambda: service.admission.in_flight == 1)
    until(lambda: service.admission.in_flight == 0)


def test_pages_elsewhere_may_call_only_where_allowed() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "authorization,content-type"}
    with serving(FakeEngine(), api_keys=("key",), cors_origins=("https://a.example",)) as (client, _):
        reply = client.options("/v1/completions", headers=ask)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in reply.headers["access-control-allow-headers"].lower()
        assert client.options("/v1/completions", headers=ask | {"Origin": "https://b.example"}).status_code == 400
        # A page can read the error too.
        reply = client.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": "https://a.example"})
        assert reply.status_code == 401 and reply.headers["access-control-allow-origin"] == "https://a.example"
    with serving(FakeEngine()) as (client, _):
        reply = client.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in reply.headers
        assert client.options("/v1/completions", headers=ask).status_code == 405


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_has_died(client: httpx2.Client, engine: FakeEngine, stream: bool) -> None:
    body = {"prompt": "x", "stream": stream}
    engine.fails_after, engine.failure = 0, EngineDeadError("it ended")
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_dead"
    engine.fails_after = 2
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == (200 if stream else 503) and '"code":"engine_dead"' in reply.text


def test_health_and_readiness(client: httpx2.Client, engine: FakeEngine, service: Service) -> None:
    def states() -> list[tuple[int, str]]:
        return [(reply.status_code, reply.json()["status"]) for reply in map(client.get, ("/health", "/ready"))]

    assert states() == [(200, "alive"), (200, "ready")]
    engine.is_ready = False
    assert states() == [(200, "alive"), (503, "starting")]
    engine.error = RuntimeError("out of memory")
    assert states() == [(503, "the engine has failed")] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1), ("port", 65536), ("max_body_bytes", 0), ("max_concurrent_requests", 0), ("body_timeout", 0),
        ("body_timeout", float("inf")), ("drain_timeout", -1), ("served_model_name", ""), ("api_keys", ("",)),
        ("api_keys", ("fine", "not fine")), ("api_keys", ("ü",)),
    ],
)
def test_configuration_is_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="API key" if field == "api_keys" else field):
        ServeConfig(**{field: value})


def test_keys_are_not_shown() -> None:
    assert "hush" not in repr(ServeConfig(api_keys=("hush",)))
