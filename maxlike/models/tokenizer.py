"""A checkpoint's own tokenizer and chat template: text -> token ids -> text, messages -> prompt.

`tokenizer.json` (the `tokenizers` library) says how text becomes ids, `tokenizer_config.json` names the
special tokens, and the chat template is Jinja, rendered as `transformers` renders it.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import tokenizers

from maxlike.models.text_stream import TextStream, TokenTexts

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What a template, which is a program from outside, can fail with besides Jinja's own errors.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Tokenizer:
    """Text to token ids and back, and messages to a prompt. Safe to use from several threads.

    `bos_token`, `eos_token`, `pad_token`, `unk_token` are the tokens' text, `bos_token_id` and so on their
    ids; None where the checkpoint names none, or names one that the vocabulary lacks. `special_ids` holds the
    ids that stand for no text. Ids run from 0 to `vocab_size - 1`: possibly fewer than the model has logits.
    `chat_templates` are the templates' sources by name.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        named_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        source: str = "the tokenizer",
    ):
        """`named_tokens` maps "bos_token" and the like to token text; `source` names the origin in errors."""
        # Settings of training time that some files still hold: both would change what `encode` returns.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._named = dict(named_tokens or {})
        self._source = source
        self.chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, jinja2.Template] = {}
        self._marks = ("", "")
        self._texts: dict[bool, TokenTexts] = {}

        added = tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        plain = [text for text in self._named.values() if text not in special]
        # A named token is special even where tokenizer.json holds it as a plain word.
        tokenizer.add_special_tokens([text for text in plain if tokenizer.token_to_id(text) is not None])
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size: int = max([tokenizer.get_vocab_size(with_added_tokens=False), *(id + 1 for id in added)])

        self.bos_token, self.bos_token_id = self._lookup("bos_token")
        self.eos_token, self.eos_token_id = self._lookup("eos_token")
        self.pad_token, self.pad_token_id = self._lookup("pad_token")
        self.unk_token, self.unk_token_id = self._lookup("unk_token")

    def _lookup(self, name: str) -> tuple[str | None, int | None]:
        token = self._named.get(name)
        id = None if token is None else self._tokenizer.token_to_id(token)
        return (None, None) if id is None else (token, id)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a checkpoint folder, from its `tokenizer.json`.

        Raises `ValueError` when that file is missing (saying what is there instead) or not understood.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(_no_tokenizer(folder))
        text = _read(path)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path}: not understood as a tokenizer ({error})") from error

        config = _read_json(folder / "tokenizer_config.json")
        fallback = _read_json(folder / "special_tokens_map.json")  # where older checkpoints name them
        named = {}
        for name in _NAMED_TOKENS:
            token = config.get(name, fallback.get(name))
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[name] = token
        templates = _find_chat_templates(folder, config)
        return cls(tokenizer, named_tokens=named, chat_templates=templates, source=str(folder))

    # -- text and ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognised.

        `add_special_tokens` adds what the checkpoint puts around a text, often a leading bos token.
        Raises `ValueError` for text that is not Unicode (lone surrogates).
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise ValueError(f"{text[:80]!r} holds half a surrogate pair, which no token stands for") from error

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, offsets) of `text` without special tokens around it: token i stands for `text[offsets[i][0]:[1]]`.

        The tokens of one character that takes several have the same offsets. Raises `ValueError` as `encode` does.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise ValueError(f"{text[:80]!r} holds half a surrogate pair, which no token stands for") from error
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises `ValueError` for unknown ids."""
        ids = [int(id) for id in ids]
        for id in ids:
            self._check(id)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """How text becomes ids, in the form of tokenizer.json."""
        return self._tokenizer.to_str()

    def token(self, id: int) -> str | None:
        """How the vocabulary spells a token; None for an id that it leaves out.

        Raises `ValueError` for an id beyond it.
        """
        self._check(id)
        return self._tokenizer.id_to_token(int(id))

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for inside a text, often part of a character; a special token's own name.

        Raises `ValueError` for an unknown id.
        """
        return self._table(skip_special_tokens=False).bytes_of(id)

    def stream(
        self, *, skip_special_tokens: bool = True, after: Sequence[int] = (), ignore_unknown: bool = False
    ) -> TextStream:
        """A `TextStream`, which turns ids to text as they come.

        Args:
            skip_special_tokens: leave them out of the text.
            after: ids of what the text continues, such as the prompt. Where a tokenizer leaves a space out at the
                start of a text, it stays in then: prompt and output together are one text. A character that these
                leave unfinished stays so.
            ignore_unknown: ids from `vocab_size` on, of which a model may have logits, are no text and no error.
        """
        return self._table(skip_special_tokens).stream(after, ignore_unknown)

    def _table(self, skip_special_tokens: bool) -> TokenTexts:
        if skip_special_tokens not in self._texts:
            self._texts[skip_special_tokens] = TokenTexts(self, self._tokenizer.decoder, skip_special_tokens)
        return self._texts[skip_special_tokens]

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            known = f"it has 0 to {self.vocab_size - 1}"
            raise ValueError(f"token id {id} is not in the vocabulary of {self._source}: {known}")

    # -- messages

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; None when the checkpoint has none."""
        return self.chat_templates.get("default")

    def with_chat_template(self, source: str) -> "Tokenizer":
        """This tokenizer with another chat template, the only one. Raises `ValueError` where `source` is not Jinja."""
        other = copy.copy(self)
        other.chat_templates, other._compiled = {"default": source}, {}
        try:
            other._compiled["default"] = _environment(self._marks).from_string(source)
        except jinja2.TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"the chat template that was given{line}: {error}") from error
        return other

    def with_generation_marks(self, begin: str, end: str) -> "Tokenizer":
        """This tokenizer with templates that write `begin` and `end` around what they mark as generated.

        Those marks are `{% generation %}` and `{% endgeneration %}`; templates without them write what they did.
        """
        other = copy.copy(self)
        other._compiled, other._marks = {}, (begin, end)
        return other

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, each `{"role": ..., "content": ...}` and what else the template knows.

        `add_generation_prompt` ends it where the assistant's answer begins. `tools` are JSON schemas of
        functions; with them, a template named "tool_use" is preferred. `variables` go to the template as they
        are. All are JSON values, of which the template (a program that came with the checkpoint) sees a copy;
        keys of a message that are None count as absent.

        Raises `ValueError` when there is no template, or it refuses the messages, or fails.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            others = f" named 'default', only {sorted(self.chat_templates)}" if self.chat_templates else ""
            raise ValueError(f"{self._source} has no chat template{others}: give the prompt as plain text")
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise ValueError(f"expected messages like {{'role': 'user', 'content': 'Hello'}}, got {messages!r:.200}")
        given = {
            "messages": [{key: value for key, value in m.items() if value is not None} for m in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            given = json.loads(json.dumps(given))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages, tools and template variables must be JSON values: {error}") from error
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment(self._marks).from_string(self.chat_templates[name])
            return self._compiled[name].render(**{**self._named, **given})
        except _TEMPLATE_ERRORS as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"the chat template of {self._source}{line}: {error}") from error

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of `apply_chat_template`'s text, whose arguments it takes: no special tokens but those that the
        template writes.
        """
        prompt = self.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        return self.encode(prompt, add_special_tokens=False)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's words, between the marks of the environment."""

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line)
            for mark in self.environment.generation_marks  # type: ignore[attr-defined]
        )
        return jinja2.nodes.Scope([begin, *body, end], lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, closed to names that mean something to Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name with a leading underscore: {name}")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    space = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment(generation_marks: tuple[str, str] = ("", "")) -> jinja2.Environment:
    """What chat templates are written for: the settings, filters and globals of `transformers`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.extend(generation_marks=generation_marks)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _namespace
    return environment


def _find_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: from `.jinja` files, else tokenizer_config.json, else chat_template.json."""
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read(path) for name, path in files.items()}
    for found in (config, _read_json(folder / "chat_template.json")):
        match found.get("chat_template"):
            case str(template):
                return {"default": template}
            case [*entries]:
                try:
                    return {entry["name"]: entry["template"] for entry in entries}
                except (KeyError, TypeError):
                    raise ValueError(f"{folder}: chat_template is a list of which each entry must be an object with a "
                                     f"name and a template; got {str(entries)[:200]}") from None
    return {}


def _no_tokenizer(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such folder"
    others = [name for name in ("tokenizer.model", "vocab.json", "merges.txt") if (folder / name).is_file()]
    if not others:
        return f"{folder} holds no tokenizer: there is no tokenizer.json"
    convert = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    return f"{folder} has no tokenizer.json, only {', '.join(others)}: convert with transformers, {convert}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as text ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
