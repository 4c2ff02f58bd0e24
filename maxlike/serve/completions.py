"""`POST /v1/completions`: a prompt, continued."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from maxlike.engine.output import Logprob
from maxlike.engine.sampling_params import SamplingParams
from maxlike.serve.body import read_body
from maxlike.serve.event_stream import DONE, EventStream, event
from maxlike.serve.generation import Generation, Step
from maxlike.serve.json_reply import JsonReply
from maxlike.serve.logprobs import CompletionLogprobsWriter
from maxlike.serve.protocol import CompletionRequest
from maxlike.serve.replies import Completion, CompletionChoice, CompletionLogprobs
from maxlike.serve.service import Service

_DEFAULT_TOKENS = 16
"""OpenAI's default."""


async def completions(service: Service, request: Request) -> Response:
    """The endpoint `/v1/completions`; an `ApiError` that it raises becomes its answer."""
    body = await read_body(request, CompletionRequest, service.config)
    service.check_model(body.model)
    if body.echo:
        service.tokenizer_for("echo")
    prompts = await service.token_ids(body.prompt)
    service.check_count(len(prompts), body.n or 1)
    for prompt in prompts:
        service.room_for(len(prompt), body.max_tokens, "prompt")
    longest = max(map(len, prompts))
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = min(_DEFAULT_TOKENS, service.engine.max_model_len - longest)
    params = body.sampling_params(max_tokens=max_tokens, logprobs=body.logprobs,
                                  prompt_logprobs=body.logprobs if body.echo else None)
    answer = _Answer(service, body, Generation(service, prompts, params, body.priority or 0))
    if body.stream:
        return EventStream(answer.chunks(), service.admission)
    return JsonReply(await service.admission.run(answer.whole(), request.receive))


class _Answer:
    """One request's answer, in one piece or many."""

    def __init__(self, service: Service, body: CompletionRequest, generation: Generation):
        self._service, self._body, self._generation = service, body, generation
        self._params: SamplingParams = generation.params
        self._prompt_logprobs: dict[int, list[dict[int, Logprob] | None]] = {}
        self._held: Step = []
        self._head: dict[str, Any] = {"id": f"cmpl-{generation.id}", "created": int(time.time()), "model": service.name}

    async def whole(self) -> Completion:
        generation, n = self._generation, self._params.n
        choices = []
        for i, continuations in enumerate(await generation.collect()):
            self._prompt_logprobs[i] = continuations[0].prompt_logprobs or []
            for j, done in enumerate(continuations):
                logprobs = None
                if self._params.logprobs is not None:
                    logprobs = CompletionLogprobs(**self._write_logprobs(
                        self._writer(i), i, done.token_ids, done.logprobs))
                choices.append(CompletionChoice(
                    index=i * n + j, text=self._echo(i) + done.text, logprobs=logprobs,
                    finish_reason=done.finish_reason, stop_reason=done.stop_reason))
        return Completion(**self._head, choices=choices, usage=generation.usage())

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Events: one write for all that a step brings."""
        generation = self._generation
        writers: dict[int, CompletionLogprobsWriter] = {}
        async with aclosing(generation.steps()) as steps:
            async for step in steps:
                events = [event(self._chunk([choice])) for choice in self._choices(step, writers)]
                if events:
                    yield b"".join(events)
        if self._body.include_usage:
            yield event(self._chunk([]) | {"usage": generation.usage().model_dump()})
        yield DONE

    def _choices(self, step: Step, writers: dict[int, CompletionLogprobsWriter]) -> Iterator[dict[str, Any]]:
        for prompt, delta in self._with_prompt_logprobs(step):
            index, text, logprobs = prompt * self._params.n + delta.index, delta.text, None
            first = index not in writers
            if first:
                writers[index] = self._writer(prompt)
                text = self._echo(prompt) + text
            if self._params.logprobs is not None:
                logprobs = self._write_logprobs(writers[index], prompt if first else None, delta.token_ids,
                                                delta.logprobs)
            if text or delta.finish_reason or (logprobs and logprobs["tokens"]):
                yield {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason,
                       "stop_reason": delta.stop_reason}

    def _with_prompt_logprobs(self, step: Step) -> Step:
        """Holds back what overtakes its prompt's logprobs, which come with the first continuation alone."""
        if self._params.prompt_logprobs is None:
            return step
        self._held += step
        for prompt, delta in step:
            if delta.prompt_logprobs is not None:
                self._prompt_logprobs[prompt] = delta.prompt_logprobs
        due = [item for item in self._held if item[0] in self._prompt_logprobs]
        self._held = [item for item in self._held if item[0] not in self._prompt_logprobs]
        return due

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._body.include_usage else {}
        return {**self._head, "object": "text_completion", "choices": choices, **usage}

    def _echo(self, prompt: int) -> str:
        """What of the prompt stands before a continuation."""
        if not self._body.echo:
            return ""
        given = self._body.prompt
        if isinstance(given, str):
            return given
        if isinstance(given[prompt], str):
            return given[prompt]  # type: ignore[return-value]
        # Ids that the tokenizer does not know, though the model does, have no text.
        stream = self._service.tokenizer_for("echo").stream(
            skip_special_tokens=self._params.skip_special_tokens, ignore_unknown=True)
        return "".join(map(stream.push, self._generation.prompts[prompt])) + stream.flush()

    def _writer(self, prompt: int) -> CompletionLogprobsWriter:
        after = () if self._body.echo else self._generation.prompts[prompt]
        return CompletionLogprobsWriter(self._service.names, self._service.engine.tokenizer,
                                        self._params.skip_special_tokens, after)

    def _write_logprobs(self, writer: CompletionLogprobsWriter, echoed: int | None, token_ids: list[int],
                        entries: list[dict[int, Logprob]] | None) -> dict[str, Any]:
        """Of the prompt `echoed`, where it is to be, and what follows it."""
        if not self._body.echo or echoed is None:
            return writer.write(token_ids, entries or [])
        prompt = self._generation.prompts[echoed]
        return writer.write([*prompt, *token_ids], [*self._prompt_logprobs[echoed], *(entries or [])])
