"""The KV cache: one flat array of pages for all layers, and the two ways to hand out its pages.

Keys and values of all layers live in one array `[layers * pages, kv_heads, page_size, lanes]`, a token's key in
lanes `[0, head_dim)` and its value in `[head_dim, 2 * head_dim)`; page `p` of layer `i` is row `i * pages + p`.
`KVCacheParams.shape` states it; the order of the lanes is the kernel's too. The array is carried through the layers and
aliased through the kernel, so a step moves none of it but the tokens that it writes (why this layout: README).

A *collection* is the cache during one step: attention asks it to attend, and gets back the collection with this
step's keys and values in it. Paged and continuous batching differ in how a sequence's pages are found, and in
nothing else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from maxlike.kernels.paged_attention import ragged_paged_attention
from maxlike.mesh import Devices, ShardingRules, as_mesh

TPU_LANES = 128


class KVCacheStrategy(enum.StrEnum):
    """How a sequence's pages are laid out in the pool."""

    PAGED = "paged"
    """Any pages, in any order, listed in a page table."""
    CONTINUOUS = "continuous"
    """One slot of `max_seq_len` tokens a sequence: consecutive pages, of which the table names the first."""


@dataclass(frozen=True)
class KVCacheParams:
    """The cache's measures; all bytes and shapes are worked out here.

    Args:
        dtype: of the stored keys and values.
        n_kv_heads, head_dim, n_layers: of the model.
        page_size: tokens a page.
        cache_strategy: see `KVCacheStrategy`.
        max_seq_len: tokens a slot holds; needed by, and only by, `CONTINUOUS`.
        rules: those that the model is built with.
    """

    dtype: DTypeLike
    n_kv_heads: int
    head_dim: int
    n_layers: int
    page_size: int = 64
    cache_strategy: KVCacheStrategy = KVCacheStrategy.PAGED
    max_seq_len: int | None = None
    rules: ShardingRules = ShardingRules()

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        except TypeError as error:
            raise ValueError(f"KVCacheParams.dtype must name a dtype; got {self.dtype!r}.") from error
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

    def shape(self, n_pages: int, platform: str) -> tuple[int, int, int, int]:
        """The cache array's shape for `n_pages` pages a layer on `platform` (`"cpu"`, `"gpu"`, `"tpu"`).

        On TPU a token's lanes are padded to a multiple of 128, the width of a register.
        """
        lanes = 2 * self.head_dim
        if platform == "tpu":
            lanes = -(-lanes // TPU_LANES) * TPU_LANES
        return self.n_layers * n_pages, self.n_kv_heads, self.page_size, lanes

    def sharding(self, devices: Devices) -> NamedSharding:
        """The cache array's sharding: cut over KV heads alone."""
        return self.rules.sharding(as_mesh(devices), self.shape(1, "cpu"), None, "kv_heads", None, None)

    def allocate(self, n_pages: int, devices: Devices) -> jax.Array:
        """A cache of zeros, `n_pages` pages a layer, each device making its own shard."""
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
        """Looks at a step's numbers, which inside `jax.jit` nobody can.

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


def mesh_platform(mesh: Mesh) -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: what the mesh's devices are, whether or not they are here."""
    return mesh.devices.flat[0].platform


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
               soft_cap: float | None = None) -> tuple[jax.Array, PagedKVCacheCollection]:
        """Writes this step's `k` and `v` `[T, K, H]` to layer `layer_index` and attends over them with `q` `[T, N, H]`.

        Returns:
            The output `[T, N, H]` and the collection to go on with.
        """
        out, pages = ragged_paged_attention(
            q, k, v, self.pages, self.cache_lengths, self.page_table, row_offsets,
            first_page=layer_index * (self.pages.shape[0] // self.params.n_layers),
            scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
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
    """`(pages, cache_lengths int32[S], page_table int32[S, M]) -> PagedKVCacheCollection`."""

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
