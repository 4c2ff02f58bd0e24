"""`POST /v1/chat/completions`: a conversation, answered."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from maxlike.engine.output import Delta, FinishReason
from maxlike.engine.sampling_params import SamplingParams, StructuredOutput
from maxlike.serve.body import read_body
from maxlike.serve.conversation import as_schema, conversation_ids
from maxlike.serve.errors import ApiError
from maxlike.serve.event_stream import DONE, EventStream, event
from maxlike.serve.generation import Continuation, Generation
from maxlike.serve.json_reply import JsonReply
from maxlike.serve.logprobs import chat_logprobs
from maxlike.serve.protocol import ChatRequest, NamedTool
from maxlike.serve.replies import AssistantMessage, ChatChoice, ChatCompletion, ChatLogprobs, ToolCall
from maxlike.serve.service import Service
from maxlike.serve.tool_calls import ToolCallParser, schema_for


async def chat_completions(service: Service, request: Request) -> Response:
    """The endpoint `/v1/chat/completions`; an `ApiError` that it raises becomes its answer."""
    body = await read_body(request, ChatRequest, service.config)
    service.check_model(body.model)
    service.check_count(1, body.n or 1)
    uses_tools = bool(body.tools) and body.tool_choice != "none"
    structured = _structured_output(service, body) if uses_tools else None
    if structured is None and body.response_format is not None:
        structured = body.response_format.structured_output()
    if structured is not None and body.structured_outputs is not None:
        raise ApiError(400, "structured_outputs, response_format and a forced tool_choice each say what the answer "
                       "looks like: give one of them.", param="structured_outputs")
    prompt = await conversation_ids(service, body.messages, body, with_tools=uses_tools)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    service.room_for(len(prompt), max_tokens, "messages")
    more: dict[str, Any] = {} if structured is None else {"structured_output": structured}
    if uses_tools and body.skip_special_tokens is None:
        more["skip_special_tokens"] = False  # some models begin a call with one
    params = body.sampling_params(max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                                  **more)
    answer = _Answer(service, body, Generation(service, [prompt], params, body.priority or 0), uses_tools)
    if body.stream:
        return EventStream(answer.chunks(), service.admission)
    return JsonReply(await service.admission.run(answer.whole(), request.receive))


def _structured_output(service: Service, body: ChatRequest) -> StructuredOutput | None:
    """What a forced call looks like; `None` where the model is free to call or not."""
    assert body.tools is not None
    if service.tool_format is None:
        raise ApiError(400, "The server does not know how this model writes tool calls: its chat template tells of no "
                       "form that it knows. Start the server with --tool-format to name one.", param="tools")
    if body.response_format is not None and body.response_format.type != "text":
        raise ApiError(400, "With tools an answer may be a call, which response_format would forbid: give one of them, "
                       "or tool_choice 'none'.", param="response_format")
    if body.tool_choice in (None, "auto"):
        if strict := [tool.function.name for tool in body.tools if tool.function.strict]:
            raise ApiError(400, f"strict is kept where a call is forced, by tool_choice 'required' or a function's "
                           f"name; with 'auto' leave it out ({', '.join(strict)}).", param="tools")
        return None
    tools, several = body.tools, body.parallel_tool_calls is not False
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools, several = [tool for tool in tools if tool.function.name == name][:1], False
    return schema_for(service.tool_format, [as_schema(tool) for tool in tools], several=several)


class _Answer:
    """One request's answers, in one piece or many."""

    def __init__(self, service: Service, body: ChatRequest, generation: Generation, uses_tools: bool):
        self._service, self._body, self._generation = service, body, generation
        self._params: SamplingParams = generation.params
        self._choices = [_Choice(service, uses_tools, body.parallel_tool_calls is not False)
                         for _ in range(self._params.n)]
        self._head: dict[str, Any] = {"id": f"chatcmpl-{generation.id}", "created": int(time.time()),
                                      "model": service.name}

    async def whole(self) -> ChatCompletion:
        (answers,) = await self._generation.collect()
        choices = [self._whole_choice(index, done) for index, done in enumerate(answers)]
        return ChatCompletion(**self._head, choices=choices, usage=self._generation.usage())

    def _whole_choice(self, index: int, done: Continuation) -> ChatChoice:
        choice = self._choices[index]
        content, calls = choice.push(done.text, last=True)
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = ChatLogprobs(content=self._logprobs(done))
        message = AssistantMessage(content=content if content or not calls else None,
                                   tool_calls=[ToolCall(**call) for call in calls] or None)
        return ChatChoice(index=index, message=message, logprobs=logprobs, stop_reason=done.stop_reason,
                          finish_reason=choice.finish_reason(done.finish_reason))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Events: one write for all that a step brings."""
        generation = self._generation
        async with aclosing(generation.steps()) as steps:
            async for step in steps:
                events = [event(self._chunk([choice])) for _, delta in step for choice in self._chunk_choices(delta)]
                if events:
                    yield b"".join(events)
        if self._body.include_usage:
            yield event(self._chunk([]) | {"usage": generation.usage().model_dump()})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._body.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **usage}

    def _chunk_choices(self, delta: Delta) -> Iterator[dict[str, Any]]:
        choice = self._choices[delta.index]

        def chunk(content: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {"index": delta.index, "delta": content, "logprobs": None, "finish_reason": None, **more}

        if not choice.begun:
            choice.begun = True
            yield chunk({"role": "assistant", "content": ""})
        text, calls = choice.push(delta.text, last=delta.finish_reason is not None)
        logprobs = {}
        if self._params.logprobs is not None and delta.token_ids:
            logprobs = {"logprobs": {"content": self._logprobs(delta), "refusal": None}}
        if text or logprobs:
            yield chunk({"content": text}, **logprobs)
        if calls:
            yield chunk({"tool_calls": calls})
        if delta.finish_reason is not None:
            yield chunk({}, finish_reason=choice.finish_reason(delta.finish_reason), stop_reason=delta.stop_reason)

    def _logprobs(self, source: Delta | Continuation) -> list[Any]:
        return chat_logprobs(self._service.names, source.token_ids, source.logprobs or [], self._params.logprobs or 0)


class _Choice:
    """One answer on its way: its text, and the calls in it."""

    def __init__(self, service: Service, uses_tools: bool, several: bool):
        self.begun = False
        self._several = several
        self._called = False
        self._parser = ToolCallParser(service.tool_format) if uses_tools and service.tool_format else None

    def push(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """The next text: what of it is content, and what calls, in OpenAI's form of deltas."""
        if self._parser is None:
            return text, []
        content, calls = self._parser.push(text)
        if last:
            rest, more = self._parser.flush()
            content, calls = content + rest, [*calls, *more]
        calls = [call for call in calls if self._several or call["index"] == 0]
        self._called = self._called or bool(calls)
        return content, calls

    def finish_reason(self, reason: FinishReason | None) -> Any:
        """A text that ended of itself, with calls in it, ended to have them made."""
        return "tool_calls" if reason == "stop" and self._called else reason
