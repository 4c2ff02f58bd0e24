"""The KV cache: one flat array of pages for all layers, and the two ways to hand out its pages.

Keys and values of all layers live in one array `[layers * pages, kv_heads, page_size, lanes]`, a token's key in
lanes `[0, head_dim)` and its value in `[head_dim, 2 * head_dim)`; page `p` of layer `i` is row `i * pages + p`.
`KVCacheParams.shape` states it; the order of the lanes is the kernel's too. The array is carried through the layers and
aliased through the kernel, so a step moves none of it but the tokens that it writes (why this layout: README).

The dtype may be int8 or float8_e4m3fn: half of bfloat16's bytes. Then a token's keys and values are stored divided by
a scale of their layer and KV head (`KVScales`), which `calibrate` measures.

A *collection* is the cache during one step: attention asks it to attend, and gets back the collection with this
step's keys and values in it. Paged and continuous batching differ in how a sequence's pages are found, and in
nothing else.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from maxlike.kernels.paged_attention import (
    FLOATS,
    LARGEST,
    Implementation,
    MosaicTpu,
    check_implementation,
    ragged_paged_attention,
)
from maxlike.kernels.ragged_attention import ragged_attention
from maxlike.mesh import Devices, ShardingRules, as_mesh, mesh_platform

TPU_LANES = 128
SMALLEST_SCALE = 1e-8
"""Of a head that calibration saw nothing but zeros of."""


class KVCacheStrategy(enum.StrEnum):
    """How a sequence's pages are laid out in the pool."""

    PAGED = "paged"
    """Any pages, in any order, listed in a page table."""
    CONTINUOUS = "continuous"
    """One slot of `max_seq_len` tokens a sequence: consecutive pages, of which the table names the first."""


def as_cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype meant, which a cache may have: float32, bfloat16, float16, int8 or float8_e4m3fn.

    Raises:
        ValueError: it is none of these.
    """
    try:
        meant = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"A KV cache's dtype must name a dtype; got {dtype!r}.") from error
    if meant.name not in (*FLOATS, *LARGEST):
        raise ValueError(f"A KV cache's dtype must be one of {', '.join((*FLOATS, *LARGEST))}; got {meant}.")
    return meant


@dataclass(frozen=True)
class KVScales:
    """What a quantised cache divides keys and values by: `k[layer][kv_head]` and `v[layer][kv_head]`.

    `dtype` names that of the cache that they were measured for, where that is known.

    Raises:
        ValueError: a scale is not positive and finite, or there is not one for each layer and KV head.
    """

    k: tuple[tuple[float, ...], ...]
    v: tuple[tuple[float, ...], ...]
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("k", "v"):
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in getattr(self, name)))
        heads = {len(row) for row in (*self.k, *self.v)}
        if len(self.k) != len(self.v) or len(heads) != 1:
            raise ValueError(f"KVScales needs k and v of one shape, [layers][KV heads]; got {len(self.k)} and "
                             f"{len(self.v)} layers of {sorted(heads)} KV heads.")
        for name in ("k", "v"):
            for layer, row in enumerate(getattr(self, name)):
                if wrong := [scale for scale in row if not (math.isfinite(scale) and scale > 0)]:
                    raise ValueError(f"KVScales.{name}[{layer}] has {wrong[0]}; a scale is positive and finite.")


@dataclass(frozen=True)
class KVCacheParams:
    """The cache's measures; all bytes and shapes are worked out here.

    Args:
        dtype: of the stored keys and values: float32, bfloat16, float16, int8 or float8_e4m3fn.
        n_kv_heads, head_dim, n_layers: of the model.
        page_size: tokens a page.
        cache_strategy: see `KVCacheStrategy`.
        max_seq_len: tokens a slot holds; needed by, and only by, `CONTINUOUS`.
        rules: those that the model is built with.
        scales: of the last two dtypes. int8 needs them; without them float8_e4m3fn stores values as they are.
        implementation: of attention over the cache; `None` chooses by the platform that is compiled for.
    """

    dtype: DTypeLike
    n_kv_heads: int
    head_dim: int
    n_layers: int
    page_size: int = 64
    cache_strategy: KVCacheStrategy = KVCacheStrategy.PAGED
    max_seq_len: int | None = None
    rules: ShardingRules = ShardingRules()
    scales: KVScales | None = None
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_cache_dtype(self.dtype))
        dtype = jnp.dtype(self.dtype).name
        if self.cache_strategy not in list(KVCacheStrategy):
            raise ValueError(f"KVCacheParams.cache_strategy must be one of {', '.join(KVCacheStrategy)}; got "
                             f"{self.cache_strategy!r}.")
        object.__setattr__(self, "cache_strategy", KVCacheStrategy(self.cache_strategy))
        for name in ("n_kv_heads", "head_dim", "n_layers", "page_size", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"KVCacheParams.{name} must be at least 1; got {value}.")
        if (self.cache_strategy == KVCacheStrategy.CONTINUOUS) != (self.max_seq_len is not None):
            raise ValueError(f"max_seq_len belongs to the continuous strategy, and it needs it; got max_seq_len="
                             f"{self.max_seq_len} with {self.cache_strategy.value!r}.")
        if self.scales is None and dtype == "int8":
            raise ValueError("An int8 cache needs KVCacheParams.scales: calibrate(model, tokens, input_row_offsets) "
                             "measures them on a model with a float cache.")
        if self.implementation is not None:
            check_implementation(self.implementation)
        if self.scales is not None:
            if not isinstance(self.scales, KVScales):
                raise ValueError(f"KVCacheParams.scales must be KVScales, as calibrate makes them; got "
                                 f"{type(self.scales).__name__}.")
            if self.scales.dtype not in (None, dtype) and dtype in LARGEST:
                raise ValueError(f"The scales were measured for a cache of {self.scales.dtype}; the cache is {dtype}. "
                                 f"Measure them with calibrate(..., dtype={dtype!r}).")
            if dtype not in LARGEST:
                raise ValueError(f"KVCacheParams.scales belong to a cache of {' or '.join(LARGEST)}; got {dtype}.")
            given = len(self.scales.k), len(self.scales.k[0])
            if given != (self.n_layers, self.n_kv_heads):
                raise ValueError(f"KVCacheParams.scales are of {given[0]} layers with {given[1]} KV heads; the cache "
                                 f"has {self.n_layers} with {self.n_kv_heads}.")

    def shape(self, n_pages: int, platform: str) -> tuple[int, int, int, int]:
        """The cache array's shape for `n_pages` pages a layer on `platform` (`"cpu"`, `"gpu"`, `"tpu"`).

        On TPU, and wherever the TPU's kernel is asked for, a token's lanes are padded to a multiple of 128, the width
        of a register.
        """
        lanes = 2 * self.head_dim
        if platform == "tpu" or isinstance(self.implementation, MosaicTpu):
            lanes = -(-lanes // TPU_LANES) * TPU_LANES
        return self.n_layers * n_pages, self.n_kv_heads, self.page_size, lanes

    def sharding(self, devices: Devices) -> NamedSharding:
        """The cache array's sharding: cut over KV heads alone."""
        return self.rules.sharding(as_mesh(devices), self.shape(1, "cpu"), None, "kv_heads", None, None)

    def allocate(self, n_pages: int, devices: Devices) -> jax.Array:
        """A cache of zeros, `n_pages` pages a layer: `shape(n_pages)` in `dtype`, each device making its own shard."""
        mesh = as_mesh(devices)
        shape = self.shape(n_pages, mesh_platform(mesh))
        return jax.jit(partial(jnp.zeros, shape, self.dtype), out_shardings=self.sharding(mesh))()

    def bytes_per_page(self, devices: Devices) -> int:
        """Bytes that one page of all layers takes on each device, lane padding counted."""
        mesh = as_mesh(devices)
        elements = np.prod(self.shape(1, mesh_platform(mesh)), dtype=np.int64)
        return int(elements) * jnp.dtype(self.dtype).itemsize // self.rules.shards(mesh, "kv_heads")

    def pages_within(self, budget: int, devices: Devices) -> int:
        """How many pages a layer fit `budget` bytes a device."""
        return budget // self.bytes_per_page(devices)

    def check_step(self, n_pages: int, cache_lengths: np.ndarray, page_table: np.ndarray, n_new: np.ndarray) -> None:
        """Looks at a step's numbers, which inside `jax.jit` nobody can, the attention kernel's own checks included.

        Pages that a sliding window has left behind must be there too: other layers may see them.

        Args:
            n_pages: pages a layer in the cache.
            cache_lengths, page_table: `int32[S]` and `int32[S, M]`, as the collections take them.
            n_new: `int[S]`, new tokens of each sequence.

        Raises:
            ValueError: a sequence outgrows its page table or slot, or a page that it needs is not in the cache.
        """
        for s, (length, new) in enumerate(zip(cache_lengths.tolist(), n_new.tolist(), strict=True)):
            if length < 0:
                raise ValueError(f"cache_lengths[{s}] is {length}; a length is 0 or more.")
            if not new:
                continue
            needed = self.pages_for(length + new)
            if self.max_seq_len is not None:
                room, table = self.pages_for(self.max_seq_len), page_table[s, 0] + np.arange(needed)
            else:
                room, table = page_table.shape[1], page_table[s, :needed]
            if needed > room:
                raise ValueError(f"Sequence {s} grows to {length + new} tokens, {needed} pages of {self.page_size}; "
                                 f"its {'slot' if self.max_seq_len else 'row of the page table'} has {room}.")
            if (table < 0).any() or (table >= n_pages).any():
                raise ValueError(f"Sequence {s} needs pages {table.tolist()}; the cache has 0 to {n_pages - 1} in each "
                                 "layer.")

    def pages_for(self, n_tokens: int) -> int:
        """Pages that a sequence of `n_tokens` tokens takes."""
        return -(-n_tokens // self.page_size)


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "cache_lengths", "page_table"],
         meta_fields=["params"])
@dataclass(frozen=True)
class PagedKVCacheCollection:
    """The cache during one step.

    Args:
        pages: the cache array, `params.shape(n_pages)`, sharded over KV heads.
        cache_lengths: `int32[S]`, tokens of each sequence in the cache before this step.
        page_table: `int32[S, M]`: token `t` of sequence `s` lies in page `page_table[s, t // page_size]`.
        params: the cache's measures.
    """

    pages: jax.Array
    cache_lengths: jax.Array
    page_table: jax.Array
    params: KVCacheParams

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, layer_index: jax.Array | int,
               row_offsets: jax.Array, *, scale: float, sliding_window: int | None = None,
               soft_cap: float | None = None,
               sinks: jax.Array | None = None) -> tuple[jax.Array, PagedKVCacheCollection]:
        """Writes this step's keys and values to a layer of the cache, and attends over what it holds then.

        Args:
            q: `[T, N, H]`.
            k, v: `[T, K, H]`, of `q`'s dtype.
            layer_index: the layer, an int or an `int32` scalar.
            row_offsets: `int32[S + 1]`: tokens `[row_offsets[s], row_offsets[s + 1])` are sequence s.
            scale: what scores are multiplied by.
            sliding_window: a token sees itself and the `sliding_window - 1` before it; `None`: all.
            soft_cap: scores become `cap * tanh(score / cap)`; `None`: they stay.
            sinks: `float32[N]`, one more score of each head, or `None`.

        Returns:
            The output `[T, N, H]` and the collection to go on with.
        """
        scales = self.params.scales
        k_scale, v_scale = (None, None) if scales is None else (
            jnp.asarray(rows, jnp.float32)[layer_index] for rows in (scales.k, scales.v))
        out, pages = ragged_paged_attention(
            q, k, v, self.pages, self.cache_lengths, self.page_table, row_offsets,
            first_page=layer_index * (self.pages.shape[0] // self.params.n_layers),
            scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, k_scale=k_scale,
            v_scale=v_scale, implementation=self.params.implementation)
        return out, replace(self, pages=pages)


class ContinuousBatchingKVCacheCollection(PagedKVCacheCollection):
    """The same cache during one step, its page table worked out from each sequence's slot."""


jax.tree_util.register_dataclass(ContinuousBatchingKVCacheCollection,
                                 data_fields=["pages", "cache_lengths", "page_table"], meta_fields=["params"])


def _check(params: KVCacheParams, pages: jax.Array, cache_lengths: jax.Array, page_table: jax.Array) -> None:
    expected = params.shape(pages.shape[0] // params.n_layers, "cpu")
    if (pages.ndim != 4 or pages.shape[:3] != expected[:3] or pages.shape[3] < expected[3]
            or pages.dtype != jnp.dtype(params.dtype)):
        raise ValueError(f"The cache has shape {pages.shape} and dtype {pages.dtype}; {params} means {expected} "
                         f"(the first a multiple of n_layers, the last possibly padded). Make it with "
                         "KVCacheParams.allocate.")
    if cache_lengths.ndim != 1 or page_table.ndim != 2 or len(cache_lengths) != len(page_table):
        raise ValueError(f"cache_lengths must be int32[S] and page_table int32[S, M]; got shapes "
                         f"{cache_lengths.shape} and {page_table.shape}.")


def _check_strategy(fetch: Any, needed: KVCacheStrategy) -> None:
    given = fetch.kv_params.cache_strategy
    if given != needed:
        raise ValueError(f"{type(fetch).__name__} needs KVCacheParams with cache_strategy={needed.value!r}; got "
                         f"{given.value!r}.")


@dataclass(frozen=True)
class FetchPagedKVCacheCollection:
    """`(pages, cache_lengths int32[S], page_table int32[S, M]) -> PagedKVCacheCollection`.

    Raises:
        ValueError: `kv_params` has another `cache_strategy`.
    """

    kv_params: KVCacheParams

    def __post_init__(self) -> None:
        _check_strategy(self, KVCacheStrategy.PAGED)

    def __call__(self, pages: jax.Array, cache_lengths: jax.Array, page_table: jax.Array) -> PagedKVCacheCollection:
        """The cache for one step.

        Raises:
            ValueError: shapes or dtypes do not fit `kv_params`.
        """
        cache_lengths, page_table = jnp.asarray(cache_lengths, jnp.int32), jnp.asarray(page_table, jnp.int32)
        _check(self.kv_params, pages, cache_lengths, page_table)
        return PagedKVCacheCollection(pages, cache_lengths, page_table, self.kv_params)


@dataclass(frozen=True)
class FetchContinuousBatchingKVCacheCollection:
    """As its paged twin, but of `page_table` only column 0 is read: the first page of the sequence's slot.

    A slot is `ceil(max_seq_len / page_size)` consecutive pages; slot `i` usually begins at page `i` times that.

    Raises:
        ValueError: `kv_params` has another `cache_strategy`.
    """

    kv_params: KVCacheParams

    def __post_init__(self) -> None:
        _check_strategy(self, KVCacheStrategy.CONTINUOUS)

    def __call__(self, pages: jax.Array, cache_lengths: jax.Array,
                 page_table: jax.Array) -> ContinuousBatchingKVCacheCollection:
        """The cache for one step.

        Raises:
            ValueError: shapes or dtypes do not fit `kv_params`.
        """
        cache_lengths, page_table = jnp.asarray(cache_lengths, jnp.int32), jnp.asarray(page_table, jnp.int32)
        _check(self.kv_params, pages, cache_lengths, page_table)
        assert self.kv_params.max_seq_len is not None
        slot = page_table[:, :1] + jnp.arange(self.kv_params.pages_for(self.kv_params.max_seq_len), dtype=jnp.int32)
        return ContinuousBatchingKVCacheCollection(pages, cache_lengths, slot, self.kv_params)


def calibrate(model: Any, tokens: jax.Array | np.ndarray, input_row_offsets: jax.Array | np.ndarray,
              dtype: DTypeLike = "int8") -> KVScales:
    """The scales with which the largest key and value of each layer and KV head just fit a quantised cache.

    Runs the model once, without a cache, on tokens that should be like those that it will see: some hundreds of real
    text. Larger values met later are clipped.

    Args:
        model: a `DistributedTransformer`; what cache it is built for does not matter.
        tokens, input_row_offsets: `int32[T]` and `int32[S + 1]`, as the model takes them.
        dtype: of the cache: int8 or float8_e4m3fn.

    Raises:
        ValueError: another dtype; there are no tokens; a key or value is not finite.
    """
    largest = LARGEST.get(as_cache_dtype(dtype).name)
    if largest is None:
        raise ValueError(f"Only caches of {' or '.join(LARGEST)} have scales; got {jnp.dtype(dtype)}.")
    if int(input_row_offsets[-1]) < 1:
        raise ValueError("calibrate needs tokens to run the model on; input_row_offsets gives none.")
    params: KVCacheParams = model.kv_params
    shape = params.n_layers, 2, params.n_kv_heads
    nothing = jax.jit(partial(jnp.zeros, shape), out_shardings=params.rules.sharding(model.mesh, shape, None, None,
                                                                                      "kv_heads"))()
    measuring = nnx.merge(*nnx.split(model))  # shares the parameters
    measuring.kv_collection_constructor = _Measurement
    # To whoever checks the batch it is a cache of one page, which has room for all.
    measuring.kv_params = replace(params, dtype=jnp.float32, scales=None, page_size=max(len(tokens), 1),
                                  cache_strategy=KVCacheStrategy.PAGED, max_seq_len=None)
    n_sequences = len(input_row_offsets) - 1
    unused = np.zeros(n_sequences, np.int32), np.zeros((n_sequences, 1), np.int32)
    _, measured = measuring.hidden_states(tokens, (nothing, *unused), input_row_offsets)
    amax = np.asarray(measured, np.float64)
    if not np.isfinite(amax).all():
        raise ValueError("A key or value is not finite: the model cannot be calibrated on these tokens.")
    k, v = np.maximum(amax / largest, SMALLEST_SCALE).transpose(1, 0, 2).tolist()
    return KVScales(k, v, as_cache_dtype(dtype).name)


@partial(jax.tree_util.register_dataclass, data_fields=["pages", "cache_lengths", "page_table"], meta_fields=[])
@dataclass(frozen=True)
class _Measurement:
    """Stands where a cache would: `pages` is `float32[L, 2, K]`, the largest |k| and |v| of each layer so far."""

    pages: jax.Array
    cache_lengths: jax.Array
    page_table: jax.Array

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, layer_index: jax.Array | int, row_offsets: jax.Array,
               **options: Any) -> tuple[jax.Array, _Measurement]:
        out = ragged_attention(q, k, v, row_offsets, **options)
        own = (jnp.arange(k.shape[0]) < row_offsets[-1])[:, None, None]
        amax = jnp.stack([jnp.where(own, jnp.abs(x), 0).max((0, 2)) for x in (k, v)]).astype(jnp.float32)
        this = (jnp.arange(self.pages.shape[0]) == layer_index)[:, None, None]
        return out, replace(self, pages=jnp.where(this, jnp.maximum(self.pages, amax), self.pages))
