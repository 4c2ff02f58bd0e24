"""One continuation of a prompt on its way through the engine. No jax here."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlike.engine.output import Delta, FinishReason, Logprob, RequestMetrics
from maxlike.engine.sampling_params import SamplingParams


class RequestState(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    """For a slot and pages: it is new, or was preempted."""
    RUNNING = "running"
    """It has a slot, and pages for what it has read so far."""
    FINISHED = "finished"
    """It has neither, and never will again."""


class Request:
    """One continuation of a prompt. With n > 1, `SamplingParams` makes n of them.

    The scheduler owns `state`, `slot`, `pages` and what is said there to be its own; the engine owns the rest.

    Args:
        request_id: of the caller.
        index: of the n continuations.
        prompt_token_ids: at least one.
        params: as asked for.
        max_total_tokens: prompt and output together; at most what the model and the cache take.
        priority: lower ones go first.
        reuse_prefix: whether pages that are in the cache may stand in for reading the prompt. Not where something is
            wanted of every token of the prompt, such as `prompt_logprobs`.
    """

    def __init__(self, request_id: str, index: int, prompt_token_ids: list[int], params: SamplingParams,
                 max_total_tokens: int, priority: int = 0, reuse_prefix: bool = True):
        self.request_id, self.index, self.params, self.priority = request_id, index, params, priority
        self.token_ids = list(prompt_token_ids)
        """Prompt and output, as far as the host knows it."""
        self.n_prompt = len(prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        self.reuse_prefix = reuse_prefix
        self.in_flight = 0
        """Tokens being drawn for it that the host has not seen yet. The scheduler counts up, the engine down."""
        self.metrics = RequestMetrics()

        # The scheduler's.
        self.state = RequestState.WAITING
        self.slot = -1
        self.pages: list[int] = []
        self.page_hashes: list[bytes] = []
        """Of the full pages of `token_ids`."""
        self.n_registered = 0
        """First pages that need no more registering."""
        self.cache_epoch = 0
        """The pool's, when the pages were taken."""
        self.arrival_key: tuple[int, int] = (0, 0)
        """Where it stands among all requests; smaller goes first."""
        self.n_preemptions = 0

        # The engine's.
        self.seed = 0
        """Of this continuation."""
        self.plain = True
        """Whether nothing but a token and its length can end it."""
        self.ending: frozenset[int] = frozenset()
        """Tokens that end it."""
        self.wants_embedding = False
        self.embedding: np.ndarray | None = None
        self.detokenizer: Any = None
        self.grammar: Any = None
        self.pieces: list[str] = []
        """Text that no delta has had yet."""
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.n_scored = 0
        """Tokens of the prompt whose successors' logprobs are there or being computed."""
        self.n_given = 0
        """Tokens of the output that deltas have had."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.client: Any = None

    @property
    def generates(self) -> bool:
        """Whether tokens are to be drawn; else the prompt is only read. The engine says in `wants_embedding` before."""
        return self.params.max_tokens != 0 and not self.wants_embedding

    @property
    def n_output(self) -> int:
        """Tokens of the output, as far as the host knows it."""
        return len(self.token_ids) - self.n_prompt

    @property
    def output_token_ids(self) -> list[int]:
        """The output, as far as the host knows it."""
        return self.token_ids[self.n_prompt:]

    def take_delta(self) -> Delta:
        """What is new since the last asking."""
        token_ids = self.token_ids[self.n_prompt + self.n_given:]
        delta = Delta(self.index, "".join(self.pieces), token_ids,
                      None if self.logprobs is None else self.logprobs[self.n_given:],
                      self.finish_reason, self.stop_reason,
                      None if self.n_given else self.prompt_logprobs, self.metrics.cached_tokens)
        self.pieces.clear()
        self.n_given += len(token_ids)
        return delta


def check_prompt(prompt: Sequence[int], vocab_size: int, max_seq_len: int | None = None) -> None:
    """Raises `ValueError` for a prompt that is empty, too long to continue, or holds an id beyond the vocabulary."""
    if len(prompt) == 0:
        raise ValueError("The prompt is empty: give at least one token.")
    if outside := [t for t in prompt if not 0 <= t < vocab_size]:
        raise ValueError(f"Token id {outside[0]} is beyond the vocabulary: ids are 0 to {vocab_size - 1}.")
    if max_seq_len is not None and len(prompt) >= max_seq_len:
        raise ValueError(f"The prompt has {len(prompt)} tokens; the model takes at most {max_seq_len}, the new "
                         f"ones counted. Shorten it to {max_seq_len - 1} or fewer.")
