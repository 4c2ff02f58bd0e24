"""The decode step of Llama 3.1 8B as the TPU compiler schedules it for slices that are not here."""

from __future__ import annotations

import bisect
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn import DistributedGemmConfig, Llama3Scaling, RotaryEmbedding
from tests.tpu_compile import (
    Permute,
    count_collectives,
    loop_body,
    overlapped_permutes,
    requires_libtpu,
    topology_mesh,
)

ROPE = RotaryEmbedding(128, 500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
LLAMA_8B = TransformerConfig("llama", 128256, 4096, 14336, 32, 8, 128, (LayerConfig(ROPE),) * 32, 131072, "bfloat16")
SEQUENCES, PAGES, PAGES_PER_SEQUENCE = 64, 512, 64
TOPOLOGIES = [
    pytest.param("v5e:2x4", {"model": 8}, id="v5e-8"),
    pytest.param("v6e:2x2", {"model": 4}, id="v6e-4"),
    pytest.param("v5e:4x4", {"kv": 8, "rep": 2}, id="v5e-16", marks=pytest.mark.slow),
]

pytestmark = [requires_libtpu, pytest.mark.parametrize(("topology", "axes"), TOPOLOGIES)]


def compile_decode(topology: str, axes: dict[str, int], gemm: bool, n_sequences: int = SEQUENCES) -> str:
    """One token for each sequence, greedily; the weights and the cache are shapes and shardings alone."""
    mesh = topology_mesh(topology, axes)
    config = DistributedGemmConfig(enable_matmul_allreduce=True) if gemm else None
    model = nnx.eval_shape(functools.partial(build_model, LLAMA_8B, devices=mesh, distributed_gemm_config=config))
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
    return jax.jit(step, donate_argnums=1).lower(
        jax.tree.map(typed, state), pages, ints(S), ints(S), ints(S, PAGES_PER_SEQUENCE), ints(S + 1),
    ).compile().as_text()


def rings(body: str) -> list[list[Permute]]:
    """The permutes of each collective product, in order: each product's partial sums end in an all-gather."""
    gathers = [match.start() for match in re.finditer(r" all-gather(?:-start)?\(", body)]
    products: list[list[Permute]] = [[] for _ in gathers]
    for permute in overlapped_permutes(body):
        products[bisect.bisect(gathers, body.index(f"%{permute.name} = "))].append(permute)
    return products


def test_xla_reduces_twice_a_layer(topology: str, axes: dict[str, int]) -> None:
    text = compile_decode(topology, axes, gemm=False)
    assert count_collectives(loop_body(text)) == {"all-reduce": 2}
    # Outside: the embedding's rows are summed, and the logits gathered, or their largest.
    assert sum(count_collectives(text).values()) <= 2 + 2


@pytest.mark.slow
def test_a_single_row_is_multiplied(topology: str, axes: dict[str, int]) -> None:
    """The sum with weights that a single row gets on CPU is not compiled for TPU."""
    body = loop_body(compile_decode(topology, axes, gemm=False, n_sequences=1))
    assert count_collectives(body) == {"all-reduce": 2}
    n = math.prod(axes.values())
    widened = re.findall(rf"f32\[(?:{14336 // n},4096|4096,{14336 // n})\]", body)
    assert not widened


def test_collective_products_travel_behind_work(topology: str, axes: dict[str, int]) -> None:
    body = loop_body(compile_decode(topology, axes, gemm=True))
    collectives, n = count_collectives(body), math.prod(axes.values())
    assert collectives.keys() == {"collective-permute", "all-gather"}  # no all-reduce
    products = rings(body)
    assert len(products) == collectives["all-gather"] == 2  # attention's output and the MLP's
    assert sum(map(len, products)) == collectives["collective-permute"]
    for permutes in products:
        ways, rest = divmod(len(permutes), n - 1)  # a ring goes one way round, or both at a time
        assert ways in (1, 2) and rest == 0
        assert sum(bool(permute.work) for permute in permutes) >= ways * (n - 2)
