"""Messages and tools as a chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from maxlike.serve.errors import ApiError
from maxlike.serve.protocol import ChatMessage, Templated, Tool
from maxlike.serve.service import Service, in_thread

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "self"}  # the last is Python's


async def conversation_ids(service: Service, messages: Sequence[ChatMessage], templated: Templated, *,
                           with_tools: bool = True) -> list[int]:
    """The prompt that the chat template makes of a conversation.

    Raises:
        ApiError: there is no template (400), or a message holds what none can take.
        ValueError: the template refuses it.
    """
    tokenizer = service.tokenizer_for("a conversation")
    if not service.has_chat_template:
        raise ApiError(400, "The model has no chat template: use /v1/completions, or start the server with "
                       "--chat-template.", param="messages", code="no_chat_template")
    variables = templated.chat_template_kwargs or {}
    if taken := sorted(_RESERVED & set(variables)):
        raise ApiError(400, f"chat_template_kwargs may not hold {', '.join(taken)}: these names are taken.",
                       param="chat_template_kwargs")
    developer = "developer" if "developer" in (tokenizer.chat_template or "") else "system"
    given = [_message(message, developer, f"messages[{i}]") for i, message in enumerate(messages)]
    tools = [as_schema(tool) for tool in templated.tools or []] if with_tools else []
    prompt = await in_thread(lambda: tokenizer.encode_chat(
        given, add_generation_prompt=templated.add_generation_prompt is not False, tools=tools or None, **variables))
    if not prompt:
        raise ApiError(400, "The chat template made an empty prompt of the messages.", param="messages")
    return prompt


def as_schema(tool: Tool) -> dict[str, Any]:
    """A tool as templates expect it."""
    return tool.model_dump(exclude_none=True)


def _message(message: ChatMessage, developer: str, where: str) -> dict[str, Any]:
    given = message.model_dump(exclude_none=True, exclude={"annotations"})
    if message.role == "developer":  # OpenAI's later name for it
        given["role"] = developer
    if isinstance(message.content, list):
        given["content"] = "\n".join(part.text for part in message.content)
    if not message.tool_calls:
        given.pop("tool_calls", None)
    for i, call in enumerate(given.get("tool_calls", ())):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"],
                                                   f"{where}.tool_calls[{i}].function.arguments")
    if message.content is None and not message.tool_calls:
        raise ApiError(400, f"{where} has no content.", param=f"{where}.content")
    return given


def _arguments(text: str, where: str) -> dict[str, Any]:
    # Templates write them as an object, which OpenAI has as text.
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be a JSON object, as text; got {text!r:.80}.", param=where)
    return value
