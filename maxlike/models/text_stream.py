"""Token ids to text as they come: a table look-up a token where the decoder allows it.

Two kinds of decoder make a token's text independent of its neighbours, but for characters whose bytes are spread over
several tokens and for the very start: byte-level BPE's (GPT-2, Llama 3, Qwen), whose tokens are bytes, and
SentencePiece's (Llama 2, Mistral, Gemma, T5), whose tokens are text, some of them one byte each. All others decode a
window of recent tokens, at several decodings a token.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxlike.models.tokenizer import Tokenizer

_CONTEXT = 4
"""Tokens of what stands before, in the window of a decoder that is neither kind."""


class TextStream(ABC):
    """Text of a growing sequence of token ids, a piece at a time; no piece ends inside a character.

    The pieces and `flush()` together are `decode()` of all ids. (Where byte-fallback tokens spell bytes that
    are not UTF-8, `decode()` garbles valid characters before them too, and a piece given out stays.)
    """

    # `tokenizers.decoders.DecodeStream` does the same but fails on such bytes ("Invalid prefix encountered"),
    # holds text back for as long as they go on, and has no flush.

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty. Raises `ValueError` for an unknown id."""

    @abstractmethod
    def flush(self) -> str:
        """The text held back so far; the stream then begins anew."""


class TokenTexts:
    """What each token says, worked out when it is first met. Shared by the streams of a tokenizer.

    `known` has the tokens that say the same wherever they stand. Filling it from several threads does no harm: all
    write the same.
    """

    def __init__(self, tokenizer: Tokenizer, decoder: Any, skip_special_tokens: bool):
        """`decoder` is the `tokenizers` library's."""
        self.tokenizer = tokenizer
        self.skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self.spelling = _Spelling.of(decoder)
        self.known: dict[int, str] = dict.fromkeys(self.skipped, "")

    def stream(self, after: Sequence[int], ignore_unknown: bool) -> TextStream:
        """A stream of the text that follows that of the ids `after`."""
        if self.spelling is None:
            return _WindowStream(self, after, ignore_unknown)
        if self.spelling.byte_level:
            return _ByteLevelStream(self, ignore_unknown)
        return _PieceStream(self, after, ignore_unknown)

    def bytes_of(self, id: int) -> bytes:
        """The bytes that a token stands for inside a text. Raises `ValueError` for an unknown id."""
        token = self.tokenizer.token(id)
        if token is None:
            return b""
        if self.spelling is None:
            return self.tokenizer.decode([id], skip_special_tokens=False).encode()
        piece = self.spelling.piece(token)
        return piece if isinstance(piece, bytes) else piece.encode()

    def piece(self, id: int, ignore_unknown: bool) -> bytes | str | None:
        """A token's text, or bytes that may be part of a character; `None` where the decoder never sees the token.

        Raises `ValueError` for an unknown id.
        """
        if ignore_unknown and id >= self.tokenizer.vocab_size:
            return None
        token = self.tokenizer.token(id)
        if token is None or id in self.skipped:
            return None
        assert self.spelling is not None
        piece = self.spelling.piece(token)
        if isinstance(piece, str):
            self.known[id] = piece
        elif (text := _whole(piece)) is not None:
            self.known[id] = text
        return piece


@dataclass(frozen=True)
class _Spelling:
    """A decoder whose tokens can be spelled one by one.

    Args:
        byte_level: each character of a token stands for a byte.
        replaced: what stands for what in tokens that are text.
        byte_fallback: whether tokens such as `<0x0A>` are bytes.
        strips: taken off the front of the whole text, once.
        drops: left out of the first token.
    """

    byte_level: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strips: str = ""
    drops: str = ""

    @classmethod
    def of(cls, decoder: Any) -> _Spelling | None:
        """Of a decoder of the `tokenizers` library; `None` where it is of another kind."""
        steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls(byte_level=True)
        if [step["type"] for step in steps] == ["Metaspace"]:
            mark, drops = steps[0]["replacement"], steps[0]["prepend_scheme"] != "never"
            return cls(replaced=((mark, " "),), drops=mark if drops else "")
        replaced = []
        while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
            step = steps.pop(0)
            replaced.append((step["pattern"]["String"], step["content"]))
        kinds, strips = [step["type"] for step in steps], ""
        if kinds[-2:] == ["Fuse", "Strip"] and (steps[-1]["start"], steps[-1]["stop"]) == (1, 0):
            strips = steps[-1]["content"]
            kinds.pop()
        if not replaced or kinds not in ([], ["Fuse"], ["ByteFallback"], ["ByteFallback", "Fuse"]):
            return None
        return cls(replaced=tuple(replaced), byte_fallback="ByteFallback" in kinds, strips=strips)

    def piece(self, token: str) -> bytes | str:
        """A token's text, or the bytes that it stands for."""
        if self.byte_level:
            try:
                return bytes([_BYTES[character] for character in token])
            except KeyError:  # an added token, which stands for itself
                return token.encode()
        for old, new in self.replaced:
            token = token.replace(old, new)
        if self.byte_fallback and (byte := _FALLBACK.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token


_FALLBACK = re.compile("<0x([0-9A-Fa-f+][0-9A-Fa-f])>")  # the library takes <0x+A> too


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _whole(piece: bytes) -> str | None:
    """The text of bytes that are UTF-8 by themselves."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


class _ByteLevelStream(TextStream):
    """All that a stream has to remember is the bytes of an unfinished character."""

    # `_ready` is `known` while nothing is held back, and otherwise empty: one look-up tells both.

    def __init__(self, table: TokenTexts, ignore_unknown: bool):
        self._table, self._ignore_unknown = table, ignore_unknown
        self._ready: Mapping[int, str] = table.known
        # What is not UTF-8 becomes U+FFFD by the rule that Rust has too: one for each maximal part of a character.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        text = self._ready.get(token_id)
        return self._push(token_id) if text is None else text

    def _push(self, token_id: int) -> str:
        piece = self._table.piece(token_id, self._ignore_unknown)
        if not piece:
            return ""
        assert isinstance(piece, bytes)
        text = self._utf8.decode(piece)
        self._ready = {} if self._utf8.getstate()[0] else self._table.known
        return text

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._ready = self._table.known
        return rest


class _PieceStream(TextStream):
    """Remembers the bytes of an unfinished character, and whether any text has come yet.

    Of a run of byte tokens that is not UTF-8 `decode()` makes as many U+FFFD; so does this, from where it goes wrong.
    """

    def __init__(self, table: TokenTexts, after: Sequence[int], ignore_unknown: bool):
        assert table.spelling is not None
        self._table, self._spelling, self._ignore_unknown = table, table.spelling, ignore_unknown
        self._bytes = b""
        self._garbled = False  # whether the run of bytes that goes on is no text
        self._begin()
        for id in after:
            if not self._starts:
                break
            self._push(id)
        self._bytes, self._garbled = b"", False
        self._settle()

    def _begin(self) -> None:
        self._starts = bool(self._spelling.strips or self._spelling.drops)

    def _settle(self) -> None:
        held = self._starts or self._bytes or self._garbled
        self._ready: Mapping[int, str] = {} if held else self._table.known

    def push(self, token_id: int) -> str:
        text = self._ready.get(token_id)
        return self._push(token_id) if text is None else text

    def _push(self, token_id: int) -> str:
        piece = self._table.piece(token_id, self._ignore_unknown)
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            text = self._add(piece)
        else:
            text = self._end_of_bytes() + piece
        if self._starts and self._spelling.drops:
            token = self._table.tokenizer.token(token_id)
            assert token is not None
            text, self._starts = token.replace(self._spelling.drops, ""), False
        elif self._starts and text:
            text, self._starts = text.removeprefix(self._spelling.strips), False
        self._settle()
        return text

    def _add(self, byte: bytes) -> str:
        self._bytes += byte
        if not self._garbled:
            try:
                text, self._bytes = self._bytes.decode(), b""
                return text
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return ""
        self._garbled = True
        text, self._bytes = "\ufffd" * len(self._bytes), b""
        return text

    def _end_of_bytes(self) -> str:
        rest = "\ufffd" * len(self._bytes)
        self._bytes, self._garbled = b"", False
        return rest

    def flush(self) -> str:
        rest = self._end_of_bytes()
        self._begin()
        self._settle()
        return rest


class _WindowStream(TextStream):
    """Decodes the last few tokens again and again, and gives out what is new."""

    def __init__(self, table: TokenTexts, after: Sequence[int], ignore_unknown: bool):
        self._tokenizer, self._skipped, self._ignore_unknown = table.tokenizer, table.skipped, ignore_unknown
        # The ids decoded together: context, then those not given out yet.
        self._window = [id for id in after[-_CONTEXT:] if self._says(id)]
        self._context = len(self._window)  # what a token says depends on whether one stands before it
        self._given = len(self._decode(self._window))  # how many characters of the window's text have been given out
        self._recent: list[str] = []  # the window's text at the last three pushes

    def push(self, token_id: int) -> str:
        if not self._says(token_id):
            return ""
        window = [*self._window, token_id]
        text = final = self._decode(window)
        complete = not text.endswith("\ufffd")
        if not complete:
            # Perhaps a character whose bytes are not all there yet; until they are, the bytes before it may
            # decode to U+FFFD as well. No character has more than four: what the text has begun with for
            # four pushes will not change.
            final = text.rstrip("\ufffd")
            if len(self._recent) == 3:
                new = _common_start([recent[self._given :] for recent in (text, *self._recent)])
                final = max(final, text[: self._given] + new, key=len)
        piece = final[self._given :]
        self._window = window
        self._given = max(self._given, len(final))
        self._recent = [*self._recent[-2:], text]
        if complete and piece:
            self._window = window[self._context :]
            self._context = len(self._window)
            self._given = len(self._decode(self._window))
            self._recent = []
        return piece

    def flush(self) -> str:
        rest = self._decode(self._window)[self._given :]
        self._window, self._context, self._given, self._recent = [], 0, 0, []
        return rest

    def _says(self, id: int) -> bool:
        return id not in self._skipped and not (self._ignore_unknown and id >= self._tokenizer.vocab_size)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _common_start(texts: list[str]) -> str:
    n = 0
    for characters in zip(*texts, strict=False):
        if len(set(characters)) > 1:
            break
        n += 1
    return texts[0][:n]
