"""Tool calls as models write them: found in a text while it comes, and forced by a grammar.

There is no common form. These are known, by the name of whose models write them:

- `hermes` (NousResearch's Hermes, Qwen 2.5 and 3): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several
  after one another.
- `llama` (Llama 3.1 to 3.3): `{"name": ..., "parameters": {...}}` and nothing before it, or after `<|python_tag|>`.
- `mistral` (Mistral's up to version 7 of its tokenizers): `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxlike.engine.sampling_params import StructuredOutput


@dataclass(frozen=True)
class _Form:
    """How calls are written.

    `opening` and `closing` stand around the JSON, which begins with `first`. With `bare` it may also begin the answer,
    without `opening`; with `chained`, follow another call. A grammar has them as `begin before CALL after between
    before CALL after end`; without `between`, only one.
    """

    opening: str
    first: str
    arguments: str
    closing: str = ""
    bare: bool = False
    chained: bool = False
    begin: str = ""
    before: str = ""
    after: str = ""
    between: str = ""
    end: str = ""


# Where a special token opens the calls, grammars leave it out: they are made of text, as which it would be spelt.
_FORMS = {
    "hermes": _Form("<tool_call>", "{", "arguments", closing="</tool_call>", before="<tool_call>\n",
                    after="\n</tool_call>", between="\n"),
    "llama": _Form("<|python_tag|>", "{", "parameters", bare=True, chained=True),
    "mistral": _Form("[TOOL_CALLS]", "[", "arguments", bare=True, begin="[", between=", ", end="]"),
}
KINDS = tuple(_FORMS)
"""The forms' names."""

_SPACE = re.compile(r"\s*")
_CHAIN = re.compile(r"\s*;?\s*")
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_KEYS = {"name", "arguments", "parameters", "type", "id"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_LIKE_TRAINING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def detect(chat_template: str | None) -> str | None:
    """The form that a chat template teaches, one of `KINDS`; `None` where it teaches none of them."""
    template = chat_template or ""
    if "<tool_call>" in template:  # others put XML in it: Qwen3-Coder, GLM 4.5
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "[TOOL_CALLS]" in template:  # from version 11 on a name and [ARGS] follow it
        return None if "[ARGS]" in template else "mistral"
    return "llama" if '{"name": function name, "parameters":' in template else None


def schema_for(kind: str, tools: Sequence[Mapping[str, Any]], *, several: bool) -> StructuredOutput:
    """What an answer looks like that is made of calls: for `StructuredOutput.grammar`, in the form `kind`.

    Args:
        kind: one of `KINDS`.
        tools: as OpenAI has them, `{"type": "function", "function": {"name": ..., "parameters": JSON schema}}`. A
            function without `parameters` takes no arguments.
        several: whether there may be more calls than one, where the form has more.

    Raises:
        ValueError: no such form, no function, or a function's parameters are no schema of an object. What llguidance
            cannot keep of a schema is found when the grammar is compiled.
    """
    form = _form(kind)
    functions = [tool["function"] for tool in tools]
    if not functions:
        raise ValueError("A call is to be forced, and there are no tools to call: give one at least.")
    call = " | ".join(f"call_{i}" for i in range(len(functions)))
    calls = f"call ({json.dumps(form.between)} call)*" if form.between and several else "call"
    lines = [f"start: {json.dumps(form.begin)} {calls} {json.dumps(form.end)}", f"call: {call}"]
    for i, function in enumerate(functions):
        before = f'{form.before}{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
        # Each schema is a document of its own, so that its references find what they name.
        lines += [f"call_{i}: {json.dumps(before)} arguments_{i} {json.dumps('}' + form.after)}",
                  f"arguments_{i}: %json {json.dumps(_schema(function))}"]
    return StructuredOutput(grammar="\n".join(lines) + "\n")


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    if schema is None:
        schema = {"properties": {}, "additionalProperties": False}
    types = schema.get("type", "object") if isinstance(schema, Mapping) else None
    if types != "object" and not (isinstance(types, list) and "object" in types):
        raise ValueError(f"The parameters of function {function['name']!r} must be the JSON schema of an object; got "
                         f"{schema!r:.80}.")
    return {**schema, "type": "object", "x-guidance": _LIKE_TRAINING}


def _form(kind: str) -> _Form:
    if kind not in _FORMS:
        raise ValueError(f"There is no form of tool calls called {kind!r}; there are: {', '.join(KINDS)}.")
    return _FORMS[kind]


class ToolCallParser:
    """Parts one answer, as it comes, into content and tool calls.

    However the text is cut into pieces, the same comes of it. Each call is given out when it is complete. What begins
    like one and is none stays content, to the letter. White space before and after calls is left out, except between a
    call and content that follows it.

    Args:
        kind: one of `KINDS`. Raises ValueError for another.
    """

    def __init__(self, kind: str):
        self._kind, self._form = kind, _form(kind)
        self._text = ""  # not given out yet
        self._json: _JsonEnd | None = None  # within a call
        self._head = 0  # there: how much of the text comes before its JSON
        self._marked = False  # there: whether that holds `opening`
        self._may_be_bare = self._form.bare
        self._after_call = False
        self._n_calls = 0

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The next text: what is certain to be content now, and the calls that are complete now.

        A call is one delta in OpenAI's form: `{"index": 0, "id": ..., "type": "function", "function": {"name": ...,
        "arguments": JSON text of an object}}`.
        """
        self._text += text
        return self._read(last=False)

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """The same at the end of the text, for what `push` had to hold back."""
        return self._read(last=True)

    def _read(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        while self._text:
            if not (self._read_content(content, last) if self._json is None else self._read_call(content, calls, last)):
                break
        return "".join(content), calls

    def _read_content(self, content: list[str], last: bool) -> bool:
        """Goes on to where a call may begin. False if that is not in the text."""
        if self._may_be_bare:
            before = (_CHAIN if self._after_call else _SPACE).match(self._text)
            assert before is not None
            if before.end() == len(self._text) and not last:
                return False
            if self._text.startswith(self._form.first, before.end()):
                self._begin_call(before.end(), marked=False)
                return True
            self._may_be_bare = False
        opening = self._form.opening
        at = self._text.find(opening)
        if at >= 0:
            shown = len(self._text[:at].rstrip())
            self._give(content, shown)
            self._begin_call(at - shown + len(opening), marked=True)
            return True
        if not last:
            held = next((n for n in range(len(opening) - 1, 0, -1) if self._text.endswith(opening[:n])), 0)
            self._give(content, len(self._text[: len(self._text) - held].rstrip()))
        elif self._after_call and self._text.isspace():
            self._text = ""
        else:
            self._give(content, len(self._text))
        return False

    def _read_call(self, content: list[str], calls: list[dict[str, Any]], last: bool) -> bool:
        """Goes on to behind the call, or what was taken for one. False if its end is not in the text."""
        assert self._json is not None
        start = _skip_space(self._text, self._head)
        if start == len(self._text):
            return last and self._refuse(content)
        if self._text[start] != self._form.first:
            return self._refuse(content)
        try:
            end = self._json.find(self._text, start)
        except ValueError:
            return self._refuse(content)
        if end is None:
            return last and self._refuse(content)
        behind = end
        if closing := self._form.closing:
            at = _skip_space(self._text, end)
            found = self._text[at : at + len(closing)]
            if not closing.startswith(found):
                return self._refuse(content)
            if found != closing and not last:
                return False
            behind = at + len(found)
        if not (read := _calls(self._text[start:end], self._marked)):
            return self._refuse(content)
        for name, arguments in read:
            calls.append({"index": self._n_calls, "id": self._new_id(), "type": "function",
                          "function": {"name": name, "arguments": arguments}})
            self._n_calls += 1
        self._text, self._json, self._after_call = self._text[behind:], None, True
        self._may_be_bare = self._form.chained
        return True

    def _begin_call(self, head: int, marked: bool) -> None:
        self._head, self._marked, self._json = head, marked, _JsonEnd()

    def _refuse(self, content: list[str]) -> bool:
        """It is no call. Another may begin within what was taken for it."""
        self._json, self._may_be_bare = None, False
        if self._marked:
            self._give(content, self._head)
        return True

    def _give(self, content: list[str], length: int) -> None:
        if length:
            content.append(self._text[:length])
            self._text, self._after_call = self._text[length:], False

    def _new_id(self) -> str:
        # Mistral's chat templates refuse ids of another length.
        return secrets.token_hex(5)[:9] if self._kind == "mistral" else f"call_{secrets.token_hex(12)}"


class _JsonEnd:
    """Where an object or array of JSON ends, in a text that grows; looks at each character once.

    It counts brackets and no more: what lies between start and end may still be none.
    """

    _BETWEEN_STRINGS = re.compile(r"[ \t\r\n0-9+\-.:,aeflnrstuE]*")
    _IN_STRING = re.compile(r'[^"\\]*')

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._in_string = False
        self._end: int | None = None

    def find(self, text: str, start: int) -> int | None:
        """The position behind it, `None` where it is not there yet. Raises ValueError for what no JSON has."""
        self._at = max(self._at, start)
        while self._end is None:
            run = (self._IN_STRING if self._in_string else self._BETWEEN_STRINGS).match(text, self._at)
            assert run is not None
            self._at = run.end()
            next = text[self._at : self._at + 1]
            if not next or (next == "\\" and self._at + 1 == len(text)):
                return None
            if next == '"':
                self._in_string = not self._in_string
            elif self._in_string:  # a backslash, and what it escapes
                self._at += 1
            elif next in "{[":
                self._depth += 1
            elif next in "}]":
                self._depth -= 1
            else:
                raise ValueError(f"{next!r} outside of a string is not JSON.")
            self._at += 1
            if self._depth == 0:
                self._end = self._at
        return self._end


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _calls(text: str, marked: bool) -> list[tuple[str, str]] | None:
    """Names and arguments of the calls in a JSON text; `None` if anything but calls is in it."""
    try:
        value = json.loads(text, strict=False)  # models leave line ends in strings as they are
        return [_call(item, marked) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None


def _call(item: Any, marked: bool) -> tuple[str, str]:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not _NAME.fullmatch(item["name"]):
        raise ValueError("A call is an object with the name of a function.")
    if not marked and not item.keys() <= _KEYS:
        raise ValueError("Without a mark, an object with other members is an answer in JSON.")
    arguments = item.get("arguments", item.get("parameters", {} if marked else None))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, strict=False)
    if not isinstance(arguments, dict):
        raise ValueError("A call's arguments are an object.")
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair can be escaped in JSON, and not encoded in UTF-8.
    return item["name"], _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", written)
