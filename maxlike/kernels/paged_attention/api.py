"""The one entry to ragged paged attention: checks, sharding over heads, choice of implementation."""

import math

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import AxisType

from maxlike.kernels.paged_attention import xla


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    cache_lengths: jax.Array,
    page_table: jax.Array,
    row_offsets: jax.Array,
    *,
    first_page: int | jax.Array = 0,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes a step's K and V into the pages of the cache, and attends over them.

    T tokens, S sequences, N query heads, K KV heads, H head width, R page rows, M pages a sequence may have.

    Args:
      q: [T, N, H], the step's queries. Query head n reads KV head n // (N / K).
      k, v: [T, K, H], the step's keys and values.
      pages: [R, K, page_size, W], W >= 2 * H: K in lanes [0, H), V in [H, 2 * H), the rest unused. Donate it to
        the enclosing jit: it is written in place.
      cache_lengths: int32[S], tokens of each sequence that the cache held before this step.
      page_table: int32[S, M]. Position p of sequence s lies in slot p % page_size of page row
        `first_page + page_table[s, p // page_size]`. Entries that no token of this step needs are never followed.
      row_offsets: int32[S + 1], ascending from 0. Tokens [row_offsets[s], row_offsets[s + 1]) belong to sequence
        s, at positions cache_lengths[s] and on. Tokens from row_offsets[S] on are padding.
      first_page: row of this layer's page 0; may be traced.
      scale: scores are `scale * q . k`.
      sliding_window: a token at position p attends to positions j with p - sliding_window < j <= p; None: to all
        j <= p.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`, before masking (Gemma 2).

    Returns:
      The output [T, N, H] in `q.dtype`, zero at padding tokens, and the pages. What unused pages, slots and lanes
      hold, NaN included, has no effect.

    Where q and pages are sharded over heads (dimension 1, Explicit mesh axes), each device works on its own heads;
    q may be sharded over more axes than k, v and pages when each device has one KV head.

    Raises:
      ValueError: shapes, dtypes or shardings do not fit together.
    """
    _check(q, k, v, pages, cache_lengths, page_table, row_offsets, sliding_window, soft_cap)

    def attend(q, k, v, pages, cache_lengths, page_table, row_offsets, first_page):
        # The choice of implementation, by the platform that is compiled for, belongs here.
        return xla.ragged_paged_attention(
            q, k, v, pages, cache_lengths, page_table, row_offsets, first_page,
            scale=scale, sliding_window=sliding_window, soft_cap=soft_cap,
        )  # fmt: skip

    arrays = (q, k, v, pages, cache_lengths, page_table, row_offsets, jnp.asarray(first_page, jnp.int32))
    mesh = jax.typeof(q).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return attend(*arrays)
    q_axes, kv_axes = _head_axes(q, k, v, pages)
    heads, kv_heads = P(None, q_axes, None), P(None, kv_axes, None)
    cache = P(None, kv_axes, None, None)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, cache, P(), P(), P(), P()),
        out_specs=(heads, cache),
        check_vma=False,
    )(*arrays)


def _check(q, k, v, pages, cache_lengths, page_table, row_offsets, sliding_window, soft_cap):
    given = f"q {q.shape}, k {k.shape}, v {v.shape}, pages {pages.shape}"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        raise ValueError(f"q must be [T, N, H] and k and v both [T, K, H]; given {given}")
    if pages.ndim != 4 or pages.shape[1] != k.shape[1] or pages.shape[3] < 2 * k.shape[2]:
        raise ValueError(
            f"pages must be [R, K, page_size, W] with K = {k.shape[1]} KV heads and W >= {2 * k.shape[2]} lanes "
            f"(twice the head width); given {given}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the KV heads; given {given}")
    for name, x in dict(q=q, k=k, v=v, pages=pages).items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating dtype, not {x.dtype}")
    indices = dict(cache_lengths=cache_lengths, page_table=page_table, row_offsets=row_offsets)
    for name, x in indices.items():
        if x.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, not {x.dtype}")
    n_sequences = cache_lengths.shape[0] if cache_lengths.ndim == 1 else -1
    if row_offsets.shape != (n_sequences + 1,) or page_table.ndim != 2 or page_table.shape[0] != n_sequences:
        raise ValueError(
            "cache_lengths must be [S], page_table [S, M] and row_offsets [S + 1]; given "
            + ", ".join(f"{name} {x.shape}" for name, x in indices.items())
        )
    if 0 in (q.size, pages.size, page_table.size):
        raise ValueError(
            f"there must be a token, a sequence and a page at least; given {given}, page_table {page_table.shape}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token, or None; given {sliding_window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, or None; given {soft_cap}")


def _head_axes(q, k, v, pages):
    """The mesh axes that the query heads, and that the KV heads are sharded over."""
    specs = dict(q=jax.typeof(q).sharding.spec, k=jax.typeof(k).sharding.spec,
                 v=jax.typeof(v).sharding.spec, pages=jax.typeof(pages).sharding.spec)  # fmt: skip
    given = ", ".join(f"{name} {spec}" for name, spec in specs.items())
    if any(axes is not None for spec in specs.values() for d, axes in enumerate(spec) if d != 1):
        raise ValueError(f"q, k, v and pages may be sharded over their heads (dimension 1) only; given {given}")
    axes = {name: _as_tuple(spec[1] if len(spec) > 1 else None) for name, spec in specs.items()}
    if not axes["k"] == axes["v"] == axes["pages"]:
        raise ValueError(f"the heads of k, v and pages must be sharded over the same mesh axes; given {given}")
    q_axes, kv_axes = axes["q"], axes["pages"]
    if q_axes != kv_axes:
        # With more shards of Q than of K and V, a device finds its KV heads only where there is just one of them.
        sizes = jax.typeof(q).sharding.mesh.shape
        local_kv_heads = pages.shape[1] // math.prod(sizes[a] for a in kv_axes)
        if q_axes[: len(kv_axes)] != kv_axes or local_kv_heads != 1:
            raise ValueError(
                "query heads must be sharded over the mesh axes of the KV heads; over more axes, after those, only "
                f"where each device has one KV head. Given {given}: {local_kv_heads} KV heads a device"
            )
    return q_axes, kv_axes


def _as_tuple(axes):
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)
