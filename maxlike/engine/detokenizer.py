"""A request's text as its tokens come, up to the text that ends it. No jax here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from maxlike.engine.sampling_params import SamplingParams
from maxlike.models.tokenizer import Tokenizer


class Detokenizer:
    """The text of one continuation, a piece at a time; no piece ends inside a character.

    With stop texts, text that may be the beginning of one is held back until that is decided. Of several the one that
    is complete first ends the text, and of those complete at once the longest: so it does not matter how the text is
    cut into tokens. One that a token completes among the first `min_tokens` is none.

    A token that ends the output by its id should not be pushed, unless its text is wanted.

    Args:
        tokenizer: of the model.
        params: its `stop`, `include_stop_str_in_output`, `min_tokens` and `skip_special_tokens`.
        after: the prompt's ids. The output's text is what it adds to the prompt's: some tokenizers leave out a space
            at the start of a text, which is wanted here.

    Attributes:
        push: `(token_id) -> str`, the text that may be given out now. An id beyond the tokenizer's vocabulary, of
            which the model may have logits, is no text.
        flush: `() -> str`, what has been held back, when there are no more tokens.
        stopped_by: the stop text that was found, or `None`. Whatever is pushed after it is no text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, after: Sequence[int] = ()):
        stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens, after=after, ignore_unknown=True)
        self.stopped_by: str | None = None
        # Without stop texts there is nothing to do here: a token costs what the stream's look-up does.
        self.push: Callable[[int], str] = stream.push
        self.flush: Callable[[], str] = stream.flush
        if params.stop:
            self._stream = stream
            self._stops = _StopTexts(params.stop)
            self._include, self._blind = params.include_stop_str_in_output, params.min_tokens
            self._held = ""
            self.push, self.flush = self._push, self._flush

    def _push(self, token_id: int) -> str:
        new = self._stream.push(token_id)
        look = self._blind <= 0
        self._blind -= 1
        return self._take(new, look) if new else ""

    def _flush(self) -> str:
        text = self._take(self._stream.flush(), self._blind <= 0)
        held, self._held = self._held, ""
        return text + held

    def _take(self, new: str, look: bool) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._held + new
        found = self._stops.read(new, look)
        if found is None:
            given = len(text) - self._stops.n_begun
            self._held = text[given:]
            return text[:given]
        self.stopped_by, end = found
        end += len(self._held)
        self._held = ""
        return text[: end if self._include else end - len(self.stopped_by)]


class _StopTexts:
    """Finds the first of several texts in a text that comes in pieces (Aho and Corasick 1975).

    A state is a node of the trie of the stop texts: the longest end of what has been read that begins one of them.
    """

    def __init__(self, stops: Sequence[str]):
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]  # the longest stop text that ends in a state
        for stop in stops:
            node = 0
            for character in stop:
                if character not in self._next[node]:
                    self._next[node][character] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._found.append(None)
                node = self._next[node][character]
            self._found[node] = stop
        self._shorter = [0] * len(self._next)  # the next longest end of the same text that is a state too
        queue = list(self._next[0].values())
        for node in queue:  # grows: breadth first, so that shorter ones are known
            for character, child in self._next[node].items():
                self._shorter[child] = self._step(self._shorter[node], character)
                self._found[child] = self._found[child] or self._found[self._shorter[child]]
                queue.append(child)
        self._first = re.compile("[" + "".join(map(re.escape, self._next[0])) + "]")
        self._state = 0

    @property
    def n_begun(self) -> int:
        """How many characters at the end of what has been read may begin a stop text."""
        return self._depth[self._state]

    def read(self, text: str, look: bool) -> tuple[str, int] | None:
        """The stop text that `text` completes first, and where in `text` it ends; `None` if none, or not to `look`."""
        at = 0
        while at < len(text):
            if self._state == 0:
                begin = self._first.search(text, at)
                if begin is None:
                    return None
                at = begin.start()
            self._state = self._step(self._state, text[at])
            at += 1
            if look and (stop := self._found[self._state]) is not None:
                return stop, at
        while self._state and not self._next[self._state]:  # complete but not looked for: nothing goes on from here
            self._state = self._shorter[self._state]
        return None

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._shorter[node]
        return self._next[node].get(character, 0)
