"""Self-attention with rotary positions, over the KV cache or inside the ragged batch itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maxlike.kernels.ragged_attention import ragged_attention
from maxlike.mesh import Devices, ShardingRules, as_mesh
from maxlike.nn.kv_cache import PagedKVCacheCollection
from maxlike.nn.linear import ColumnParallelLinear, RowParallelLinear
from maxlike.nn.module import Module, create_param, on_mesh_of, rows_of
from maxlike.nn.norm import RMSNorm
from maxlike.nn.rotary_embedding import RotaryEmbedding, apply_rotary


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "row_offsets", "freqs"], meta_fields=[])
@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know of a ragged batch; worked out once a step.

    Args:
        positions: `int32[T]`, each token's place in its sequence, the cached ones counted.
        row_offsets: `int32[S + 1]`: tokens `[row_offsets[s], row_offsets[s + 1])` are sequence `s`. Where T is cut into
            R shards, `int32[R, S + 1]`, each shard's own, counted from its first token.
        freqs: cos and sin of the model's rope, both `float32[T, rotary_dim / 2]`.
    """

    positions: jax.Array
    row_offsets: jax.Array
    freqs: tuple[jax.Array, jax.Array]

    @classmethod
    def create(cls, n_tokens: int, row_offsets: jax.Array, cache_lengths: jax.Array | None,
               rope: RotaryEmbedding) -> AttentionMetadata:
        """For a step.

        Args:
            n_tokens: T.
            row_offsets: as the class has them.
            cache_lengths: `int32[S]`, tokens of each sequence before this step; `None` for no cache, as it must be
                for shards.
            rope: the model's.
        """
        if row_offsets.ndim == 2:
            shards = row_offsets.shape[0]
            token = jnp.arange(n_tokens // shards, dtype=jnp.int32)
            # Each token's sequence begins at the last offset that is not behind it.
            starts = jnp.where(row_offsets[:, :, None] <= token, row_offsets[:, :, None], 0).max(axis=1)
            rows = rows_of(row_offsets)
            positions = jnp.reshape(token - starts, n_tokens, out_sharding=on_mesh_of(row_offsets, rows))
            return cls(positions, row_offsets, rope(positions))
        token = jnp.arange(n_tokens, dtype=jnp.int32)
        row = jnp.searchsorted(row_offsets[1:], token, side="right", method="compare_all")
        row = jnp.minimum(row, row_offsets.shape[0] - 2)  # padding tokens: any row will do
        positions = token - row_offsets[row]
        if cache_lengths is not None:
            positions = positions + cache_lengths[row]
        return cls(positions, row_offsets, rope(positions))


class AttentionWithRope(Module):
    """Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

    Query heads are sharded over the whole model axis, KV heads over as much of it as there are KV heads.

    Args:
        num_attention_heads, num_key_value_heads, hidden_size, head_dim: N, K, D and H.
        dtype: of the parameters, but for `sinks`; the output has that of the input.
        devices: a mesh, or devices from which `make_mesh` makes one.
        rngs: for the initial values (LeCun normal; norms begin at one, biases and sinks at zero).
        rope: this layer's own; `None` uses the model's.
        scale: of the scores; `None` is `head_dim ** -0.5`.
        has_bias: on the query, key and value products. `has_output_bias`: on the output product.
        qk_norm_eps: an RMS norm over each query and key head, before the rope (Qwen 3, Gemma 3); `None`: none.
        qk_norm_offset: that norm's `weight_offset`.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; `None`: all.
        logit_soft_cap: scores become `cap * tanh(score / cap)`; `None`: they stay.
        has_sinks: a parameter `sinks`, `float32[N]` whatever `dtype` is: of each query head one more score in the
            softmax, without a value (gpt-oss).
        rules: which mesh axes heads are cut over.

    Raises:
        ValueError: N is no multiple of K, the mesh does not divide the heads, `rope` is for another head width, or a
            window or cap is not positive.
    """

    def __init__(self, num_attention_heads: int, num_key_value_heads: int, hidden_size: int, head_dim: int,
                 dtype: DTypeLike, devices: Devices, *, rngs: nnx.Rngs, rope: RotaryEmbedding | None = None,
                 scale: float | None = None, has_bias: bool = False, has_output_bias: bool = False,
                 qk_norm_eps: float | None = None, qk_norm_offset: float = 0.0, sliding_window: int | None = None,
                 logit_soft_cap: float | None = None, has_sinks: bool = False,
                 rules: ShardingRules = ShardingRules()):
        if min(num_attention_heads, num_key_value_heads) < 1 or num_attention_heads % num_key_value_heads:
            raise ValueError(f"{num_attention_heads} query heads cannot share {num_key_value_heads} KV heads evenly.")
        if rope is not None and rope.head_dim != head_dim:
            raise ValueError(f"rope.head_dim is {rope.head_dim}, but attention has head_dim {head_dim}.")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, or None for all tokens; got {sliding_window}.")
        if logit_soft_cap is not None and logit_soft_cap <= 0:
            raise ValueError(f"logit_soft_cap must be above 0, or None for no cap; got {logit_soft_cap}.")
        mesh = as_mesh(devices, n_heads=num_attention_heads, n_kv_heads=num_key_value_heads)
        self.n_heads, self.n_kv_heads, self.head_dim = num_attention_heads, num_key_value_heads, head_dim
        self.rope, self.sliding_window, self.logit_soft_cap = rope, sliding_window, logit_soft_cap
        self.scale = head_dim ** -0.5 if scale is None else scale
        q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
        # Sharding the flat dimension must not cut a head in two: it is the number of heads that has to divide.
        self.q_axes = rules.sharding(mesh, (num_attention_heads,), "heads").spec[0]
        self.kv_axes = rules.sharding(mesh, (num_key_value_heads,), "kv_heads").spec[0]
        column = partial(ColumnParallelLinear, hidden_size, dtype=dtype, devices=mesh, rngs=rngs, has_bias=has_bias,
                         rules=rules)
        self.q_proj = column(q_size, out_axis="heads")
        self.k_proj = column(kv_size, out_axis="kv_heads")
        self.v_proj = column(kv_size, out_axis="kv_heads")
        self.o_proj = RowParallelLinear(q_size, hidden_size, dtype, mesh, rngs=rngs, has_bias=has_output_bias,
                                        in_axis="heads", rules=rules)
        norm = partial(RMSNorm, head_dim, dtype, mesh, rngs=rngs, weight_offset=qk_norm_offset, rules=rules)
        self.q_norm = None if qk_norm_eps is None else norm(eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else norm(eps=qk_norm_eps)
        n = (num_attention_heads,)
        self.sinks = create_param(jax.nn.initializers.zeros, rngs, n, jnp.float32,
                                  rules.sharding(mesh, n, "heads")) if has_sinks else None

    def __call__(self, x: jax.Array, layer_index: jax.Array | int, kv_collection: PagedKVCacheCollection | None,
                 metadata: AttentionMetadata) -> tuple[jax.Array, PagedKVCacheCollection | None]:
        """`[T, D] -> [T, D]`, and the collection with this step's keys and values in it.

        Args:
            x: `[T, D]`, normed.
            layer_index: which layer of the cache this is: an int, or an `int32` scalar inside a scan.
            kv_collection: the cache during this step. With `None` tokens attend to those of their own sequence in
                this batch, and `None` is returned.
            metadata: `AttentionMetadata.create`'s, the same for all layers.
        """
        tokens = x.shape[0]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        rows = rows_of(x)
        q = jnp.reshape(q, (tokens, self.n_heads, self.head_dim),
                        out_sharding=on_mesh_of(q, rows, self.q_axes, None))  # [T, N, H]
        k, v = (jnp.reshape(y, (tokens, self.n_kv_heads, self.head_dim),
                            out_sharding=on_mesh_of(y, rows, self.kv_axes, None)) for y in (k, v))  # [T, K, H]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = metadata.freqs if self.rope is None else self.rope(metadata.positions)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        options: dict[str, Any] = dict(
            scale=self.scale, sliding_window=self.sliding_window, soft_cap=self.logit_soft_cap,
            sinks=None if self.sinks is None else self.sinks.get_value())
        if kv_collection is None:
            out = ragged_attention(q, k, v, metadata.row_offsets, **options)
        else:
            out, kv_collection = kv_collection.attend(q, k, v, layer_index, metadata.row_offsets, **options)
        out = jnp.reshape(out, (tokens, self.n_heads * self.head_dim), out_sharding=on_mesh_of(out, rows, self.q_axes))
        return self.o_proj(out), kv_collection
