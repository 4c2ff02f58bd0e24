"""What comes back from a request, as a whole or piece by piece; the names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: a token or text that ends the output; `length`: as many tokens as asked for or as fit; `abort`: cancelled, or
its grammar could not be followed, as `stop_reason` tells."""


class Logprob(NamedTuple):
    """A token's log-probability under the model, and its place among all tokens, the likeliest being 1."""

    logprob: float
    rank: int


@dataclass(slots=True)
class CompletionOutput:
    """One continuation.

    Args:
        index: of the n continuations of a prompt.
        text: of `token_ids`, without the stop text; empty without a tokenizer.
        token_ids: the token that ended it included.
        logprobs: for each token the logprobs by token id, the token's own first, then the likeliest; `None` when not
            asked for.
        finish_reason: `None` while it goes on.
        stop_reason: the text or token id of the request that ended it; `None` for the model's own end. Of an abort, why
            the grammar could not be followed any further.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Of all tokens together; `None` when logprobs were not asked for."""
        if self.logprobs is None:
            return None
        return sum(entry[token].logprob for token, entry in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(slots=True)
class Delta:
    """What a step added to one continuation; fields as in `CompletionOutput`, of the new tokens alone.

    `prompt_logprobs` (as in `RequestOutput`) comes once, with the first delta of continuation 0. `cached_tokens` of the
    prompt were found in the cache.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class RequestMetrics:
    """When what happened, in seconds on the clock of `time.perf_counter`.

    Args:
        arrival: the request came.
        first_scheduled: a step began to read its prompt; `None`: not yet, as for what follows.
        first_token: its first token was there.
        finished: its last continuation ended.
        cached_tokens: how many of the prompt's tokens were found in the cache.
    """

    arrival: float = 0.0
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations.

    Args:
        request_id: a name of its own.
        prompt: its text; `None` where token ids were given.
        prompt_token_ids: as they were read.
        outputs: the n continuations, in order.
        prompt_logprobs: for each token of the prompt as `CompletionOutput.logprobs` has them, `None` for the first one,
            which nothing precedes; `None` when not asked for.
        metrics: when what happened.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's embedding.

    Args:
        request_id: a name of its own.
        prompt_token_ids: as they were read.
        embedding: the last token's hidden state behind the final norm, D floats, of length 1.
    """

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[float]


@dataclass(slots=True)
class ScoreOutput:
    """How likely a text is.

    Args:
        request_id: a name of its own.
        prompt_token_ids: as they were read.
        logprobs: each token's log-probability (natural) given those before it; the first token's is `None`.
    """

    request_id: str
    prompt_token_ids: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        """The text's log-probability, given its first token."""
        return sum(logprob for logprob in self.logprobs if logprob is not None)
