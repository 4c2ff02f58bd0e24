"""A whole decode step of a Llama-3.1-8B-shaped model, by the real TPU compiler, for TPUs that are not there."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn import DistributedGemmConfig, Llama3Scaling, RotaryEmbedding
from tests.tpu_compile import count_collectives, loop_body, overlapped_permutes, requires_libtpu, topology_mesh

ROPE = RotaryEmbedding(128, 500_000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
LLAMA_3_1_8B = TransformerConfig(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, layers=(LayerConfig(ROPE),) * 32, max_position_embeddings=131072,
    dtype="bfloat16")
SEQUENCES, PAGES, PAGES_PER_SEQUENCE = 64, 1024, 16


def decode_step(topology: str, devices: int, gemm_config: DistributedGemmConfig | None) -> jax.stages.Compiled:
    """The step compiled, its weights and cache abstract: one token for each of 64 sequences."""
    mesh = topology_mesh(topology, {"model": devices})
    model = nnx.eval_shape(partial(build_model, LLAMA_3_1_8B, devices=mesh, distributed_gemm_config=gemm_config))
    graphdef, state = nnx.split(model)

    def abstract(shape: tuple[int, ...], dtype: jnp.dtype, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(lambda x: abstract(x.shape, x.dtype, jax.typeof(x).sharding.spec), state)
    pages = abstract(model.kv_params.shape(PAGES, "tpu"), model.kv_params.dtype, model.kv_params.sharding(mesh).spec)
    integers = partial(abstract, dtype=jnp.int32, spec=P())

    def step(state, pages, tokens, row_offsets, cache_lengths, page_table):
        return nnx.merge(graphdef, state)(tokens, (pages, cache_lengths, page_table), None, row_offsets)

    return jax.jit(step, donate_argnums=1).lower(
        state, pages, integers((SEQUENCES,)), integers((SEQUENCES + 1,)), integers((SEQUENCES,)),
        integers((SEQUENCES, PAGES_PER_SEQUENCE))).compile()


@requires_libtpu
@pytest.mark.parametrize(("topology", "devices"), [("v5e:2x4", 8), ("v6e:2x2", 4)])
def test_a_layer_costs_two_all_reduces(topology: str, devices: int) -> None:
    body = loop_body(decode_step(topology, devices, None).as_text())
    assert count_collectives(body) == {"all-reduce": 2}


@requires_libtpu
@pytest.mark.parametrize(("topology", "devices"), [("v5e:2x4", 8), ("v6e:2x2", 4)])
def test_collective_matmuls_reduce_while_they_compute(topology: str, devices: int) -> None:
    body = loop_body(decode_step(topology, devices, DistributedGemmConfig(enable_matmul_allreduce=True)).as_text())
    collectives = count_collectives(body)
    assert collectives.keys() == {"collective-permute", "all-gather"}
    permutes = overlapped_permutes(body)
    assert len(permutes) == collectives["collective-permute"] >= 2 * (devices - 1)
    idle = [permute.name for permute in permutes if not permute.work]
    assert len(idle) <= 2, f"two products a layer may each leave one permute without work: {idle}"
