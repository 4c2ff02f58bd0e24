"""The public function: checks its arguments, and splits the heads over the mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from maxlike.kernels.ragged_attention.xla import blockwise_attention


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_offsets: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention inside each sequence of a ragged batch.

    Sequence s is the tokens [row_offsets[s], row_offsets[s + 1]); the token at position p sees positions
    (p - sliding_window, p] of its own sequence. The scores are `scale * q . k`, then, with a soft cap,
    `soft_cap * tanh(score / soft_cap)`; products accumulate, and the softmax is taken, in float32. Query head
    n reads KV head n // (N / K). Tokens outside every sequence (the padding from row_offsets[S] on) get zeros
    and give zero gradients, whatever they hold.

    Differentiable in q, k, v and sinks. Memory is linear in T, forward and backward; time grows with the sum of the
    sequences' squared lengths (or length times window), not with T squared. Forward:
    FlashAttention, https://arxiv.org/abs/2205.14135; backward: https://arxiv.org/abs/2307.08691.

    Arrays on a mesh with Explicit axes may be sharded over their heads (dimension 1): k and v over the
    leading mesh axes of q's, as `("kv",)` is of `("kv", "rep")`. The axes left over divide the query heads of
    single KV heads, so with them each shard must hold one KV head. `row_offsets` is replicated.

    They may also be sharded over their tokens, all three alike, no sequence lying on two shards. `row_offsets` is
    then int32[R, S + 1], sharded over R in the same way, and counts each of the R shards' tokens from its first.

    Args:
      q: float[T, N, H], float32 or bfloat16.
      k: float[T, K, H], where K divides N.
      v: float[T, K, H].
      row_offsets: int32[S + 1], ascending; row_offsets[S] <= T. Or int32[R, S + 1], as above.
      scale: factor on the scores, usually 1 / sqrt(H).
      sliding_window: how many positions a token sees, itself included; None for all.
      soft_cap: bound on the scores' magnitude; None for none.
      sinks: float32[N], of each query head one more score, neither scaled nor capped, that takes part in the softmax
        and has no value (gpt-oss); None for none. Sharded as the heads of q.

    Returns:
      float[T, N, H] in q's dtype, sharded as q.

    Raises:
      ValueError: shapes or shardings do not fit together, or a window or a cap is not positive.
    """
    row_offsets = jnp.asarray(row_offsets)
    _check(q, k, v, row_offsets, sliding_window, soft_cap, sinks)
    options: dict[str, Any] = dict(scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
    mesh = jax.typeof(q).sharding.mesh
    # Axes that are Manual already belong to a shard_map around us: what we see is one shard of theirs.
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not axes:
        return blockwise_attention(q, k, v, row_offsets.reshape(-1), sinks=sinks, **options)
    q_spec, kv_spec = _specs(q, k, v, row_offsets, mesh)
    # The custom derivative is inside the shard_map, so that it is shard_map's own transpose that sums the
    # gradients of k and v over the shards that share them.
    sharded = jax.shard_map(
        lambda q, k, v, row_offsets, sinks: blockwise_attention(
            q, k, v, row_offsets.reshape(-1), sinks=sinks, **options
        ),
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, jax.P(q_spec[0]), jax.P(q_spec[1])),
        out_specs=q_spec,
        axis_names=axes,
        check_vma=False,
    )
    return sharded(q, k, v, row_offsets, sinks)


def _check(q, k, v, row_offsets, sliding_window, soft_cap, sinks):
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}; expected [T, N, H], [T, K, H] and [T, K, H]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads evenly; "
            "the number of KV heads must divide the number of query heads"
        )
    integers = jnp.issubdtype(row_offsets.dtype, jnp.integer)
    if row_offsets.ndim not in (1, 2) or row_offsets.shape[-1] < 2 or not integers:
        raise ValueError(
            f"row_offsets is {row_offsets.dtype}{list(row_offsets.shape)}; expected int32[S + 1] with S at least 1, or "
            "int32[R, S + 1] for R shards of the tokens"
        )
    mesh, spec = jax.typeof(q).sharding.mesh, jax.typeof(q).sharding.spec
    shards = math.prod(mesh.shape[axis] for axis in _axes(spec, 0))
    if math.prod(row_offsets.shape[:-1]) != shards:
        raise ValueError(
            f"row_offsets is {row_offsets.dtype}{list(row_offsets.shape)}, and the tokens are cut into {shards} "
            f"shards; expected the offsets of each, int32[{shards}, S + 1]"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; expected at least 1, or None for no window")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}; expected a positive number, or None for no cap")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != jnp.float32):
        raise ValueError(f"sinks is {sinks.dtype}{list(sinks.shape)}; expected float32[{q.shape[1]}], or None")


def _specs(q, k, v, row_offsets, mesh):
    """The specs of q and of k and v, once it is sure that every shard holds its query heads' KV heads."""
    specs = [jax.typeof(x).sharding.spec for x in (q, k, v)]
    given = f"q, k and v are sharded as {specs[0]}, {specs[1]} and {specs[2]}"
    if any(_axes(spec, 2) for spec in specs):
        raise ValueError(f"{given}; only the tokens and the heads may be sharded: reshard the last dimension")
    token_axes = _axes(specs[0], 0)
    if any(_axes(spec, 0) != token_axes for spec in (*specs, jax.typeof(row_offsets).sharding.spec)):
        raise ValueError(
            f"{given}, row_offsets as {jax.typeof(row_offsets).sharding.spec}; where tokens are sharded, all four must "
            "be, in the same way, on their first dimension"
        )
    q_axes, k_axes, v_axes = (_axes(spec, 1) for spec in specs)
    if k_axes != v_axes or q_axes[: len(k_axes)] != k_axes:
        raise ValueError(f"{given}; k's and v's mesh axes must be the same, and the leading ones of q's")
    kv_shards = math.prod(mesh.shape[axis] for axis in k_axes)
    q_shards = math.prod(mesh.shape[axis] for axis in q_axes)
    if q_shards > kv_shards and k.shape[1] != kv_shards:
        raise ValueError(
            f"{given}: {q_shards} shards of the query heads, and {kv_shards} of the {k.shape[1]} KV heads; "
            "where shards share KV heads each must hold exactly one: shard k and v over as many devices as KV heads"
        )
    return jax.P(token_axes or None, q_axes or None), jax.P(token_axes or None, k_axes or None)


def _axes(spec: jax.P, dim: int) -> tuple[str, ...]:
    """The names of the mesh axes that dimension `dim` is sharded over."""
    entry = spec[dim] if dim < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
