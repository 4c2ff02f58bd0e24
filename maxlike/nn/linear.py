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
"""XLA:CPU widens the whole of a bfloat16 weight to multiply it with a single row; several rows go ten times faster."""


def matmul(x: jax.Array, weight: jax.Array, out_sharding: NamedSharding | None = None, *,
           tied: bool = False) -> jax.Array:
    """`x @ weight.T`, accumulated in float32: `[T, I], [O, I] -> [T, O]` in `x.dtype`.

    Args:
        out_sharding: of the result, where the contracted dimension is sharded.
        tied: the weight is an embedding's too.
    """

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        padding = max(0, _MIN_ROWS - x.shape[0])
        y = jax.lax.dot_general(
            jnp.pad(x, ((0, padding), (0, 0))), weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
            out_sharding=out_sharding, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
        return y[:x.shape[0]].astype(x.dtype)

    def weighted_sum(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Left to itself, XLA:CPU works x out again for every output, or writes a copy of it for each to memory that
        # several weights share. The barrier prevents it, and in jax 0.10 that x is rounded to what it is already.
        x, weight = jax.lax.optimization_barrier((x, weight))
        wide = jax.lax.reduce_precision(x.astype(jnp.float32), jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)
        return jnp.sum(weight.astype(jnp.float32) * wide, axis=1)[None].astype(x.dtype)

    if x.shape[0] > 1 or tied:  # jax 0.10 widens a table once for both its uses, and writes that out
        return product(x, weight)
    # XLA:CPU rearranges a weight before it multiplies; for a single row that takes longer than all else.
    return jax.lax.platform_dependent(x, weight, cpu=weighted_sum, default=product)


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
        self.out_dim, self.gather_output, self.tied = out_dim, gather_output, tied_weight is not None
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
        y = matmul(x, self.weight.get_value(), tied=self.tied)
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
