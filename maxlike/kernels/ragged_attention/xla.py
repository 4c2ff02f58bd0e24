"""Blockwise causal attention in plain XLA operations, with its own derivative.

Tokens are cut into blocks. For each block of queries a loop visits the blocks of keys that some query in it
can see, from the one that holds the earliest visible key to the diagonal, and merges them into a running softmax
(FlashAttention, https://arxiv.org/abs/2205.14135). Only the output and the log of each softmax's denominator are
saved; the backward pass works the probabilities out again, block by block (https://arxiv.org/abs/2307.08691).

What a query sees is one number: as sequences are contiguous and attention is causal, the keys that the query
at position p sees are `first_visible[p] .. p`. A padding token's first visible key lies beyond all keys.

Blocks are heads-major, [K, G * B, H] and [K, B, H] for blocks of B tokens with G query heads to a KV head, so that
every product is a batch over KV heads of plain matrix products, and nothing is transposed inside the loops.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # tokens
_MASKED = -1e30  # finite: a row whose keys are all masked in one block must not give inf - inf


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "sliding_window", "soft_cap"))
def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_offsets: jax.Array,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """`ragged_attention` on one device; its arguments are as documented there."""
    return _forward(q, k, v, row_offsets, scale, sliding_window, soft_cap)[0]


def _forward(q, k, v, row_offsets, scale, sliding_window, soft_cap):
    tokens, kv_heads, width = k.shape
    block = _block_size(tokens)
    first_visible = _first_visible(row_offsets, tokens, block, sliding_window)
    keys, values = _to_blocks(k, kv_heads, block), _to_blocks(v, kv_heads, block)

    def query_block(args):
        index, queries, first = args

        def visit(j, carry):
            top, total, acc = carry
            scores, _ = _scores(queries, keys[j], scale, soft_cap)
            scores = jnp.where(_visible(first, index, j), scores, _MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            weighted = _dot("kxb,kbh->kxh", _flat(weights).astype(v.dtype), values[j])
            total = total * decay + weights.sum(-1)
            acc = acc * decay[..., None] + weighted.reshape(acc.shape)
            return new_top, total, acc

        rows = (kv_heads, queries.shape[1] // block, block)
        start = jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, width))
        top, total, acc = lax.fori_loop(first.min() // block, index + 1, visit, start)
        # A query with nothing to see (padding) has met only masked scores, if any.
        seen = top > _MASKED / 2
        out = jnp.where(seen[..., None], acc / jnp.maximum(total, 1e-30)[..., None], 0)
        return _flat(out).astype(q.dtype), jnp.where(seen, top + jnp.log(jnp.maximum(total, 1e-30)), 0)

    queries = _to_blocks(q, kv_heads, block)
    out, log_total = lax.map(query_block, (jnp.arange(len(queries)), queries, first_visible))
    out = _from_blocks(out, q.shape)
    return out, (q, k, v, row_offsets, out, log_total)


def _backward(scale, sliding_window, soft_cap, saved, d_out):
    q, k, v, row_offsets, out, log_total = saved
    tokens, kv_heads, _ = k.shape
    block = _block_size(tokens)
    first_visible = _first_visible(row_offsets, tokens, block, sliding_window)
    keys, values = _to_blocks(k, kv_heads, block), _to_blocks(v, kv_heads, block)

    def query_block(d_kv, args):
        index, queries, first, log_total, d_outs, delta = args

        def visit(j, carry):
            d_queries, d_keys, d_values = carry
            scores, slope = _scores(queries, keys[j], scale, soft_cap)
            weights = jnp.where(_visible(first, index, j), jnp.exp(scores - log_total[..., None]), 0)
            d_weights = _dot("kxh,kbh->kxb", d_outs, values[j]).reshape(weights.shape)
            d_scores = weights * (d_weights - delta[..., None]) * slope
            weights, d_scores = _flat(weights).astype(v.dtype), _flat(d_scores).astype(q.dtype)
            d_queries += _dot("kxb,kbh->kxh", d_scores, keys[j])
            d_keys = d_keys.at[j].add(_dot("kxb,kxh->kbh", d_scores, queries))
            d_values = d_values.at[j].add(_dot("kxb,kxh->kbh", weights, d_outs))
            return d_queries, d_keys, d_values

        start = jnp.zeros(queries.shape, jnp.float32), *d_kv
        d_queries, *d_kv = lax.fori_loop(first.min() // block, index + 1, visit, start)
        return tuple(d_kv), d_queries.astype(q.dtype)

    queries, d_outs = _to_blocks(q, kv_heads, block), _to_blocks(d_out, kv_heads, block)
    delta = jnp.sum(d_outs * _to_blocks(out, kv_heads, block).astype(jnp.float32), -1).reshape(log_total.shape)
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (d_keys, d_values), d_queries = lax.scan(
        query_block,
        (zeros, zeros),
        (jnp.arange(len(queries)), queries, first_visible, log_total, d_outs, delta),
    )
    d_k, d_v = (_from_blocks(x, k.shape).astype(k.dtype) for x in (d_keys, d_values))
    return _from_blocks(d_queries, q.shape), d_k, d_v, None


blockwise_attention.defvjp(_forward, _backward)


def _block_size(tokens: int) -> int:
    return min(BLOCK, max(8, tokens))


def _first_visible(row_offsets, tokens, block, sliding_window):
    """The first key that each query sees, int32[blocks, block]; past every key for tokens in no sequence."""
    padded = -(-tokens // block) * block
    position = jnp.arange(padded, dtype=jnp.int32)
    row = jnp.searchsorted(row_offsets, position, side="right") - 1
    first = row_offsets[jnp.maximum(row, 0)].astype(jnp.int32)
    if sliding_window is not None:
        first = jnp.maximum(first, position - (sliding_window - 1))
    inside = (position >= row_offsets[0]) & (position < row_offsets[-1])
    return jnp.where(inside, first, padded).reshape(-1, block)


def _visible(first, query_block, key_block):
    """Which keys of one block the queries of another see: bool[B, B]."""
    block = len(first)
    query = query_block * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
    key = key_block * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
    return (first[:, None] <= key) & (key <= query)


def _scores(queries, keys, scale, soft_cap):
    """Scores float32[K, G, B, B] of a block of queries on a block of keys, and their slope in the product q . k."""
    kv_heads, block, _ = keys.shape
    scores = scale * _dot("kxh,kbh->kxb", queries, keys).reshape(kv_heads, -1, block, block)
    if soft_cap is None:
        return scores, scale
    squashed = jnp.tanh(scores / soft_cap)
    return soft_cap * squashed, scale * (1 - squashed * squashed)


def _to_blocks(x, kv_heads, block):
    """[T, K * G, H] -> [blocks, K, G * B, H], zeros after the last token."""
    tokens, heads, width = x.shape
    x = jnp.pad(x, ((0, -tokens % block), (0, 0), (0, 0)))
    x = x.reshape(-1, block, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 2, 3, 1, 4).reshape(x.shape[0], kv_heads, -1, width)


def _from_blocks(x, shape):
    """What `_to_blocks` made, back to `shape`, [T, K * G, H]."""
    tokens, heads, width = shape
    blocks, kv_heads, _, _ = x.shape
    x = x.reshape(blocks, kv_heads, heads // kv_heads, -1, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(-1, heads, width)[:tokens]


def _flat(x):
    """[K, G, B, ...] -> [K, G * B, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _dot(spec, x, y):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)
