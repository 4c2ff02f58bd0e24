"""The sharded decoder-only transformer over a ragged batch: MAX's `distributed_transformer`, for JAX.

One module definition scores, trains and serves. With a KV cache a call is one step of continuous batching; with
none, every sequence of the batch attends within itself.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import Mesh

from maxlike.mesh import Devices, as_mesh, distribute_value
from maxlike.nn.attention import AttentionMetadata, AttentionWithRope
from maxlike.nn.kv_cache import KVCacheParams, PagedKVCacheCollection
from maxlike.nn.linear import DistributedGemmConfig, RowParallelLinear
from maxlike.nn.module import Module
from maxlike.nn.rotary_embedding import RotaryEmbedding
from maxlike.nn.transformer.segments import CheckpointPolicy, make_segments

__all__ = ["DistributedTransformer", "DistributedTransformerBlock", "ReturnLogits", "ShardableCallable",
           "distribute_value", "forward_sharded_layers", "take"]

Item = TypeVar("Item")


class ReturnLogits(enum.StrEnum):
    """Which rows of logits a call returns."""

    LAST_TOKEN = "last_token"
    """Of each sequence's last token: `float32[S, V]`."""
    VARIABLE = "variable"
    """Also of each sequence's last n tokens, n the call's `return_n_logits`: `float32[S * n, V]`."""
    ALL = "all"
    """Also of every token: `float32[T, V]`."""


@runtime_checkable
class ShardableCallable(Protocol):
    """A layer that works on one array and can say how its parameters are sharded."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer applied to `x`: for those of a block, `[T, D] -> [T, D]`."""
        ...

    def partition_specs(self) -> dict[str, P]:
        """Dotted parameter path -> `PartitionSpec`."""
        ...


def take(it: Iterable[Item], n: int) -> list[Item]:
    """The next `n` items of an iterator, fewer if it ends, as a list."""
    return list(islice(it, n))


def forward_sharded_layers(layers: Sequence[Callable[[Any], Any]], xs: Sequence[Any]) -> list[Any]:
    """`[layer(x) ...]`, pair by pair.

    Raises:
        AssertionError: there are not as many inputs as layers.
    """
    if len(layers) != len(xs):
        raise AssertionError(f"Expected as many inputs as layers; got {len(xs)} inputs for {len(layers)} layers.")
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


class DistributedTransformerBlock(Module):
    """A pre-norm residual block: `h = x + attention(norm(x))`, then `h + mlp(norm(h))`.

    Under tensor parallelism each half ends in a row-parallel product, so a block costs two all-reduces.

    Args:
        attention: called as `(x, layer_index, kv_collection, metadata) -> (y, kv_collection)`.
        mlp, attention_norm, mlp_norm: `[T, D] -> [T, D]`.
        devices: the mesh that the parts were built on, or its devices.
        distributed_gemm_config: given, it is set on every row-parallel layer in the block.

    Raises:
        ValueError: the parts do not lie on the mesh of `devices`.
    """

    def __init__(self, attention: Any, mlp: Any, attention_norm: Any, mlp_norm: Any, devices: Devices,
                 distributed_gemm_config: DistributedGemmConfig | None = None):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        check_mesh(self, devices)
        if distributed_gemm_config is not None:
            for _, part in nnx.iter_modules(self):
                if isinstance(part, RowParallelLinear):
                    part.distributed_gemm_config = distributed_gemm_config

    def __call__(self, x: jax.Array, layer_index: jax.Array | int, kv_collection: PagedKVCacheCollection | None,
                 metadata: AttentionMetadata) -> tuple[jax.Array, PagedKVCacheCollection | None]:
        """`[T, D] -> [T, D]`, and the cache with this layer's new keys and values in it; arguments as attention's."""
        y, kv_collection = self.attention(self.attention_norm(x), layer_index, kv_collection, metadata)
        h = x + y
        return h + self.mlp(self.mlp_norm(h)), kv_collection


class DistributedTransformer(Module):
    """Embedding, blocks, final norm and head over a ragged batch.

    Args:
        dim, n_heads: D and N, to check the parts against.
        layers: the blocks, bottom first. With `use_subgraphs` their parameters are stacked here.
        norm, output: `[T, D] -> [T, D]` and `[rows, D] -> [rows, V]`, the head's output replicated.
        embedding: `int32[T] -> [T, D]`; its `vocab_size` bounds the ids.
        kv_params: the cache's measures.
        kv_collection_constructor: `(pages, cache_lengths, page_table) -> collection`: one of the `Fetch...`.
        devices: the mesh that the parts were built on, or devices from which `make_mesh` makes one.
        rope: for every attention that was not given its own.
        return_logits: which rows of logits a call returns.
        use_subgraphs: scan groups of like layers instead of calling each; the numbers agree to rounding.
        subgraph_layer_groups: lists of layers of one structure; `None` is one group of all layers.

    Raises:
        ValueError: the parts do not fit each other, the mesh, or their groups.
    """

    def __init__(self, dim: int, n_heads: int, layers: Sequence[Any], norm: Any, output: Any, embedding: Any,
                 kv_params: KVCacheParams, kv_collection_constructor: Callable[..., PagedKVCacheCollection],
                 devices: Devices, rope: RotaryEmbedding, return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
                 use_subgraphs: bool = False, subgraph_layer_groups: Sequence[Sequence[int]] | None = None):
        if len(layers) != kv_params.n_layers:
            raise ValueError(f"{len(layers)} layers were given, but kv_params has n_layers={kv_params.n_layers}.")
        if n_heads % kv_params.n_kv_heads:
            raise ValueError(f"{n_heads} heads cannot share kv_params.n_kv_heads={kv_params.n_kv_heads} evenly.")
        if rope.head_dim != kv_params.head_dim:
            raise ValueError(f"rope.head_dim={rope.head_dim}, but kv_params.head_dim={kv_params.head_dim}.")
        self.mesh = as_mesh(devices, n_heads=n_heads, n_kv_heads=kv_params.n_kv_heads)
        self.dim, self.n_heads, self.vocab_size = dim, n_heads, embedding.vocab_size
        self.norm, self.output, self.embedding = norm, output, embedding
        self.kv_params, self.kv_collection_constructor = kv_params, kv_collection_constructor
        self.rope, self.return_logits = rope, ReturnLogits(return_logits)
        self.segments = nnx.List(make_segments(layers, subgraph_layer_groups, use_subgraphs))
        check_mesh(self, self.mesh)
        self._check_parts()

    def __call__(self, tokens: jax.Array | np.ndarray, kv_cache_inputs: tuple[Any, Any, Any] | None,
                 return_n_logits: int | None, input_row_offsets: jax.Array | np.ndarray,
                 ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """One step over a ragged batch.

        Args:
            tokens: `int32[T]`, all sequences' new tokens end to end.
            kv_cache_inputs: `(pages, cache_lengths int32[S], page_table int32[S, M])`, or `None` for no cache.
                `pages` is donated: go on with the one that is returned.
            return_n_logits: n of `ReturnLogits.VARIABLE`, a Python int; otherwise not looked at.
            input_row_offsets: `int32[S + 1]`: tokens `[o[s], o[s + 1])` are sequence s. Tokens behind the last
                offset and sequences without tokens are padding, and touch nothing.

        Returns:
            `(outputs, kv_pages)`. `outputs` is `(last_logits,)`, or `(last_logits, logits, offsets)`: with
            VARIABLE logits `float32[S * n, V]` and offsets `n * arange(S + 1)`, rows before a sequence's first
            new token NaN; with ALL `float32[T, V]` and `input_row_offsets`. `last_logits` is `float32[S, V]`, NaN
            for a sequence without tokens. `kv_pages` is `None` without a cache.

        Raises:
            ValueError: shapes are off, or (outside `jax.jit`) a token id is beyond the vocabulary or a sequence
                beyond its pages.
        """
        tokens, offsets = self._check_batch(tokens, input_row_offsets, kv_cache_inputs)
        if self.return_logits == ReturnLogits.VARIABLE and (
                not isinstance(return_n_logits, int) or return_n_logits < 1):
            raise ValueError(f"ReturnLogits.VARIABLE needs return_n_logits, an int of at least 1; got "
                             f"{return_n_logits!r}.")
        n = return_n_logits if self.return_logits == ReturnLogits.VARIABLE else None
        pages, *rest = (None,) if kv_cache_inputs is None else kv_cache_inputs
        graphdef, state = nnx.split(self)
        return _jitted("_forward", graphdef, state, pages, tuple(rest), tokens, offsets, n)

    def hidden_states(self, tokens: jax.Array | np.ndarray, kv_cache_inputs: tuple[Any, Any, Any] | None,
                      input_row_offsets: jax.Array | np.ndarray,
                      remat: CheckpointPolicy | None = None) -> tuple[jax.Array, jax.Array | None]:
        """As a call, but stops before the head: `([T, D] after the final norm, kv_pages)`; raises as a call does.

        Without a cache the tokens may be sharded over R devices (`ShardingRules.tokens`), no sequence lying on two of
        them; `input_row_offsets` is then `int32[R, S + 1]`, sharded likewise, and counts from each shard's first.

        Args:
            remat: what of each block is kept for the backward pass, one of `jax.checkpoint_policies`, the rest being
                worked out again; `None`: all of it is kept.
        """
        tokens, offsets = self._check_batch(tokens, input_row_offsets, kv_cache_inputs, shards_allowed=True)
        pages, *rest = (None,) if kv_cache_inputs is None else kv_cache_inputs
        graphdef, state = nnx.split(self)
        return _jitted("_hidden_states", graphdef, state, pages, tuple(rest), tokens, offsets, remat)

    def _check_parts(self) -> None:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            width = jax.eval_shape(self.embedding, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
        if width != self.dim:
            raise ValueError(f"dim={self.dim} was given, but the embedding gives rows of {width}.")
        expected = dict(n_heads=self.n_heads, n_kv_heads=self.kv_params.n_kv_heads, head_dim=self.kv_params.head_dim)
        for _, part in nnx.iter_modules(self.segments):
            if isinstance(part, AttentionWithRope):
                its = {name: getattr(part, name) for name in expected}
                if its != expected:
                    raise ValueError(f"By n_heads and kv_params attention has {expected}, but a layer has {its}.")

    def _check_batch(self, tokens: Any, row_offsets: Any, kv_cache_inputs: Any,
                     shards_allowed: bool = False) -> tuple[Any, Any]:
        tokens, row_offsets = (x if isinstance(x, jax.Array) else np.asarray(x) for x in (tokens, row_offsets))
        if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (tokens, row_offsets)):
            raise ValueError(f"tokens and input_row_offsets must be integers; got {tokens.dtype} and "
                             f"{row_offsets.dtype}.")
        if shards_allowed and row_offsets.ndim == 2 and kv_cache_inputs is None:
            _check_shards(tokens, row_offsets)
            return tokens.astype(np.int32), row_offsets.astype(np.int32)
        if tokens.ndim != 1 or row_offsets.ndim != 1 or row_offsets.shape[0] < 2 or tokens.shape[0] < 1:
            raise ValueError("tokens must be int32[T] and input_row_offsets int32[S + 1], with T and S at least 1; got "
                             f"shapes {tokens.shape} and {row_offsets.shape}.")
        if not any(isinstance(x, jax.core.Tracer) for x in (tokens, row_offsets)):
            ids, offsets = np.asarray(tokens), np.asarray(row_offsets)
            if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(ids):
                raise ValueError(f"input_row_offsets must rise from 0 to at most the number of tokens, {len(ids)}; got "
                                 f"{offsets.tolist()}.")
            ids = ids[:offsets[-1]]
            if ((ids < 0) | (ids >= self.vocab_size)).any():
                bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise ValueError(f"Token id {bad} is beyond the vocabulary: ids are 0 to {self.vocab_size - 1}.")
            if kv_cache_inputs is not None:
                pages, *rest = kv_cache_inputs
                if not any(isinstance(x, jax.core.Tracer) for x in rest):
                    lengths, table = map(np.asarray, rest)
                    if len(lengths) == len(table) == len(offsets) - 1:  # else the constructor says what is wrong
                        self.kv_params.check_step(pages.shape[0] // self.kv_params.n_layers, lengths, table,
                                                  np.diff(offsets))
        return tokens.astype(np.int32), row_offsets.astype(np.int32)

    def _hidden_states(self, pages: jax.Array | None, rest: tuple[Any, ...], tokens: jax.Array,
                       row_offsets: jax.Array, remat: CheckpointPolicy | None = None,
                       ) -> tuple[jax.Array, jax.Array | None]:
        row_offsets = jnp.asarray(row_offsets, jnp.int32)
        kv_collection = None if pages is None else self.kv_collection_constructor(pages, *rest)
        if kv_collection is not None and kv_collection.cache_lengths.shape[0] != row_offsets.shape[0] - 1:
            raise ValueError(f"cache_lengths has {kv_collection.cache_lengths.shape[0]} sequences, input_row_offsets "
                             f"{row_offsets.shape[0] - 1}.")
        metadata = AttentionMetadata.create(
            tokens.shape[0], row_offsets, None if kv_collection is None else kv_collection.cache_lengths, self.rope)
        x = self.embedding(tokens)
        for segment in self.segments:
            x, kv_collection = segment(x, kv_collection, metadata, remat)
        return self.norm(x), None if kv_collection is None else kv_collection.pages

    def _forward(self, pages: jax.Array | None, rest: tuple[Any, ...], tokens: jax.Array, row_offsets: jax.Array,
                 n: int | None) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        x, pages = self._hidden_states(pages, rest, tokens, row_offsets)
        first, end = row_offsets[:-1], row_offsets[1:]

        def logits_of(rows: jax.Array) -> jax.Array:
            return self.output(x.at[rows].get(mode="clip")).astype(jnp.float32)

        def last_rows(logits: jax.Array, rows: jax.Array) -> jax.Array:
            return jnp.where((end > first)[:, None], logits.at[rows].get(mode="clip"), jnp.nan)

        if self.return_logits == ReturnLogits.ALL:
            logits = self.output(x).astype(jnp.float32)
            return (last_rows(logits, end - 1), logits, row_offsets), pages
        if self.return_logits == ReturnLogits.LAST_TOKEN:
            return (jnp.where((end > first)[:, None], logits_of(end - 1), jnp.nan),), pages
        assert n is not None
        rows = end[:, None] - n + jnp.arange(n)  # [S, n]
        logits = jnp.where((rows >= first[:, None]).reshape(-1, 1), logits_of(rows.reshape(-1)), jnp.nan)
        sequences = jnp.arange(row_offsets.shape[0], dtype=jnp.int32)
        return (last_rows(logits, n * sequences[1:] - 1), logits, n * sequences), pages


@partial(jax.jit, static_argnums=(0, 1, 7), donate_argnums=3)
def _jitted(method: str, graphdef: nnx.GraphDef, state: nnx.State, pages: jax.Array | None, rest: tuple[Any, ...],
            tokens: jax.Array, row_offsets: jax.Array, option: Any) -> Any:
    model = nnx.merge(graphdef, state)
    with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
        return getattr(model, method)(pages, rest, tokens, row_offsets, option)


def _check_shards(tokens: Any, row_offsets: Any) -> None:
    local = jax.typeof(tokens).sharding.shard_shape(tokens.shape) if isinstance(tokens, jax.Array) else tokens.shape
    if tokens.ndim != 1 or tokens.shape[0] < 1 or row_offsets.shape[0] * local[0] != tokens.shape[0] or (
            row_offsets.shape[1] < 2):
        raise ValueError("tokens must be int32[T], cut into R shards, and input_row_offsets int32[R, S + 1]; got "
                         f"shapes {tokens.shape}, each shard {local}, and {row_offsets.shape}.")


def check_mesh(module: nnx.Module, devices: Devices) -> None:
    """Sees to it that all parameters of `module` lie on one mesh.

    Raises:
        ValueError: a parameter lies elsewhere; names it and both meshes.
    """
    mesh: Any = devices if isinstance(devices, Mesh) else None
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        its = jax.typeof(param.get_value()).sharding.mesh
        mesh = mesh or its
        if its.axis_names != mesh.axis_names or its.axis_sizes != mesh.axis_sizes:
            raise ValueError(f"Parameter {'.'.join(map(str, path))} was built on mesh {dict(its.shape)}, the model on "
                             f"{dict(mesh.shape)}. Make one mesh with make_mesh(devices, n_heads=..., n_kv_heads=...) "
                             "and give it to every layer.")
