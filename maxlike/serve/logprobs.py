"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maxlike.engine.output import Logprob
from maxlike.models.tokenizer import Tokenizer

_LEAST = -9999.0
"""Stands for minus infinity, which JSON has not."""


class TokenNames:
    """What tokens are called in answers: their text, or `bytes:\\xe2\\x80` for bytes that are no text by themselves,
    or `token_id:7` where there is no text at all."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._names: dict[int, tuple[str, list[int] | None]] = {}

    def name(self, id: int) -> str:
        """Of a token."""
        return self.name_and_bytes(id)[0]

    def name_and_bytes(self, id: int) -> tuple[str, list[int] | None]:
        """The name, and the bytes, which are `None` where there is no text."""
        if id not in self._names:
            self._names[id] = self._work_out(id)
        return self._names[id]

    def _work_out(self, id: int) -> tuple[str, list[int] | None]:
        if self._tokenizer is None or id >= self._tokenizer.vocab_size:  # a model may have more logits than tokens
            return f"token_id:{id}", None
        data = self._tokenizer.token_bytes(id)
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


class CompletionLogprobsWriter:
    """The form of `/v1/completions`, of one choice, piece by piece: it knows how far the text has come."""

    def __init__(self, names: TokenNames, tokenizer: Tokenizer | None, skip_special_tokens: bool,
                 after: Sequence[int]):
        """`after` are tokens that the choice's text goes on from, without holding them."""
        self._names = names
        self._text = None if tokenizer is None else tokenizer.stream(
            skip_special_tokens=skip_special_tokens, after=after, ignore_unknown=True)
        self._length = 0

    def write(self, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob] | None]) -> dict[str, Any]:
        """Of the next tokens: `{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`."""
        offsets, logprobs, tops = [], [], []
        for id, entry in zip(token_ids, entries, strict=True):
            offsets.append(self._length)
            if self._text is not None:
                self._length += len(self._text.push(id))
            logprobs.append(None if entry is None else _finite(entry[id].logprob))
            tops.append(None if entry is None else self._top(entry))
        return {"tokens": [self._names.name(id) for id in token_ids], "token_logprobs": logprobs,
                "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: dict[int, Logprob]) -> dict[str, float]:
        top: dict[str, float] = {}
        for id, (logprob, _) in entry.items():
            name, logprob = self._names.name(id), _finite(logprob)
            top[name] = max(logprob, top.get(name, logprob))  # several tokens may have one name
        return top


def chat_logprobs(names: TokenNames, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob]],
                  n_top: int) -> list[dict[str, Any]]:
    """The form of `/v1/chat/completions`: one entry a token, with the `n_top` likeliest."""
    content = []
    for id, entry in zip(token_ids, entries, strict=True):
        likeliest = sorted((logprob.rank, other) for other, logprob in entry.items())[:n_top]
        content.append({**_entry(names, id, entry),
                        "top_logprobs": [_entry(names, other, entry) for _, other in likeliest]})
    return content


def _entry(names: TokenNames, id: int, entry: dict[int, Logprob]) -> dict[str, Any]:
    name, data = names.name_and_bytes(id)
    return {"token": name, "logprob": _finite(entry[id].logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST
