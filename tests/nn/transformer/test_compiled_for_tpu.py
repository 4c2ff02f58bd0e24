"""Decode steps of real models' shapes as the TPU compiler schedules them for slices that are not here."""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn import (
    MLP,
    AttentionWithRope,
    ColumnParallelLinear,
    DistributedGemmConfig,
    KVCacheParams,
    Llama3Scaling,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
)
from maxlike.nn.kv_cache import FetchPagedKVCacheCollection, KVScales
from maxlike.nn.transformer import DistributedTransformer, DistributedTransformerBlock
from tests.tpu_compile import (
    Permute,
    count_collectives,
    loop_bodies,
    loop_body,
    overlapped_permutes,
    requires_libtpu,
    topology_mesh,
)

ROPE = RotaryEmbedding(128, 500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
LLAMA_8B = TransformerConfig("llama", 128256, 4096, 14336, 32, 8, 128, (LayerConfig(ROPE),) * 32, 131072, "bfloat16")
LOCAL, FULL = LayerConfig(RotaryEmbedding(128, 10000.0), sliding_window=1024), LayerConfig(RotaryEmbedding(128, 1e6))
GEMMA_27B = TransformerConfig(
    "gemma3_text", 262208, 5376, 21504, 32, 16, 128, (*(LOCAL,) * 5, FULL) * 10 + (LOCAL, LOCAL), 131072,
    "bfloat16", hidden_act="gelu_pytorch_tanh", qk_norm=True, norm_weight_offset=1.0, sandwich_norm=True,
    embedding_scale=5376**0.5, query_pre_attn_scalar=168, tie_word_embeddings=True)
SEQUENCES, PAGES, PAGES_PER_SEQUENCE = 64, 512, 64
TOPOLOGIES = [
    pytest.param("v5e:2x4", {"model": 8}, id="v5e-8"),
    pytest.param("v6e:2x2", {"model": 4}, id="v6e-4"),
    pytest.param("v5e:4x4", {"kv": 8, "rep": 2}, id="v5e-16", marks=pytest.mark.slow),
]

pytestmark = requires_libtpu
on_topologies = pytest.mark.parametrize(("topology", "axes"), TOPOLOGIES)


def gpt_oss(mesh: jax.sharding.Mesh, kv_dtype: str = "bfloat16") -> DistributedTransformer:
    """The attention of gpt-oss-20b, its heads of 64 with sinks, every other layer with a window; a dense MLP.

    The width is 3072 where gpt-oss has 2880: a table of rows that are no multiple of 128 the compiler lays out by
    columns, and copies whole to look rows up. That is the embedding's matter, and not attention's.
    """
    D, N, K, H, F, V, L = 3072, 64, 8, 64, 3072, 201088, 24
    parts: dict[str, Any] = dict(dtype=jnp.bfloat16, devices=mesh, rngs=nnx.Rngs(0))
    layers = [
        DistributedTransformerBlock(
            AttentionWithRope(N, K, D, H, has_sinks=True, has_bias=True, has_output_bias=True,
                              sliding_window=None if i % 2 else 128, **parts),
            MLP(D, F, **parts), RMSNorm(D, **parts), RMSNorm(D, **parts), mesh)
        for i in range(L)
    ]
    ones = ((1.0,) * K,) * L
    kv_params = KVCacheParams(kv_dtype, K, H, L, scales=KVScales(ones, ones) if kv_dtype == "int8" else None)
    output = ColumnParallelLinear(D, V, out_axis="vocab", gather_output=True, **parts)
    return DistributedTransformer(
        D, N, layers, RMSNorm(D, **parts), output, VocabParallelEmbedding(V, D, **parts), kv_params,
        FetchPagedKVCacheCollection(kv_params), mesh, RotaryEmbedding(H, 150000.0), use_subgraphs=True,
        subgraph_layer_groups=[list(range(0, L, 2)), list(range(1, L, 2))])


def compile_decode(build: Callable[[jax.sharding.Mesh], DistributedTransformer], topology: str, axes: dict[str, int],
                   n_sequences: int = SEQUENCES) -> Program:
    """One token for each sequence, greedily; the weights and the cache are shapes and shardings alone."""
    mesh = topology_mesh(topology, axes)
    model = nnx.eval_shape(functools.partial(build, mesh))
    graphdef, state = nnx.split(model)
    params = model.kv_params

    def typed(array: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, jax.typeof(array).sharding.spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P()))

    def step(state, pages, tokens, lengths, table, offsets):
        (logits,), pages = nnx.merge(graphdef, state)(tokens, (pages, lengths, table), None, offsets)
        return jnp.argmax(logits, axis=-1), pages

    pages = jax.ShapeDtypeStruct(params.shape(PAGES, "tpu"), params.dtype, sharding=params.sharding(mesh))
    S = n_sequences
    compiled = jax.jit(step, donate_argnums=1).lower(
        jax.tree.map(typed, state), pages, ints(S), ints(S), ints(S, PAGES_PER_SEQUENCE), ints(S + 1)).compile()
    shape = pages.sharding.shard_shape(pages.shape)
    memory = compiled.memory_analysis()
    return Program(compiled.as_text(), shape, math.prod(shape) * pages.dtype.itemsize, memory.temp_size_in_bytes,
                   memory.alias_size_in_bytes)


class Program(NamedTuple):
    """A compiled decode step."""

    text: str
    cache_shape: tuple[int, ...]  # of one device's shard
    cache_bytes: int
    temporaries: int  # bytes a device
    aliased: int


def llama(mesh: jax.sharding.Mesh, gemm: bool = False) -> DistributedTransformer:
    config = DistributedGemmConfig(enable_matmul_allreduce=True) if gemm else None
    return build_model(LLAMA_8B, devices=mesh, distributed_gemm_config=config)


def gemma(mesh: jax.sharding.Mesh) -> DistributedTransformer:
    return build_model(GEMMA_27B, devices=mesh)


def llama_int8(mesh: jax.sharding.Mesh) -> DistributedTransformer:
    scales = KVScales(*(((0.02,) * 8,) * 32,) * 2)
    return build_model(LLAMA_8B, devices=mesh, kv_params=KVCacheParams("int8", 8, 128, 32, scales=scales))


# Each model with the layers of each of its scans' bodies, and sequences: the logits are temporaries too, and those of
# 64 sequences over Gemma's vocabulary alone would be 64 MiB.
MODELS = [
    pytest.param(llama, [1], 64, id="llama-8b"),
    pytest.param(gemma, [6, 1], 32, id="gemma-27b", marks=pytest.mark.slow),
    pytest.param(gpt_oss, [2], 64, id="gpt-oss"),
    pytest.param(llama_int8, [1], 64, id="llama-8b-int8", marks=pytest.mark.exhaustive),
    pytest.param(functools.partial(gpt_oss, kv_dtype="int8"), [2], 64, id="gpt-oss-int8", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize(("build", "layers", "n_sequences"), MODELS)
def test_attention_kernel_moves_no_cache(build: Any, layers: list[int], n_sequences: int, topology: str) -> None:
    program = compile_decode(build, topology, {"model": 8}, n_sequences)
    bodies = loop_bodies(program.text)
    assert [count_collectives(body) for body in bodies] == [{"all-reduce": 2 * n} for n in layers]
    assert [body.count('custom_call_target="tpu_custom_call"') for body in bodies] == layers
    assert program.aliased >= program.cache_bytes
    assert program.temporaries < 64e6
    shape = re.escape(",".join(map(str, program.cache_shape)))
    assert re.search(shape, program.text)
    assert not re.findall(shape + r"\][^ ]* copy(?:-start)?\(", program.text)


def rings(body: str) -> list[list[Permute]]:
    """The permutes of each collective product, in order: each product's partial sums end in an all-gather."""
    gathers = [match.start() for match in re.finditer(r" all-gather(?:-start)?\(", body)]
    products: list[list[Permute]] = [[] for _ in gathers]
    for permute in overlapped_permutes(body):
        products[bisect.bisect(gathers, body.index(f"%{permute.name} = "))].append(permute)
    return products


@on_topologies
def test_xla_reduces_twice_a_layer(topology: str, axes: dict[str, int]) -> None:
    text = compile_decode(llama, topology, axes).text
    assert count_collectives(loop_body(text)) == {"all-reduce": 2}
    # Outside: the embedding's rows are summed, and the logits gathered, or their largest.
    assert sum(count_collectives(text).values()) <= 2 + 2


@pytest.mark.slow
@on_topologies
def test_a_single_row_is_multiplied(topology: str, axes: dict[str, int]) -> None:
    """The sum with weights that a single row gets on CPU is not compiled for TPU."""
    body = loop_body(compile_decode(llama, topology, axes, n_sequences=1).text)
    assert count_collectives(body) == {"all-reduce": 2}
    n = math.prod(axes.values())
    widened = re.findall(rf"f32\[(?:{14336 // n},4096|4096,{14336 // n})\]", body)
    assert not widened


@on_topologies
def test_collective_products_travel_behind_work(topology: str, axes: dict[str, int]) -> None:
    body = loop_body(compile_decode(functools.partial(llama, gemm=True), topology, axes).text)
    collectives, n = count_collectives(body), math.prod(axes.values())
    assert collectives.keys() == {"collective-permute", "all-gather"}  # no all-reduce
    products = rings(body)
    assert len(products) == collectives["all-gather"] == 2  # attention's output and the MLP's
    assert sum(map(len, products)) == collectives["collective-permute"]
    for permutes in products:
        ways, rest = divmod(len(permutes), n - 1)  # a ring goes one way round, or both at a time
        assert ways in (1, 2) and rest == 0
        assert sum(bool(permute.work) for permute in permutes) >= ways * (n - 2)
