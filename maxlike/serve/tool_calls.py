"""What models write when they call tools, as OpenAI's `tool_calls`; and grammars that make them call one.

Models are trained to one of a few forms, which their chat templates show them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxlike.engine.grammar import as_held
from maxlike.engine.sampling_params import StructuredOutput


@dataclass(frozen=True)
class _Form:
    """How calls are written: JSON objects with a name and arguments.

    Args:
        opening, closing: what stands around a call; the closing may be missing.
        bare: the character with which calls may begin without the opening, where no text has been before.
        between: what may stand between calls that have no opening.
        arguments: the key.
        before, joint, after: what stands before, between and after the calls of a forced answer.
        id_prefix, id_length: of a call's id, with so many letters and digits. Mistral's templates want nine, no more.
    """

    opening: str
    closing: str = ""
    bare: str = ""
    between: str = ""
    arguments: str = "arguments"
    before: str = ""
    joint: str = ""
    after: str = ""
    id_prefix: str = "call_"
    id_length: int = 24


_FORMS = {
    # <tool_call>{"name": ..., "arguments": {...}}</tool_call>, NousResearch's Hermes 2 Pro, Qwen 2.5, Qwen 3
    "hermes": _Form("<tool_call>", "</tool_call>", before="<tool_call>\n", joint="\n</tool_call>\n<tool_call>\n",
                    after="\n</tool_call>"),
    # {"name": ..., "parameters": {...}}, Llama 3.1 to 3.3; several with semicolons between
    "llama": _Form("<|python_tag|>", bare="{", between=";", arguments="parameters", joint="; "),
    # [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], Mistral up to version 7 of its tokenizer. The opening is a
    # special token, which is missing where special tokens are left out, and which a forced answer does without.
    "mistral": _Form("[TOOL_CALLS]", bare="[", before="[", joint=", ", after="]", id_prefix="", id_length=9),
}
KINDS = tuple(_FORMS)
"""Names of the forms."""


def detect(chat_template: str) -> str | None:
    """The form of calls that a chat template shows to its model; `None` where it is none of `KINDS`."""
    if "<tool_call>" in chat_template:
        # Qwen3-Coder and GLM have the same opening, but no JSON in it.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else "hermes"
    if "[TOOL_CALLS]" in chat_template:
        return None if "[ARGS]" in chat_template else "mistral"
    if re.search(r'\{"name": .{0,120}?"parameters": ', chat_template, re.DOTALL):
        return "llama"
    return None


def schema_for(kind: str, tools: Sequence[Mapping[str, Any]], choice: str, several: bool = True) -> StructuredOutput:
    """What an answer looks like that calls a tool and does nothing else.

    Args:
        kind: one of `KINDS`.
        tools: in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters": schema}}`.
        choice: "required": any of them, once or (if `several`) more often; or the name of the one to be called, once.

    Raises:
        ValueError: `choice` names none of them, or a schema is not one of an object.
    """
    form = _form(kind)
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        functions, several = [function for function in functions if function["name"] == choice], False
    if not functions:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise ValueError(f"No tool is named {choice!r}; there are: {names or 'none'}.")
    rules = [f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
        rules.append(f"call{i}: {_quoted(head)} arguments{i} {_quoted('}')}")
        rules.append(f"arguments{i}: %json {json.dumps(_parameters(function))}")
    more = f" ({_quoted(form.joint)} call)*" if several else ""
    around = [_quoted(text) if text else "" for text in (form.before, form.after)]
    return StructuredOutput(grammar="\n".join([f"start: {around[0]} call{more} {around[1]}", *rules]))


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    if schema is None:  # OpenAI: a function without parameters
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(f"The parameters of {function['name']} must be a JSON schema of type object; got "
                         f"{schema!r:.100}.")
    return as_held({**schema, "type": "object"})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _form(kind: str) -> _Form:
    if kind not in _FORMS:
        raise ValueError(f"Calls of tools are written in one of the forms {', '.join(KINDS)}; got {kind!r}.")
    return _FORMS[kind]


class ToolCallParser:
    """Finds the calls in a text that comes in pieces; however it is cut, the result is the same.

    A call is given out when it is complete. What looked like one and is none, or breaks off, is content: nothing is
    lost but whitespace beside calls.

    Args:
        kind: one of `KINDS`.
    """

    def __init__(self, kind: str):
        self._form = _form(kind)
        self._n_calls = 0
        self._text = ""  # not decided yet
        self._end: _JsonEnd | None = None  # in `_text`, of the value that should be a call; None outside of one
        self._released = 0  # how much of `_text` is certainly content if it is none
        self._is_bare = False  # whether it has no opening
        self._may_close = False  # whether a call has just ended, so that its closing may follow
        self._begins = True  # whether nothing but whitespace has been content since the start or the last call

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What the next piece of text makes certain.

        Returns:
            New content, and new calls as OpenAI's deltas: `{"index": of the call, "id": ..., "type": "function",
            "function": {"name": ..., "arguments": a JSON object, as text}}`.
        """
        if not (self._text or self._begins or self._form.opening[0] in text or text[-1:].isspace()):
            return text, []  # most text, at little cost
        self._text += text
        return self._decide(final=False)

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """As `push`, when no more text comes."""
        return self._decide(final=True)

    def _decide(self, final: bool) -> tuple[str, list[dict[str, Any]]]:
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        while self._end is not None or self._find(content, final):
            assert self._end is not None
            end = self._end.find(self._text)
            if end is None and not final:
                break
            found = _calls(self._text[self._end.start:end], needs_arguments=self._is_bare) if end else []
            if found:
                calls += [self._delta(name, arguments) for name, arguments in found]
                self._text = self._text[end:]
                self._begins, self._may_close = True, bool(self._form.closing)
            else:
                self._give(self._released, content)
            self._end = None
        return "".join(content), calls

    def _find(self, content: list[str], final: bool) -> bool:
        """Gives out the text before the next place where a call may begin; False where none is in sight."""
        form = self._form
        if self._may_close:
            rest = self._text.lstrip()
            if not final and form.closing != rest and form.closing.startswith(rest):
                return False
            if rest.startswith(form.closing):
                self._text = rest.removeprefix(form.closing)
            self._may_close = False
        text, lead = self._text, 0
        if self._begins:
            lead = len(text) - len(text.lstrip())
            if self._n_calls and form.between and text.startswith(form.between, lead):
                rest = text[lead + len(form.between) :].lstrip()
                if not final and form.opening != rest and form.opening.startswith(rest):
                    return False
                if rest.startswith((form.opening, form.bare)):
                    lead = len(text) - len(rest)
            is_opening = text.startswith(form.opening, lead) or (not final and form.opening.startswith(text[lead:]))
            if form.bare and text.startswith(form.bare, lead) and not is_opening:
                return self._try(0, lead, lead + 1, content)
        at = text.find(form.opening)
        if at >= 0:
            value = at + len(form.opening)
            return self._try(0 if at == lead else len(text[:at].rstrip()), value, value, content)
        if final:
            given = len(text)
            if self._n_calls and self._begins and text.isspace():
                self._text, given = "", 0
        else:
            begun = max(n for n in range(len(form.opening)) if text.endswith(form.opening[:n]))
            given = len(text[: len(text) - begun].rstrip())
        self._give(given, content)
        return False

    def _try(self, given: int, value: int, released: int, content: list[str]) -> bool:
        """Looks for a call's value from `value` on; if it is none, all before `released` is content."""
        self._is_bare = released > value
        self._end, self._released = _JsonEnd(value - given), released - given
        self._give(given, content)
        return True

    def _give(self, n: int, content: list[str]) -> None:
        if n:
            content.append(self._text[:n])
            self._text = self._text[n:]
            self._begins = False

    def _delta(self, name: str, arguments: str) -> dict[str, Any]:
        index, self._n_calls = self._n_calls, self._n_calls + 1
        id = self._form.id_prefix + secrets.token_hex(16)[: self._form.id_length]
        return {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


class _JsonEnd:
    """Finds where a JSON object or array ends, in a text that grows."""

    _OTHERS = re.compile(r"[\s0-9:,truefalsn+\-.E]*")
    _CHARACTERS = re.compile(r'[^"\\]*')

    def __init__(self, start: int):
        self.start = start
        """Where it begins, or the whitespace before it."""
        self._at = start
        self._depth = 0
        self._in_text = False

    def find(self, text: str) -> int | None:
        """Where the value ends; 0 if it is certainly none, `None` where `text` ends before it."""
        while True:
            pattern = self._CHARACTERS if self._in_text else self._OTHERS
            match = pattern.match(text, self._at)
            assert match is not None
            at = match.end()
            if not self._depth and match[0].strip():
                return 0
            character = text[at : at + 1]
            if not character or (character == "\\" and at + 1 == len(text)):
                self._at = at
                return None
            self._at = at + 1
            if self._in_text:
                self._at += character == "\\"
                self._in_text = character == "\\"
            elif character in "{[":
                self._depth += 1
            elif character in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return self._at
            elif character == '"' and self._depth:
                self._in_text = True
            else:
                return 0


def _calls(text: str, needs_arguments: bool) -> list[tuple[str, str]]:
    """The calls, by name and arguments, of a JSON object or of an array of some; none where it is otherwise."""
    try:
        value = json.loads(text, strict=False)
        calls = [_call(entry, needs_arguments) for entry in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return []
    return [call for call in calls if call is not None] if None not in calls else []


def _call(entry: Any, needs_arguments: bool) -> tuple[str, str] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        return None
    arguments = entry.get("arguments", entry.get("parameters"))
    if isinstance(arguments, str):  # models also write them as OpenAI has them
        arguments = json.loads(arguments, strict=False)
    if arguments is None and not needs_arguments:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    entry["name"].encode()  # half a surrogate pair is no name; raises a ValueError
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        written.encode()
    except UnicodeEncodeError:
        written = json.dumps(arguments)
    return entry["name"], written
