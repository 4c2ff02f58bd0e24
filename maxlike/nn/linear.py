"""Linear layers under tensor parallelism (Megatron-LM, https://arxiv.org/abs/1909.08053).

Weights are `[out, in]`, as checkpoints store them, and products contract both last dimensions, on CPU into float32:
there any other form reads memory several times slower. On accelerators it makes no difference how a weight lies.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from maxlike.kernels.collective_matmul import matmul_allreduce
from maxlike.mesh import Devices, ShardingRules, as_mesh
from maxlike.nn.module import Module, create_param, gathered, on_mesh_of, rows_of

_Product = Callable[[jax.Array, jax.Array], jax.Array]
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
_MAX_READERS = 15
"""At how many places of a fused loop XLA:CPU lets a value be read before it writes the value to memory instead."""
_MIN_SLICE, _MIN_SLICES = 128, 4
"""Columns of a slice, and slices of a row: with less there is more beside the loop than in it."""
_MAX_PARTIAL_SUMS = 4 * 2**20
"""Bytes of partial sums that stay in a cache between the loop that writes them and the one that adds them up."""
_MAX_ROWS_BEHIND_WEIGHT = 64
"""With some hundred rows the arithmetic outweighs what rearranging a weight costs, and x on the left is as fast."""


def matmul(x: jax.Array, weight: jax.Array, out_sharding: NamedSharding | None = None) -> jax.Array:
    """`x @ weight.T`, accumulated in float32: `[T, I], [O, I] -> [T, O]` in `x.dtype`.

    Args:
        out_sharding: of the result, where the contracted dimension is sharded.
    """

    def product(x: jax.Array, weight: jax.Array, out_sharding: NamedSharding | None = out_sharding,
                dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype, out_sharding=out_sharding,
            precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)

    rows_are_cut = any(jax.typeof(x).sharding.spec[:1])  # then they can be neither padded nor taken apart

    def default(x: jax.Array, weight: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
        padding = 0 if rows_are_cut else max(0, _MIN_ROWS - x.shape[0])
        return product(jnp.pad(x, ((0, padding), (0, 0))), weight, dtype=dtype)[:x.shape[0]].astype(x.dtype)

    def on_accelerator(x: jax.Array, weight: jax.Array) -> jax.Array:
        # They add up in float32 whatever they write. A float32 result is what the TPU's compiler might sum over the
        # devices, twice the bytes, and what the products of the derivative would have for an operand.
        return default(x, weight, x.dtype)

    def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        # XLA:CPU (YNNPACK) rearranges the right operand before it multiplies, which for a weight takes two thirds of
        # the time; the left one it reads as it lies. Fewer than 16 columns on the right get a slower inner loop (jax
        # 0.12) or a very slow one (a single column). The barrier keeps XLA from swapping the operands back.
        rows, (O, I) = x.shape[0], weight.shape
        x, weight = _with_whole_rows(x), _with_whole_rows(weight)
        together = _outputs_together(rows, weight)
        if together > 1:
            # Columns that would be padding are used: a row of the weight is several outputs' rows end to end, and
            # column (b, t) has row t of x in the part of output b, zeros elsewhere.
            weight = jnp.reshape(weight, (O // together, together * I), out_sharding=_like(weight))
            # Zeros by the bits, since LLVM is slow at arithmetic in bfloat16, and zero times infinity is none.
            same = jnp.where(jnp.eye(together, dtype=bool), jnp.uint16(0xFFFF), jnp.uint16(0))[:, None, :, None]
            bits = same & jax.lax.bitcast_convert_type(x, jnp.uint16)[:, None, :]
            x = jax.lax.bitcast_convert_type(bits, x.dtype).reshape(-1, together * I)
        y = product(weight, jnp.pad(x, ((0, -x.shape[0] % _LANES), (0, 0))), _transposed(out_sharding))
        y = jax.lax.optimization_barrier(y)[:, :x.shape[0]]
        if together > 1:
            y = jnp.reshape(y, (O, rows), out_sharding=_like(weight))
        # What follows would otherwise be worked out column by column, in the order of what lies here.
        return jax.lax.optimization_barrier(y.T.astype(x.dtype))

    def weighted_sum(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Left to itself, XLA:CPU works x out again for every output, or writes a copy of it for each to memory that
        # several weights share; the barrier prevents it.
        x, weight = jax.lax.optimization_barrier((x, weight))
        return jnp.sum(weight * x, axis=1)[None]

    on_cpu: _Product = default
    if not rows_are_cut and x.dtype in (jnp.bfloat16, jnp.float32):
        if x.shape[0] == 1 and (slices := _column_slices(weight)):
            on_cpu = _differentiable(functools.partial(_sum_of_slices, slices=slices), default)
        elif x.dtype == jnp.bfloat16 and x.shape[0] <= _MAX_ROWS_BEHIND_WEIGHT:
            on_cpu = _differentiable(weight_first, default)
        elif x.shape[0] == 1:
            on_cpu = _differentiable(weighted_sum, default)
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=on_accelerator)


def _differentiable(product: _Product, plain: _Product) -> _Product:
    """A product with the derivative of a `plain` one, since its own would be lost where numbers are taken for bits."""
    primal = jax.custom_jvp(product)

    @functools.partial(primal.defjvp, symbolic_zeros=True)
    def tangent(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        (x, weight), (dx, dweight) = primals, tangents
        parts = [plain(*operands) for of, operands in ((dx, (dx, weight)), (dweight, (x, dweight)))
                 if not isinstance(of, SymbolicZero)]  # a weight that is not trained costs nothing
        return primal(x, weight), functools.reduce(jnp.add, parts)

    return primal


def _column_slices(weight: jax.Array) -> int:
    """Into how many slices `_sum_of_slices` is to cut the columns of a weight `[O, I]`; 0 if it would gain nothing."""
    O, I = _local_shape(weight)
    if weight.shape[1] > I:
        return 0  # a part of each row is elsewhere
    possible = [n for n in range(_MIN_SLICES, 2 * _MAX_READERS + 1) if I % (n * _LANES) == 0 and I // n >= _MIN_SLICE]
    n = max(possible, default=0)
    return n if n and 4 * O * I // n <= _MAX_PARTIAL_SUMS else 0


def _sum_of_slices(x: jax.Array, weight: jax.Array, slices: int) -> jax.Array:
    """`matmul` of one row on XLA:CPU: slices of the columns are weighted and added up, then what each lane has.

    A product there is one by 16 columns and limited by its arithmetic; this loop, which LLVM vectorises along a row, is
    limited by memory: in bfloat16 30 to 37 GB/s where the product reads 17 to 26 and the memory gives 44.
    """
    width = weight.shape[1] // slices
    x, weight = _with_whole_rows(x), _with_whole_rows(weight)
    # Without the barrier the sum would be taken apart again, or x widened once for every output.
    x, weight = jax.lax.optimization_barrier((x, weight))
    wide = jax.lax.optimization_barrier(x.astype(jnp.float32)[0])
    if weight.dtype == jnp.bfloat16:
        # Widened by its bits, as integers: jax 0.10.2 cuts no bfloat16, it writes a float32 copy of the weight first.
        # And XLA lets a value be read at some 15 places of one loop, not at more, hence two names for the same bits.
        views = [(jax.lax.bitcast_convert_type(weight, narrow), widened)
                 for narrow, widened in ((jnp.uint16, jnp.uint32), (jnp.int16, jnp.int32))]

    def widened_slice(i: int) -> jax.Array:
        if weight.dtype == jnp.float32:
            return weight[:, i * width:(i + 1) * width]
        bits, widened = views[i % 2 if slices > _MAX_READERS else 0]
        return jax.lax.bitcast_convert_type(bits[:, i * width:(i + 1) * width].astype(widened) << 16, jnp.float32)

    total = functools.reduce(jnp.add, (
        widened_slice(i) * wide[i * width:(i + 1) * width] for i in range(slices)))
    # YNNPACK would take all that is added into the sum below, and write every part to memory. It has no `where`; this
    # one changes nothing: where x is NaN, so are the sums.
    total = jnp.where(wide[0] == wide[0], total, jnp.nan)
    return jnp.sum(total, axis=1)[None].astype(x.dtype)


def _outputs_together(rows: int, weight: jax.Array) -> int:
    """How many outputs' rows of a weight `[O, I]` are one operand's row, for so many rows of activations."""
    O, I = _local_shape(weight)
    if weight.shape[1] > I:
        return 1  # a part of each row is elsewhere
    return max(n for n in (1, 2, 4, 8) if n == 1 or (n * rows <= _LANES and n * I <= _LONG and O % n == 0))


def _with_whole_rows(array: jax.Array) -> jax.Array:
    """An array whose rows lie whole on each device, typed so: they may have been cut over an axis of one device."""
    sharding = jax.typeof(array).sharding
    if not any(sharding.spec[1:]) or _local_shape(array)[1] < array.shape[1]:
        return array
    return jax.reshard(array, NamedSharding(sharding.mesh, jax.P(*sharding.spec[:1])))


def _local_shape(array: jax.Array) -> tuple[int, ...]:
    """Of what each device holds. (`shard_shape` does not know the meshes inside a `shard_map` over some axes.)"""
    sharding = jax.typeof(array).sharding
    entries = (axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in sharding.spec)
    parts = (math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in entries)
    return tuple(size // n for size, n in itertools.zip_longest(array.shape, parts, fillvalue=1))


def _like(weight: jax.Array) -> NamedSharding | None:
    """The sharding of a weight, for its reshaping: `None` where it lies on no mesh."""
    sharding = jax.typeof(weight).sharding
    return None if sharding.mesh.empty else sharding


def _transposed(sharding: NamedSharding | None) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, jax.P(*reversed(sharding.spec)))


@dataclass(frozen=True)
class LoraScaling:
    """What an adapter's product is multiplied by: `alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685, and Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
    """

    alpha: float
    use_rslora: bool = False

    def factor(self, rank: int) -> float:
        """The factor for an adapter of this rank."""
        return self.alpha / (rank ** 0.5 if self.use_rslora else rank)


class Linear(Module):
    """What both kinds of linear layer have: a weight `[out, in]`, and perhaps a bias and an adapter.

    The adapter is `y + factor * (x @ lora_a.T) @ lora_b.T` (`nn/lora.py`), with `lora_a` `[r, in]` and `lora_b`
    `[out, r]`. Of the weight's two dimensions each is cut as the weight is, so beside the layer's own communication
    there is at most a sum of `[T, r]`. The adapter is used in the dtype of `x`.
    """

    weight: nnx.Param
    bias: nnx.Param | None
    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None
    lora_scaling: LoraScaling | None = None

    def _adapted(self, y: jax.Array, x: jax.Array, in_axes: Any, out_axes: Any) -> jax.Array:
        """`y`, which is the layer's output for `x`, with the adapter's added if there is one."""
        if self.lora_a is None or self.lora_b is None or self.lora_scaling is None:
            return y
        a = gathered(self.lora_a.get_value().astype(x.dtype), None, in_axes)
        b = gathered(self.lora_b.get_value().astype(x.dtype), out_axes, None)
        h = matmul(x, a, out_sharding=on_mesh_of(a, rows_of(x), None))  # [T, r]
        return y + matmul(h * self.lora_scaling.factor(a.shape[0]), b)


class ColumnParallelLinear(Linear):
    """`y = x @ weight.T + bias`, the output dimension sharded: `[T, in_dim] -> [T, out_dim]`.

    `weight` is `[out_dim, in_dim]`, as checkpoints store it; products accumulate in float32.

    Args:
        dtype: of the parameters; the output has that of the input.
        devices: a mesh, or devices from which `make_mesh` makes one.
        rngs: for the initial weight (LeCun normal).
        has_bias: a parameter `bias`, `[out_dim]`, that begins at zero.
        out_axis: logical axis of the output (`ShardingRules`): `"mlp"`, `"heads"`, `"kv_heads"` or `"vocab"`.
        gather_output: replicate the output. Then `out_dim` need not be divisible: rows are padded inside, and
            the padding is cut off again (logits over an odd vocabulary).
        tied_weight: an embedding's weight, shared instead of creating one.
        rules: which mesh axes `out_axis` is cut over.

    Raises:
        ValueError: the mesh does not divide `out_dim`, or `tied_weight` has another shape.
    """

    def __init__(self, in_dim: int, out_dim: int, dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs,
                 has_bias: bool = False, out_axis: str = "mlp", gather_output: bool = False,
                 tied_weight: nnx.Param | None = None, rules: ShardingRules = ShardingRules()):
        mesh = as_mesh(devices)
        self.out_dim, self.gather_output = out_dim, gather_output
        shards = rules.shards(mesh, out_axis)
        self.out_axes = rules.sharding(mesh, (shards,), out_axis).spec[0]
        rows = -(-out_dim // shards) * shards if gather_output else out_dim
        if tied_weight is None:
            self.weight = create_param(_lecun_normal, rngs, (rows, in_dim), dtype,
                                       rules.sharding(mesh, (rows, in_dim), out_axis, "hidden"),
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
        y = self.ungathered(x)
        return jax.reshard(y, on_mesh_of(y, rows_of(y), None))[:, :self.out_dim] if self.gather_output else y

    def ungathered(self, x: jax.Array) -> jax.Array:
        """`[T, in_dim] -> [T, rows]`, cut over the devices as the weight's rows are, its padding still there."""
        y = matmul(x, gathered(self.weight.get_value(), self.out_axes, None))
        if self.bias is not None:
            y = y + self.bias.get_value()
        return self._adapted(y, x, None, self.out_axes)


class RowParallelLinear(Linear):
    """`y = sum over devices of x_shard @ weight_shard.T, + bias`: `[T, in_dim] -> [T, out_dim]`, whole on each.

    `weight` is `[out_dim, in_dim]`, as checkpoints store it; products accumulate in float32.

    Args:
        dtype: of the parameters; the output has that of the input.
        devices: a mesh, or devices from which `make_mesh` makes one.
        rngs: for the initial weight (LeCun normal).
        has_bias: a parameter `bias`, `[out_dim]`, that begins at zero and is added once, after the sum.
        in_axis: logical axis of the input: `"mlp"` or `"heads"`.
        distributed_gemm_config: how the sum is done; `DistributedTransformerBlock` sets it on its layers.
        rules: which mesh axes `in_axis` is cut over.

    Raises:
        ValueError: the mesh does not divide `in_dim`.
    """

    def __init__(self, in_dim: int, out_dim: int, dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs,
                 has_bias: bool = False, in_axis: str = "mlp",
                 distributed_gemm_config: DistributedGemmConfig | None = None,
                 rules: ShardingRules = ShardingRules()):
        mesh = as_mesh(devices)
        self.distributed_gemm_config = distributed_gemm_config
        self.weight = create_param(_lecun_normal, rngs, (out_dim, in_dim), dtype,
                                   rules.sharding(mesh, (out_dim, in_dim), "hidden", in_axis))
        self.in_axes = rules.sharding(mesh, (in_dim,), in_axis).spec[0]
        self.bias = create_param(jax.nn.initializers.zeros, rngs, (out_dim,), dtype,
                                 rules.sharding(mesh, (out_dim,), None)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, in_dim]`, sharded on the last dimension, `-> [T, out_dim]`."""
        weight = gathered(self.weight.get_value(), None, self.in_axes)
        if self.distributed_gemm_config is not None and self.distributed_gemm_config.enable_matmul_allreduce:
            y = matmul_allreduce(x, weight)
        else:
            y = matmul(x, weight, out_sharding=on_mesh_of(weight, rows_of(x), None))
        if self.bias is not None:
            y = y + self.bias.get_value()
        return self._adapted(y, x, self.in_axes, None)
