"""Compiled steps of a model: everything that is decided by shapes is decided once, ahead of time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.engine.sampling import Rows, empty_state, sample
from maxlike.engine.sampling_params import SamplingParams
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer, ReturnLogits


class ModelRunner:
    """Runs steps of a model over a cache that it owns.

    The model is split once, into a flat tuple of arrays: handing those to a compiled step costs a fraction of
    what traversing the module does.

    Args:
        model: built with `ReturnLogits.LAST_TOKEN`.
        n_pages: pages a layer in the cache.
        n_sequences: S of every step.
        pages_per_sequence: M of every page table.

    Raises:
        ValueError: the model returns more logits than a step wants.
    """

    def __init__(self, model: DistributedTransformer, n_pages: int, n_sequences: int, pages_per_sequence: int):
        if model.return_logits != ReturnLogits.LAST_TOKEN:
            raise ValueError(f"Generation needs a model with ReturnLogits.LAST_TOKEN; got {model.return_logits!r}.")
        self.graphdef, state = nnx.split(model)
        self.leaves, self.treedef = jax.tree.flatten(state)
        self.replicated = NamedSharding(model.mesh, P())
        self.pages = model.kv_params.allocate(n_pages, model.mesh)
        self.n_sequences, self.pages_per_sequence = n_sequences, pages_per_sequence
        self.compiled: dict[int, jax.stages.Compiled] = {}

    def compile(self, n_tokens: int) -> jax.stages.Compiled:
        """The step over `n_tokens` new tokens, compiled at the first asking."""
        if n_tokens not in self.compiled:
            def small(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

            s, f32 = self.n_sequences, jnp.float32
            self.compiled[n_tokens] = jax.jit(self._step, donate_argnums=1).lower(
                self.leaves, self.pages, small(n_tokens), small(s + 1), small(s), small(s, self.pages_per_sequence),
                small(dtype=f32), small(), small(dtype=f32), small(dtype=jnp.uint32), small()).compile()
        return self.compiled[n_tokens]

    def step(self, tokens: jax.Array | np.ndarray, row_offsets: np.ndarray, cache_lengths: np.ndarray,
             page_table: np.ndarray, sampling: SamplingParams, draw: int) -> jax.Array:
        """One step: the next token of each sequence, `int32[S]`, still on the device.

        Args:
            tokens: `int32[T]`; a step's output may be the next one's input as it is.
            row_offsets, cache_lengths, page_table: as the model takes them.
            sampling: for all sequences.
            draw: number of this draw; with the seed it decides the random numbers.
        """
        step = self.compile(tokens.shape[0])
        seed = np.uint32((sampling.seed or 0) & 0xFFFFFFFF)
        next_tokens, self.pages = step(
            self.leaves, self.pages, tokens, row_offsets, cache_lengths, page_table, np.float32(sampling.temperature),
            np.int32(sampling.top_k), np.float32(sampling.top_p), seed, np.int32(draw))
        return next_tokens

    def _step(self, leaves: list[jax.Array], pages: jax.Array, tokens: jax.Array, row_offsets: jax.Array,
              cache_lengths: jax.Array, page_table: jax.Array, temperature: jax.Array, top_k: jax.Array,
              top_p: jax.Array, seed: jax.Array, draw: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
        (logits,), written = model(tokens, (pages, cache_lengths, page_table), None, row_offsets)
        assert written is not None
        with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
            S, V = logits.shape

            def column(value: Any, dtype: Any = jnp.float32) -> jax.Array:
                return jnp.full(S, value, dtype)

            row, no = jnp.arange(S), column(False, bool)
            rows = Rows(slots=row, temperature=column(temperature), top_k=column(top_k, jnp.int32),
                        top_p=column(top_p), min_p=column(0), repetition=column(1), frequency=column(0),
                        presence=column(0), seed=jnp.stack([row.astype(jnp.uint32), column(seed, jnp.uint32)], axis=1),
                        draw=column(draw, jnp.int32), live=~no, edited=no, masked=no, logprobs=no)
            sampled, _ = sample(logits, rows, empty_state(S, V), jnp.zeros((S, -(-V // 32)), jnp.uint32))
            return sampled.tokens, written
