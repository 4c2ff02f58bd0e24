"""Token embedding, the table cut over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maxlike.mesh import Devices, ShardingRules, as_mesh
from maxlike.nn.module import Module, create_param, gathered, on_mesh_of, rows_of

_normal = jax.nn.initializers.normal(0.02)


class VocabParallelEmbedding(Module):
    """`int32[T] -> [T, hidden_dim]`, T cut as the ids are; each device looks up the rows that it holds.

    The table is padded to a multiple of the shards; no id reaches the padding. `scale` multiplies the rows,
    rounded to `dtype` first (Gemma's `sqrt(hidden_dim)`). Ids outside the vocabulary are clipped into it here,
    where nothing can be raised; `DistributedTransformer` refuses them when it is given numbers to look at.

    Args:
        vocab_size, hidden_dim: V and D.
        dtype: of the table and the rows.
        devices: a mesh, or devices from which `make_mesh` makes one.
        rngs: for the initial table (normal, 0.02).
        rules: which mesh axes the vocabulary is cut over.
    """

    def __init__(self, vocab_size: int, hidden_dim: int, dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs,
                 scale: float | None = None, rules: ShardingRules = ShardingRules()):
        mesh = as_mesh(devices)
        self.vocab_size, self.scale = vocab_size, scale
        shards = rules.shards(mesh, "vocab")
        self.vocab_axes = rules.sharding(mesh, (shards,), "vocab").spec[0]
        rows = -(-vocab_size // shards) * shards
        self.weight = create_param(_normal, rngs, (rows, hidden_dim), dtype,
                                   rules.sharding(mesh, (rows, hidden_dim), "vocab", "hidden"),
                                   logical_shape=(vocab_size, hidden_dim))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`int32[T] -> [T, hidden_dim]` in the weight's dtype."""
        weight = gathered(self.weight.get_value(), self.vocab_axes, None)
        x = _looked_up(weight, jnp.clip(tokens, 0, self.vocab_size - 1))
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)


def _rows(weight: jax.Array, ids: jax.Array) -> jax.Array:
    return weight.at[ids].get(mode="promise_in_bounds", out_sharding=on_mesh_of(weight, rows_of(ids), None))


_looked_up = jax.custom_vjp(_rows)


def _look_up(weight: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows(weight, ids), (weight, ids)


def _add_up(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    # In float32 and rounded once: a bfloat16 sum of a frequent token's gradients would stop growing at some hundred.
    weight, ids = saved
    wide = jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=jax.typeof(weight).sharding)
    (total,) = jax.linear_transpose(lambda weight: _rows(weight, ids), wide)(gradient.astype(jnp.float32))
    return total.astype(weight.dtype), None


_looked_up.defvjp(_look_up, _add_up)
