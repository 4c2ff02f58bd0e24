"""Records to sequences: what a line of a file says, and which of its tokens are learned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from maxlike.models.tokenizer import Tokenizer
from maxlike.train.conversations import ChatEncoder, Message, check_messages
from maxlike.train.packing import Example, Group
from maxlike.train.records import DataError, Record

Format = Literal["auto", "text", "chat", "completion", "preference"]

KEYS = {"text": ("text",), "chat": ("messages",), "completion": ("prompt", "completion"),
        "preference": ("chosen", "rejected")}
_EXPECTED = ("`text`, `messages`, `prompt` and `completion`, or (for preferences) `chosen` and `rejected`, commonly "
             "with `prompt`")


@dataclass(frozen=True)
class EncodingConfig:
    """How records become sequences.

    Args:
        max_seq_len: tokens of the longest sequence.
        max_group_len: tokens that a pair may have together; of one sequence `max_seq_len` is the limit.
        format: which keys a record must have; "auto" goes by those it has.
        train_on: of conversations and completions "assistant" learns the assistant's turns (of completions what
            follows the prompt), "all" everything. Preferences learn what was chosen or rejected in any case.
        turns: "together" learns all the assistant's turns of a conversation in one sequence; "apart" makes a sequence
            of each, which ends there: for templates that write a turn otherwise when others follow.
        too_long: what becomes of sequences beyond `max_seq_len`; "truncate" keeps their beginning.
        long_text: the same for `text`; "cut" makes windows of it, each beginning with the last token of the one
            before, so that every token is a target once.
        window_lengths: of which each text that is cut draws one, where there is something to draw with; its first
            window is shorter by chance, so that a text is not cut at the same places each time.
        template_variables: for the chat template, `{"enable_thinking": False}` for instance; a record may have its own
            as `chat_template_kwargs`.
    """

    max_seq_len: int
    max_group_len: int
    format: Format = "auto"
    train_on: Literal["assistant", "all"] = "assistant"
    turns: Literal["together", "apart"] = "together"
    too_long: Literal["bad", "truncate"] = "bad"
    long_text: Literal["cut", "truncate", "bad"] = "cut"
    window_lengths: tuple[int, ...] = ()
    template_variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """What became of a record: its groups of sequences and how many of those were truncated, or what is wrong."""

    groups: tuple[Group, ...] = ()
    truncated: int = 0
    bad: str | None = None
    message: str = ""


def parse(record: Record) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        DataError: "not_utf8", "not_json" or "not_an_object".
    """
    try:
        value = json.loads(record.line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise DataError("not_utf8", f"not UTF-8: {error.reason} at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError("not_json", f"not JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError("not_json", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError("not_an_object", f"expected a JSON object with {_EXPECTED}; got {value!r:.80}")
    return value


def format_of(value: Mapping[str, Any]) -> str:
    """Which format a record has, by its keys.

    Raises:
        DataError: "missing_keys" where it has the keys of none, or of several.
    """
    found = [name for name, keys in KEYS.items() if all(value.get(key) is not None for key in keys)]
    if len(found) != 1:
        several = f"the keys of several formats ({', '.join(found)})"
        problem = several if found else f"only {', '.join(value) or 'nothing'}"
        raise DataError("missing_keys", f"expected {_EXPECTED}; got {problem}")
    return found[0]


class Encoder:
    """Records to groups of sequences. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, config: EncodingConfig, preference: bool):
        """`preference`: records are pairs, the others bad; otherwise the other way around."""
        self._tokenizer = tokenizer
        self._config = config
        self._preference = preference
        self._chat = ChatEncoder(tokenizer, config.template_variables)

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Encoded:
        """What becomes of a record; what is wrong with it names file and line. `rng` draws from `window_lengths`.

        Raises:
            ValueError: what no record can help, such as a checkpoint without a chat template.
        """
        try:
            groups = self._groups(parse(record), rng)
        except DataError as error:
            return Encoded(bad=error.kind, message=f"{record.where}: {error}")
        truncated = sum(short for _, short in groups)
        return Encoded(tuple(group for group, _ in groups), truncated)

    def _groups(self, value: dict[str, Any], rng: np.random.Generator | None) -> list[tuple[Group, bool]]:
        """Groups, and whether each was truncated."""
        format = self._config.format if self._config.format != "auto" else format_of(value)
        missing = [key for key in KEYS[format] if value.get(key) is None]
        if missing:
            raise DataError("missing_keys", f"expected {' and '.join(f'`{key}`' for key in KEYS[format])}; "
                                            f"got {', '.join(value) or 'nothing'}")
        if (format == "preference") != self._preference:
            raise DataError("other_format", f"a record with {' and '.join(KEYS[format])} among those "
                                            f"{'of preferences' if self._preference else 'to be learned as they are'}: "
                                            "pairs and others cannot be mixed")
        match format:
            case "text":
                return self._text(value["text"], rng)
            case "chat":
                return [self._fit((example,)) for example in self._conversation(value)]
            case "completion":
                return [self._fit((example,)) for example in self._completion(value)]
            case _:
                return [self._fit(self._pair(value))]

    # -- the formats

    def _text(self, text: Any, rng: np.random.Generator | None) -> list[tuple[Group, bool]]:
        if not isinstance(text, str):
            raise DataError("wrong_type", f"text must be a string; got {text!r:.80}")
        if not text:
            raise DataError("empty", "text is empty")
        ids = self._with_end(self._encode(text))
        limit, config = self._config.max_seq_len, self._config
        first = 0  # where the second window begins
        if rng is not None and config.window_lengths:
            limit = int(rng.choice(config.window_lengths))
            first = int(rng.integers(1, limit))
        whole = Example(ids, np.ones(len(ids), np.float32))
        if len(ids) <= limit or config.long_text != "cut":
            policy = "truncate" if config.long_text == "truncate" else "bad"
            return [self._fit((whole,), policy)]
        # The last token of one window begins the next, where it is no target.
        starts = [0, *range(first or limit - 1, len(ids) - 1, limit - 1)]
        return [((Example(ids[i : end + 1], whole.weights[i : end + 1]),), False)
                for i, end in itertools.pairwise([*starts, len(ids) - 1])]

    def _conversation(self, value: dict[str, Any]) -> list[Example]:
        messages = check_messages(value["messages"], "messages")
        if not messages:
            raise DataError("empty", "messages is empty: there is no conversation")
        return self._turns(messages, 0, value, self._config.train_on == "all")

    def _completion(self, value: dict[str, Any]) -> list[Example]:
        prompt, completion = value["prompt"], value["completion"]
        everything = self._config.train_on == "all"
        if isinstance(prompt, str) and isinstance(completion, str):
            return [self._strings(prompt, completion, "completion", everything)]
        messages, start = self._joined(prompt, completion, "completion")
        return self._turns(messages, start, value, everything)

    def _pair(self, value: dict[str, Any]) -> Group:
        prompt, sides = value.get("prompt"), (value["chosen"], value["rejected"])
        names = ("chosen", "rejected")
        if prompt is None:
            prompt, sides = _common_prompt(*sides)
        if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
            return tuple(self._strings(prompt, side, name) for side, name in zip(sides, names, strict=True))
        pair = []
        for side, name in zip(sides, names, strict=True):
            messages, start = self._joined(prompt, side, name)
            pair.append(self._encode_turns(messages, _turns_of(messages, start, name), value))
        return tuple(pair)

    def _joined(self, prompt: Any, answer: Any, name: str) -> tuple[list[Message], int]:
        if isinstance(prompt, str) or isinstance(answer, str):
            raise DataError("wrong_type", f"prompt and {name} must both be strings, or both lists of messages; got "
                                          f"{type(prompt).__name__} and {type(answer).__name__}")
        before, after = check_messages(prompt, "prompt"), check_messages(answer, name)
        if not before or not after:
            raise DataError("empty", f"{name if before else 'prompt'} is empty")
        return [*before, *after], len(before)

    def _turns(self, messages: list[Message], start: int, value: dict[str, Any], everything: bool) -> list[Example]:
        turns = _turns_of(messages, start, "messages" if start == 0 else "completion")
        if everything:
            return [self._encode_turns(messages, (), value, everything=True)]
        if self._config.turns == "apart":
            return [self._encode_turns(messages[: turn + 1], [turn], value) for turn in turns]
        return [self._encode_turns(messages, turns, value)]

    def _encode_turns(self, messages: list[Message], turns: Sequence[int], value: dict[str, Any],
                      everything: bool = False) -> Example:
        tools, variables = value.get("tools"), value.get("chat_template_kwargs")
        if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
            raise DataError("wrong_type", f"tools must be a list of JSON schemas; got {tools!r:.80}")
        if variables is not None and not isinstance(variables, dict):
            raise DataError("wrong_type", f"chat_template_kwargs must be an object; got {variables!r:.80}")
        reserved = {"messages", "tools", "add_generation_prompt"} & set(variables or ())
        if reserved:
            raise DataError("wrong_type", f"chat_template_kwargs may not set {', '.join(sorted(reserved))}")
        ids, learned = self._chat.encode(messages, turns, tools or None, variables)
        return Example(ids, np.ones(len(ids), np.float32) if everything else learned.astype(np.float32))

    def _strings(self, prompt: str, answer: str, name: str, everything: bool = False) -> Example:
        """Both as one text, as TRL encodes them; learned is what comes after the tokens that both texts begin with."""
        if not answer:
            raise DataError("empty", f"{name} is empty")
        ids = self._with_end(self._encode(prompt + answer))
        before = self._encode(prompt)
        same = min(len(before), len(ids))
        differ = np.flatnonzero(before[:same] != ids[:same])
        weights = np.ones(len(ids), np.float32)
        if not everything:
            weights[: differ[0] if differ.size else same] = 0
        return Example(ids, weights)

    # -- tokens

    def _encode(self, text: str) -> np.ndarray:
        try:
            return np.asarray(self._tokenizer.encode(text), np.int32)
        except ValueError as error:
            raise DataError("wrong_type", str(error)) from error

    def _with_end(self, ids: np.ndarray) -> np.ndarray:
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ValueError("the checkpoint names no eos_token, which ends every text that is learned: name one in "
                             "tokenizer_config.json")
        return ids if ids.size and ids[-1] == end else np.append(ids, np.int32(end))

    def _fit(self, group: Group, policy: str | None = None) -> tuple[Group, bool]:
        """`group` within the limits, and whether it had to be truncated for that."""
        config, limit = self._config, self._config.max_seq_len
        if len(group) > 1 and sum(map(len, group)) > config.max_group_len:
            limit = min(limit, config.max_group_len // len(group))
        too_long = any(len(example) > limit for example in group)
        if too_long and (policy or config.too_long) == "bad":
            sizes = " and ".join(str(len(example)) for example in group)
            most = f"at most {config.max_seq_len}" + (f", {config.max_group_len} together" if len(group) > 1 else "")
            raise DataError("too_long", f"{sizes} tokens, {most} are allowed (max_seq_len)")
        cut = tuple(Example(example.tokens[:limit], example.weights[:limit]) for example in group)
        for example, whole in zip(cut, group, strict=True):
            if not example.weights[1:].any():
                if whole.weights[1:].any():
                    raise DataError("prompt_too_long", f"nothing of what is to be learned lies in the first {limit} "
                                                       f"of {len(whole)} tokens (max_seq_len)")
                raise DataError("nothing_to_learn", f"none of its {len(whole)} tokens is to be learned")
        return cut, too_long


def _turns_of(messages: Sequence[Message], start: int, name: str) -> list[int]:
    turns = [i for i in range(start, len(messages)) if messages[i]["role"] == "assistant"]
    if not turns:
        raise DataError("no_assistant_turn", f"there is no assistant turn in {name}")
    return turns


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, tuple[Any, Any]]:
    """The prompt of two conversations: the messages that they share in front."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError("missing_keys", "there is no `prompt`, and chosen and rejected are not lists of "
                                             "messages, whose common beginning it could be")
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    return chosen[:n], (chosen[n:], rejected[n:])
