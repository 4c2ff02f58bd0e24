"""Engines over the embedded model in float32, and what its greedy text is by recomputation without a cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

import maxlike
from maxlike import ReturnLogits
from maxlike.cli import EMBEDDED_MODEL
from maxlike.engine.config import EngineConfig
from maxlike.engine.engine import Engine
from maxlike.engine.loading import load_engine
from maxlike.engine.output import CompletionOutput
from maxlike.engine.request import Request
from maxlike.engine.sampling_params import SamplingParams
from maxlike.models.tokenizer import Tokenizer

ROOM = 512  # tokens of the recomputation's one program
NEAR = 1e-4  # two logits so near may come in either order, by rounding


def engine_of(**config: Any) -> Engine:
    """An engine on one device."""
    return load_engine(EMBEDDED_MODEL, EngineConfig(**config), devices=jax.devices("cpu")[:1], dtype="float32")


@cache
def tokenizer() -> Tokenizer:
    """The embedded model's."""
    return Tokenizer.from_folder(EMBEDDED_MODEL)


@cache
def _source() -> list[int]:
    return tokenizer().encode(Path(__file__).read_text() * 2)


def source_tokens(n: int, start: int = 0) -> list[int]:
    """Tokens of Python source that the model has an opinion about."""
    return _source()[start:start + n]


def run(engine: Engine, *, until: int | None = None) -> list[Request]:
    """Steps until all is done (or so many steps); the requests that moved, in order of first moving."""
    moved: dict[int, Request] = {}
    steps = 0
    while engine.has_work() and (until is None or steps < until):
        for request in engine.step():
            moved.setdefault(id(request), request)
        engine.scheduler.check()
        steps += 1
    return list(moved.values())


def finished(request: Request) -> CompletionOutput:
    """What a request has come to."""
    delta = request.take_delta()
    return CompletionOutput(delta.index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason,
                            delta.stop_reason)


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of a request that nobody is beside."""
    (request,) = engine.add("alone", prompt, params)
    run(engine)
    return request.output_token_ids


@cache
def _scorer() -> Any:
    return maxlike.load(EMBEDDED_MODEL, devices=jax.devices("cpu")[:1], dtype="float32",
                        return_logits=ReturnLogits.ALL)


def logits_after(tokens: list[int]) -> np.ndarray:
    """`float32[len(tokens), V]`: the model's logits behind each token, without a cache."""
    assert len(tokens) <= ROOM
    padded = np.pad(np.array(tokens, np.int32), (0, ROOM - len(tokens)))
    (_, logits, _), _ = _scorer()(padded, None, None, np.array([0, len(tokens)], np.int32))
    return np.asarray(logits)[:len(tokens)]


def near_ties(prompt: list[int], output: list[int]) -> list[int]:
    """Sees to it that each greedy token is the likeliest; the places where another was as near as `NEAR`.

    Raises:
        AssertionError: a token is not the likeliest, by more than that.
    """
    logits = logits_after([*prompt, *output[:-1]])[len(prompt) - 1:]
    best = logits.max(-1)
    gap = best - logits[np.arange(len(output)), output]
    assert (gap <= NEAR).all(), f"token {int(gap.argmax())} of {output} is {gap.max()} below the likeliest"
    second = np.partition(logits, -2, axis=-1)[:, -2]
    return np.flatnonzero(best - second <= NEAR).tolist()
