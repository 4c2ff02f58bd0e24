"""The one entry to ragged paged attention: checks, sharding over heads, choice of implementation."""

import importlib
import math
import re
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, NamedSharding

from maxlike.kernels.paged_attention.mosaic_tpu import MosaicTpu
from maxlike.kernels.paged_attention.xla import LARGEST, Xla

FLOATS = ("float32", "bfloat16", "float16")
"""Dtypes of q, k and v; a cache may be of these, and of those in `LARGEST`."""


class Implementation(Protocol):
    """One way to compute it: a frozen dataclass whose fields are overrides, called on one device's arrays.

    What it cannot do it refuses with a `ValueError` that has the numbers and names the next choice.
    """

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: jax.Array,
        cache_lengths: jax.Array,
        page_table: jax.Array,
        row_offsets: jax.Array,
        first_page: jax.Array,
        sinks: jax.Array | None,
        k_scale: jax.Array | None,
        v_scale: jax.Array | None,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> tuple[jax.Array, jax.Array]:
        """The arguments of `ragged_paged_attention` on one device, already checked.

        T, S, M, N, K, H as there, N and K being this device's heads: q `[T, N, H]`, k and v `[T, K, H]`, pages
        `[pages, K, page_size, 2 * H]` (perhaps padded), cache_lengths `int32[S]`, page_table `int32[S, M]`, row_offsets
        `int32[S + 1]`, first_page `int32[]`, sinks `float32[N]`, k_scale and v_scale `float32[K]`.

        Returns:
            The output `[T, N, H]`, and the pages with k and v in them.

        Raises:
            ValueError: this implementation cannot do it.
        """


HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""GPUs with the instructions that `MosaicGpu` is written for, as they stand in a device's kind."""

IMPLEMENTATIONS = {"xla": "Xla", "mosaic_tpu": "MosaicTpu", "mosaic_gpu": "MosaicGpu"}
"""Module here -> the implementation in it."""


def implementation_named(name: str) -> Implementation:
    """The implementation of a name in `IMPLEMENTATIONS`, as it comes without overrides."""
    return getattr(importlib.import_module(f"maxlike.kernels.paged_attention.{name}"), IMPLEMENTATIONS[name])()


def check_implementation(implementation: Any) -> None:
    """Raises `ValueError` unless it is an implementation: not a name, and not the class of one."""
    if not callable(implementation) or isinstance(implementation, type):
        raise ValueError(
            f"implementation must be an object such as Xla() or MosaicTpu(), of maxlike.kernels.paged_attention; given "
            f"{implementation!r}"
        )


def choose_implementation(device: Any, dtype: jnp.dtype) -> tuple[Implementation, str]:
    """The implementation for a device and queries of a dtype, and why, where it is plain JAX on an accelerator.

    `device` is a `jax.Device`, or an `AbstractDevice`: anything with a `.platform` and a `.device_kind`.
    """
    if device.platform == "cpu":
        return Xla(), ""
    if device.platform == "tpu":
        return MosaicTpu(), ""
    if device.platform != "gpu" or not any(name in re.split("[ -]", device.device_kind) for name in HOPPER):
        return Xla(), f"the kernel for GPUs needs a Hopper, one of {', '.join(HOPPER)}; this is {device.device_kind}"
    # jax's Mosaic GPU sets environment variables when it is imported: only for those who have the GPU.
    from maxlike.kernels.paged_attention import mosaic_gpu

    if not mosaic_gpu.supported():
        return Xla(), (
            f"the kernel for Hopper needs jax {mosaic_gpu.OLDEST_JAX} or newer, and that Python 3.12 or newer; "
            f"this is {jax.__version__}"
        )
    if dtype == jnp.float32:
        return Xla(), "the tensor cores of a Hopper round float32; its kernel takes bfloat16 and float16"
    return mosaic_gpu.MosaicGpu(), ""


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
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes a step's K and V into the pages of the cache, and attends over them.

    T tokens, S sequences, N query heads, K KV heads, H head width, R page rows, M pages a sequence may have.

    Args:
      q: [T, N, H], the step's queries, in float32, bfloat16 or float16. Query head n reads KV head n // (N / K).
      k, v: [T, K, H] in `q.dtype`, the step's keys and values.
      pages: [R, K, page_size, W], W >= 2 * H: K in lanes [0, H), V in [H, 2 * H), the rest unused. Of a dtype that
        q may have, or quantised: int8 or float8_e4m3fn. Donate it to the enclosing jit: it is written in place.
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
      sinks: float32[N], of each query head one more score, neither scaled nor capped, that takes part in the softmax
        and has no value (gpt-oss).
      k_scale, v_scale: float32[K], for quantised pages. Stored is x / scale, to int8 rounded to the nearest (of two
        to the even one) and clipped to [-127, 127], or clipped to [-448, 448] and cast to float8_e4m3fn; attended to
        is stored * scale. int8 needs them; without them float8_e4m3fn stores x.
      implementation: None takes that of `choose_implementation` for the device that is compiled for: that of q's
        mesh, without a mesh the default device.

    Returns:
      The output [T, N, H] in `q.dtype`, zero at padding tokens, and the pages. What unused pages, slots and lanes
      hold, NaN included, has no effect. Products are of q's and the pages' common dtype (quantised pages: q's),
      summed in float32.

    Where q and pages are sharded over heads (dimension 1, Explicit mesh axes), each device works on its own heads;
    q may be sharded over more axes than k, v and pages when each device has one KV head. Sinks and scales are cut
    like their heads.

    Raises:
      ValueError: shapes, dtypes or shardings do not fit together; or, where they are known and not traced, the
        batch's numbers do not fit the cache.
    """
    _check(q, k, v, pages, sliding_window, soft_cap)
    _check_per_head(q, pages, sinks, k_scale, v_scale)
    _check_batch(cache_lengths, page_table, row_offsets)
    _check_numbers(q, pages, cache_lengths, page_table, row_offsets, first_page, sliding_window)

    mesh = jax.typeof(q).sharding.mesh
    if implementation is None:
        implementation, _ = choose_implementation(mesh.abstract_device or _default_device(), q.dtype)
    check_implementation(implementation)

    def attend(*arrays):
        return implementation(*arrays, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)

    arrays = [jnp.asarray(x) for x in (q, k, v, pages, cache_lengths, page_table, row_offsets)]
    arrays.append(jnp.asarray(first_page, jnp.int32))
    per_head = [x if x is None else jnp.asarray(x) for x in (sinks, k_scale, v_scale)]
    if AxisType.Explicit not in mesh.axis_types:
        return attend(*arrays, *per_head)
    q_axes, kv_axes = _head_axes(q, k, v, pages)
    heads, kv_heads = P(None, q_axes, None), P(None, kv_axes, None)
    cache = P(None, kv_axes, None, None)
    per_head_specs = P(q_axes), P(kv_axes), P(kv_axes)
    there: Any = mesh
    if not isinstance(q, jax.core.Tracer):
        there = q.sharding.mesh  # type: ignore[attr-defined]  # eagerly: the mesh of real devices
    per_head = [
        x if x is None else jax.reshard(x, NamedSharding(there, spec))
        for x, spec in zip(per_head, per_head_specs, strict=True)
    ]
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, cache, P(), P(), P(), P(), *per_head_specs),
        out_specs=(heads, cache),
        check_vma=False,
    )(*arrays, *per_head)


def _default_device():
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, jax.Device):
        return device
    return jax.devices(device)[0]  # None, or the name of a platform


def _check(q, k, v, pages, sliding_window, soft_cap):
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
    if q.dtype.name not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must be of one dtype, of {', '.join(FLOATS)}; given q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    if pages.dtype.name not in (*FLOATS, *LARGEST):
        raise ValueError(f"pages must be of {', '.join((*FLOATS, *LARGEST))}; given {pages.dtype}")
    if 0 in (q.size, pages.size):
        raise ValueError(f"there must be a token and a page at least; given {given}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token, or None; given {sliding_window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, or None; given {soft_cap}")


def _check_per_head(q, pages, sinks, k_scale, v_scale):
    for name, x, heads in (
        ("sinks", sinks, q.shape[1]),
        ("k_scale", k_scale, pages.shape[1]),
        ("v_scale", v_scale, pages.shape[1]),
    ):
        if x is not None and (x.shape != (heads,) or x.dtype != jnp.float32):
            raise ValueError(f"{name} must be float32[{heads}], one a head, or None; given {x.dtype}{list(x.shape)}")
    scales = [name for name, x in (("k_scale", k_scale), ("v_scale", v_scale)) if x is not None]
    if scales and pages.dtype.name not in LARGEST:
        raise ValueError(
            f"scales belong to pages of {' or '.join(LARGEST)}; given {' and '.join(scales)} for {pages.dtype}"
        )
    if len(scales) == 1 or (pages.dtype == jnp.int8 and not scales):
        raise ValueError(f"{pages.dtype} pages need both k_scale and v_scale; given {''.join(scales) or 'neither'}")


def _check_batch(cache_lengths, page_table, row_offsets):
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
    if 0 in page_table.shape:
        raise ValueError(f"there must be a sequence and a page at least; given page_table {page_table.shape}")


def _check_numbers(q, pages, cache_lengths, page_table, row_offsets, first_page, sliding_window):
    """Outside jit the numbers are there to be looked at; traced they are not, and the caller answers for them.

    `KVCacheParams.check_step` is what a model's callers have, for all layers at once.
    """
    batch = (cache_lengths, page_table, row_offsets, first_page)
    if any(isinstance(x, jax.core.Tracer) for x in batch):
        return
    cached, table, offsets = (np.asarray(x) for x in batch[:3])
    new = np.diff(offsets)
    if offsets[0] != 0 or np.any(new < 0) or offsets[-1] > q.shape[0]:
        raise ValueError(
            f"row_offsets must ascend from 0 to at most the {q.shape[0]} tokens that are there; given {offsets}"
        )
    page_size, width = pages.shape[2], table.shape[1]
    for s in np.flatnonzero(new):
        if cached[s] < 0:
            raise ValueError(f"cache_lengths must not be negative; given {cached[s]} for sequence {s}")
        length = cached[s] + new[s]
        if length > width * page_size:
            raise ValueError(
                f"sequence {s} comes to {length} tokens ({cached[s]} in the cache, {new[s]} new); {width} pages of "
                f"{page_size} tokens, the width of page_table, hold {width * page_size}"
            )
        first = 0 if sliding_window is None else max(0, cached[s] - sliding_window + 1)
        rows = int(first_page) + table[s, first // page_size : -(-length // page_size)].astype(np.int64)
        outside = rows[(rows < 0) | (rows >= pages.shape[0])]
        if outside.size:
            raise ValueError(
                f"sequence {s} needs page row {outside[0]} (first_page {int(first_page)} and its entry of page_table); "
                f"the cache has rows 0 to {pages.shape[0] - 1}"
            )


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
