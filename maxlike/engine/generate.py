"""One prompt, one continuation: chunked prefill, then a token a step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from maxlike.engine.runner import ModelRunner
from maxlike.engine.sampling_params import SamplingParams
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer

PREFILL_CHUNK = 512
"""Most tokens of a prompt taken in one step."""


@dataclass
class Figures:
    """What a generation took: seconds to compile, and tokens a second (0 where nothing was measured)."""

    compile_s: float = 0.0
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0


def generate(model: DistributedTransformer, prompt: Sequence[int], max_new_tokens: int, *,
             sampling: SamplingParams | None = None, eos_token_ids: Collection[int] = (),
             max_seq_len: int | None = None, figures: Figures | None = None) -> Iterator[int]:
    """Yields the tokens that continue `prompt`, up to and including the first of `eos_token_ids`.

    Args:
        model: built with `ReturnLogits.LAST_TOKEN`.
        prompt: token ids.
        max_new_tokens: at most so many; fewer when `max_seq_len` tokens are reached.
        max_seq_len: longest sequence that the model takes, in tokens.
        sampling: `None` is greedy.
        figures: filled in on the way.

    Raises:
        ValueError: the prompt is empty, too long, or holds an id beyond the vocabulary, or the model returns other
            logits. Raised at the call, not at the first token.
    """
    check_prompt(prompt, model.vocab_size, max_seq_len)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    if max_seq_len is not None:
        max_new_tokens = min(max_new_tokens, max_seq_len - len(prompt))
    n_pages = model.kv_params.pages_for(len(prompt) + max_new_tokens)
    runner, sampling = ModelRunner(model, n_pages, 1, n_pages), sampling or SamplingParams(temperature=0)
    return _generate(runner, np.asarray(prompt, np.int32), max_new_tokens, sampling, eos_token_ids,
                     Figures() if figures is None else figures)


def check_prompt(prompt: Sequence[int], vocab_size: int, max_seq_len: int | None = None) -> None:
    """Raises `ValueError` for a prompt that is empty, too long to continue, or holds an id beyond the vocabulary."""
    if len(prompt) == 0:
        raise ValueError("The prompt is empty: give at least one token.")
    if outside := [t for t in prompt if not 0 <= t < vocab_size]:
        raise ValueError(f"Token id {outside[0]} is beyond the vocabulary: ids are 0 to {vocab_size - 1}.")
    if max_seq_len is not None and len(prompt) >= max_seq_len:
        raise ValueError(f"The prompt has {len(prompt)} tokens; the model takes at most {max_seq_len}, the new "
                         f"ones counted. Shorten it to {max_seq_len - 1} or fewer.")


def _generate(runner: ModelRunner, prompt: np.ndarray, max_new_tokens: int, sampling: SamplingParams,
              eos_token_ids: Collection[int], figures: Figures) -> Iterator[int]:
    table = np.arange(runner.pages_per_sequence, dtype=np.int32)[None]
    chunk = min(PREFILL_CHUNK, 1 << (len(prompt) - 1).bit_length())
    start = time.perf_counter()
    runner.compile(chunk)
    if max_new_tokens > 1:
        runner.compile(1)
    figures.compile_s = time.perf_counter() - start

    def step(tokens: jax.Array | np.ndarray, n: int, cached: int) -> jax.Array:
        return runner.step(tokens, np.array([0, n], np.int32), np.array([cached], np.int32), table, sampling,
                           cached + n)

    start = time.perf_counter()
    for cached in range(0, len(prompt), chunk):
        piece = prompt[cached:cached + chunk]
        upcoming = step(np.pad(piece, (0, chunk - len(piece))), len(piece), cached)
    upcoming.block_until_ready()
    figures.prefill_tok_s = len(prompt) / (time.perf_counter() - start)
    start = time.perf_counter()
    for i in range(max_new_tokens):
        current = upcoming
        if i + 1 < max_new_tokens:  # the device works on the next token while the host looks at this one
            upcoming = step(current, 1, len(prompt) + i)
        token = int(np.asarray(current)[0])
        if i:
            figures.decode_tok_s = i / (time.perf_counter() - start)
        yield token
        if token in eos_token_ids:
            return
