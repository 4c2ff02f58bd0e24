"""Bad requests: an OpenAI-style error with a status of 400 and so on, which says what is wrong. Never one of 500."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from maxlike.serve.service import Service
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving

JSON = {"Content-Type": "application/json"}


def error_of(reply: httpx2.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["message"] and len(error["message"]) < 700
    return error


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": 5}, "prompt", "got 5"),
        ({"prompt": None}, "prompt", "got None"),
        ({"prompt": []}, "prompt", "none empty"),
        ({"prompt": [[]]}, "prompt", "none empty"),
        ({"prompt": ["a", 5]}, "prompt", "got ['a', 5]"),
        ({"prompt": [5, -1]}, "prompt", "got [5, -1]"),
        ({"prompt": [True]}, "prompt", "got [True]"),
        ({"prompt": [1.5]}, "prompt", "got [1.5]"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
        ({"prompt": [2**31]}, "prompt", "got [2147483648]"),
        ({"prompt": [4096]}, None, "vocabulary"),
        ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": 2.0}, "n", "integer"),
        ({"prompt": "x", "n": "2"}, "n", "integer"),
        ({"prompt": "x", "n": True}, "n", "integer"),
        ({"prompt": "x", "n": 10**30}, "n", "less than or equal to 128"),
        ({"prompt": "x", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "got 'hot'"),
        ({"prompt": "x", "temperature": 1e300}, "temperature", "float32"),
        ({"prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "x", "top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"prompt": "x", "repetition_penalty": -1}, "repetition_penalty", "greater than 0"),
        ({"prompt": "x", "frequency_penalty": -2.1}, "frequency_penalty", "-2"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "x", "max_tokens": 10**18}, "max_tokens", "128 at most"),
        ({"prompt": "x", "max_tokens": 5, "min_tokens": 6}, "min_tokens", "6 and 5"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "x", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "x", "seed": 2**63}, "seed", "less than"),
        ({"prompt": "x", "stop": ""}, "stop", "none empty"),
        ({"prompt": "x", "stop": ["a"] * 65}, "stop", "at most 64"),
        ({"prompt": "x", "stop": "a" * 4097}, "stop", "4096 characters in all; got 4097"),
        ({"prompt": "x", "stop": ["a" * 4000, "b" * 97]}, "stop", "4096 characters in all; got 4097"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a.[key]", "match"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias", "dictionary"),
        ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(400)}}, "logit_bias", "300 token ids"),
        ({"prompt": "x", "logit_bias": {"9999999999": 1}}, "logit_bias", "9999999999"),
        ({"prompt": "x", "best_of": 3}, "best_of", "must equal n"),
        ({"prompt": "x", "suffix": "end"}, "suffix", "not supported"),
        ({"prompt": "x", "stream": "yes"}, "stream", "boolean"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"prompt": "x", "stream": True, "stream_options": {"more": 1}}, "stream_options.more", "Unknown field"),
        ({"prompt": "x", "temprature": 1}, "temprature", "Unknown field: temprature."),
        ({"prompt": "x", "guided_regex": "a"}, "guided_regex", "structured_outputs.regex"),
        ({"prompt": "x", "structured_outputs": {}}, None, "none"),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, None, "regex, choice"),
        ({"prompt": "x", "structured_outputs": {"json": "{"}}, None, "not JSON"),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, None, "open parenthesis"),
        ({"prompt": "x", "user": 5}, "user", "string"),
    ],
)
def test_a_field_that_is_wrong(
    client: httpx2.Client, engine: FakeEngine, body: dict[str, Any], param: str | None, says: str
) -> None:
    error = error_of(client.post("/v1/completions", json=body), 400)
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not engine.calls


def test_all_unknown_fields_are_named(client: httpx2.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": "x", "one": 1, "two": 2}), 400)
    assert error["message"] == "Unknown fields: one, two." and error["code"] == "unknown_field"


USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "messages", "missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "'king'"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "no content"),
        ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content", "got 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content", "'text'"),
        ({"messages": [{"role": "user", "content": "hi", "mood": "good"}]}, "messages[0].mood", "Unknown field"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999}}]}]},
         "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens", "greater"),
        ({"messages": USER, "max_tokens": 10**9}, "max_tokens", "128 at most"),
        ({"messages": [{"role": "user", "content": "hi " * 200}]}, "messages", "128 at most"),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"messages": USER, "response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
         "response_format", "takes no"),
        ({"messages": USER, "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
         "structured_outputs", "give one"),
        ({"messages": USER, "tools": []}, "tools", "at least 1"),
        ({"messages": USER, "tools": [{"type": "search"}]}, "tools[0].type", "'function'"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice", "'g'"),
        ({"messages": USER, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format",
         "give one"),
        ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools",
         "leave it out (f)"),
        ({"messages": USER, "functions": []}, "functions", "Use tools"),
        ({"messages": USER, "reasoning_effort": "high"}, "reasoning_effort", "chat_template_kwargs"),
        ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not hold"),
        ({"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "may not hold self"),
        ({"messages": USER, "response_format": {"type": "json_object", "json_schema": {"name": "x"}}},
         "response_format", "takes no json_schema"),
        ({"messages": USER, "logprobs": 3}, "logprobs", "boolean"),
    ],
)
def test_a_chat_that_is_wrong(
    client: httpx2.Client, engine: FakeEngine, body: dict[str, Any], param: str | None, says: str
) -> None:
    error = error_of(client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == param
    assert says in error["message"]
    assert not engine.calls


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": "x", "dimensions": 64}, "dimensions"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": [5] * 129}, "input"),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "x", "messages": USER}, None),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/detokenize", {"tokens": [4096]}, None),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_other_endpoints(client: httpx2.Client, engine: FakeEngine, path: str, body: Any, param: str | None) -> None:
    assert error_of(client.post(path, json=body), 400)["param"] == param
    assert not engine.calls


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"nonsense", b"[]", b"5", b"null", b'"prompt"', b'{"prompt": "x"} more',
        b'{"prompt": NaN}', b'{"prompt": "x", "metadata": {"a": NaN}}', b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"\xff\xfe{\x00}\x00",
        b"[" * 1_000_000, b'{"a":' * 500_000, b'{"prompt": "x", "metadata": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_not_json(client: httpx2.Client, engine: FakeEngine, data: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        error_of(client.post(path, content=data, headers=JSON), 400)
    assert not engine.calls


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 415), ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200), ("application/json; charset=latin-1", 415), (";;;", 415),
        ("application/json; charset*=a; charset*0=b", 415), ("application/json; charset*=utf-8''utf-8", 200),
    ],
)
def test_the_content_type_must_be_json(client: httpx2.Client, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    reply = client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert reply.status_code == status
    if status != 200:
        error_of(reply, status)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb(client: httpx2.Client, engine: FakeEngine, chunked: bool) -> None:
    def parts() -> Iterator[bytes]:
        yield from (b" " * 1_000_000 for _ in range(100))

    content = parts() if chunked else b" " * 100_000_000
    error = error_of(client.post("/v1/completions", content=content, headers=JSON), 413)
    assert error["code"] == "body_too_large" and str(4 * 2**20) in error["message"]
    assert client.get("/health").status_code == 200
    assert not engine.calls


def test_a_body_that_does_not_come() -> None:
    with serving(FakeEngine(), body_timeout=0.2) as (client, service):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 100\r\n\r\n{")
            reply = connection.recv(10_000)
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert service.admission.in_flight == 0


def test_paths_and_methods(client: httpx2.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["message"] == "There is no /v1/nothing here."
    assert error_of(client.get("/v1/models/other/model"), 404)["code"] == "model_not_found"
    reply = client.get("/v1/completions")
    error_of(reply, 405)
    assert reply.headers["allow"] == "POST"
    error_of(client.post("/v1/models", json={}), 405)
    error_of(client.get("/v1/models/"), 404)
    for path, text in (("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/tokenize", "prompt")):
        error = error_of(client.post(path, json={"model": "other", text: "x"}), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model" and "tiny" in error["message"]


def test_an_error_of_ours_says_nothing(client: httpx2.Client, engine: FakeEngine, service: Service) -> None:
    engine.fault = RuntimeError("secret")
    reply = client.post("/v1/completions", json={"prompt": "x", "structured_outputs": {"regex": "a"}})
    error = error_of(reply, 500)
    assert "secret" not in reply.text and error["type"] == "internal_error"
    assert service.admission.in_flight == 0
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_what_the_template_refuses_is_the_requests_fault() -> None:
    with serving(FakeEngine(), chat_template="{{ raise_exception('Roles must alternate') }}") as (client, _):
        error = error_of(client.post("/v1/chat/completions", json={"messages": USER}), 400)
    assert "Roles must alternate" in error["message"]


def test_without_a_template_there_is_no_chat() -> None:
    with serving(FakeEngine(), chat_template=None) as (client, _):
        error = error_of(client.post("/v1/chat/completions", json={"messages": USER}), 400)
        assert error["code"] == "no_chat_template"
        assert client.get("/v1/models").json()["data"][0]["maxlike"] == {"has_chat_template": False,
                                                                        "max_model_len": 128}


def test_duplicate_and_deep_metadata_is_harmless(client: httpx2.Client) -> None:
    body = '{"prompt": "x", "prompt": "y", "metadata": ' + "[" * 100 + "]" * 100 + "}"
    error_of(client.post("/v1/completions", content=body.encode(), headers=JSON), 400)
    body = json.dumps({"prompt": "x", "metadata": {"a": {"b": [1, None]}}})
    assert client.post("/v1/completions", content=body.encode(), headers=JSON).status_code == 200
