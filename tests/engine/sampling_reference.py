"""Sampling written out in numpy, row by row in float64: what `maxlike.engine.sampling` is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from maxlike.engine.sampling import Rows
from maxlike.engine.sampling_params import MAX_EDITS

DEFAULTS: dict[str, Any] = dict(
    slots=np.int32(2**30), temperature=np.float32(0), top_k=np.int32(0), top_p=np.float32(1), min_p=np.float32(0),
    repetition=np.float32(1), frequency=np.float32(0), presence=np.float32(0), draw=np.int32(0), live=np.bool_(True),
    edited=np.bool_(False), masked=np.bool_(False), logprobs=np.bool_(False))


def rows_of(R: int, seed: Any = None, **asked: Any) -> Rows:
    """R rows that ask for this: scalars or `[R]`. `seed` is `uint32[R, 2]`, without it each row's is its number."""
    if seed is None:
        seed = np.stack([np.zeros(R), np.arange(R)], axis=1)
    columns = {name: np.broadcast_to(np.asarray(asked.pop(name, default), default.dtype), R)
               for name, default in DEFAULTS.items()}
    assert not asked, f"no such columns: {asked}"
    return Rows(seed=np.asarray(seed, np.uint32), **columns)


def edits_of(edits: list[tuple[int, float, int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slot's edits, `(id, value, until)` each, as `clear_slot` takes them."""
    ids, values, until = np.full(MAX_EDITS, vocab_size, np.int32), np.zeros(MAX_EDITS, np.float32), np.zeros(
        MAX_EDITS, np.int32)
    for place, (id, value, end) in enumerate(edits):
        ids[place], values[place], until[place] = id, value, end
    return ids, values, until


def words_of(allowed: np.ndarray) -> np.ndarray:
    """`bool[R, V] -> uint32[R, ceil(V / 32)]`, a bit a token."""
    R, V = allowed.shape
    words = np.zeros((R, -(-V // 32)), np.uint32)
    for row, id in zip(*np.nonzero(allowed), strict=True):
        words[row, id // 32] |= np.uint32(1) << np.uint32(id % 32)
    return words


def penalised(logits: np.ndarray, prompt: list[int], output: list[int], repetition: float, frequency: float,
              presence: float) -> np.ndarray:
    """One row's logits behind the penalties, token by token."""
    x = logits.astype(np.float64)
    for id in {*prompt, *output}:
        x[id] = x[id] / repetition if x[id] > 0 else x[id] * repetition
    for id in set(output):
        x[id] -= frequency * output.count(id) + presence
    return x


def kept_of(x: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0,
            min_p: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The ids that the limits leave of one row's logits, the likeliest first and of equals the lower, and their
    weights, of which the highest is 1."""
    x = x.astype(np.float64)
    order = np.argsort(-x, kind="stable")[:top_k or None]
    weights = np.exp((x[order] - x.max()) / temperature)
    kept = len(order)
    if top_p < 1:
        kept = 1 + int(np.searchsorted(np.cumsum(weights), top_p * weights.sum() * (1 - 1e-6)))
    kept = min(kept, int((weights >= min_p).sum()))
    return order[:kept], weights[:kept]


def distribution(logits: Any, temperature: float, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0) -> np.ndarray:
    """Each token's probability, `float64[V]`."""
    logits = np.asarray(logits, np.float64)
    ids, weights = kept_of(logits, temperature, top_k, top_p, min_p)
    probabilities = np.zeros(len(logits))
    probabilities[ids] = weights / weights.sum()
    return probabilities
