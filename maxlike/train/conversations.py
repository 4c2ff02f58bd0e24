"""Conversations through the checkpoint's own chat template, and which of their tokens are the assistant's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxlike.models.tokenizer import Tokenizer
from maxlike.train.records import DataError

Message = dict[str, Any]
Span = tuple[int, int]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters, which no text has
_MARKS = re.compile(f"[{_BEGIN}{_END}]")


def check_messages(value: Any, name: str) -> list[Message]:
    """`value` as messages for a template: text parts joined, the arguments of tool calls as objects.

    Raises:
        DataError: "wrong_type" or "unknown_role".
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError("wrong_type", f'{name} must be a list of objects, as [{{"role": "user", "content": "Hello"}}]; '
                                      f"got {value!r:.80}")
    return [_check_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _check_message(message: Message, name: str) -> Message:
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if not isinstance(role, str):
        raise DataError("wrong_type", f"{name}.role must be text, such as 'user'; got {role!r:.80}")
    if role not in ROLES:
        raise DataError("unknown_role", f"{name}.role {role!r:.80} is unknown: expected one of {', '.join(ROLES)}")
    if isinstance(content, list) and content:
        texts = [part["text"] for part in content
                 if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise DataError("wrong_type", f'{name}.content may hold parts {{"type": "text", "text": ...}} and no '
                                          f"others; got {content!r:.80}")
        content = "\n".join(texts)  # as the server joins them
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        raise DataError("wrong_type", f"{name}.content must be text; got {content!r:.80}")
    checked = {**message, "content": content}
    if calls is None:
        checked.pop("tool_calls", None)
    elif not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError("wrong_type", f"{name}.tool_calls must be a list of objects; got {calls!r:.80}")
    elif not calls:
        checked.pop("tool_calls")
    else:
        checked["tool_calls"] = [_with_arguments(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return checked


def _with_arguments(call: Message, name: str) -> Message:
    # OpenAI has arguments as text, templates write them from an object.
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError("wrong_type", f"{name}.function.arguments must be a JSON object, possibly as text; got "
                                      f"{function['arguments']!r:.80}")
    return {**call, "function": {**function, "arguments": arguments}}


class ChatEncoder:
    """Conversations to tokens, and which of those the assistant says, its end-of-turn token included.

    Where the template marks the assistant's words (`{% generation %}`), the marks say so. Otherwise the conversation
    up to each of the assistant's turns is rendered (with the generation prompt) and up to its end; both must be what
    the whole conversation begins with.
    """

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None):
        """`variables` go to the template, as `enable_thinking` or a date do."""
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        self._marked = None
        if any("endgeneration" in source for source in tokenizer.chat_templates.values()):
            self._marked = tokenizer.with_generation_marks(_BEGIN, _END)

    def encode(self, messages: Sequence[Message], turns: Sequence[int], tools: list[Any] | None = None,
               variables: Mapping[str, Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids `int32[n]`, learned `bool[n]`): the learned tokens are those of the assistant's turns `turns`.

        Args:
            messages: as `check_messages` returns them.
            turns: indices of messages, in order; each is the assistant's.
            tools: what the assistant may call, JSON schemas.
            variables: for the template, before those of this encoder.

        Raises:
            DataError: "template" where it refuses the conversation; "unstable_template" where the turns cannot be
                found in what it writes; "wrong_type" for text that is not Unicode.
            ValueError: the checkpoint has no chat template.
        """
        if not self._tokenizer.chat_templates:
            self._tokenizer.apply_chat_template(messages)  # raises, and says what is missing
        given = {"tools": tools, **self._variables, **(variables or {})}
        text = self._render(self._tokenizer, messages, False, given)
        spans = self._marked_spans(text, messages, turns, given)
        marked = spans is not None
        if spans is None:
            spans = self._prefix_spans(text, messages, turns, given)
        try:
            ids, offsets = self._tokenizer.encode_with_offsets(text)
        except ValueError as error:
            raise DataError("wrong_type", str(error)) from error
        return np.asarray(ids, np.int32), self._learned(text, ids, offsets, spans, marked)

    def _render(self, tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool, given: dict[str, Any]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **given)
        except ValueError as error:
            raise DataError("template", str(error)) from error

    def _marked_spans(self, text: str, messages: Sequence[Message], turns: Sequence[int],
                      given: dict[str, Any]) -> list[Span] | None:
        """What the template marks, in `text`; None where it has no marks, or not one pair for each turn."""
        marked = text if self._marked is None else self._render(self._marked, messages, False, given)
        if marked == text:
            return None
        spans, pieces, size, begin = [], [], 0, 0
        last = 0
        for mark in _MARKS.finditer(marked):
            pieces.append(marked[last : mark.start()])
            size += len(pieces[-1])
            last = mark.end()
            if mark.group() == _BEGIN:
                begin = size
            else:
                spans.append((begin, size))
        if "".join([*pieces, marked[last:]]) != text:
            raise DataError("unstable_template", "the chat template changes what stands between its generation marks "
                                                 "after they are written, or the messages hold U+FDD0 or U+FDD1")
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(assistant):
            return [spans[assistant.index(turn)] for turn in turns]
        return spans if list(turns) == assistant else None

    def _prefix_spans(self, text: str, messages: Sequence[Message], turns: Sequence[int],
                      given: dict[str, Any]) -> list[Span]:
        spans = []
        for turn in turns:
            if turn == 0:
                raise DataError("template", "the conversation begins with the assistant: without a message before, "
                                            "the chat template does not show where its words begin")
            before = self._render(self._tokenizer, messages[:turn], True, given)
            last = turn == len(messages) - 1
            upto = text if last else self._render(self._tokenizer, messages[: turn + 1], False, given)
            if not text.startswith(before) or not text.startswith(upto) or len(upto) < len(before):
                raise DataError("unstable_template", (
                    f"the chat template writes messages[{turn}] differently when others follow (some drop earlier "
                    "thinking) or when it is to be answered: which tokens are the assistant's cannot be told. Learn "
                    "each turn in an example of its own (turns='apart'), or use a template with "
                    "{% generation %} marks"))
            spans.append((len(before), len(upto)))
        return spans

    def _learned(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]],
                 spans: Sequence[Span], marked: bool) -> np.ndarray:
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        special = self._tokenizer.special_ids
        learned = np.zeros(len(ids), bool)
        for begin, end in spans:
            # Some tokenizers give a token of spaces no width: it is in where its neighbours are.
            inside = np.flatnonzero((starts < end) & (ends > begin) & (ends > starts))
            if not inside.size:
                continue
            first, last = int(inside[0]), int(inside[-1])
            if marked:
                follows = ids[last + 1] if last + 1 < len(ids) else None
                if ids[last] not in special and follows in special and follows != self._tokenizer.bos_token_id:
                    last += 1  # the marks leave the end of the turn out: without it a model learns no end
            else:
                ending = next((i for i in range(last, first - 1, -1) if ids[i] in special), None)
                if ending is not None and not text[ends[ending] : end].strip():
                    last = ending  # the newline behind the end of a turn is never generated
            learned[first : last + 1] = True
        return learned
