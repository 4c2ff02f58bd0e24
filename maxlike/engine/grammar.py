"""Structured output: which tokens may come next, so that the whole text is what was asked for. No jax here.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np

from maxlike.engine.sampling_params import StructuredOutput
from maxlike.models.tokenizer import Tokenizer

MAX_LENGTH = 128 * 1024
"""Most characters of a schema, regular expression or grammar, which a server may get from anybody."""
MAX_CACHED = 128
MAX_CACHED_LENGTH = 4 * MAX_LENGTH
"""So many compiled grammars, of so many characters together, are kept for who asks for the same: a large one takes some
hundred bytes a character."""
MAX_COPIES = 256
"""Continuations that share a compiled grammar before it is compiled anew: what they add to its lexer goes with it."""
MAX_LEXER_STATES = 50_000
"""Of 1 to 2 kB each. llguidance's own limit is five times that, for a single grammar."""
MAX_WHITESPACE = 32
"""Most characters of whitespace in one place of JSON. Without a bound, a small model may never come out of it."""
_STACK_BYTES = 512 * 2**20
# llguidance descends once for each definition that leads to the next, some kilobytes at a time: in a thread with the
# usual 8 MB, a thousand of them in a row end the process. Of this stack only what is used takes memory.
_STACK_LOCK = threading.Lock()


class GrammarCompiler:
    """Makes grammars for a tokenizer. Safe to use from several threads, and better not on the engine's: it takes
    milliseconds, and the first time longer, since the tokenizer is prepared then.

    Args:
        tokenizer: of the model.
        vocab_size: V, of the model's logits; at least the tokenizer's.
        eos_token_ids: tokens that end the output, of which those count that the tokenizer has. If none, its own.

    Raises:
        ValueError: there is no token that ends the output, or the tokenizer has more tokens than the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]):
        self._eos = sorted({id for id in eos_token_ids if 0 <= id < tokenizer.vocab_size})
        if not self._eos and tokenizer.eos_token_id is not None:
            self._eos = [tokenizer.eos_token_id]
        if not self._eos:
            raise ValueError("Structured output needs a token that ends it; neither model nor tokenizer has one.")
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"The tokenizer has {tokenizer.vocab_size} tokens; the model knows {vocab_size} only.")
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._prepared: llguidance.LLTokenizer | None = None
        self._preparing = threading.Lock()
        self._limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._cache_lock = threading.Lock()

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """A grammar at its beginning; at once where the same was asked for lately.

        Raises:
            ValueError: it is not valid, no text is of this kind, or it asks for something that cannot be held to, such
                as a part of JSON Schema that llguidance does not have; or the tokenizer is of a kind that it does not
                know. Says why.
        """
        text = _text(wanted)
        with self._cache_lock:
            kept = self._cache.get(text)
            if kept is not None and kept.shared.is_usable:
                self._cache.move_to_end(text)
                return kept.copy()
        fresh = self._make(text)
        with self._cache_lock:
            self._cache[text] = fresh
            self._cache.move_to_end(text)
            while len(self._cache) > MAX_CACHED or sum(map(len, self._cache)) > MAX_CACHED_LENGTH:
                self._cache.popitem(last=False)
            return fresh.copy()

    def _make(self, text: str) -> Grammar:
        with self._preparing:
            if self._prepared is None:
                try:
                    self._prepared = llguidance.LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size,
                                                            eos_token=self._eos)
                except ValueError as error:
                    raise ValueError(f"Structured output is not possible with this tokenizer: {error}") from error
        tokenizer, n_words = self._prepared, -(-self._vocab_size // 32)

        def make() -> Grammar:
            matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=self._limits)
            grammar = Grammar(matcher, self._eos, n_words, _Shared())
            if grammar.error is None:  # what is worked out at the first token is kept for all copies
                mask = np.empty(n_words, np.uint32)
                grammar.fill_mask(mask)
                trial = Grammar(matcher.deep_copy(), self._eos, n_words, grammar.shared)
                trial.accept(int(np.unpackbits(mask.view(np.uint8), bitorder="little").argmax()))
                if trial.error is not None:
                    return trial
            return grammar

        with ThreadPoolExecutor(1, "compile-grammar") as thread:
            with _STACK_LOCK:
                usual = threading.stack_size(_STACK_BYTES)
                try:
                    made = thread.submit(make)
                finally:
                    threading.stack_size(usual)
            grammar = made.result()
        if grammar.is_finished and not grammar.may_end:
            why = grammar.error or ""
            if not why or why.startswith("NoExtension"):
                why = "there is no such text"
            raise ValueError(f"The output cannot be held to this structure: {why}.")
        return grammar


def _text(wanted: StructuredOutput) -> str:
    """What llguidance is given."""
    matcher = llguidance.LLMatcher
    if wanted.regex is not None:
        return matcher.grammar_from_regex(_checked(wanted.regex))
    if wanted.grammar is not None:
        return matcher.grammar_from_lark(_checked(wanted.grammar))
    if wanted.choice is not None:
        # A token of the grammar, not a rule, of which a place takes 2,000 at most.
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return matcher.grammar_from_lark(_checked(f"start: CHOICE\nCHOICE: {texts}"))
    schema = {"type": "object"} if wanted.json_object else wanted.json
    try:
        if isinstance(schema, str):
            schema = json.loads(_checked(schema))
        if not isinstance(schema, bool | Mapping):
            raise ValueError(f"it is an object, true or false, not {schema!r:.100}")
        if schema is False:
            raise ValueError("false, which allows nothing")
        schema = as_held({} if schema is True else schema)
        return matcher.grammar_from_json_schema(_checked(json.dumps(schema, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"This JSON schema is not possible: {error}.") from error


def as_held(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema with llguidance's options: nothing that it does not know is passed over, and whitespace ends.

    Raises:
        ValueError: the schema's own `x-guidance` is no object.
    """
    own = schema.get("x-guidance", {})
    if not isinstance(own, Mapping):
        raise ValueError(f"x-guidance must be an object; got {own!r:.100}")
    usual = {"whitespace_pattern": rf"[ \t\n\r]{{1,{MAX_WHITESPACE}}}", "json_allow_general_unicode_escapes": True}
    return {**schema, "x-guidance": {**usual, **own, "lenient": False}}


def _checked(text: str) -> str:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"A schema, regular expression or grammar may have {MAX_LENGTH} characters; got {len(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"A schema, regular expression or grammar must be Unicode text: {error}.") from error
    return text


@dataclass
class _Shared:
    """What copies have in common. They have one lexer too: where one has used that up, others fail as well."""

    n_copies: int = 0
    has_failed: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether there may be one more."""
        return not self.has_failed and self.n_copies < MAX_COPIES


class Grammar:
    """Where one continuation is in its grammar.

    It is finished when no text can follow: the output should end then, whether or not a token said so and whatever
    `ignore_eos` says. `min_tokens` and `ignore_eos` are kept by what `fill_mask` is told; nothing else should forbid
    the tokens that end the output, since they may be the only ones left.
    """

    def __init__(self, matcher: llguidance.LLMatcher, eos_token_ids: Collection[int], n_words: int, shared: _Shared):
        self._matcher, self._eos, self._n_words, self.shared = matcher, eos_token_ids, n_words, shared

    def copy(self) -> Grammar:
        """Another one in the same place."""
        self.shared.n_copies += 1
        return Grammar(self._matcher.deep_copy(), self._eos, self._n_words, self.shared)

    def fill_mask(self, out: np.ndarray, may_end: bool = True, held_back: Collection[int] = ()) -> None:
        """Sets bit `i % 32` of `out[i // 32]` for each token `i` that may come next, and clears the others.

        Args:
            out: `uint32[ceil(V / 32)]` in one piece, V being the model's vocabulary. Ids that the tokenizer
                does not have are not allowed.
            may_end: whether the tokens that end the output are allowed where the text may end. They are in any case
                where nothing else is.
            held_back: other tokens that are allowed only where nothing else is.

        Raises:
            ValueError: `out` has another shape, dtype or layout.
        """
        if out.shape != (self._n_words,) or out.dtype != np.uint32 or not out.flags.c_contiguous:
            raise ValueError(f"A mask is uint32[{self._n_words}], in one piece; got {out.dtype}{list(out.shape)}.")
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        # Where the text may not end, a token that ends the output may still be a word of it.
        forbidden = [*held_back, *(() if may_end and self._matcher.is_accepting() else self._eos)]
        before = {id // 32: int(out[id // 32]) for id in forbidden}
        for id in forbidden:
            out[id // 32] &= np.uint32(~(1 << id % 32) & 0xFFFFFFFF)
        if before and not out.any():
            for word, bits in before.items():
                out[word] = bits

    def accept(self, token_id: int) -> bool:
        """Goes on past `token_id`. False, and nothing changes, where it is not allowed."""
        if self._matcher.try_consume_tokens([token_id]) == 1:
            return True
        return self.is_finished and self.error is None and token_id in self._eos

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether no text can follow: the grammar is at its end, or became too large to follow (see `error`).

        There are ends that only the mask shows: it then has nothing but the tokens that end the output.
        """
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further, such as a limit on its size; `None` while it can."""
        error = self._matcher.get_error().removesuffix("<non-verbose/>").strip() or None
        if error is not None:
            self.shared.has_failed = True
        return error
