"""/v1/chat/completions: what the template is given, and how what comes of it is put."""

import json
from typing import Any

import httpx2
import pytest

from maxlike.engine.sampling_params import SamplingParams, StructuredOutput
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving
from tests.serve.test_completions import events

USER = [{"role": "user", "content": "hi"}]


def chat(client: httpx2.Client, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def prompt_text(engine: FakeEngine) -> str:
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(engine.calls[-1].prompt, skip_special_tokens=False)


def test_an_answer(client: httpx2.Client, engine: FakeEngine) -> None:
    reply = chat(client)
    assert reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-")
    assert reply["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": " hello world", "refusal": None, "tool_calls": None},
        "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert prompt_text(engine) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # The answer may be as long as there is room.
    assert engine.calls[0].params == SamplingParams(max_tokens=None)
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(engine.calls[0].prompt)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_template_sees_the_conversation(client: httpx2.Client, engine: FakeEngine) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    chat(client, messages=[
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "7", "tool_call_id": "call_1"},
    ])
    assert prompt_text(engine) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_knows_developers_gets_them() -> None:
    engine = FakeEngine()
    with serving(engine, chat_template="{# developer #}{{ messages[0].role }}:{{ mood }}") as (client, _):
        chat(client, messages=[{"role": "developer", "content": "x"}], chat_template_kwargs={"mood": "good"})
    assert prompt_text(engine) == "developer:good"


def test_the_generation_prompt_can_be_left_out(client: httpx2.Client, engine: FakeEngine) -> None:
    chat(client, add_generation_prompt=False)
    assert prompt_text(engine) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutput(json_object=True)),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}},
         StructuredOutput(json={"type": "integer"})),
    ],
)
def test_response_format(client: httpx2.Client, engine: FakeEngine, given: Any, expected: Any) -> None:
    chat(client, response_format=given)
    assert engine.calls[0].params is not None and engine.calls[0].params.structured_output == expected


def test_options_reach_the_engine(client: httpx2.Client, engine: FakeEngine) -> None:
    chat(client, n=2, temperature=0.5, seed=3, stop="x", max_completion_tokens=5, max_tokens=5, top_k=4, priority=2,
         logit_bias={"7": 1}, user="me", store=True)
    assert engine.calls[0].params == SamplingParams(
        n=2, temperature=0.5, seed=3, stop="x", max_tokens=5, top_k=4, logit_bias={7: 1})
    assert engine.calls[0].priority == 2


def test_logprobs(client: httpx2.Client, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(engine.reply, add_special_tokens=False)[:2]
    other = engine.tokenizer.token_bytes(300)
    content = chat(client, logprobs=True, top_logprobs=2, max_tokens=2)["choices"][0]["logprobs"]["content"]
    for id, entry in zip(ids, content, strict=True):
        data = engine.tokenizer.token_bytes(id)
        own = {"token": data.decode(), "logprob": -1.5, "bytes": list(data)}
        assert entry == own | {"top_logprobs": [
            {"token": other.decode(), "logprob": -0.5, "bytes": list(other)}, own]}
    # One alternative: the likeliest, which the token itself was not. None: none.
    for n_top in (1, 0, None):
        content = chat(client, logprobs=True, top_logprobs=n_top, max_tokens=1)["choices"][0]["logprobs"]["content"]
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5] * (n_top or 0)
    assert chat(client, logprobs=False)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 1}, {"max_tokens": 2, "n": 3}])
def test_a_stream_adds_up_to_the_whole(client: httpx2.Client, more: dict[str, Any]) -> None:
    whole = chat(client, **more)
    reply = client.post("/v1/chat/completions", json={
        "messages": USER, "stream": True, "stream_options": {"include_usage": True}, **more})
    *chunks, last = events(reply.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[-1]["delta"] == {}
        if choice["logprobs"] is not None:
            content = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]


# -- tools

TOOL = {"type": "function", "function": {"name": "f", "description": "does", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def test_calls_are_found_in_what_the_model_writes(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = f" Let me see.\n{CALL}\n{CALL.replace('1', '2')}"
    choice = chat(client, tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Let me see."
    first, second = choice["message"]["tool_calls"]
    assert first["type"] == "function" and first["id"] != second["id"]
    assert [call["function"]["name"] for call in (first, second)] == ["f", "f"]
    assert [json.loads(call["function"]["arguments"]) for call in (first, second)] == [{"a": 1}, {"a": 2}]
    # The template has seen the tools, as they were given.
    assert f"<tools>{json.dumps([TOOL])}</tools>" in prompt_text(engine)
    assert engine.calls[0].params == SamplingParams(max_tokens=None, skip_special_tokens=False)


def test_calls_in_a_stream(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = f" Well.\n{CALL}"
    reply = client.post("/v1/chat/completions", json={"messages": USER, "tools": [TOOL], "stream": True})
    parts = [part for chunk in events(reply.text) for part in chunk["choices"]]
    (call,) = [call for part in parts for call in part["delta"].get("tool_calls", ())]
    assert call["index"] == 0 and call["function"]["name"] == "f" and call["id"]
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    assert "".join(part["delta"].get("content", "") for part in parts).strip() == "Well."
    assert parts[-1]["finish_reason"] == "tool_calls"


def test_one_call_alone(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = f"{CALL}\n{CALL}"
    choice = chat(client, tools=[TOOL], parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["message"]["content"] is None


def test_what_breaks_off_is_content(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = CALL
    choice = chat(client, tools=[TOOL], max_tokens=6)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"] is None
    assert CALL.startswith(choice["message"]["content"]) and choice["message"]["content"]


def test_without_tools_calls_are_text(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = CALL
    for more in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = chat(client, **more)["choices"][0]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert "<tools>" not in prompt_text(engine)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_forced_call_has_a_grammar(client: httpx2.Client, engine: FakeEngine, choice: Any) -> None:
    engine.reply = CALL
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}  # type: ignore[operator]
    chat(client, tools=[strict], tool_choice=choice)
    params = engine.calls[0].params
    assert params is not None and params.structured_output is not None
    assert params.structured_output.grammar is not None and '\\"f\\"' in params.structured_output.grammar


def test_what_a_forced_call_may_be(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = CALL
    other = {"type": "function", "function": {"name": "required"}}

    def grammar(**more: Any) -> str:
        chat(client, tools=[TOOL, other], **more)
        params = engine.calls.pop().params
        assert params is not None and params.structured_output is not None
        return params.structured_output.grammar or ""

    several, one = grammar(tool_choice="required"), grammar(tool_choice="required", parallel_tool_calls=False)
    assert ")*" in several and ")*" not in one and "call_1" in one
    named = grammar(tool_choice={"type": "function", "function": {"name": "required"}})
    assert '\\"required\\"' in named and "call_1" not in named and ")*" not in named


def test_a_model_whose_calls_nobody_knows() -> None:
    with serving(FakeEngine(), tool_format=None) as (client, _):
        reply = client.post("/v1/chat/completions", json={"messages": USER, "tools": [TOOL]})
        assert reply.status_code == 400 and "--tool-format" in reply.json()["error"]["message"]
        chat(client, tools=[TOOL], tool_choice="none")
