"""`maxlike serve` as users see it: the `openai` client, lm-eval, clients that hang up, signals under load."""

import concurrent.futures
import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

import maxlike
from maxlike.cli import EMBEDDED_MODEL
from maxlike.models.tokenizer import Tokenizer
from tests.serve.fake_engine import CHATML
from tests.serve.maxlike_server import figures, maxlike_serve
from tests.serve.serving import until

pytestmark = pytest.mark.slow  # a server compiles for half a minute before it answers

TEXT = "import os\nimport sys\n\ndef main():\n    print(os.path.join('a', 'b'))\n"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["a", "b"]}, "n": {"type": "integer", "maximum": 99,
                                                                               "minimum": 0}},
          "required": ["name", "n"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "description": "Finds things.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    template = tmp_path_factory.mktemp("template") / "chatml.jinja"
    # Where it writes calls of tools it shows how the model does: in Hermes' way.
    template.write_text(CHATML)
    with maxlike_serve("--chat-template", str(template)) as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def score() -> Callable[[list[int]], np.ndarray]:
    """Log-probabilities `float[T, V]` of what follows each of T tokens, from the model without engine or cache."""
    model = maxlike.load(EMBEDDED_MODEL, dtype="float32", return_logits=maxlike.ReturnLogits.ALL)

    def score(ids: list[int]) -> np.ndarray:
        # In few lengths, each of which is compiled; what stands behind changes nothing.
        padded = np.pad(np.array(ids, np.int32), (0, -len(ids) % 64))
        (_, logits, _), _ = model(padded, None, None, np.array([0, len(padded)], np.int32))
        logits = np.asarray(logits, np.float64)[: len(ids)]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return score


# -- the client that people have


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").id == "embedded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_the_likeliest_text(client: openai.OpenAI, tokenizer: Tokenizer, score: Any) -> None:
    reply = client.completions.create(model="embedded", prompt=TEXT, max_tokens=24, temperature=0, logprobs=3)
    choice, found = reply.choices[0], reply.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    prompt = tokenizer.encode(TEXT)
    ids = list(prompt)
    for token_logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        logprobs = score(ids)[-1]
        ids.append(int(logprobs.argmax()))
        assert token_logprob == pytest.approx(logprobs.max(), abs=1e-3)
        assert sorted(top.values()) == pytest.approx(np.sort(logprobs)[-3:], abs=1e-3)
    assert choice.text == tokenizer.decode(ids).removeprefix(tokenizer.decode(prompt))
    assert choice.finish_reason == "length"
    assert reply.usage is not None and reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == 24 and reply.usage.total_tokens == len(prompt) + 24


def test_a_prompt_is_scored(client: openai.OpenAI, tokenizer: Tokenizer, score: Any) -> None:
    ids = tokenizer.encode(TEXT)
    expected = score(ids)
    for max_tokens in (0, 1):
        reply = client.completions.create(model="embedded", prompt=ids, max_tokens=max_tokens, temperature=0,
                                          logprobs=1, echo=True)
        found = reply.choices[0].logprobs
        assert found is not None and found.token_logprobs is not None and found.text_offset is not None
        assert len(found.token_logprobs) == len(ids) + max_tokens and found.token_logprobs[0] is None
        for i, (logprob, top) in enumerate(zip(found.token_logprobs[1:len(ids)], found.top_logprobs[1:], strict=False)):
            assert logprob == pytest.approx(expected[i, ids[i + 1]], abs=1e-3)
            assert max(top.values()) == pytest.approx(expected[i].max(), abs=1e-3)
        for token, start in zip(found.tokens[1:], found.text_offset[1:], strict=True):
            assert reply.choices[0].text[start:].startswith(token)


def test_streams_say_what_answers_say(client: openai.OpenAI) -> None:
    options: Any = {"model": "embedded", "prompt": TEXT, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 10
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == 20
    chat: Any = {"model": "embedded", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(**chat)
    pieces = list(client.chat.completions.create(**chat, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"


def test_n_and_seed(client: openai.OpenAI) -> None:
    def texts(seed: int, **more: Any) -> list[str]:
        reply = client.completions.create(model="embedded", prompt="def ", n=3, max_tokens=20, seed=seed, **more)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.text for choice in reply.choices]

    assert len(set(texts(7))) == 3
    assert texts(7) == texts(7) != texts(8)
    chat = client.chat.completions.create(model="embedded", messages=MESSAGES, n=3, seed=1, max_tokens=8)
    assert len({choice.message.content for choice in chat.choices}) == 3


def test_stop(client: openai.OpenAI) -> None:
    options: Any = {"model": "embedded", "prompt": TEXT, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[10:13]
    choice = client.completions.create(**options, stop=["never there", stop]).choices[0]
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    assert choice.stop_reason == stop  # type: ignore[attr-defined]


def test_logit_bias_and_penalties(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (id,) = tokenizer.encode(" self", add_special_tokens=False)

    def text(bias: float, **more: Any) -> str:
        return client.completions.create(model="embedded", prompt=TEXT, max_tokens=6, temperature=0,
                                         logit_bias={str(id): bias}, **more).choices[0].text

    assert text(100) == " self" * 6
    assert " self" not in text(-100)
    # Somewhere between are biases that a penalty outweighs.
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 1.5}}):
        assert any(text(bias) != text(bias, **penalty) for bias in range(0, 40, 4)), penalty


def test_chat_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="embedded", messages=MESSAGES, max_tokens=5, logprobs=True,
                                            top_logprobs=4, temperature=0).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 5
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert entry.bytes is not None
    assert b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content).decode() == choice.message.content


def test_json_schema(client: openai.OpenAI) -> None:
    for seed in range(3):
        choice = client.chat.completions.create(
            model="embedded", messages=MESSAGES, max_tokens=400, seed=seed,  # whitespace alone may take 300
            response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}).choices[0]
        value = json.loads(choice.message.content or "")
        assert set(value) == {"name", "n"} and value["name"] in "ab" and 0 <= value["n"] <= 99
    choice = client.completions.create(model="embedded", prompt="x", max_tokens=50,
                                       extra_body={"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}).choices[0]
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", choice.text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_tools(client: openai.OpenAI, choice: Any) -> None:
    options: Any = {"model": "embedded", "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice,
                    "seed": 2, "max_tokens": 400, "parallel_tool_calls": False}  # else it might call without end
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    call: Any = answer.message.tool_calls[0]
    assert call.type == "function" and call.id and call.function.name == "look_up"
    assert set(json.loads(call.function.arguments)) == {"name", "n"}
    arguments = ""
    for piece in client.chat.completions.create(**options, stream=True):
        for delta in piece.choices[0].delta.tool_calls or ():
            if delta.index == 0 and delta.function is not None:
                arguments += delta.function.arguments or ""
    assert json.loads(arguments) == json.loads(call.function.arguments)
    # The answer goes back as it came, and the conversation goes on.
    client.chat.completions.create(model="embedded", tools=[TOOL], max_tokens=4, messages=[
        *MESSAGES, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "found"}])


def test_a_model_that_need_not_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="embedded", messages=MESSAGES, tools=[TOOL], max_tokens=8,
                                            temperature=0).choices[0]
    assert answer.message.content and not answer.message.tool_calls and answer.finish_reason == "length"


def test_embeddings(client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model="embedded", input=["import os", "import os", "class A:"])
    first, again, other = (np.array(item.embedding) for item in reply.data)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-3)
    assert first @ again == pytest.approx(1, abs=1e-3) and first @ other < 0.99
    plain = client.embeddings.create(model="embedded", input="import os", encoding_format="float").data[0].embedding
    np.testing.assert_allclose(plain, first, atol=1e-3)


def test_prefixes_are_found(client: openai.OpenAI, url: str) -> None:
    prompt: Any = [list(range(300, 500))]  # over three pages of 64 tokens
    client.completions.create(model="embedded", prompt=prompt, max_tokens=1)
    reply = client.completions.create(model="embedded", prompt=prompt, max_tokens=1)
    assert reply.usage is not None and reply.usage.prompt_tokens_details.cached_tokens == 192  # type: ignore[attr-defined]
    assert figures(url)["prefix_cache_hits_total"] >= 192


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="embedded", prompt="x", max_tokens=10**9)
    with pytest.raises(openai.BadRequestError, match="beyond the vocabulary"):
        client.completions.create(model="embedded", prompt=[4096])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="embedded", messages=MESSAGES, response_format={
            "type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nonsense"}}})
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt="x")


# -- lm-eval


def test_lm_eval_scores_a_task(url: str, tmp_path: Path, tokenizer: Tokenizer, score: Any) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'maxlike[lm-eval]'")
    documents = [
        {"context": "import os\nimport", "choices": [" sys", " giraffe"], "gold": 0},
        {"context": "def f(self", "choices": ["):", "<<<<"], "gold": 0},
        {"context": "for i in", "choices": [" xylophone", " range(10):"], "gold": 1},
        {"context": "try:\n    x = 1", "choices": ["\nexcept ValueError:", "\nzebra"], "gold": 0},
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "small.yaml").write_text(f"""
task: small
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "docs.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
""")
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
               f"model=embedded,base_url={url}/v1/completions,num_concurrent=3,max_retries=1,max_length=2048",
               "--tasks", "small", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
               "--log_samples"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                         env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["small"]["acc,none"] == 1.0
    (samples,) = (tmp_path / "out").rglob("samples_small_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == len(documents)
    for line in lines:
        for choice, response in zip(line["doc"]["choices"], line["filtered_resps"], strict=True):
            context = tokenizer.encode(line["doc"]["context"], add_special_tokens=False)
            whole = tokenizer.encode(line["doc"]["context"] + choice, add_special_tokens=False)
            logprobs = score(whole)
            expected = sum(logprobs[i - 1, whole[i]] for i in range(len(context), len(whole)))
            greedy = all(logprobs[i - 1].argmax() == whole[i] for i in range(len(context), len(whole)))
            assert math.isclose(float(response[0]), expected, abs_tol=1e-2)
            assert str(response[1]) == str(greedy)


# -- hardship


def test_a_thousand_clients_that_hang_up_leave_no_page_in_use(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    bodies = [json.dumps({"prompt": [300 + i] * (i % 200 + 1), "max_tokens": 500, "ignore_eos": True, "n": i % 3 + 1,
                          "stream": bool(i % 2)}) for i in range(7)]

    def come_and_go(i: int) -> None:
        body = bodies[i % len(bodies)]
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               f"Content-Length: {len(body)}\r\n\r\n{body}".encode()[: None if i % 5 else -9])
            if i % 4 == 1 and i % 5:
                connection.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    connection.recv(100)

    before = figures(url)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(come_and_go, range(1000)))

    def quiet() -> bool:
        now = figures(url)
        return (now["num_requests_running"] == now["num_requests_waiting"] == now["kv_cache_pages_used"]
                == now["http_requests_in_flight"] == 0)

    until(quiet, 60)
    assert figures(url)["generation_tokens_total"] > before["generation_tokens_total"]  # some had begun
    reply = httpx2.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60)
    assert reply.status_code == 200
    until(quiet)


def test_garbage_under_load(url: str) -> None:
    bad: list[dict[str, Any]] = [
        {"content": b"\xff\xfe"}, {"content": b'{"prompt": NaN}'}, {"json": {"prompt": 5}}, {"json": {"prompt": "x",
         "max_tokens": 10**12}}, {"json": {"prompt": "x", "model": "none"}}, {"json": {"prompt": "x", "n": -1}},
        {"json": {"prompt": "x", "repetition_penalty": -1}}, {"json": {"prompt": [10**6]}},
        {"json": {"prompt": "x", "logit_bias": {"5000": 1}}}, {"json": {"prompt": "x", "stop_token_ids": [5000]}},
        {"json": {"prompt": "x", "structured_outputs": {"regex": "("}}},
        {"json": {"prompt": "x", "structured_outputs": {"grammar": "start: nowhere"}}},
    ]

    def ask(i: int) -> tuple[bool, int]:
        good = i % 2 == 0
        request = {"json": {"prompt": "def ", "max_tokens": 8}} if good else bad[i // 2 % len(bad)]
        headers = {"Content-Type": "application/json"}
        return good, httpx2.post(f"{url}/v1/completions", headers=headers, timeout=120, **request).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for good, status in pool.map(ask, range(96)):
            assert status == 200 if good else 400 <= status < 500


def test_a_signal_under_load_finishes_what_runs() -> None:
    with maxlike_serve("--api-key", "key") as (process, url):
        key = {"Authorization": "Bearer key"}
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 401

        def ask(i: int) -> tuple[int, str]:
            body = {"prompt": [300 + i] * 20, "max_tokens": 200, "ignore_eos": True, "temperature": 0,
                    "stream": i % 2 == 0}
            reply = httpx2.post(f"{url}/v1/completions", json=body, headers=key, timeout=120)
            return reply.status_code, reply.text

        def running() -> bool:
            text = httpx2.get(f"{url}/metrics", headers=key).text
            return bool(re.search(r"^maxlike_num_requests_running 8.0$", text, re.MULTILINE))

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, i) for i in range(12)]  # more than run at once
            until(running, 60)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(f"{url}/ready").status_code == 503)
            assert httpx2.post(f"{url}/v1/completions", json={"prompt": "x"}, headers=key).status_code == 503
            for i, answer in enumerate(answers):
                status, text = answer.result(120)
                assert status == 200
                assert '"finish_reason":"length"' in text
                assert i % 2 or text.endswith("data: [DONE]\n\n")
        assert process.wait(60) == 0
