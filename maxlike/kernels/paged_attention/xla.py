"""Ragged paged attention in plain JAX: the path of the CPU, and of every platform without a kernel of its own.

Sequences are cut into tiles of query tokens, one token for those that decode; each tile reads its pages block by
block and accumulates the softmax as it goes (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867). All
loops have trip counts found from the actual lengths, so the cost follows the live tokens and never the width of the
page table: nothing of the size [S, M * page_size] exists.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Tokens of K and V read at a time (a page, if that is larger). Small blocks have masks. Large ones lie where a single
# token sees everything, and save it overhead; a tile of many tokens has enough to do with a small block.
SMALL_BLOCK, LARGE_BLOCK = 64, 256
TILE = 64  # query tokens of one sequence that share the reading of a block
NO_SCORE = -1e30  # finite: a row that has no score yet then gives exp(0), wiped out by its first real score
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # what a quantised cache stores at most, by its dtype


@dataclasses.dataclass(frozen=True)
class Xla:
    """Plain JAX, on every platform."""

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
        """As `maxlike.kernels.paged_attention.api.Implementation` says, which has the shapes."""
        kv = jnp.concatenate([quantise(k, k_scale, pages.dtype), quantise(v, v_scale, pages.dtype)], axis=-1)
        pages = write(kv, pages, cache_lengths, page_table, row_offsets, first_page)
        options = dict(scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
        out = _read(q, pages, cache_lengths, page_table, row_offsets, first_page, sinks, k_scale, v_scale, **options)
        return out, pages


def quantise(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """What a cache of `dtype` stores of x [T, K, H]: itself, or the nearest to x / scale, of two the even one."""
    if dtype.name not in LARGEST:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    if scale is not None:
        x = x / scale[:, None]
    x = jnp.clip(x, -LARGEST[dtype.name], LARGEST[dtype.name])
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)


def _read(q, pages, cache_lengths, page_table, row_offsets, first_page, sinks, k_scale, v_scale, *, scale,
          sliding_window, soft_cap):  # fmt: skip
    """Attention over the pages with the step's tokens in them -> [T, N, H]."""

    T, N, H = q.shape
    new = row_offsets[1:] - row_offsets[:-1]
    tile_width = min(TILE, T)
    decode_rows = 1, (new == 1).astype(jnp.int32)
    other_rows = tile_width, jnp.where(new > 1, -(-new // tile_width), 0)
    out = jnp.zeros_like(q)
    for width, n_tiles in (decode_rows, other_rows):
        tiles = _cut(width, n_tiles, cache_lengths, row_offsets, pages, T, sliding_window)

        def body(i, out, width=width, tiles=tiles):
            tile = _Tile(*lax.dynamic_index_in_dim(tiles, i, keepdims=False, allow_negative_indices=False))
            at, size = (tile.row, 0, 0), (width, N, H)
            o = _attend(
                lax.dynamic_slice(q, at, size), pages, first_page + page_table[tile.sequence], tile,
                sinks, k_scale, v_scale, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap,
            )  # fmt: skip
            token = tile.row + jnp.arange(width)[:, None, None]
            own = (token >= tile.first) & (token < tile.end)
            return lax.dynamic_update_slice(out, jnp.where(own, o, lax.dynamic_slice(out, at, size)), at)

        out = lax.fori_loop(0, n_tiles.sum(), body, out)
    return out


def write(kv, pages, cache_lengths, page_table, row_offsets, first_page):
    """The pages with the step's K and V [T, K, 2 * H] in them."""
    T, _, width = kv.shape
    page_size, lanes = pages.shape[2:]
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, lanes - width)))
    t = jnp.arange(T)
    s = jnp.searchsorted(row_offsets[1:], t, side="right", method="compare_all")
    position = cache_lengths[s] + t - row_offsets[s]
    row = first_page + page_table[s, position // page_size]
    row = jnp.where(t < row_offsets[-1], row, pages.shape[0] + t)  # padding is dropped
    return pages.at[row, :, position % page_size].set(kv, mode="drop", unique_indices=True)


class _Tile(NamedTuple):
    """A run of new tokens of one sequence, attended in one go: int32 scalars, a row of the table `_cut` makes.

    They depend on the step and not on the layer, so in an unrolled model they are worked out once.
    """

    sequence: jax.Array
    row: jax.Array  # where its rows of q begin; of these,
    first: jax.Array  # tokens [first, end) are its own
    end: jax.Array
    position: jax.Array  # of token `row` in the sequence (negative for a row of an earlier sequence)
    start: jax.Array  # it attends to positions [start, stop),
    stop: jax.Array
    first_page: jax.Array  # which lie in these pages of the sequence, the last included
    last_page: jax.Array
    first_block: jax.Array  # and in small blocks from this one on,
    n_small: jax.Array  # so many of them read one by one;
    inner: jax.Array  # those from this one on
    n_large: jax.Array  # are read in so many large blocks


def _block_sizes(pages):
    """Tokens of a small and of a large block: whole pages, and whole small blocks."""
    page_size = pages.shape[2]
    small = -(-SMALL_BLOCK // page_size) * page_size
    return small, max(1, LARGE_BLOCK // small) * small


def _cut(width, n_tiles, cache_lengths, row_offsets, pages, T, sliding_window):
    """Cuts each sequence's new tokens into n_tiles [S] tiles of `width` tokens -> int32[n, fields of `_Tile`].

    The first n_tiles.sum() rows are tiles, the others have no meaning.
    """
    small, large = _block_sizes(pages)
    page_size = pages.shape[2]
    ends = jnp.cumsum(n_tiles)
    i = jnp.arange(len(n_tiles) + (T // width if width > 1 else 0))
    s = jnp.minimum(jnp.searchsorted(ends, i, side="right", method="compare_all"), len(n_tiles) - 1)
    first = row_offsets[s] + (i - (ends - n_tiles)[s]) * width
    end = jnp.minimum(first + width, row_offsets[s + 1])
    row = jnp.clip(first, 0, T - width)
    to_position = cache_lengths[s] - row_offsets[s]
    stop = end + to_position
    start = jnp.zeros_like(s)
    if sliding_window is not None:
        start = jnp.maximum(0, first + to_position - sliding_window + 1)
    first_block, inner = start // small, -(-start // small)
    n_large = jnp.zeros_like(s)
    if width == 1:
        n_large = jnp.maximum(0, stop // small - inner) // (large // small)
    tile = _Tile(
        sequence=s, row=row, first=first, end=end, position=row + to_position,
        start=start, stop=stop, first_page=start // page_size, last_page=(stop - 1) // page_size,
        first_block=first_block, n_small=-(-stop // small) - first_block - n_large * (large // small),
        inner=inner, n_large=n_large,
    )  # fmt: skip
    return jnp.stack(tile, axis=1)


def _attend(q, pages, table, tile, sinks, k_scale, v_scale, *, scale, sliding_window, soft_cap):
    """Attention of q [n, N, H], the rows of a tile, over the page rows `table` [M] -> [n, N, H] in `q.dtype`.

    What comes out for rows that are not the tile's own is finite and without meaning.
    """
    n, N, H = q.shape
    K, page_size, lanes = pages.shape[1:]
    small, large = _block_sizes(pages)
    # int8 and float8_e4m3fn are exact in every q.dtype; their scales meet the products, in float32.
    dtype = q.dtype if pages.dtype.name in LARGEST else jnp.promote_types(q.dtype, pages.dtype)
    dot = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    # Splitting slots into K and V is a slow copy on CPU. One token's few rows instead meet the whole slot: zeros in
    # the lanes of V leave the scores as they are, and the lanes of K are dropped from the result.
    split = n > 1
    rows = q.reshape(n, K, N // K, H).transpose(1, 0, 2, 3).reshape(K, -1, H).astype(dtype)
    if not split:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, lanes - H)))
    position = jnp.repeat(tile.position + jnp.arange(n), N // K)[:, None]
    to_scores = scale if k_scale is None else scale * k_scale[:, None, None]

    def add(carry, block, size, masked):
        """The softmax so far (maximum, sum, weighted values), with `size` positions from a small block on added."""
        m, l, acc = carry
        page = block * (small // page_size) + jnp.arange(size // page_size)
        if masked:
            page = jnp.clip(page, tile.first_page, tile.last_page)
        # Bounds are known to hold for the needed pages, and checking them costs time to compile.
        kv = pages.at[table.at[page].get(mode="promise_in_bounds")].get(mode="promise_in_bounds")
        kv = kv.transpose(1, 0, 2, 3).reshape(K, size, lanes)
        j = block * small + jnp.arange(size)
        if masked:  # values too: unused slots may hold NaN
            kv = jnp.where(((j >= tile.start) & (j < tile.stop))[:, None], kv, 0)
        if lanes > 2 * H:
            kv = jnp.where(jnp.arange(lanes) < 2 * H, kv, 0)
        kv = kv.astype(dtype)
        keys, values = (kv[..., :H], kv[..., H : 2 * H]) if split else (kv, kv)
        scores = to_scores * dot("krh,kbh->krb", rows, keys)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if masked:
            seen = j <= position
            if sliding_window is not None:
                seen &= j > position - sliding_window
            scores = jnp.where(seen, scores, NO_SCORE)
        m_next = jnp.maximum(m, scores.max(-1))
        p = jnp.exp(scores - m_next[..., None])
        shrink = jnp.exp(m - m_next)
        acc = shrink[..., None] * acc + dot("krb,kbh->krh", p.astype(dtype), values)
        return m_next, shrink * l + p.sum(-1), acc

    step = large // small

    def add_large(i, carry):
        return add(carry, tile.inner + i * step, large, masked=False)

    def add_small(i, carry):
        block = tile.first_block + i
        return add(carry, jnp.where(block < tile.inner, block, block + tile.n_large * step), small, masked=True)

    m = jnp.full(rows.shape[:2], NO_SCORE, jnp.float32)
    l = jnp.zeros_like(m)
    if sinks is not None:  # a first score, with no value
        m = jnp.tile(sinks.astype(jnp.float32).reshape(K, N // K), n)
        l = jnp.ones_like(m)
    carry = m, l, jnp.zeros((*m.shape, H if split else lanes), jnp.float32)
    if n == 1:
        carry = lax.fori_loop(0, tile.n_large, add_large, carry)
    _, l, acc = lax.fori_loop(0, tile.n_small, add_small, carry)
    out = (acc if split else acc[..., H : 2 * H]) / l[..., None]
    if v_scale is not None:
        out = v_scale[:, None, None] * out
    return out.reshape(K, n, N // K, H).transpose(1, 0, 2, 3).reshape(n, N, H).astype(q.dtype)
