"""Which token comes next: greedy, temperature, top-k, top-p, decided on the device."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751), measured after temperature and top-k; 1: all.
        seed: of the draw; the same seed gives the same text.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= _LARGEST_FLOAT32:
            raise ValueError(f"temperature must be 0 (greedy) or above, within float32; got {self.temperature}.")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be 0 (all tokens) or above, within int32; got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and {2**32 - 1}; got {self.seed}.")


def sample(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array,
           key: jax.Array) -> jax.Array:
    """Draws one token a row: `float32[S, V] -> int32[S]`; the scalars are those of `SamplingParams`."""

    def draw() -> jax.Array:
        # In order of likelihood both limits are limits on the rank, exact even where logits tie.
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        rank = jnp.arange(logits.shape[-1])
        ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        choice = jax.random.categorical(key, jnp.where((before < top_p) | (rank == 0), ranked, -jnp.inf), axis=-1)
        return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)

    # A sort of the whole vocabulary is dear: greedy decoding skips it.
    return jax.lax.cond(temperature > 0, draw, lambda: _likeliest(logits))


def _likeliest(logits: jax.Array) -> jax.Array:
    """The first of each row's highest: `float32[S, V] -> int32[S]`; any token for a row of NaN."""
    # jnp.argmax, which on XLA:CPU goes pair by pair through values and indices, takes several times as long.
    last = logits.shape[-1] - 1
    highest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == highest, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)
