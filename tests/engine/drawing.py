"""What sampling should do, written out in numpy and float64; and rows and state to ask it with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from maxlike.engine.sampling import (
    CHUNK,
    Rows,
    Sampled,
    SlotState,
    clear_slot,
    empty_state,
    fill_slot,
    sample,
    seed_words,
)
from maxlike.engine.sampling_params import MAX_EDITS

DEFAULTS = dict(slots=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition=1.0, frequency=0.0, presence=0.0,
                draw=0, live=True, edited=False, masked=False, logprobs=False)
INTEGERS, FLAGS = ("slots", "top_k", "draw"), ("live", "edited", "masked", "logprobs")
run = jax.jit(sample)
_clear, _fill = jax.jit(clear_slot, donate_argnums=0), jax.jit(fill_slot, donate_argnums=0)


def rows_of(n: int, *, seed: Any = 0, **asked: Any) -> Rows:
    """`n` rows; what is asked is one value for all or one a row, the rest is as `SamplingParams` has it."""
    def column(name: str) -> np.ndarray:
        dtype = np.int32 if name in INTEGERS else bool if name in FLAGS else np.float32
        return np.broadcast_to(asked.get(name, DEFAULTS[name]), n).astype(dtype)

    assert asked.keys() <= DEFAULTS.keys()
    seeds = [seed] * n if isinstance(seed, int) else seed
    words = np.array([seed_words(int(seed)) for seed in seeds], np.uint32)
    return Rows(seed=words, **{name: column(name) for name in DEFAULTS})


def all_allowed(n: int, V: int) -> np.ndarray:
    """A mask that forbids nothing, unless it is by the bits behind the last token."""
    return pack(np.ones((n, V), bool))


def pack(allowed: np.ndarray) -> np.ndarray:
    """The mask of `bool[n, V]`."""
    n, V = allowed.shape
    words = np.zeros((n, -(-V // 32)), np.uint32)
    for token in range(V):
        words[:, token // 32] |= allowed[:, token].astype(np.uint32) << np.uint32(token % 32)
    return words


def enter(state: SlotState, slot: int, prompt: Sequence[int] = (), output: Sequence[int] = (),
          edits: Sequence[tuple[int, float, int]] = ()) -> SlotState:
    """A request with this history and these edits (token, what is added, before which draw) is in the slot."""
    V = state.counts.shape[1]
    ids, values, until = np.full(MAX_EDITS, V, np.int32), np.zeros(MAX_EDITS, np.float32), np.zeros(MAX_EDITS, np.int32)
    for i, (token, value, before) in enumerate(edits):
        ids[i], values[i], until[i] = token, value, before
    state = _clear(state, np.int32(slot), ids, values, until)
    known = [*prompt, *output]
    for start in range(0, len(known), CHUNK):
        chunk = known[start:start + CHUNK]
        # Behind the chunk stands a token that must not be counted.
        padded = np.array(chunk + [V - 1] * (CHUNK - len(chunk)), np.int32)
        n_prompt = min(max(len(prompt) - start, 0), len(chunk))
        state = _fill(state, np.int32(slot), padded, np.int32(n_prompt), np.int32(len(chunk)))
    return state


@dataclass
class Asked:
    """One row's logits and all that is asked of it."""

    logits: np.ndarray
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    draw: int = 0
    seed: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    edits: Sequence[tuple[int, float, int]] = ()
    allowed: np.ndarray | None = field(default=None, repr=False)

    def adjusted(self) -> np.ndarray:
        """The logits after mask, penalties and edits: `float64[V]`."""
        x = np.asarray(self.logits, np.float64).copy()
        if self.allowed is not None:
            x[~self.allowed] = -np.inf
        counts = Counter(self.output)
        for token in {*self.prompt, *self.output}:
            x[token] = x[token] / self.repetition if x[token] > 0 else x[token] * self.repetition
            x[token] -= self.frequency * counts[token] + self.presence * (counts[token] > 0)
        for token, value, before in self.edits:
            if self.draw < before:
                x[token] += value
        return x

    def distribution(self) -> np.ndarray:
        """Each token's probability: `float64[V]`."""
        return distribution(self.adjusted(), self.temperature, self.top_k, self.top_p, self.min_p)


def distribution(logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0) -> np.ndarray:
    """Each token's probability; of equal ones those with lower ids come first."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    probabilities = np.zeros(len(logits))
    if temperature == 0:
        probabilities[order[0]] = 1
        return probabilities
    order = order[:top_k or None]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    kept = 1 + int(np.sum(np.cumsum(weights)[:-1] < top_p * weights.sum() * (1 - 1e-9))) if top_p < 1 else len(order)
    order, weights = order[:kept], weights[:kept]
    weights[weights < min_p] = 0
    probabilities[order] = weights / weights.sum()
    return probabilities


def draw_all(asked: Sequence[Asked], *, logprobs: bool = False, program: Any = run) -> tuple[Sampled, SlotState]:
    """A token of each, row `i` in slot `i`."""
    state = empty_state(len(asked), len(asked[0].logits))
    for slot, one in enumerate(asked):
        if one.prompt or one.output or one.edits:
            state = enter(state, slot, one.prompt, one.output, one.edits)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition", "frequency", "presence", "draw")
    rows = rows_of(len(asked), slots=np.arange(len(asked)), seed=[one.seed for one in asked], logprobs=logprobs,
                   edited=[bool(one.edits) for one in asked], masked=[one.allowed is not None for one in asked],
                   **{name: [getattr(one, name) for one in asked] for name in names})
    nothing = np.zeros(len(asked[0].logits), bool)  # which no row without a mask may look at
    mask = pack(np.stack([nothing if one.allowed is None else one.allowed for one in asked]))
    return program(np.stack([one.logits for one in asked]).astype(np.float32), rows, state, mask)
