"""Collective matmul: a row-parallel product whose reduction travels while the product is computed.

The plain form computes a `[T, D]` partial sum on every device and then reduces it: links idle first, chips
idle after. Here the output columns are cut into chunks, and the partial sums of one chunk are on their way to
the neighbour while the next chunk is computed, a ring reduce-scatter:

    Wang et al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
    Models", ASPLOS 2023.

An all-gather then gives every device all the columns.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
@jax.jit  # called eagerly it is one program, not one for each operation of the ring
def matmul_allreduce(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight.T`, summed over the devices that share the contracted dimension.

    Args:
      x: `[T, F]`, its type carrying the sharding `P(rows, axes)` on Explicit mesh axes. `axes` is one mesh
        axis, or a tuple of them that makes one ring in row-major order; None, or axes of size 1, means a
        plain product.
      weight: `[D, F]`, sharded `P(None, axes)`. D need not be divisible by the number of devices.

    Returns:
      `[T, D]` in x's dtype, sharded `P(rows, None)`: the plain product, to rounding. Products and additions
      are done in float32; from device to device partial sums travel in x's dtype, as in XLA's own all-reduce
      on TPU (for bfloat16 half the bytes, and one rounding a hop).

    Raises:
      ValueError: the shapes or the shardings of x and weight do not belong together.

    Reverse-mode differentiable. The gradients are plain products, which need no communication along `axes`.
    """
    axes = _shared_axes(x, weight)
    mesh, rows = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec[0]
    if math.prod(mesh.shape[axis] for axis in axes) == 1:
        whole = jax.sharding.NamedSharding(mesh, jax.P(rows, None)) if axes else None
        return _product(x, weight, out_sharding=whole).astype(x.dtype)
    # That the gathered columns are alike on all devices is more than check_vma can tell.
    per_device = functools.partial(_ring, axes=axes)
    return jax.shard_map(per_device, mesh=mesh, out_specs=jax.P(rows, None), check_vma=False)(x, weight)


def _shared_axes(x: jax.Array, weight: jax.Array) -> tuple[str, ...]:
    """The mesh axes over which the last dimension of both operands is sharded."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"matmul_allreduce needs x [T, F] and weight [D, F], but was given {x.shape} and {weight.shape}; "
            "a weight is stored [out, in]"
        )
    spec, weight_spec = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    axes = spec[1]
    if weight_spec != jax.P(None, axes):
        raise ValueError(
            f"matmul_allreduce contracts x, sharded {spec}, with a weight sharded {jax.P(None, axes)}, "
            f"but was given {weight_spec}; jax.reshard one of them to match"
        )
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def _product(x, weight, out_sharding=None):
    contract_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x, weight, contract_last, preferred_element_type=jnp.float32, out_sharding=out_sharding, precision=_precision(x)
    )


def _precision(x):
    # By default TPUs and GPUs multiply float32 in fewer bits than it has.
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _ring(x: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """One device's part, `[T, F / n]` and `[D, F / n]` -> `[T, D]`: the sum over the n devices of the ring."""
    n, me = lax.axis_size(axes), lax.axis_index(axes)
    # Of few rows, the sums are sent sooner than the next chunk of weights is read: memory is about 16 times
    # as fast as one direction of a link (TPU v5e: 819 and 50 GB/s, as published). Of more rows, half the
    # columns go round the other way. Two devices use both directions of their link as it is.
    ways = (1, -1) if n > 2 and 16 * x.shape[0] > x.shape[1] else (1,)
    columns = weight.shape[0]
    chunk = math.ceil(columns / (n * len(ways)))

    def products(step, me):  # for each way round, what this device adds to the sums that it holds in a step
        result = []
        for i, way in enumerate(ways):
            # Sums start one device beyond the one that keeps them, which they reach in step n.
            keeper = lax.rem(me + (-way * step) % n, n)
            start = (keeper * len(ways) + i) * chunk  # dynamic_slice moves it back where it would overrun
            rows = lax.dynamic_slice_in_dim(weight, start, chunk, allow_negative_indices=False)
            result.append(_product(x, rows))
        return result

    sums = [own.astype(x.dtype) for own in products(1, me)]
    for step in range(2, n + 1):
        neighbours = [[(i, (i + way) % n) for i in range(n)] for way in ways]
        received = [lax.ppermute(s, axes, perm) for s, perm in zip(sums, neighbours, strict=True)]
        # Left alone, XLA fuses the addition into the product, which then has to wait for the message, or it
        # computes the products of all steps first, and the messages travel with nothing to hide them.
        own, received, me = lax.optimization_barrier((products(step, me), received, me))
        sums = [(o + r).astype(x.dtype) for o, r in zip(own, received, strict=True)]

    out = lax.all_gather(jnp.concatenate(sums, axis=1), axes, axis=1, tiled=True)
    whole, rest = columns // chunk * chunk, columns % chunk
    if rest == 0:
        return out[:, :columns]
    # The chunk of the last columns was moved back: they are at its end.
    return jnp.concatenate([out[:, :whole], out[:, whole + chunk - rest : whole + chunk]], axis=1)


def _forward(x, weight):
    return matmul_allreduce(x, weight), (x, weight)


def _backward(operands, d_out):
    x, weight = operands
    product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32, precision=_precision(x))
    d_x = product(d_out, weight, (((1,), (0,)), ((), ())), out_sharding=jax.typeof(x).sharding)
    d_weight = product(d_out, x, (((0,), (0,)), ((), ())), out_sharding=jax.typeof(weight).sharding)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


matmul_allreduce.defvjp(_forward, _backward)
