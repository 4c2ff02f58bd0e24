"""/v1/completions: what the engine is asked, and how what it says is put."""

import json
from typing import Any

import httpx2
import pytest

from maxlike.engine.sampling_params import SamplingParams, StructuredOutput
from tests.serve.fake_engine import FakeEngine


def events(text: str) -> list[dict[str, Any]]:
    """A stream's events, which must end with [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def complete(client: httpx2.Client, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", json={"model": "tiny"} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_text_is_continued(client: httpx2.Client, engine: FakeEngine) -> None:
    reply = complete(client, prompt="def f")
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode("def f")
    n = len(engine.tokenizer.encode(" hello world", add_special_tokens=False))
    assert reply["object"] == "text_completion" and reply["model"] == "tiny" and reply["id"].startswith("cmpl-")
    assert reply["choices"] == [
        {"index": 0, "text": " hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert reply["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": n, "total_tokens": len(prompt) + n,
                              "prompt_tokens_details": {"cached_tokens": 2}}
    assert engine.calls[0].prompt == prompt
    assert engine.calls[0].params == SamplingParams(max_tokens=16)


def test_every_option_reaches_the_engine(client: httpx2.Client, engine: FakeEngine) -> None:
    options = {"n": 2, "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
               "frequency_penalty": -1, "presence_penalty": 2, "seed": 5, "stop": ["a", "b"], "stop_token_ids": [9],
               "ignore_eos": True, "max_tokens": 9, "min_tokens": 2, "include_stop_str_in_output": True,
               "skip_special_tokens": False, "logprobs": 3}
    complete(client, prompt="x", **options, logit_bias={"17": -100, "18": 0.5}, priority=-3, best_of=2,
             structured_outputs={"regex": "a+"}, user="somebody", metadata={"a": 1}, store=False)
    call = engine.calls[0]
    assert call.params == SamplingParams(**options, logit_bias={17: -100, 18: 0.5},
                                         structured_output=StructuredOutput(regex="a+"))
    assert call.priority == -3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": {"type": "object"}}, StructuredOutput(json={"type": "object"})),
        ({"json": "{}"}, StructuredOutput(json="{}")),
        ({"json_object": True}, StructuredOutput(json_object=True)),
        ({"choice": ["a", "b"]}, StructuredOutput(choice=["a", "b"])),
        ({"grammar": "start: /a/"}, StructuredOutput(grammar="start: /a/")),
    ],
)
def test_structured_outputs(
    client: httpx2.Client, engine: FakeEngine, given: dict[str, Any], expected: StructuredOutput
) -> None:
    complete(client, prompt="x", structured_outputs=given)
    assert engine.calls[0].params is not None and engine.calls[0].params.structured_output == expected


def test_null_is_not_given(client: httpx2.Client, engine: FakeEngine) -> None:
    fields = ["n", "temperature", "stop", "seed", "logit_bias", "stream", "stream_options", "suffix", "echo", "best_of",
              "max_tokens", "user", "structured_outputs", "priority", "logprobs"]
    complete(client, prompt="x", **dict.fromkeys(fields))
    assert engine.calls[0].params == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    ("prompt", "n_prompts"), [("a", 1), (["a"], 1), (["a", "b c"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8]], 3)]
)
def test_prompts_of_all_kinds(client: httpx2.Client, engine: FakeEngine, prompt: Any, n_prompts: int) -> None:
    reply = complete(client, prompt=prompt, n=2, temperature=1)
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * n_prompts))
    assert [choice["text"] for choice in reply["choices"]] == [" 0: hello world", " 1: hello world"] * n_prompts
    prompts = [call.prompt for call in engine.calls]
    if prompt == [5, 6, 7]:
        assert prompts == [[5, 6, 7]]
    if prompt == [[5, 6], [7], [8]]:
        assert prompts == [[5, 6], [7], [8]]
    assert reply["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert len({call.request_id for call in engine.calls}) == n_prompts


@pytest.mark.parametrize("prompt", ["def f", ["def f", "a b"], [[5, 6], [7]]])
@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 0, "max_tokens": 3}])
def test_a_stream_adds_up_to_the_whole(client: httpx2.Client, prompt: Any, more: dict[str, Any]) -> None:
    whole = complete(client, prompt=prompt, n=2, **more)
    reply = client.post("/v1/completions", json={
        "prompt": prompt, "n": 2, "stream": True, "stream_options": {"include_usage": True}, **more})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(reply.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {last["id"]} and last["object"] == "text_completion"
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        if choice["logprobs"] is not None:
            for key, values in choice["logprobs"].items():
                assert [value for part in parts for value in part["logprobs"][key]] == values, key


def test_without_usage_chunks_do_not_speak_of_it(client: httpx2.Client) -> None:
    reply = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert all("usage" not in chunk for chunk in events(reply.text))


def test_logprobs(client: httpx2.Client, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    choice = complete(client, prompt="def f", logprobs=2, echo=True, max_tokens=2)["choices"][0]
    prompt = engine.tokenizer.encode("def f")
    reply = engine.tokenizer.encode(" hello world", add_special_tokens=False)[:2]
    tokens = [engine.tokenizer.token_bytes(id).decode() for id in prompt + reply]
    found = choice["logprobs"]
    assert found["tokens"] == tokens
    assert found["token_logprobs"] == [None] + [-1.5] * (len(tokens) - 1)
    other = engine.tokenizer.decode([300])
    assert found["top_logprobs"] == [None] + [{token: -1.5, other: -0.5} for token in tokens[1:]]
    # The token at each place is what the text has there; the one that begins it is no text.
    assert tokens[0] == engine.tokenizer.bos_token and found["text_offset"][:2] == [0, 0]
    for token, start in zip(tokens[1:], found["text_offset"][1:], strict=True):
        assert choice["text"][start:].startswith(token)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_as_lm_eval_does_it(client: httpx2.Client, engine: FakeEngine, max_tokens: int) -> None:
    reply = complete(client, prompt=[[5, 6, 7], [8, 9]], temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234,
                     echo=True)
    assert [len(choice["logprobs"]["token_logprobs"]) for choice in reply["choices"]] == [3 + max_tokens,
                                                                                          2 + max_tokens]
    assert engine.calls[0].params is not None and engine.calls[0].params.prompt_logprobs == 1


def test_a_token_that_is_no_text_has_its_bytes_for_a_name(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.reply = " 🦜"
    found = complete(client, prompt="x", logprobs=0)["choices"][0]["logprobs"]
    names = [name for name in found["tokens"] if name.startswith("bytes:")]
    assert names
    assert bytes.fromhex("".join(names).replace("bytes:", "").replace("\\x", "")) in "🦜".encode()


def test_without_a_tokenizer_there_are_ids(
    client: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "tokenizer", None)
    for body in ({"prompt": "x"}, {"prompt": [5], "echo": True}):
        reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 400 and "no tokenizer" in reply.json()["error"]["message"]


def test_max_tokens_has_room(client: httpx2.Client, engine: FakeEngine) -> None:
    for n_prompt, expected in ((127, 1), (120, 8), (5, 16)):  # of 128; OpenAI's default is 16
        complete(client, prompt=[5] * n_prompt)
        assert engine.calls[-1].params is not None and engine.calls[-1].params.max_tokens == expected
    for n_prompt, more in ((128, {}), (120, {"max_tokens": 9}), (129, {"max_tokens": 0}), (5, {"max_tokens": 10**12})):
        reply = client.post("/v1/completions", json={"prompt": [5] * n_prompt} | more)
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["code"] == "context_length_exceeded"
        assert str(n_prompt) in error["message"] and "128" in error["message"]
    assert len(engine.calls) == 3


def test_one_write_brings_all_that_a_step_has(client: httpx2.Client) -> None:
    with client.stream("POST", "/v1/completions", json={"prompt": "x", "n": 3, "stream": True}) as reply:
        chunks = [chunk for chunk in reply.iter_raw() if b"finish_reason" in chunk]
    assert chunks[0].count(b"data: ") % 3 == 0


def test_an_error_before_the_first_token_has_its_own_status(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.full = True
    reply = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "queue_full"


def test_an_error_in_the_midst_is_the_streams_last_event(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.fails_after = 2
    reply = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert reply.status_code == 200
    *chunks, last = events(reply.text)
    assert len(chunks) == 2
    assert last["error"]["message"] == "the engine failed"


def test_one_of_several_prompts_that_fails_ends_the_others(client: httpx2.Client, engine: FakeEngine) -> None:
    engine.may_go_on.clear()
    reply = client.post("/v1/completions", json={"prompt": [[5], [6], [5000]]})
    assert reply.status_code == 400 and "5000" in reply.json()["error"]["message"]
    assert {call.ended for call in engine.calls} == {"cancelled"}
