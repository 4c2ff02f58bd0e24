"""A training step of a real model's shape, as the TPU compiler plans it for a slice that is not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn import Llama3Scaling, RotaryEmbedding
from maxlike.nn.lora import LoraConfig, add_lora, is_lora
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.train.batch import Batch
from maxlike.train.optimizer import OptimizerConfig, make_optimizer
from maxlike.train.step import StepConfig, init_state, make_train_step
from tests.tpu_compile import requires_libtpu, topology_mesh

ROPE = RotaryEmbedding(128, 500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
LLAMA_8B = TransformerConfig("llama", 128256, 4096, 14336, 32, 8, 128, (LayerConfig(ROPE),) * 32, 131072, "bfloat16")
PARAMETERS, DEVICES = 8.03e9, 8



def planned(topology: str, tokens_per_device: int, lora: LoraConfig | None) -> tuple[int, int, int]:
    """Bytes on each device of a step: of its arguments, of those that are updated in place, and of temporaries."""
    mesh = topology_mesh(topology, {"fsdp": DEVICES, "model": 1})

    def build() -> DistributedTransformer:
        model = build_model(LLAMA_8B, devices=mesh, dtype="float32" if lora is None else "bfloat16")
        if lora is not None:
            add_lora(model, lora, nnx.Rngs(0))
        return model

    model = nnx.eval_shape(build)
    optimizer = make_optimizer(OptimizerConfig(total_steps=100), model)
    state = init_state(model, optimizer, None if lora is None else is_lora)
    rows = NamedSharding(mesh, P("fsdp"))

    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    T = DEVICES * tokens_per_device
    batch = Batch(array(jnp.int32, T), array(jnp.int32, T), array(jnp.float32, T), array(jnp.int32, DEVICES, 17))
    with jax.set_mesh(mesh):
        compiled = make_train_step(model, optimizer, StepConfig("bfloat16", "full")).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    print(f"{topology}, {tokens_per_device} tokens a device: {memory.argument_size_in_bytes / 1e9:.2f} GB of "
          f"arguments, {memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries")
    return memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes


@requires_libtpu
@pytest.mark.slow
def test_a_full_fine_tune_of_llama_8b_fits_on_eight_v5p() -> None:
    arguments, updated, temporaries = planned("v5p:2x2x2", 4096, None)
    # Weights and Adam's moments in float32, each device its eighth, updated in place.
    assert arguments < 1.01 * 12 * PARAMETERS / DEVICES
    assert updated > 0.99 * 12 * PARAMETERS / DEVICES
    # All layers' weights gathered at once would alone be 16 GB: they are gathered layer by layer, inside the scan.
    assert temporaries < 0.6 * 2 * PARAMETERS
    assert arguments + temporaries < 95e9 / 3


@requires_libtpu
@pytest.mark.slow
def test_lora_on_llama_8b_fits_on_eight_v6e() -> None:
    arguments, updated, temporaries = planned("v6e:2x4", 4096, LoraConfig(rank=16))
    adapters = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    # The base in bfloat16, each device its eighth, and the adapters and their moments in float32, which alone are
    # updated; cut as the weight is, of A and B only the one is that has its hidden dimension.
    assert arguments < 1.01 * (2 * PARAMETERS / DEVICES + 12 * adapters)
    assert 12 * adapters / DEVICES < updated < 12 * adapters
    assert temporaries < 0.6 * 2 * PARAMETERS
    assert arguments + temporaries < 32e9 / 2
