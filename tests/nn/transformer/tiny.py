"""Transformers that compile in seconds, and a plain account of what they compute.

The weights of a `Tiny` are numpy arrays under per-layer names. `build` puts them on any mesh in any form of
execution, and `plain_logits` says in a page of einsums what must come out, whichever form that was.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from maxlike.mesh import make_mesh
from maxlike.nn import (
    MLP,
    AttentionWithRope,
    ColumnParallelLinear,
    DistributedGemmConfig,
    KVCacheParams,
    KVCacheStrategy,
    ReturnLogits,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
)
from maxlike.nn.kv_cache import FetchContinuousBatchingKVCacheCollection, FetchPagedKVCacheCollection
from maxlike.nn.transformer import DistributedTransformer, DistributedTransformerBlock
from maxlike.nn.transformer.segments import named_parameters

PAGE_SIZE, MAX_SEQ_LEN = 4, 12
THETA, WINDOW_THETA = 10000.0, 100.0  # layers with a window have a rope of their own, as Gemma 3's


@dataclass(frozen=True)
class Tiny:
    """A model's measures; `windows` holds each layer's sliding window."""

    n_heads: int = 8
    n_kv_heads: int = 2
    windows: tuple[int | None, ...] = (None, None)
    head_dim: int = 8
    dim: int = 36
    mlp_dim: int = 48
    vocab: int = 61  # divisible by no mesh

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        D, F, Q, KV = self.dim, self.mlp_dim, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = {
            "attention.q_proj.weight": (Q, D), "attention.k_proj.weight": (KV, D), "attention.v_proj.weight": (KV, D),
            "attention.o_proj.weight": (D, Q), "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F), "attention_norm.weight": (D,), "mlp_norm.weight": (D,),
        }  # fmt: skip
        ends = {"embedding.weight": (self.vocab, D), "norm.weight": (D,), "output.weight": (self.vocab, D)}
        return ends | {f"layers.{i}.{name}": shape for i in range(len(self.windows)) for name, shape in layer.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter's value, float32, the same in each process. Attention is far from uniform."""
        values = {}
        for name, shape in self.shapes().items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            if len(shape) == 1:
                values[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            else:
                values[name] = rng.normal(0, 1.5 / math.sqrt(shape[1]), shape).astype(np.float32)
        return values


def abstract(tiny: Tiny, devices: Mesh | Sequence[jax.Device], *, use_subgraphs: bool = False,
             groups: Sequence[Sequence[int]] | None = None, gemm: bool = False,
             strategy: KVCacheStrategy = KVCacheStrategy.PAGED,
             return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
             **cache_options: Any) -> DistributedTransformer:
    """The model put together by hand, its parameters shapes alone; `cache_options` are those of `KVCacheParams`."""
    t = tiny
    mesh = devices if isinstance(devices, Mesh) else make_mesh(
        devices, n_heads=t.n_heads, n_kv_heads=t.n_kv_heads, mlp_dim=t.mlp_dim)
    cache_options.setdefault("dtype", jnp.float32)
    params = KVCacheParams(
        n_kv_heads=t.n_kv_heads, head_dim=t.head_dim, n_layers=len(t.windows), page_size=PAGE_SIZE,
        cache_strategy=strategy, max_seq_len=MAX_SEQ_LEN if strategy == KVCacheStrategy.CONTINUOUS else None,
        **cache_options)
    fetch = (FetchPagedKVCacheCollection if strategy == KVCacheStrategy.PAGED
             else FetchContinuousBatchingKVCacheCollection)

    def make() -> DistributedTransformer:
        common: dict[str, Any] = dict(dtype=jnp.float32, devices=mesh, rngs=nnx.Rngs(0))
        layers = [
            DistributedTransformerBlock(
                AttentionWithRope(t.n_heads, t.n_kv_heads, t.dim, t.head_dim, sliding_window=window,
                                  rope=window and RotaryEmbedding(t.head_dim, WINDOW_THETA), **common),
                MLP(t.dim, t.mlp_dim, **common), RMSNorm(t.dim, **common), RMSNorm(t.dim, **common), mesh,
                DistributedGemmConfig(enable_matmul_allreduce=True) if gemm else None)
            for window in t.windows
        ]  # fmt: skip
        return DistributedTransformer(
            t.dim, t.n_heads, layers, RMSNorm(t.dim, **common),
            ColumnParallelLinear(t.dim, t.vocab, out_axis="vocab", gather_output=True, **common),
            VocabParallelEmbedding(t.vocab, t.dim, **common), params, fetch(params), mesh,
            RotaryEmbedding(t.head_dim, THETA), return_logits, use_subgraphs, groups)  # fmt: skip

    return nnx.eval_shape(make)


def build(tiny: Tiny, devices: Mesh | Sequence[jax.Device], **options: Any) -> DistributedTransformer:
    """As `abstract`, with `tiny.weights()` in it."""
    model, weights = abstract(tiny, devices, **options), tiny.weights()
    for names, stacked, param in named_parameters(model):
        like = param.get_value()
        values = [weights.pop(name) for name in names]
        value = np.stack(values) if stacked else values[0]
        value = np.pad(value, [(0, full - part) for full, part in zip(like.shape, value.shape, strict=True)])
        param.set_value(jax.device_put(value, NamedSharding(model.mesh, jax.typeof(like).sharding.spec)))
    assert not weights, f"the model has no {sorted(weights)}"
    return model


def plain_logits(tiny: Tiny, weights: dict[str, Any], tokens: Any, xp: Any = np,
                 cached: list[tuple[Any, Any]] | None = None) -> Any:
    """`[S, L] -> [S, L, V]`: all logits of S sequences, padded behind (a causal model does not look there).

    Dense masked attention, one head after the other in the mind of the reader. `xp` is `numpy`, and the numbers
    are float64, or `jax.numpy`, and they are float32 and differentiable. `cached` gets each layer's keys and values,
    `[S, L, K, H]`, as a cache would.
    """
    w = {name: xp.asarray(value, np.float64 if xp is np else np.float32) for name, value in weights.items()}
    S, L = tokens.shape
    H, group = tiny.head_dim, tiny.n_heads // tiny.n_kv_heads

    def norm(x, weight):
        return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight

    def rotate(x, theta):  # dimensions i and i + H / 2 are a complex number, turned
        angle = np.arange(L)[:, None] * theta ** (-2 * np.arange(H // 2) / H)
        turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)[None, :, None, :]
        return xp.concatenate([turned.real, turned.imag], -1)

    x = w["embedding.weight"][tokens]
    for i, window in enumerate(tiny.windows):
        def product(x, name, i=i):
            return xp.einsum("sli,oi->slo", x, w[f"layers.{i}.{name}.weight"])

        h = norm(x, w[f"layers.{i}.attention_norm.weight"])
        q, k, v = (product(h, f"attention.{name}_proj").reshape(S, L, -1, H) for name in "qkv")
        theta = WINDOW_THETA if window else THETA
        q, k = rotate(q, theta), rotate(k, theta)
        if cached is not None:
            cached.append((k, v))
        k, v = xp.repeat(k, group, 2), xp.repeat(v, group, 2)
        scores = xp.einsum("slnh,smnh->snlm", q, k) / np.sqrt(H)
        back = np.arange(L)[:, None] - np.arange(L)
        scores = xp.where((back >= 0) & (back < (window or L)), scores, -np.inf)
        p = xp.exp(scores - scores.max(-1, keepdims=True))
        attended = xp.einsum("snlm,smnh->slnh", p / p.sum(-1, keepdims=True), v).reshape(S, L, -1)
        x = x + product(attended, "attention.o_proj")
        h = norm(x, w[f"layers.{i}.mlp_norm.weight"])
        gate = product(h, "mlp.gate_proj")
        x = x + product(gate / (1 + xp.exp(-gate)) * product(h, "mlp.up_proj"), "mlp.down_proj")
    return xp.einsum("sli,oi->slo", norm(x, w["norm.weight"]), w["output.weight"])


ROOM = 16  # tokens of every step, so that one program serves them all
STEPS = ((5, 0, 1, 7), (1, 3, 4, 1), (1, 1, 1, 1))  # new tokens of each sequence: prompts, a mixture, decoding
TOTALS = tuple(map(sum, zip(*STEPS, strict=True)))


def sequences(tiny: Tiny) -> np.ndarray:
    """`int32[S, L]`: the tokens of all sequences; sequence s has `TOTALS[s]`, and the rest are zeros."""
    tokens = np.random.default_rng(1).integers(0, tiny.vocab, (len(TOTALS), max(TOTALS)), np.int32)
    return np.where(np.arange(max(TOTALS)) < np.array(TOTALS)[:, None], tokens, 0)


def ragged(tokens: np.ndarray, begin: Sequence[int], new: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`(int32[ROOM], int32[S + 1])`: `new[s]` tokens of each sequence from `begin[s]` on, and nonsense behind."""
    parts = [row[b : b + n] for row, b, n in zip(tokens, begin, new, strict=True)]
    offsets = np.cumsum([0, *new]).astype(np.int32)
    nonsense = np.resize(np.array([10**6, -7], np.int32), ROOM - offsets[-1])
    return np.concatenate([*parts, nonsense]), offsets


def garbage_cache(model: DistributedTransformer, n_pages: int) -> jax.Array:
    """A cache full of NaN, or of -128, which int8 has instead."""
    params = model.kv_params
    garbage = -128 if params.dtype == jnp.int8 else np.nan
    return jax.device_put(np.full(params.shape(n_pages, "cpu"), garbage, params.dtype), params.sharding(model.mesh))


def page_table(strategy: KVCacheStrategy, n_sequences: int) -> np.ndarray:
    """`int32[S, M]`: pages in no order, or slots in no order and nothing of use behind the first column."""
    M = MAX_SEQ_LEN // PAGE_SIZE
    rng = np.random.default_rng(2)
    if strategy == KVCacheStrategy.PAGED:
        return rng.permutation(n_sequences * M).reshape(n_sequences, M).astype(np.int32)
    table = np.full((n_sequences, 2), 10**6, np.int32)
    table[:, 0] = M * rng.permutation(n_sequences)
    return table


def serve(model: DistributedTransformer, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Each step's logits of the last tokens, `float32[S, V]`, and the cache at the end."""
    table = page_table(model.kv_params.cache_strategy, len(tokens))
    pages = garbage_cache(model, len(tokens) * MAX_SEQ_LEN // PAGE_SIZE + 1)
    lengths = np.zeros(len(tokens), np.int32)
    logits = []
    for new in STEPS:
        ids, offsets = ragged(tokens, lengths, new)
        (last,), pages = model(ids, (pages, lengths, table), None, offsets)
        logits.append(np.asarray(last))
        lengths = lengths + np.array(new, np.int32)
    return logits, np.asarray(pages)


def check_served(tiny: Tiny, model: DistributedTransformer) -> None:
    """Raises `AssertionError` unless all steps give the plain logits, to 1e-4, and write what they must alone."""
    tokens = sequences(tiny)
    expected = plain_logits(tiny, tiny.weights(), tokens)
    served, pages = serve(model, tokens)
    ends = np.cumsum(STEPS, axis=0)
    for new, end, logits in zip(STEPS, ends, served, strict=True):
        rows = expected[range(len(tokens)), end - 1]
        rows[np.array(new) == 0] = np.nan
        np.testing.assert_allclose(logits, rows, rtol=0, atol=1e-4)
    written = np.isfinite(pages[..., : 2 * tiny.head_dim]).all((1, 3)).sum()
    assert written == len(tiny.windows) * sum(TOTALS)
    assert np.isnan(pages).all((1, 3)).sum() == pages.shape[0] * pages.shape[2] - written
