"""A `TransformerConfig` becomes a `DistributedTransformer`: the only place where the layers are put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from maxlike.mesh import Devices, ShardingRules, as_mesh, make_mesh, mesh_platform, tensor_parallel_sizes
from maxlike.models.config import TransformerConfig
from maxlike.nn.attention import AttentionWithRope
from maxlike.nn.embedding import VocabParallelEmbedding
from maxlike.nn.kv_cache import (
    FetchContinuousBatchingKVCacheCollection,
    FetchPagedKVCacheCollection,
    KVCacheParams,
    KVCacheStrategy,
)
from maxlike.nn.linear import ColumnParallelLinear, DistributedGemmConfig
from maxlike.nn.mlp import MLP
from maxlike.nn.norm import OutputNorm, RMSNorm, SoftCap
from maxlike.nn.transformer.distributed_transformer import (
    DistributedTransformer,
    DistributedTransformerBlock,
    ReturnLogits,
)


def mesh_for(config: TransformerConfig, devices: Devices | None = None) -> Mesh:
    """The mesh for a model: over `devices`, or with `None` over as many of all devices as its heads allow.

    Raises:
        ValueError: the number of devices given does not fit the model; lists the sizes that do.
    """
    heads = dict(n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
                 intermediate_size=config.intermediate_size)
    if devices is not None:
        return as_mesh(devices, **heads)
    present = jax.devices()
    return make_mesh(present[:max(n for n in tensor_parallel_sizes(**heads) if n <= len(present))], **heads)


def default_kv_params(config: TransformerConfig, mesh: Mesh, dtype: DTypeLike,
                      rules: ShardingRules = ShardingRules()) -> KVCacheParams:
    """A paged cache for a model's layers and KV heads, in `dtype`; in float32 on CPU, where jax 0.10 widens a whole
    bfloat16 cache at each write. `rules` are those that the model is built with.
    """
    return KVCacheParams(jnp.float32 if mesh_platform(mesh) == "cpu" else dtype, config.num_key_value_heads,
                         config.head_dim, len(config.layers), rules=rules)


def build_model(config: TransformerConfig, *, devices: Devices | None = None, dtype: DTypeLike | None = None,
                use_subgraphs: bool | None = None, return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
                kv_params: KVCacheParams | None = None,
                distributed_gemm_config: DistributedGemmConfig | None = None,
                rules: ShardingRules = ShardingRules(), rngs: nnx.Rngs | None = None) -> DistributedTransformer:
    """A model with random parameters. Under `nnx.eval_shape`, its shapes and shardings alone.

    Args:
        devices: see `mesh_for`.
        dtype: of parameters and activations: float32 or bfloat16; `None` is the config's.
        use_subgraphs: scan groups of like layers; `None`: yes, but on CPU, where XLA would copy each layer's
            weights out of the stack. Random layers are held twice while they are stacked; `load` reads into stacks.
        return_logits: which rows of logits a call returns.
        kv_params: the cache's measures; `None` is `default_kv_params`.
        distributed_gemm_config: how row-parallel products are summed over the devices; `None` leaves it to XLA.
        rules: which mesh axes logical axes lie on.
        rngs: for the parameters; `None` is `nnx.Rngs(0)`.

    Raises:
        ValueError: the mesh or dtype does not fit the model.
    """
    mesh = mesh_for(config, devices)
    dtype = compute_dtype(config, dtype)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    kv_params = default_kv_params(config, mesh, dtype, rules) if kv_params is None else kv_params
    if use_subgraphs is None:
        use_subgraphs = mesh_platform(mesh) != "cpu"
    common: dict[str, Any] = dict(dtype=dtype, devices=mesh, rngs=rngs, rules=rules)
    norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, weight_offset=config.norm_weight_offset,
                   **common)
    model_rope = config.layers[-1].rope

    def block(i: int) -> DistributedTransformerBlock:
        layer = config.layers[i]
        attention: Any = AttentionWithRope(
            config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.head_dim,
            rope=None if layer.rope == model_rope else layer.rope, sliding_window=layer.sliding_window,
            scale=(config.query_pre_attn_scalar or config.head_dim) ** -0.5,
            has_bias=config.attention_bias, has_output_bias=config.attention_output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None, qk_norm_offset=config.norm_weight_offset,
            logit_soft_cap=config.attn_logit_softcapping, **common)
        mlp: Any = MLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act,
                       has_bias=config.mlp_bias, **common)
        if config.sandwich_norm:
            attention, mlp = OutputNorm(attention, norm()), OutputNorm(mlp, norm())
        return DistributedTransformerBlock(attention, mlp, norm(), norm(), mesh, distributed_gemm_config)

    layers = [block(i) for i in range(len(config.layers))]
    embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, scale=config.embedding_scale, **common)
    output: Any = ColumnParallelLinear(config.hidden_size, config.vocab_size, out_axis="vocab", gather_output=True,
                                       tied_weight=embedding.weight if config.tie_word_embeddings else None, **common)
    if config.final_logit_softcapping is not None:
        output = SoftCap(output, config.final_logit_softcapping)
    fetch = (FetchPagedKVCacheCollection if kv_params.cache_strategy == KVCacheStrategy.PAGED
             else FetchContinuousBatchingKVCacheCollection)
    return DistributedTransformer(
        config.hidden_size, config.num_attention_heads, layers, norm(), output, embedding, kv_params,
        fetch(kv_params), mesh, model_rope, return_logits, use_subgraphs, layer_groups(config))


def abstract_model(build: Callable[[], DistributedTransformer]) -> DistributedTransformer:
    """What `build` makes, as shapes, dtypes and shardings alone: programs are compiled of it without any weights, for
    devices that need not be there."""
    model = nnx.eval_shape(build)

    def placed(variable: Any) -> jax.ShapeDtypeStruct:
        array = jax.typeof(variable)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(model.mesh, array.sharding.spec))

    nnx.update(model, jax.tree.map(placed, nnx.state(model)))
    return model


def layer_groups(config: TransformerConfig) -> list[list[int]]:
    """Layers of one structure together, each group ascending: the `subgraph_layer_groups` of a model."""
    kinds = list(dict.fromkeys(config.layers))
    return [[i for i, layer in enumerate(config.layers) if layer == kind] for kind in kinds]


def compute_dtype(config: TransformerConfig, dtype: DTypeLike | None) -> jnp.dtype:
    """What a model computes in: `dtype`, or with `None` the checkpoint's, bfloat16 standing in for its float16.

    Raises:
        ValueError: `dtype` is neither float32 nor bfloat16.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if config.dtype == "float32" else jnp.bfloat16)
    for possible in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        if dtype in (possible, possible.name):
            return possible
    raise ValueError(f"Models compute in float32 or bfloat16; got {dtype}.")
