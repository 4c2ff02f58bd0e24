"""Ragged paged attention in plain JAX: the path of the CPU, and of every platform without a kernel of its own.

Both parts below are loops with trip counts found from the actual lengths, so the cost follows the live tokens and
never the width of the page table: nothing of the size [S, M * page_size] exists. Softmax is accumulated block by
block (online softmax; Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # tokens of KV read at a time (a page, if that is larger)
TILE = 64  # query tokens of one sequence that share the reading of a block
NO_SCORE = -1e30  # finite: with -inf, a row without any score yet would give exp(-inf + inf) = NaN


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
    pages = _write(k, v, pages, cache_lengths, page_table, row_offsets, first_page)

    T, N, H = q.shape
    K, page_size = pages.shape[1:3]
    n_pages = max(1, BLOCK // page_size)  # of one block
    block = n_pages * page_size
    new = row_offsets[1:] - row_offsets[:-1]
    dtype = jnp.promote_types(q.dtype, pages.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def attend(s, q_tile, first_position):
        """Attention of q_tile [n, N, H], tokens of sequence s at first_position and on -> float32[n, N, H]."""
        n = q_tile.shape[0]
        rows = q_tile.reshape(n, K, N // K, H).transpose(1, 0, 2, 3).reshape(K, -1, H).astype(dtype)
        position = jnp.repeat(first_position + jnp.arange(n), N // K)[:, None]
        length = cache_lengths[s] + new[s]
        end = jnp.minimum(first_position + n, length)
        start = 0 if sliding_window is None else jnp.maximum(0, first_position - sliding_window + 1)

        def body(i, carry):
            m, l, acc = carry
            needed = jnp.clip(i * n_pages + jnp.arange(n_pages), start // page_size, (end - 1) // page_size)
            kv = pages[first_page + page_table[s, needed], :, :, : 2 * H]
            kv = kv.transpose(1, 0, 2, 3).reshape(K, block, 2 * H)
            j = i * block + jnp.arange(block)
            kv = jnp.where(((j >= start) & (j < end))[:, None], kv, 0).astype(dtype)
            scores = scale * jnp.einsum(
                "krh,kbh->krb", rows, kv[..., :H], precision=precision, preferred_element_type=jnp.float32
            )
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            seen = j <= position
            if sliding_window is not None:
                seen &= j > position - sliding_window
            scores = jnp.where(seen, scores, NO_SCORE)
            m_next = jnp.maximum(m, scores.max(-1))
            p = jnp.where(seen, jnp.exp(scores - m_next[..., None]), 0)
            shrink = jnp.exp(m - m_next)
            l = shrink * l + p.sum(-1)
            acc = shrink[..., None] * acc + jnp.einsum(
                "krb,kbh->krh", p.astype(dtype), kv[..., H:], precision=precision, preferred_element_type=jnp.float32
            )
            return m_next, l, acc

        stats = jnp.full(rows.shape[:2], NO_SCORE, jnp.float32)
        carry = stats, jnp.zeros_like(stats), jnp.zeros(rows.shape, jnp.float32)
        _, l, acc = lax.fori_loop(start // block, -(-end // block), body, carry)
        out = acc / jnp.maximum(l, 1e-30)[..., None]
        return out.reshape(K, n, N // K, H).transpose(1, 0, 2, 3).reshape(n, N, H)

    def tiles(out, width, n_tiles):
        """Attends, `width` tokens of a sequence at a time, for the n_tiles [S] tiles of each sequence."""
        ends = jnp.cumsum(n_tiles)

        def body(i, out):
            s = jnp.searchsorted(ends, i, side="right")
            first = (i - (ends[s] - n_tiles[s])) * width  # of the sequence's new tokens
            row = row_offsets[s] + first
            at = (row, 0, 0)
            o = attend(s, lax.dynamic_slice(q_padded, at, (width, N, H)), cache_lengths[s] + first)
            mine = (first + jnp.arange(width) < new[s])[:, None, None]
            o = jnp.where(mine, o.astype(q.dtype), lax.dynamic_slice(out, at, (width, N, H)))
            return lax.dynamic_update_slice(out, o, at)

        return lax.fori_loop(0, ends[-1], body, out)

    q_padded = jnp.pad(q, ((0, TILE), (0, 0), (0, 0)))  # a slice that reaches past the end would be moved back
    out = jnp.zeros_like(q_padded)
    out = tiles(out, 1, jnp.where(new == 1, 1, 0))
    out = tiles(out, TILE, jnp.where(new > 1, -(-new // TILE), 0))
    return out[:T], pages


def _write(k, v, pages, cache_lengths, page_table, row_offsets, first_page):
    """The pages with the step's K and V in them: one small in-place update a token, padding not visited."""
    T, K, H = k.shape
    page_size, W = pages.shape[2:]
    kv = jnp.concatenate([k, v, jnp.zeros((T, K, W - 2 * H), k.dtype)], axis=-1).astype(pages.dtype)

    def body(t, pages):
        s = jnp.searchsorted(row_offsets[1:], t, side="right")
        position = cache_lengths[s] + t - row_offsets[s]
        row = first_page + page_table[s, position // page_size]
        token = lax.dynamic_slice(kv, (t, 0, 0), (1, K, W))
        return lax.dynamic_update_slice(pages, token[:, :, None, :], (row, 0, position % page_size, 0))

    return lax.fori_loop(0, row_offsets[-1], body, pages)
