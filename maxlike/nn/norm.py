"""Root-mean-square layer norm, and what Gemma wraps around layers: an output norm, a soft cap."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maxlike.mesh import Devices, ShardingRules, as_mesh
from maxlike.nn.module import Module, create_param

# One function a value, so that layers alike share one compiled initializer.
_constant = functools.cache(jax.nn.initializers.constant)


class RMSNorm(Module):
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension, in float32.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Gemma stores its weights around zero:
    `weight_offset=1.0`.

    Args:
        dim: of the last dimension; `weight` is `[dim]`, whole on each device.
        dtype: of `weight`.
        devices: a mesh, or devices from which `make_mesh` makes one.
        rngs: as other layers have it; the weight begins at `1 - weight_offset`.
        rules: as other layers have it.
    """

    def __init__(self, dim: int, dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs, eps: float = 1e-6,
                 weight_offset: float = 0.0, rules: ShardingRules = ShardingRules()):
        self.eps, self.weight_offset = eps, weight_offset
        self.weight = create_param(_constant(1.0 - weight_offset), rngs, (dim,), dtype,
                                   rules.sharding(as_mesh(devices), (dim,), None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., dim] -> [..., dim]` in `x.dtype`."""
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * (self.weight.get_value().astype(jnp.float32) + self.weight_offset)).astype(x.dtype)


class OutputNorm(Module):
    """`layer` followed by `norm` on its output: the second slice of a sandwich norm.

    A layer that returns more than its output (attention returns the cache too) has the rest passed through.
    """

    def __init__(self, layer: Any, norm: RMSNorm):
        self.layer, self.norm = layer, norm

    def __call__(self, x: jax.Array, *args: Any) -> Any:
        """`norm(layer(x, ...))`: `[T, D] -> [T, D]`; of a tuple, its first element is normed."""
        y = self.layer(x, *args)
        return (self.norm(y[0]), *y[1:]) if isinstance(y, tuple) else self.norm(y)


class SoftCap(Module):
    """`cap * tanh(layer(x) / cap)`, in float32: Gemma's soft cap of the logits, around the head `layer`."""

    def __init__(self, layer: Any, cap: float):
        self.layer, self.cap = layer, cap

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, D] -> [T, V]`, float32."""
        return self._capped(self.layer(x))

    def ungathered(self, x: jax.Array) -> jax.Array:
        """As the layer's `ungathered`, `[T, D] -> [T, rows]`, capped."""
        return self._capped(self.layer.ungathered(x))

    def _capped(self, y: jax.Array) -> jax.Array:
        return self.cap * jnp.tanh(y.astype(jnp.float32) / self.cap)
