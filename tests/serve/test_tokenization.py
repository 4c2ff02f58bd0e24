"""/tokenize, /detokenize, /tokenizer_info, /v1/models, /v1/embeddings and the page."""

import base64

import httpx2
import numpy as np
import pytest

from tests.serve.fake_engine import CHATML, FakeEngine


def test_text_to_ids_and_back(client: httpx2.Client, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    text = "def f(x): return 'ü'"
    for special in (True, False, None):
        ids = engine.tokenizer.encode(text, add_special_tokens=special is not False)
        reply = client.post("/tokenize", json={"prompt": text, "add_special_tokens": special}).json()
        assert reply == {"count": len(ids), "max_model_len": 128, "tokens": ids, "token_strs": None}
    reply = client.post("/tokenize", json={"prompt": "def f", "return_token_strs": True}).json()
    assert reply["token_strs"] == [engine.tokenizer.bos_token, "def", " f"]
    whole = {"prompt": f"{engine.tokenizer.bos_token}{text}"}
    assert client.post("/detokenize", json={"tokens": ids}).json() == whole
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_to_ids(client: httpx2.Client, engine: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    ids = client.post("/tokenize", json=body).json()["tokens"]
    client.post("/v1/chat/completions", json=body)
    assert ids == engine.calls[-1].prompt
    assert client.post("/tokenize", json=body | {"add_generation_prompt": False}).json()["count"] < len(ids)


def test_tokenizer_info(client: httpx2.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/tokenizer_info").json() == {
        "bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": None, "unk_token": None,
        "chat_template": CHATML}
    monkeypatch.setattr(engine, "tokenizer", None)
    assert client.get("/tokenizer_info").status_code == 404


def test_models(client: httpx2.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["object"] == "model"
    assert card["max_model_len"] == card["maxlike"]["max_model_len"] == 128
    assert client.get("/v1/models/tiny").json() == card


@pytest.mark.parametrize("given", ["x", ["x", "y z"], [5, 6, 7], [[5], [6, 7]]])
def test_embeddings(client: httpx2.Client, engine: FakeEngine, given: object) -> None:
    reply = client.post("/v1/embeddings", json={"model": "tiny", "input": given, "user": "me"}).json()
    prompts = [call.prompt for call in engine.calls]
    assert [item["embedding"] for item in reply["data"]] == [[len(prompt), 0.25] for prompt in prompts]
    assert [item["index"] for item in reply["data"]] == list(range(len(prompts)))
    n = sum(map(len, prompts))
    assert reply["usage"] == {"prompt_tokens": n, "total_tokens": n}
    packed = client.post("/v1/embeddings", json={"input": given, "encoding_format": "base64"}).json()
    for item, plain in zip(packed["data"], reply["data"], strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), plain["embedding"])


def test_the_page(client: httpx2.Client) -> None:
    reply = client.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert reply.text.lstrip().lower().startswith("<!doctype html>")
