"""What every layer here shares: parameters created in place on the mesh, and specs read back from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]


class Module(nnx.Module):
    """An `nnx.Module` that can say how its parameters are sharded (the `ShardableCallable` contract)."""

    def partition_specs(self) -> dict[str, P]:
        """Dotted parameter path -> `PartitionSpec`, e.g. `{"weight": P("model", None)}`."""
        return {".".join(map(str, path)): jax.typeof(variable.get_value()).sharding.spec
                for path, variable in nnx.to_flat_state(nnx.state(self, nnx.Param))}


def on_mesh_of(array: jax.Array, *spec: Any) -> NamedSharding:
    """The sharding `P(*spec)`, an entry for each dimension, on the mesh that `array`, of any shape, lies on: layers
    need no mesh in context.
    """
    return NamedSharding(jax.typeof(array).sharding.mesh, P(*spec))


def rows_of(array: jax.Array) -> Any:
    """The mesh axes, an entry of a spec, that the first dimension of an array lies on: T, of activations `[T, ...]`."""
    return (*jax.typeof(array).sharding.spec, None)[0]


def gathered(weight: jax.Array, *spec: Any) -> jax.Array:
    """`weight`, `[out, in]`, sharded as `P(*spec)`, in which the axes that only its storage is cut over (`"fsdp"`) are
    missing.
    """
    sharding = on_mesh_of(weight, *spec)
    return weight if jax.typeof(weight).sharding == sharding else jax.reshard(weight, sharding)


def create_param(init: Initializer, rngs: nnx.Rngs | jax.Array, shape: tuple[int, ...], dtype: DTypeLike,
                 sharding: NamedSharding, *, logical_shape: tuple[int, ...] | None = None) -> nnx.Param:
    """A parameter of `shape`, each device making its own shard.

    Works eagerly and under `jax.eval_shape`; in both the value's type carries `sharding.spec`.

    Args:
        init: called with `(key, shape, dtype)`, as in `jax.nn.initializers`.
        rngs: where the key comes from, or the key itself.
        shape: as it is stored, padding included.
        dtype: of the parameter.
        sharding: of the parameter; `ShardingRules.sharding` makes it of logical axes.
        logical_shape: the shape in checkpoints, when `shape` is padded; what lies outside it is zero.
    """
    logical_shape = logical_shape or shape
    make = jax.jit(_make, static_argnums=(1, 2, 3, 4, 5), out_shardings=sharding)
    key = rngs if isinstance(rngs, jax.Array) else rngs.params()
    value = make(key, init, shape, jnp.dtype(dtype), sharding, logical_shape)
    return nnx.Param(value, logical_shape=logical_shape)


def _make(key: jax.Array, init: Initializer, shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding,
          logical_shape: tuple[int, ...]) -> jax.Array:
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        value = init(key, logical_shape, dtype)
        value = jnp.pad(value, [(0, full - part) for full, part in zip(shape, logical_shape, strict=True)])
        return jax.reshard(value, sharding.spec)
