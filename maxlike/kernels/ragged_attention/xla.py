"""Blockwise causal attention in plain XLA operations, with its own derivative.

Tokens are cut into blocks. For each block of queries a loop visits the blocks of keys that some query in it
sees, from the one that holds the earliest such key to the diagonal, and merges them into a running softmax
(FlashAttention, https://arxiv.org/abs/2205.14135). Only the output and the logarithm of each query's softmax
denominator are saved; the backward pass works the weights out again, block by block (FlashAttention-2,
https://arxiv.org/abs/2307.08691).

What a query sees is one number: sequences are contiguous and attention is causal, so the query at position p
sees the keys `first_visible[p] .. p`. A token of no sequence has its first visible key beyond all keys.

For blocks of B tokens, with G query heads to a KV head, queries are [blocks, K, G * B, H] and keys and values
[blocks, K, B, H]: each product is a batch over KV heads of plain matrix products, and nothing is transposed
inside the loops. Blocks are float32 whatever the inputs are, because XLA:CPU in jax 0.10.2 reads or writes a
slice of a bfloat16 array by converting the whole array.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

SAVED = "ragged_attention"
"""What `jax.checkpoint_policies.save_only_these_names` keeps, so that rematerialisation does not attend again."""

# Tokens in a block. On CPU 64 and 128 cost the same, 32 and 256 a quarter more; accelerators want it large.
BLOCK = 128
# Finite, so that a query whose keys are all hidden in one block does not make inf - inf.
_HIDDEN = -1e30


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_offsets: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`ragged_attention` on one device: q `[T, N, H]`, k and v `[T, K, H]`, and all else as there."""
    position = jnp.arange(len(q), dtype=jnp.int32)
    row = jnp.searchsorted(row_offsets, position, side="right") - 1
    first_visible = row_offsets[row].astype(jnp.int32)
    if sliding_window is not None:
        first_visible = jnp.maximum(first_visible, position - (sliding_window - 1))
    inside = (position >= row_offsets[0]) & (position < row_offsets[-1])
    first_visible = jnp.where(inside, first_visible, jnp.iinfo(jnp.int32).max)

    # Hiding a key gives it no weight, but zero times NaN is NaN: what the padding holds must go, and so must
    # the gradients that come in for it, which the derivative of the last line sees to.
    def blank(x):
        return jnp.where(inside[:, None, None], x, 0)

    return blank(_attend(blank(q), blank(k), blank(v), sinks, first_visible, scale, soft_cap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, sinks, first_visible, scale, soft_cap):
    """Attention where the query at p sees keys first_visible[p] .. p; anything finite where it sees none."""
    return _forward(q, k, v, sinks, first_visible, scale, soft_cap)[0]


def _forward(q, k, v, sinks, first_visible, scale, soft_cap):
    dot = _dot_for(q.dtype)
    queries, keys, values = _to_blocks(q, k), _to_blocks(k, k), _to_blocks(v, k)
    first_visible = _visible_blocks(first_visible)

    def query_block(args):
        index, queries, first = args

        def visit(j, carry):
            top, total, acc = carry
            scores, _ = _scores(dot, queries, keys[j], scale, soft_cap)
            scores = jnp.where(_visible(first, index, j), scores, _HIDDEN)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            total = decay * total + weights.sum(-1)
            acc = decay[..., None] * acc + dot("kxb,kbh->kxh", _flat(weights), values[j]).reshape(acc.shape)
            return new_top, total, acc

        acc = jnp.zeros((len(queries), queries.shape[1] // len(first), len(first), queries.shape[2]))
        start = jnp.full(acc.shape[:-1], _HIDDEN), jnp.zeros(acc.shape[:-1]), acc
        if sinks is not None:  # a first score, with no value
            start = jnp.broadcast_to(_by_group(sinks, k), acc.shape[:-1]), jnp.ones(acc.shape[:-1]), acc
        top, total, acc = lax.fori_loop(first.min() // len(first), index + 1, visit, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # zero where no block was visited
        return _flat(acc / total[..., None]), top + jnp.log(total)

    out, log_total = lax.map(query_block, (jnp.arange(len(queries)), queries, first_visible))
    out, log_total = checkpoint_name(_from_blocks(out, q), SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, sinks, first_visible, out, log_total)


def _backward(scale, soft_cap, saved, d_out):
    q, k, v, sinks, first_visible, out, log_total = saved
    dot = _dot_for(q.dtype)
    queries, keys, values = _to_blocks(q, k), _to_blocks(k, k), _to_blocks(v, k)
    d_outs = _to_blocks(d_out, k)
    # sum_j weight_j * d_weight_j, which the softmax's derivative subtracts, equals out . d_out.
    delta = (d_outs * _to_blocks(out, k)).sum(-1).reshape(log_total.shape)

    def query_block(d_kv, args):
        index, queries, first, log_total, d_outs, delta = args

        def visit(j, carry):
            d_queries, d_keys, d_values = carry
            scores, slope = _scores(dot, queries, keys[j], scale, soft_cap)
            weights = jnp.where(_visible(first, index, j), jnp.exp(scores - log_total[..., None]), 0)
            d_weights = dot("kxh,kbh->kxb", d_outs, values[j]).reshape(weights.shape)
            d_scores = _flat(weights * (d_weights - delta[..., None]) * slope)
            d_queries += dot("kxb,kbh->kxh", d_scores, keys[j])
            d_keys = d_keys.at[j].add(dot("kxb,kxh->kbh", d_scores, queries))
            d_values = d_values.at[j].add(dot("kxb,kxh->kbh", _flat(weights), d_outs))
            return d_queries, d_keys, d_values

        start = jnp.zeros_like(queries), *d_kv
        d_queries, *d_kv = lax.fori_loop(first.min() // len(first), index + 1, visit, start)
        return tuple(d_kv), d_queries

    (d_keys, d_values), d_queries = lax.scan(
        query_block,
        (jnp.zeros_like(keys), jnp.zeros_like(values)),
        (jnp.arange(len(queries)), queries, first_visible, log_total, d_outs, delta),
    )
    d_q, d_k, d_v = _from_blocks(d_queries * scale, q), _from_blocks(d_keys * scale, k), _from_blocks(d_values, v)
    d_sinks = None
    if sinks is not None:  # its value is zero, so that of the derivative of its score only -delta is left
        d_sinks = -(jnp.exp(_by_group(sinks, k) - log_total) * delta).sum((0, 3)).reshape(-1)
    return d_q, d_k, d_v, d_sinks, None


_attend.defvjp(_forward, _backward)


def _by_group(sinks, k):
    """float32[N] -> [K, G, 1]."""
    return sinks.reshape(k.shape[1], -1, 1)


def _scores(dot, queries, keys, scale, soft_cap):
    """Scores float32[K, G, B, B] of queries on a block of keys, and their slope in the scaled products."""
    kv_heads, block, _ = keys.shape
    # Not the queries are scaled: that would round them where products are in bfloat16.
    products = scale * dot("kxh,kbh->kxb", queries, keys).reshape(kv_heads, -1, block, block)
    if soft_cap is None:
        return products, 1.0
    squashed = jnp.tanh(products / soft_cap)
    return soft_cap * squashed, 1 - squashed * squashed


def _visible(first, query_block, key_block):
    """Which keys of one block the queries of another, whose first visible keys are `first`, see: bool[B, B]."""
    block = len(first)
    query = query_block * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
    key = key_block * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
    return (first[:, None] <= key) & (key <= query)


def _dot_for(dtype):
    """Products of float32 blocks, exact where `dtype` is float32; TPU and GPU have faster ones for the others."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


def _cut(tokens: int) -> tuple[int, int]:
    """How many blocks, at least one, and of how many tokens."""
    block = max(1, min(BLOCK, tokens))
    return max(1, math.ceil(tokens / block)), block


def _to_blocks(x, k):
    """[T, K * G, H] -> float32[blocks, K, G * B, H], with zeros after the last token; `k` has the K heads."""
    tokens, heads, width = x.shape
    kv_heads = k.shape[1]
    blocks, block = _cut(tokens)
    x = jnp.pad(x, ((0, blocks * block - tokens), (0, 0), (0, 0)))
    x = x.reshape(blocks, block, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(blocks, kv_heads, -1, width).astype(jnp.float32)


def _visible_blocks(first_visible):
    """int32[T] -> int32[blocks, B]; the tokens that fill the last block see nothing."""
    blocks, block = _cut(len(first_visible))
    padding = (0, blocks * block - len(first_visible))
    return jnp.pad(first_visible, padding, constant_values=jnp.iinfo(jnp.int32).max).reshape(blocks, block)


def _from_blocks(x, like):
    """What `_to_blocks` made of an array such as `like`, in that array's shape and dtype."""
    tokens, heads, width = like.shape
    blocks, block = _cut(tokens)
    kv_heads = x.shape[1]
    x = x.reshape(blocks, kv_heads, heads // kv_heads, block, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(-1, heads, width)[:tokens].astype(like.dtype)


def _flat(x):
    """[K, G, B, ...] -> [K, G * B, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
