"""A batch cut over the data axes of a mesh: loss and gradients are those of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.mesh import ShardingRules, make_mesh
from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn.rotary_embedding import RotaryEmbedding
from maxlike.nn.transformer.segments import named_parameters

V, T, SHARDS = 130, 128, 8
LENGTHS = [[5, 11], [16], [1, 7, 3], [2, 2], [9, 7], [16], [4, 5, 6], [1]]  # of each eighth; some end in padding
LAYERS = (LayerConfig(RotaryEmbedding(16)), LayerConfig(RotaryEmbedding(16, theta=500.0), sliding_window=4))


def offsets_for(shards: int) -> np.ndarray:
    """`int32[shards, S + 1]`; the padding of one eighth is a sequence of its own where another one follows."""
    rows = []
    for first in range(0, SHARDS, SHARDS // shards):
        ends = [0]
        for i in range(SHARDS // shards):
            ends += [*(i * T // SHARDS + np.cumsum(LENGTHS[first + i])), (i + 1) * T // SHARDS]
        rows.append(ends)
    longest = max(map(len, rows))
    return np.array([row + row[-1:] * (longest - len(row)) for row in rows], np.int32)


def loss_and_gradients(devices: list[jax.Device], axes: dict[str, int], tied: bool, scanned: bool, remat: Any = None,
                       ) -> tuple[float, dict[str, np.ndarray]]:
    config = TransformerConfig("llama", V, 64, 128, 8, 4, 16, LAYERS * 2, 512, tie_word_embeddings=tied,
                               bos_token_id=1, eos_token_ids=(2,), qk_norm=True, attention_bias=True)
    mesh = make_mesh(devices, n_heads=8, n_kv_heads=4, **axes)
    model = build_model(config, devices=mesh, dtype="float32", use_subgraphs=scanned, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rules, shards = ShardingRules(), axes.get("data", 1) * axes.get("fsdp", 1)
    rows = NamedSharding(mesh, P(rules.mesh_axes(mesh, "tokens") or None))
    rng = np.random.default_rng(0)
    tokens, targets = (jax.device_put(rng.integers(V, size=T, dtype=np.int32), rows) for _ in range(2))
    offsets = jax.device_put(offsets_for(shards), rows)

    @jax.jit
    @jax.value_and_grad
    def loss(params: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, params)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hidden, _ = model.hidden_states(tokens, None, offsets, remat)
            logits = model.output(hidden).astype(jnp.float32)
            chosen = jnp.where(targets[:, None] == jnp.arange(V), logits, 0).sum(1)
            return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()

    value, gradients = loss(params)
    for name, param, gradient in zip(model.partition_specs(), jax.tree.leaves(params), jax.tree.leaves(gradients),
                                     strict=True):
        assert jax.typeof(gradient).sharding.spec == jax.typeof(param).sharding.spec, name
    by_name = {}
    for names, stacked, param in named_parameters(nnx.merge(graphdef, gradients)):
        array = np.asarray(param.get_value())
        for name, part in zip(names, array if stacked else [array], strict=True):
            vocabulary = "embedding" in name or "output" in name
            by_name[name] = part[:V] if vocabulary else part  # without its padding
    return float(value), by_name


MESHES = [{"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 2}, {"fsdp": 2}, {"data": 1}]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(devices: list[jax.Device], axes: dict[str, int],
                                                    tied: bool) -> None:
    expected, gradients = loss_and_gradients(devices[:1], {}, tied, scanned=False)
    scanned = axes in ({"fsdp": 8}, {"data": 2, "fsdp": 2})
    value, found = loss_and_gradients(devices, axes, tied, scanned,
                                      jax.checkpoint_policies.nothing_saveable if scanned else None)
    assert abs(value - expected) < 1e-5
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(found[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


def test_remat_saves_memory(devices: list[jax.Device]) -> None:
    config = TransformerConfig("llama", V, 64, 256, 4, 4, 16, LAYERS[:1] * 6, 2048, bos_token_id=1,
                               eos_token_ids=(2,))
    model = build_model(config, devices=devices[:1], dtype="float32", use_subgraphs=True)
    graphdef, params = nnx.split(model)
    tokens, offsets = np.zeros(2048, np.int32), np.array([0, 2048], np.int32)

    def temporaries(remat: Any) -> int:
        def loss(params: nnx.State) -> jax.Array:
            return nnx.merge(graphdef, params).hidden_states(tokens, None, offsets, remat)[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(jax.checkpoint_policies.nothing_saveable) < temporaries(None) / 2


def test_shards_that_do_not_fit(devices: list[jax.Device]) -> None:
    config = TransformerConfig("llama", V, 64, 128, 8, 4, 16, LAYERS, 512, bos_token_id=1, eos_token_ids=(2,))
    model = build_model(config, devices=make_mesh(devices, fsdp=8), dtype="float32")
    rows = NamedSharding(model.mesh, P("fsdp"))
    tokens = jax.device_put(np.zeros(T, np.int32), rows)
    with pytest.raises(ValueError, match=r"cut into R shards.*each shard \(16,\), and \(4, 2\)"):
        model.hidden_states(tokens, None, np.zeros((4, 2), np.int32))
    with pytest.raises(ValueError, match=r"int32\[S \+ 1\]"):  # logits are for serving, which cuts no batch
        model(tokens, None, None, np.zeros((8, 2), np.int32))
