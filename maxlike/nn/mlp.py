"""The gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from maxlike.mesh import Devices, ShardingRules, as_mesh
from maxlike.nn.linear import ColumnParallelLinear, RowParallelLinear
from maxlike.nn.module import Module

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""By the names of Hugging Face configs (`hidden_act`)."""


class MLP(Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, https://arxiv.org/abs/2002.05202): `[T, D] -> [T, D]`.

    Gate and up are column-parallel, down is row-parallel: one all-reduce.

    Args:
        hidden_dim, feed_forward_length: D and F.
        dtype: of the parameters; the output has that of the input.
        devices: a mesh, or devices from which `make_mesh` makes one.
        rngs: for the initial weights (LeCun normal).
        activation: a name in `ACTIVATIONS`.
        has_bias: on all three products.
        rules: which mesh axes F is cut over.

    Raises:
        ValueError: the activation is unknown, or the mesh does not divide F.
    """

    def __init__(self, hidden_dim: int, feed_forward_length: int, dtype: DTypeLike, devices: Devices, *,
                 rngs: nnx.Rngs, activation: str = "silu", has_bias: bool = False,
                 rules: ShardingRules = ShardingRules()):
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}.")
        mesh = as_mesh(devices)
        self.activation = activation
        column = partial(ColumnParallelLinear, hidden_dim, feed_forward_length, dtype, mesh, rngs=rngs,
                         has_bias=has_bias, out_axis="mlp", rules=rules)
        self.gate_proj, self.up_proj = column(), column()
        self.down_proj = RowParallelLinear(feed_forward_length, hidden_dim, dtype, mesh, rngs=rngs,
                                           has_bias=has_bias, in_axis="mlp", rules=rules)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, D] -> [T, D]`."""
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))
