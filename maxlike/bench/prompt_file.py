"""Prompts from a file: JSON Lines, or conversations as ShareGPT has them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Content = str | tuple[int, ...] | tuple[Mapping[str, Any], ...]
"""A prompt: text, token ids, or the messages of a chat."""

_EXPECTED = ("an object with `prompt` (text or token ids), `messages` or `conversations` (ShareGPT's), and "
             "`output_len` where the output's length is given")
_OURS, _THEIRS = ("human", "user"), ("gpt", "assistant", "chatgpt")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file says of one request.

    Args:
        content: the prompt.
        reply: the text that followed it, whose length the output may be given; `None` where the file has none.
        output_len: the output's length in tokens; `None` where the file does not say.
    """

    content: Content
    reply: str | None = None
    output_len: int | None = None


def read_prompts(file: Path) -> list[Entry]:
    """The entries of `file`: one JSON object a line, or one JSON array of objects (ShareGPT's form).

    Of a conversation the first message of a user is the prompt, and the answer to it the reply; conversations without
    such a pair are left out.

    Raises:
        ValueError: the file cannot be read, holds no prompt, or an entry is not understood (its place is named).
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The prompts in {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The prompts in {file} are not UTF-8: {error}.") from error
    entries = []
    for where, value in _objects(text, str(file)):
        entry = _entry(value, where)
        if entry is not None:
            entries.append(entry)
    if not entries:
        raise ValueError(f"{file} holds no prompt: expected on each line {_EXPECTED}.")
    return entries


def _objects(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each entry."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} begins like a JSON array and is none: {error}.") from error
        yield from ((f"{name}, entry {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{name}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number} is not JSON: {error}.") from error


def _entry(value: Any, where: str) -> Entry | None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected {_EXPECTED}; got {type(value).__name__}.")
    given = [key for key in ("prompt", "messages", "conversations") if key in value]
    if len(given) != 1:
        raise ValueError(f"{where}: expected {_EXPECTED}; got {', '.join(given) or ', '.join(value) or 'nothing'}.")
    output_len = value.get("output_len")
    if output_len is not None and (isinstance(output_len, bool) or not isinstance(output_len, int) or output_len < 1):
        raise ValueError(f"{where}: output_len must be a whole number of at least 1; got {output_len!r}.")
    if given == ["conversations"]:
        return _conversation(value["conversations"], output_len, where)
    if given == ["messages"]:
        messages = value["messages"]
        if not _is_list(messages, dict):
            raise ValueError(f"{where}: messages must be a list of objects, as "
                             f'[{{"role": "user", "content": "Hello"}}]; got {messages!r:.80}.')
        return Entry(tuple(messages), None, output_len)
    prompt = value["prompt"]
    if _is_list(prompt, int) and not any(isinstance(id, bool) or id < 0 for id in prompt):
        return Entry(tuple(prompt), None, output_len)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: prompt must be text or a list of token ids, and not empty; got {prompt!r:.80}.")
    return Entry(prompt, None, output_len)


def _conversation(turns: Any, output_len: int | None, where: str) -> Entry | None:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: conversations must be a list of objects with `from` and `value`; got "
                         f"{turns!r:.80}.")
    for asked, answered in itertools.pairwise(turns):
        if asked.get("from") in _OURS and answered.get("from") in _THEIRS:
            prompt, reply = asked.get("value"), answered.get("value")
            if isinstance(prompt, str) and prompt and isinstance(reply, str):
                return Entry(prompt, reply, output_len)
    return None


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(
        isinstance(item, of) for item in value)
