"""Ragged paged attention in plain JAX: the path of the CPU, and of every platform without a kernel of its own.

All loops have trip counts found from the actual lengths, so the cost follows the live tokens and never the width of
the page table: nothing of the size [S, M * page_size] exists. Softmax is accumulated block by block (online
softmax: Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SMALL_BLOCK, LARGE_BLOCK = 64, 256  # tokens of K and V read at a time (a page, if that is larger)
TILE = 64  # query tokens of one sequence that share the reading of a block
NO_SCORE = -1e30  # finite: a row that has no score yet then gives exp(0), wiped out by its first real score


class _Batch(NamedTuple):
    """What is known of the ragged batch; `new` is the count of new tokens."""

    cache_lengths: jax.Array  # int32[S]
    new: jax.Array  # int32[S]
    row_offsets: jax.Array  # int32[S + 1]
    page_table: jax.Array  # int32[S, M]
    first_page: jax.Array  # int32


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    cache_lengths: jax.Array,
    page_table: jax.Array,
    row_offsets: jax.Array,
    first_page: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `maxlike.kernels.paged_attention.ragged_paged_attention`."""
    new = row_offsets[1:] - row_offsets[:-1]
    batch = _Batch(cache_lengths, new, row_offsets, page_table, first_page)
    pages = _write(k, v, pages, batch)

    attend = functools.partial(
        _attend_tiles, q, pages, batch, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap
    )
    tile = min(TILE, q.shape[0])
    out = jnp.zeros_like(q)
    out = attend(out, width=1, n_tiles=jnp.where(new == 1, 1, 0))
    out = attend(out, width=tile, n_tiles=jnp.where(new > 1, -(-new // tile), 0))
    return out, pages


def _write(k, v, pages, batch):
    """The pages with the step's K and V in them."""
    T, _, H = k.shape
    page_size, lanes = pages.shape[2:]
    kv = jnp.pad(jnp.concatenate([k, v], axis=-1), ((0, 0), (0, 0), (0, lanes - 2 * H)))
    t = jnp.arange(T)
    s = jnp.searchsorted(batch.row_offsets[1:], t, side="right", method="compare_all")
    position = batch.cache_lengths[s] + t - batch.row_offsets[s]
    row = batch.first_page + batch.page_table[s, position // page_size]
    row = jnp.where(t < batch.row_offsets[-1], row, pages.shape[0] + t)  # padding is dropped
    return pages.at[row, :, position % page_size].set(kv.astype(pages.dtype), mode="drop", unique_indices=True)


def _attend_tiles(q, pages, batch, out, *, width, n_tiles, **options):
    """`out` [T, N, H] with the attention of n_tiles [S] tiles of `width` tokens of each sequence filled in."""
    ends = jnp.cumsum(n_tiles)
    T, N, H = q.shape

    def body(i, out):
        s = jnp.searchsorted(ends, i, side="right", method="compare_all")
        first = batch.row_offsets[s] + (i - (ends[s] - n_tiles[s])) * width
        end = jnp.minimum(first + width, batch.row_offsets[s + 1])
        # A tile holds rows that are not its own at the end of the sequence, and before `first` at the end of q.
        row = jnp.minimum(first, T - width)
        o = _attend(lax.dynamic_slice(q, (row, 0, 0), (width, N, H)), pages, batch, s, row, first, end, **options)
        token = row + jnp.arange(width)[:, None, None]
        o = jnp.where((token >= first) & (token < end), o, lax.dynamic_slice(out, (row, 0, 0), (width, N, H)))
        return lax.dynamic_update_slice(out, o, (row, 0, 0))

    return lax.fori_loop(0, ends[-1], body, out)


def _attend(q, pages, batch, s, row, first, end, *, scale, sliding_window, soft_cap):
    """Attention of q [n, N, H], which are the tokens from `row` on -> [n, N, H].

    Tokens [first, end) belong to sequence s; what comes out for others is finite and without meaning.
    """
    n, N, H = q.shape
    K, page_size, lanes = pages.shape[1:]
    dtype = jnp.promote_types(q.dtype, pages.dtype)
    dot = functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    # Splitting slots into K and V is a slow copy on CPU. One token's few rows instead meet the whole slot: zeros in
    # the lanes of V leave the scores as they are, and the lanes of K are dropped from the result.
    whole = n == 1
    rows = q.reshape(n, K, N // K, H).transpose(1, 0, 2, 3).reshape(K, -1, H).astype(dtype)
    if whole:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, lanes - H)))

    to_position = batch.cache_lengths[s] - batch.row_offsets[s]
    position = jnp.repeat(row + to_position + jnp.arange(n), N // K)[:, None]
    first, last = first + to_position, end - 1 + to_position
    start = 0 if sliding_window is None else jnp.maximum(0, first - sliding_window + 1)
    first_page, last_page = start // page_size, last // page_size
    table = batch.page_table[s]

    def add_block(carry, base, size, edge):
        """Softmax over the blocks so far (max, sum, weighted values), with positions base to base + size added."""
        m, l, acc = carry
        index = base // page_size + jnp.arange(size // page_size)
        kv = pages[batch.first_page + table[jnp.clip(index, first_page, last_page)]]
        kv = kv.transpose(1, 0, 2, 3).reshape(K, size, lanes)
        j = base + jnp.arange(size)
        if edge:
            kv = jnp.where(((j >= start) & (j <= last))[:, None], kv, 0)
        if lanes > 2 * H:
            kv = jnp.where(jnp.arange(lanes) < 2 * H, kv, 0)
        kv = kv.astype(dtype)
        keys, values = (kv, kv) if whole else (kv[..., :H], kv[..., H : 2 * H])
        scores = scale * dot("krh,kbh->krb", rows, keys)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if edge:
            seen = j <= position
            if sliding_window is not None:
                seen &= j > position - sliding_window
            scores = jnp.where(seen, scores, NO_SCORE)
        m_next = jnp.maximum(m, scores.max(-1))
        p = jnp.exp(scores - m_next[..., None])
        shrink = jnp.exp(m - m_next)
        acc = shrink[..., None] * acc + dot("krb,kbh->krh", p.astype(dtype), values)
        return m_next, shrink * l + p.sum(-1), acc

    # Positions that all tokens of the tile see go in large blocks without a mask, the edges in small blocks.
    small = -(-SMALL_BLOCK // page_size) * page_size
    large = max(1, LARGE_BLOCK // small) * small
    seen_by_all = 0 if sliding_window is None else -(-jnp.maximum(0, last - sliding_window + 1) // small)
    n_large = jnp.maximum(0, (first + 1) // small - seen_by_all) // (large // small)
    skipped = n_large * (large // small)
    n_small = last // small + 1 - start // small - skipped

    def edge(i, carry):
        i += start // small
        return add_block(carry, jnp.where((i >= seen_by_all), i + skipped, i) * small, small, edge=True)

    def inner(i, carry):
        return add_block(carry, seen_by_all * small + i * large, large, edge=False)

    m = jnp.full(rows.shape[:2], NO_SCORE, jnp.float32)
    carry = m, jnp.zeros_like(m), jnp.zeros((*m.shape, lanes if whole else H), jnp.float32)
    carry = lax.fori_loop(0, n_large, inner, carry)
    _, l, acc = lax.fori_loop(0, n_small, edge, carry)
    out = (acc[..., H : 2 * H] if whole else acc) / l[..., None]
    return out.reshape(K, n, N // K, H).transpose(1, 0, 2, 3).reshape(n, N, H).astype(q.dtype)
