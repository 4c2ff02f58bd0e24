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

BLOCK = 128  # tokens of K and V read at a time (a page, if that is larger)
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

    tokens = q.shape[0]
    q = jnp.pad(q, ((0, TILE), (0, 0), (0, 0)))  # a tile may reach past the end
    attend = functools.partial(
        _attend_tiles, q, pages, batch,
        head_dim=k.shape[2], scale=scale, sliding_window=sliding_window, soft_cap=soft_cap,
    )  # fmt: skip
    out = jnp.zeros_like(q)
    out = attend(out, width=1, n_tiles=jnp.where(new == 1, 1, 0))
    out = attend(out, width=TILE, n_tiles=jnp.where(new > 1, -(-new // TILE), 0))
    return out[:tokens], pages


def _write(k, v, pages, batch):
    """The pages with the step's K and V in them: one small in-place update a token, padding not visited."""
    T, K, H = k.shape
    page_size, lanes = pages.shape[2:]
    kv = jnp.concatenate([k, v], axis=-1).astype(pages.dtype)
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, lanes - 2 * H)))
    t = jnp.arange(T)
    s = jnp.searchsorted(batch.row_offsets[1:], t, side="right", method="compare_all")
    position = batch.cache_lengths[s] + t - batch.row_offsets[s]
    row = batch.first_page + batch.page_table[s, position // page_size]
    slot = position % page_size

    def body(t, pages):
        token = lax.dynamic_slice(kv, (t, 0, 0), (1, K, lanes))[:, :, None, :]
        return lax.dynamic_update_slice(pages, token, (row[t], 0, slot[t], 0))

    return lax.fori_loop(0, batch.row_offsets[-1], body, pages)


def _attend_tiles(q, pages, batch, out, *, width, n_tiles, **options):
    """`out` [T, N, H] with the attention of n_tiles [S] tiles of `width` tokens of each sequence filled in."""
    ends = jnp.cumsum(n_tiles)
    size = (width, *q.shape[1:])

    def body(i, out):
        s = jnp.searchsorted(ends, i, side="right", method="compare_all")
        first = (i - (ends[s] - n_tiles[s])) * width  # of the tile, among the sequence's new tokens
        at = (batch.row_offsets[s] + first, 0, 0)
        o = _attend(lax.dynamic_slice(q, at, size), pages, batch, s, first, **options)
        mine = (first + jnp.arange(width) < batch.new[s])[:, None, None]
        o = jnp.where(mine, o.astype(out.dtype), lax.dynamic_slice(out, at, size))
        return lax.dynamic_update_slice(out, o, at)

    return lax.fori_loop(0, ends[-1], body, out)


def _attend(q, pages, batch, s, first, *, head_dim, scale, sliding_window, soft_cap):
    """Attention of q [n, N, H], new tokens `first` and on of sequence s -> float32[n, N, H]."""
    n, N, H = q.shape
    K, page_size, lanes = pages.shape[1:]
    block_pages = max(1, BLOCK // page_size)
    block = block_pages * page_size
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

    position = batch.cache_lengths[s] + first
    end = jnp.minimum(position + n, batch.cache_lengths[s] + batch.new[s])
    start = 0 if sliding_window is None else jnp.maximum(0, position - sliding_window + 1)
    first_needed, last_needed = start // page_size, (end - 1) // page_size
    table = batch.page_table[s]
    position = jnp.repeat(position + jnp.arange(n), N // K)[:, None]

    def body(i, carry):
        m, l, acc = carry
        needed = jnp.clip(i * block_pages + jnp.arange(block_pages), first_needed, last_needed)
        kv = pages[batch.first_page + table[needed]]
        kv = kv.transpose(1, 0, 2, 3).reshape(K, block, lanes)
        j = i * block + jnp.arange(block)
        live = ((j >= start) & (j < end))[:, None] & (jnp.arange(lanes) < 2 * H)
        kv = jnp.where(live, kv, 0).astype(dtype)
        keys, values = (kv, kv) if whole else (kv[..., :H], kv[..., H : 2 * H])
        scores = scale * dot("krh,kbh->krb", rows, keys)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        seen = j <= position
        if sliding_window is not None:
            seen &= j > position - sliding_window
        scores = jnp.where(seen, scores, NO_SCORE)
        m_next = jnp.maximum(m, scores.max(-1))
        p = jnp.exp(scores - m_next[..., None])
        shrink = jnp.exp(m - m_next)
        acc = shrink[..., None] * acc + dot("krb,kbh->krh", p.astype(dtype), values)
        return m_next, shrink * l + p.sum(-1), acc

    m = jnp.full(rows.shape[:2], NO_SCORE, jnp.float32)
    carry = m, jnp.zeros_like(m), jnp.zeros((*m.shape, lanes if whole else H), jnp.float32)
    _, l, acc = lax.fori_loop(start // block, -(-end // block), body, carry)
    out = acc[..., H : 2 * H] if whole else acc
    out = out / l[..., None]
    return out.reshape(K, n, N // K, H).transpose(1, 0, 2, 3).reshape(n, N, H)
