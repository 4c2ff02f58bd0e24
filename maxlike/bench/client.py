"""One streamed request to an OpenAI-compatible server, and when its tokens came."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2

from maxlike.bench.workload import Prompt

Endpoint = Literal["completions", "chat"]
_BODY_LIMIT = 4096  # bytes of an error's body that are looked at
# What carries a chat's text, whatever the model and server call it.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call")


@dataclass(slots=True)
class RequestRecord:
    """What became of a request; times in seconds on the event loop's clock.

    Args:
        due: when it should have been sent.
        sent: when it was.
        chunks: when each piece of the output came. A piece is an event that carries text; its tokens may be several.
        finished: when the output ended, or the request failed.
        output_tokens: by the server's count; the pieces where it gives none (`has_usage` is false).
        prompt_tokens: by the server's count; ours where it gives none.
        cached_tokens: of the prompt, found in the server's prefix cache, as far as it says.
        error: what went wrong, in a word or two that are the same for all errors of the kind; `None`: nothing.
        message: the error in full.
    """

    due: float
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    finished: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    has_usage: bool = False
    finish_reason: str | None = None
    error: str | None = None
    message: str = ""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first piece; to the end, where there was no text."""
        return (self.chunks[0] if self.chunks else self.finished) - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first: the time between first piece and end, over tokens less one.

        `None` for an output of one token or none.
        """
        return (self.finished - self.sent - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end of the output."""
        return self.finished - self.sent


class _RequestError(Exception):
    """What makes a request fail: the kind of error, and its message."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Client:
    """Sends requests to one model of one server. Use it as an async context manager.

    Args:
        base_url: of the server, as `http://127.0.0.1:8000`; `/v1` may stand behind it.
        model: the name that the server knows.
        endpoint: `completions` or `chat`.
        api_key: sent as a bearer token.
        ignore_eos: ask for outputs of exactly the length wanted (vLLM's option; OpenAI's own servers have none).
        extra_body: more fields of the requests' bodies; they replace what is there.
        timeout: seconds that a request may take.
        transport: what carries the requests instead of the network.

    Raises:
        ValueError: the URL is none.
    """

    def __init__(self, base_url: str, model: str, *, endpoint: Endpoint = "completions", api_key: str | None = None,
                 ignore_eos: bool = True, extra_body: Mapping[str, Any] | None = None, timeout: float = 600.0,
                 transport: httpx2.AsyncBaseTransport | None = None):
        self.model = model
        self.endpoint = endpoint
        self._root = server_root(base_url)
        self._path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
        self._fields: dict[str, Any] = {"model": model, "temperature": 0, "stream": True,
                                        "stream_options": {"include_usage": True}}
        if ignore_eos:
            self._fields["ignore_eos"] = True
        self._extra = dict(extra_body or {})
        self._timeout = timeout
        # A compressed stream would be held back; a proxy that the environment names would be measured too.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"} | _authorization(api_key)
        self._http = httpx2.AsyncClient(
            base_url=self._root, headers=headers, timeout=None, trust_env=False, transport=transport,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None))

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    def body(self, prompt: Prompt) -> bytes:
        """The JSON that asks for a continuation of `prompt`.

        Raises:
            ValueError: the endpoint takes no such prompt: token ids for a chat, or messages for a completion.
        """
        content = prompt.content
        is_messages = isinstance(content, tuple) and isinstance(content[0], Mapping)
        if self.endpoint == "chat":
            if not isinstance(content, str) and not is_messages:
                raise ValueError("A chat takes text or messages; the file has token ids: leave out --chat.")
            messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
            asked: dict[str, Any] = {"messages": messages}
        elif is_messages:
            raise ValueError("A completion takes text or token ids; the file has messages: add --chat.")
        else:
            asked = {"prompt": content}
        return json.dumps(self._fields | asked | {"max_tokens": prompt.output_len} | self._extra).encode()

    async def send(self, body: bytes, prompt: Prompt, due: float | None = None) -> RequestRecord:
        """Sends what `body` made of `prompt`, and reads the answer to its end. A failure is in the record."""
        now = asyncio.get_running_loop().time
        record = RequestRecord(now() if due is None else due)
        record.sent = now()
        try:
            async with asyncio.timeout(self._timeout), \
                    self._http.stream("POST", self._path, content=body) as response:
                await self._read(response, record)
        except TimeoutError:
            record.error, record.message = "timeout", f"no end after {self._timeout:g} s"
        except _RequestError as failure:
            record.error, record.message = failure.kind, str(failure)
        except httpx2.ConnectError as error:
            record.error, record.message = "no connection", f"{self._root}: {error}"
        except httpx2.SSEError as error:
            record.error, record.message = "malformed stream", str(error)
        except httpx2.HTTPError as error:
            record.error, record.message = "connection lost", f"{type(error).__name__}: {error}"
        if record.error is not None:
            record.finished = now()
        if not record.has_usage:
            record.output_tokens, record.prompt_tokens = len(record.chunks), prompt.n_tokens or 0
        return record

    async def _read(self, response: httpx2.Response, record: RequestRecord) -> None:
        if response.status_code != 200:
            raise _RequestError(f"HTTP {response.status_code}", await _error_message(response))
        now = asyncio.get_running_loop().time
        done = False
        try:
            async for event in httpx2.EventSource(response):
                if done:  # nothing comes, but only a body read to its end leaves the connection for the next request
                    continue
                if event.data == "[DONE]":
                    done = True
                    continue
                at = now()
                value = _parse(event.data)
                if (usage := value.get("usage")) is not None:
                    _take_usage(usage, record)
                if choices := value.get("choices"):
                    _take_choice(choices, record, at)
        except httpx2.HTTPError:
            if not done:
                raise
        if not done and record.finish_reason is None:
            raise _RequestError("stream broke off", f"the stream ended after {len(record.chunks)} pieces of text, with "
                           "neither a finish_reason nor [DONE]")
        if not record.finished:
            record.finished = now()


async def list_models(base_url: str, *, api_key: str | None = None, timeout: float = 30.0,
                      transport: httpx2.AsyncBaseTransport | None = None) -> list[str]:
    """The names of the models that the server offers.

    Raises:
        ValueError: it does not answer, or not as OpenAI's servers do.
    """
    root = server_root(base_url)
    try:
        async with httpx2.AsyncClient(trust_env=False, timeout=timeout, transport=transport) as http:
            response = await http.get(f"{root}/v1/models", headers=_authorization(api_key))
            response.raise_for_status()
        names = [entry["id"] for entry in response.json()["data"]]
    except httpx2.HTTPError as error:
        raise ValueError(f"{root}/v1/models cannot be asked for the model: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root}/v1/models does not list models as OpenAI's servers do: is it one?") from error
    if not names:
        raise ValueError(f"{root}/v1/models lists no model.")
    return names


def server_root(base_url: str) -> str:
    """The URL of a server, without a slash or `/v1` at its end.

    Raises:
        ValueError: it is no http or https URL.
    """
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"A server's URL is expected, as http://127.0.0.1:8000; got {base_url!r}: {error}.") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"A server's URL is expected, as http://127.0.0.1:8000; got {base_url!r}.")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def _authorization(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _parse(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _RequestError("malformed stream", f"an event is not JSON ({error}): {data:.80}") from error
    if not isinstance(value, dict):
        raise _RequestError("malformed stream", f"an event is no JSON object: {data:.80}")
    if (said := value.get("error")) is not None:
        raise _RequestError("error in the stream", str(said.get("message", said) if isinstance(said, dict) else said))
    return value


def _take_usage(usage: Any, record: RequestRecord) -> None:
    try:
        record.output_tokens, record.prompt_tokens = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
        record.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _RequestError("malformed stream", f"a usage without its counts: {usage!r:.200}") from error
    record.has_usage = True


def _take_choice(choices: Any, record: RequestRecord, at: float) -> None:
    try:
        choice = choices[0]
        text = choice.get("text")
        delta = choice.get("delta") or {}
        carries = bool(text) or any(delta.get(name) for name in _TEXTS)
        reason = choice.get("finish_reason")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise _RequestError("malformed stream", f"choices are no list of objects: {choices!r:.200}") from error
    if carries:
        record.chunks.append(at)
    if carries or reason is not None:
        record.finished = at
    if reason is not None:
        record.finish_reason = reason


async def _error_message(response: httpx2.Response) -> str:
    """What the body of an error says, in one line."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) >= _BODY_LIMIT:
            break
    text = body[:_BODY_LIMIT].decode(errors="replace")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        said = json.loads(text)["error"]
        text = said["message"] if isinstance(said, dict) else said
    return " ".join(str(text).split())[:300]
