"""The model behind the endpoints: its name, its tokenizer, its limits; requests turned into prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio.to_thread

from maxlike.engine.async_engine import AsyncEngine
from maxlike.models.tokenizer import Tokenizer
from maxlike.serve.admission import Admission
from maxlike.serve.config import ServeConfig
from maxlike.serve.errors import ApiError
from maxlike.serve.logprobs import TokenNames
from maxlike.serve.metrics import ServeMetrics
from maxlike.serve.protocol import Prompts

P = ParamSpec("P")
R = TypeVar("R")


class Service:
    """What all endpoints share.

    Args:
        engine: runs the requests.
        config: the server's.
        tool_format: how the model writes tool calls, by a name of `serve.tool_calls`; `None` where it does not, or no
            one knows.
    """

    def __init__(self, engine: AsyncEngine, config: ServeConfig, tool_format: str | None = None):
        self.engine, self.config, self.tool_format = engine, config, tool_format
        self.admission = Admission(config)
        self.metrics = ServeMetrics(engine.metrics)
        self.metrics.in_flight.set_function(lambda: self.admission.in_flight)
        self.names = TokenNames(engine.tokenizer)
        self.created = int(time.time())

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.config.served_model_name

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can be talked to."""
        return self.engine.tokenizer is not None and self.engine.tokenizer.chat_template is not None

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` (404) for a model that is not here; `None` is the one that is."""
        if name not in (None, self.name):
            raise ApiError(404, f"There is no model {name!r:.200} here, only {self.name!r}.", param="model",
                           code="model_not_found")

    def tokenizer_for(self, what: str) -> Tokenizer:
        """The tokenizer. Raises `ApiError` (400) where the checkpoint has none; `what` needs it."""
        if self.engine.tokenizer is None:
            raise ApiError(400, f"The model has no tokenizer, which {what} needs: give token ids.")
        return self.engine.tokenizer

    async def token_ids(self, prompts: Prompts) -> list[list[int]]:
        """The token ids of each prompt.

        Raises:
            ApiError: there is text and no tokenizer, or a prompt without any token.
            ValueError: text that is not Unicode.
        """
        given: list[str] | list[list[int]]
        if isinstance(prompts, str):
            given = [prompts]
        elif isinstance(prompts[0], int):
            given = [prompts]  # type: ignore[list-item]
        else:
            given = prompts  # type: ignore[assignment]
        limit = self.engine.max_queue
        if limit is not None and len(given) > limit:
            raise ApiError(400, f"The request has {len(given)} prompts; the server lets {limit} wait at most. Send "
                           "fewer at a time.")
        if not isinstance(given[0], str):
            return given  # type: ignore[return-value]
        tokenizer = self.tokenizer_for("text")
        token_ids = await in_thread(lambda: [tokenizer.encode(text) for text in given])
        if not all(token_ids):
            raise ApiError(400, "A prompt is empty: the model needs at least one token to go on from.", param="prompt")
        return token_ids

    def room_for(self, n_prompt: int, max_tokens: int | None, param: str) -> None:
        """Sees to it that a prompt fits, and its continuation where that has a length.

        Raises:
            ApiError: it does not (400), with the numbers.
        """
        limit = self.engine.max_model_len
        if n_prompt + (1 if max_tokens is None else max_tokens) > limit:
            asked = "" if max_tokens is None else f" and {max_tokens} are to follow"
            raise ApiError(400, f"The prompt has {n_prompt} tokens{asked}; the model takes {limit} at most, prompt and "
                           "continuation together.", param=param if max_tokens is None or n_prompt >= limit
                           else "max_tokens", code="context_length_exceeded")


async def in_thread(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work(...)` away from the event loop: it may take its time."""
    return await anyio.to_thread.run_sync(lambda: work(*args, **kwargs))
