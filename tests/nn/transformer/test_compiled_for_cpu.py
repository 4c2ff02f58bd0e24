"""What a decode step needs on CPU besides its weights and its cache: less than one layer's weights.

So XLA copies neither the cache nor the layers, and widens no table to float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from maxlike.engine.config import EngineConfig
from maxlike.engine.runner import ModelRunner
from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn import RotaryEmbedding
from maxlike.nn.transformer.segments import named_parameters

LAYERS, D, F, N, K, H, V = 4, 512, 1536, 8, 4, 64, 32000
PAGES, PAGE_SIZE = 256, 64


def runner(devices: list[jax.Device], dtype: str, tied: bool, n_sequences: int) -> ModelRunner:
    """Compiles steps of a model whose parameters are zeros."""
    config = TransformerConfig("llama", V, D, F, N, K, H, (LayerConfig(RotaryEmbedding(H)),) * LAYERS, 4096, dtype,
                               tie_word_embeddings=tied)
    model = nnx.eval_shape(partial(build_model, config, devices=devices))
    for _, _, param in named_parameters(model):
        like = param.get_value()
        sharding = NamedSharding(model.mesh, jax.typeof(like).sharding.spec)
        param.set_value(jax.device_put(np.zeros(like.shape, like.dtype), sharding))
    assert model.kv_params.page_size == PAGE_SIZE
    sizes = EngineConfig(max_num_seqs=n_sequences, max_num_batched_tokens=n_sequences, max_model_len=16 * PAGE_SIZE)
    runner = ModelRunner(model, sizes)
    runner.allocate(PAGES)
    return runner


@pytest.mark.parametrize(
    ("dtype", "tied", "n_sequences", "n_devices"),
    [
        ("bfloat16", True, 1, 1),
        ("bfloat16", True, 4, 1),
        pytest.param("bfloat16", False, 1, 1, marks=pytest.mark.slow),
        pytest.param("float32", True, 4, 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_temporaries_stay_below_one_layers_weights(devices: list[jax.Device], dtype: str, tied: bool,
                                                   n_sequences: int, n_devices: int) -> None:
    made = runner(devices[:n_devices], dtype, tied, n_sequences)
    memory = made.compile("forward", n_sequences).memory_analysis()
    tail = made.compile("greedy", n_sequences).memory_analysis()
    cache = LAYERS * PAGES * K * PAGE_SIZE * 2 * H * 4  # float32 on CPU
    layer = (2 * N * H * D + 2 * K * H * D + 3 * D * F) * jnp.dtype(dtype).itemsize
    assert cache > 10 * layer and 2 * layer < V * D * 4  # a copy of either would show
    assert memory.alias_size_in_bytes == cache // n_devices
    assert memory.temp_size_in_bytes < layer // n_devices
    assert tail.temp_size_in_bytes < layer // n_devices
