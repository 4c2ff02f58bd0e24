"""Linear layers under tensor parallelism (Megatron-LM, https://arxiv.org/abs/1909.08053).

Weights are `[out, in]`, as checkpoints store them, and products contract both last dimensions into float32: on
XLA:CPU any other form reads memory several times slower, on accelerators it makes no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from maxlike.kernels.collective_matmul import matmul_allreduce
from maxlike.mesh import Devices, ShardingRules, as_mesh
from maxlike.nn.module import Module, create_param, on_mesh_of

_lecun_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)


@dataclass(frozen=True)
class DistributedGemmConfig:
    """How row-parallel products are summed over the model axis.

    `enable_matmul_allreduce` takes the product apart so that each part's sum travels while the next part is
    computed (collective matmul); otherwise XLA places one all-reduce behind the product.
    """

    enable_matmul_allreduce: bool = False


_MIN_ROWS = 4
"""XLA works fewer out one by one: on CPU widening the whole weight for each, on TPU on the vector unit."""
_LANES = 16
"""Rows of activations that XLA:CPU multiplies at a time by a bfloat16 weight that is the left operand."""
_LONG = 8192
"""A contraction so long runs at the full pace; one of 2048 is a tenth slower, however many of them there are."""
_MAX_ROWS_BEHIND_WEIGHT = 64
"""With some hundred rows the arithmetic outweighs what rearranging a weight costs, and x on the left is as fast."""


def matmul(x: jax.Array, weight: jax.Array, out_sharding: NamedSharding | None = None) -> jax.Array:
    """`x @ weight.T`, accumulated in float32: `[T, I], [O, I] -> [T, O]` in `x.dtype`.

    Args:
        out_sharding: of the result, where the contracted dimension is sharded.
    """

    def product(x: jax.Array, weight: jax.Array, out_sharding: NamedSharding | None = out_sharding) -> jax.Array:
        return jax.lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, out_sharding=out_sharding,
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)

    rows_are_cut = any(jax.typeof(x).sharding.spec[:1])  # then they can be neither padded nor taken apart

    def default(x: jax.Array, weight: jax.Array) -> jax.Array:
        padding = 0 if rows_are_cut else max(0, _MIN_ROWS - x.shape[0])
        return product(jnp.pad(x, ((0, padding), (0, 0))), weight)[:x.shape[0]].astype(x.dtype)

    def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        # XLA:CPU (YNNPACK) rearranges the right operand before it multiplies, which for a weight takes two thirds of
        # the time; the left one it reads as it lies. Fewer than 16 columns on the right get a slower inner loop (jax
        # 0.12) or a very slow one (a single column). The barrier keeps XLA from swapping the operands back.
        rows, (O, I) = x.shape[0], weight.shape
        together = _outputs_together(rows, weight)
        if together > 1:
            # Columns that would be padding are used: a row of the weight is several outputs' rows end to end, and
            # column (b, t) has row t of x in the part of output b, zeros elsewhere.
            weight = jnp.reshape(weight, (O // together, together * I), out_sharding=_like(weight))
            x = (jnp.eye(together, dtype=x.dtype)[:, None, :, None] * x[:, None, :]).reshape(-1, together * I)
        y = product(weight, jnp.pad(x, ((0, -x.shape[0] % _LANES), (0, 0))), _transposed(out_sharding))
        y = jax.lax.optimization_barrier(y)[:, :x.shape[0]]
        if together > 1:
            y = jnp.reshape(y, (O, rows), out_sharding=_like(weight))
        return y.T.astype(x.dtype)

    def weighted_sum(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Left to itself, XLA:CPU works x out again for every output, or writes a copy of it for each to memory that
        # several weights share; the barrier prevents it.
        x, weight = jax.lax.optimization_barrier((x, weight))
        return jnp.sum(weight * x, axis=1)[None]

    if x.dtype == jnp.bfloat16 and x.shape[0] <= _MAX_ROWS_BEHIND_WEIGHT and not rows_are_cut:
        return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=default)
    if x.dtype == jnp.float32 and x.shape[0] == 1:
        return jax.lax.platform_dependent(x, weight, cpu=weighted_sum, default=default)
    return default(x, weight)


def _outputs_together(rows: int, weight: jax.Array) -> int:
    """How many outputs' rows of a weight `[O, I]` are one operand's row, for so many rows of activations."""
    spec, (O, I) = jax.typeof(weight).sharding.spec, weight.shape
    if any(spec[1:]):
        return 1  # a part of each row is elsewhere
    shards = O // jax.typeof(weight).sharding.shard_shape(weight.shape)[0]
    return max(n for n in (1, 2, 4, 8) if n == 1 or (n * rows <= _LANES and n * I <= _LONG and O % (n * shards) == 0))


def _like(weight: jax.Array) -> NamedSharding | None:
    """The sharding of a weight, for its reshaping: `None` where it lies on no mesh."""
    sharding = jax.typeof(weight).sharding
    return None if sharding.mesh.empty else sharding


def _transposed(sharding: NamedSharding | None) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, jax.P(*reversed(sharding.spec)))


class ColumnParallelLinear(Module):
    """`y = x @ weight.T + bias`, the output dimension sharded: `[T, in_dim] -> [T, out_dim]`.

    Args:
        out_axis: logical axis of the output (`ShardingRules`): `"mlp"`, `"heads"`, `"kv_heads"` or `"vocab"`.
        gather_output: replicate the output. Then `out_dim` need not be divisible: rows are padded inside, and
            the padding is cut off again (logits over an odd vocabulary).
        tied_weight: an embedding's weight, shared instead of creating one.
    """

    def __init__(self, in_dim: int, out_dim: int, dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs,
                 has_bias: bool = False, out_axis: str = "mlp", gather_output: bool = False,
                 tied_weight: nnx.Param | None = None, rules: ShardingRules = ShardingRules()):
        mesh = as_mesh(devices)
        self.out_dim, self.gather_output = out_dim, gather_output
        shards = rules.shards(mesh, out_axis)
        rows = -(-out_dim // shards) * shards if gather_output else out_dim
        if tied_weight is None:
            self.weight = create_param(_lecun_normal, rngs, (rows, in_dim), dtype,
                                       rules.sharding(mesh, (rows, in_dim), out_axis, None),
                                       logical_shape=(out_dim, in_dim))
        elif tied_weight.get_value().shape == (rows, in_dim):
            self.weight = tied_weight
        else:
            raise ValueError(f"tied_weight has shape {tied_weight.get_value().shape}; a linear layer from {in_dim} to "
                             f"{out_dim} on this mesh needs {(rows, in_dim)}.")
        self.bias = create_param(jax.nn.initializers.zeros, rngs, (rows,), dtype,
                                 rules.sharding(mesh, (rows,), out_axis),
                                 logical_shape=(out_dim,)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, in_dim] -> [T, out_dim]`."""
        y = matmul(x, self.weight.get_value())
        if self.bias is not None:
            y = y + self.bias.get_value()
        return jax.reshard(y, on_mesh_of(y, None, None))[:, :self.out_dim] if self.gather_output else y


class RowParallelLinear(Module):
    """`y = sum over devices of x_shard @ weight_shard.T, + bias`: `[T, in_dim] -> [T, out_dim]`, replicated.

    Args:
        in_axis: logical axis of the input: `"mlp"` or `"heads"`.
        distributed_gemm_config: how the sum is done; `DistributedTransformerBlock` sets it on its layers.
    """

    def __init__(self, in_dim: int, out_dim: int, dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs,
                 has_bias: bool = False, in_axis: str = "mlp",
                 distributed_gemm_config: DistributedGemmConfig | None = None,
                 rules: ShardingRules = ShardingRules()):
        mesh = as_mesh(devices)
        self.distributed_gemm_config = distributed_gemm_config
        self.weight = create_param(_lecun_normal, rngs, (out_dim, in_dim), dtype,
                                   rules.sharding(mesh, (out_dim, in_dim), None, in_axis))
        self.bias = create_param(jax.nn.initializers.zeros, rngs, (out_dim,), dtype,
                                 rules.sharding(mesh, (out_dim,), None)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, in_dim]`, sharded on the last dimension, `-> [T, out_dim]`."""
        weight = self.weight.get_value()
        if self.distributed_gemm_config is not None and self.distributed_gemm_config.enable_matmul_allreduce:
            y = matmul_allreduce(x, weight)
        else:
            y = matmul(x, weight, out_sharding=on_mesh_of(weight, None, None))
        return y if self.bias is None else y + self.bias.get_value()
