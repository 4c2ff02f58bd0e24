"""Schedules and optimizers: numbers worked out by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlike.mesh import make_mesh
from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn.rotary_embedding import RotaryEmbedding
from maxlike.train.optimizer import OptimizerConfig, make_optimizer, make_schedule

CONFIG = TransformerConfig("llama", 64, 32, 48, 2, 2, 16, (LayerConfig(RotaryEmbedding(16)),) * 2, 64,
                           attention_bias=True, bos_token_id=1, eos_token_ids=(2,))


@pytest.mark.parametrize(("fields", "expected"), [
    (dict(schedule="constant"), {0: 1.0, 5: 1.0, 10**6: 1.0}),
    (dict(schedule="constant", warmup_steps=4), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 50: 1.0}),
    (dict(schedule="linear", total_steps=10), {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0, 20: 0.0}),
    (dict(schedule="linear", warmup_steps=2, total_steps=10, final_fraction=0.2), {0: 0.5, 2: 1.0, 6: 0.6, 10: 0.2}),
    (dict(schedule="cosine", warmup_steps=2, total_steps=10), {1: 1.0, 4: (1 + 0.5**0.5) / 2, 6: 0.5, 10: 0.0}),
    (dict(schedule="wsd", warmup_steps=1, total_steps=10, decay_steps=4), {0: 1.0, 6: 1.0, 8: 0.5, 10: 0.0, 11: 0.0}),
])
def test_schedules(fields: dict[str, Any], expected: dict[int, float]) -> None:
    rate = make_schedule(OptimizerConfig(learning_rate=0.5, **fields))
    for step, fraction in expected.items():
        value = jax.jit(rate)(jnp.int32(step))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, 0.5 * fraction, atol=1e-7, err_msg=f"step {step}")


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adafactor"])
@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "direct"])
def test_matrices_decay_and_vectors_do_not(name: str, scanned: bool, devices: list[jax.Device]) -> None:
    """Gradients are zero, so that what an update holds is the decay alone."""
    model = build_model(CONFIG, devices=make_mesh(devices[:1]), dtype="float32", use_subgraphs=scanned,
                        rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda x: x + 1, nnx.state(model))  # no bias is zero
    optimizer = make_optimizer(OptimizerConfig(name, schedule="constant", weight_decay=0.25), model)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.transform.init(params),
                                           params)
    found = dict(nnx.to_flat_state(updates))
    for path, param in nnx.to_flat_state(params):
        matrix = path[-1] == "weight" and not any("norm" in str(part) for part in path)
        expected = -0.25 * param.get_value() if matrix else jnp.zeros_like(param.get_value())
        np.testing.assert_allclose(found[path].get_value(), expected, atol=1e-6, err_msg=str(path))


def test_adamw_by_hand(devices: list[jax.Device]) -> None:
    model = build_model(CONFIG, devices=make_mesh(devices[:1]), dtype="float32", rngs=nnx.Rngs(0))
    params = nnx.state(model)
    config = OptimizerConfig(schedule="constant", b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, max_grad_norm=None)
    optimizer = make_optimizer(config, model)
    state, update = optimizer.transform.init(params), jax.jit(optimizer.update)
    m = v = 0.0
    for t, g in enumerate((0.5, -0.25, 2.0), 1):
        updates, state = update(jax.tree.map(lambda x, g=g: jnp.full_like(x, g), params), state, params)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        np.testing.assert_allclose(updates["norm"]["weight"].get_value(), -step, rtol=1e-5)
        weight = params["embedding"]["weight"].get_value()
        np.testing.assert_allclose(updates["embedding"]["weight"].get_value(), -step - 0.1 * weight, rtol=1e-4)


def test_gradients_are_clipped_by_their_norm_over_all_parameters(devices: list[jax.Device]) -> None:
    model = build_model(CONFIG, devices=make_mesh(devices[:1]), dtype="float32", rngs=nnx.Rngs(0))
    params = nnx.state(model)
    optimizer = make_optimizer(OptimizerConfig("sgd", schedule="constant", max_grad_norm=0.5), model)
    update, state = jax.jit(optimizer.update), optimizer.transform.init(params)
    updates, _ = update(jax.tree.map(jnp.ones_like, params), state, params)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 0.5, rtol=1e-5)
    small = jax.tree.map(lambda x: jnp.full_like(x, 1e-5), params)
    updates, _ = update(small, state, params)
    np.testing.assert_allclose(updates["norm"]["weight"].get_value(), -1e-5, rtol=1e-6)


def test_muon_makes_matrices_orthogonal_and_leaves_the_outer_ones_to_adam(devices: list[jax.Device]) -> None:
    model = build_model(CONFIG, devices=make_mesh(devices[:1]), dtype="float32", use_subgraphs=True, rngs=nnx.Rngs(0))
    params = nnx.state(model)
    optimizer = make_optimizer(OptimizerConfig("muon", schedule="constant", max_grad_norm=None), model)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.transform.init(params), params)
    layers = updates["segments"][0]["layers"][0]
    for layer in layers["mlp"]["gate_proj"]["weight"].get_value():  # [48, 32], of each layer
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() < 1.8 * singular.min()  # of a random matrix's the largest is ten times the smallest
    head = updates["output"]["weight"].get_value()
    np.testing.assert_allclose(np.abs(head) / np.abs(head).mean(), 1, rtol=1e-3)  # Adam's first step is the sign


@pytest.mark.parametrize(("fields", "messages"), [
    (dict(name="adam2", schedule="steps", learning_rate=0.0),
     ["name is 'adam2'; expected one of adamw, adafactor, lion, muon, sgd",
      "schedule is 'steps'; expected one of constant, linear, cosine, wsd", "learning_rate is 0.0"]),
    (dict(schedule="cosine"), ["total_steps is None; schedule 'cosine' needs more than the 0 of warm-up"]),
    (dict(schedule="linear", warmup_steps=5, total_steps=5), ["total_steps is 5; .* more than the 5 of warm-up"]),
    (dict(schedule="wsd", total_steps=10), ["decay_steps is None; wsd needs 1 to 10"]),
    (dict(schedule="wsd", total_steps=10, decay_steps=11), ["decay_steps is 11"]),
    (dict(schedule="constant", decay_steps=3), ["decay_steps is 3; only the schedule wsd has them"]),
    (dict(name="sgd", schedule="constant", b1=0.9), ["b1 is 0.9, which sgd has not; it takes momentum"]),
    (dict(name="adafactor", schedule="constant", momentum=0.9), ["which adafactor has not; it takes none"]),
    (dict(schedule="constant", b2=1.0, eps=0.0, weight_decay=-1.0, max_grad_norm=0.0, final_fraction=2.0,
          warmup_steps=-1, skip_nonfinite=-1),
     ["b2 is 1.0", "eps is 0.0", "weight_decay is -1.0", "max_grad_norm is 0.0", "final_fraction is 2.0",
      "warmup_steps is -1", "skip_nonfinite is -1"]),
])
def test_configurations_that_are_refused(fields: dict[str, Any], messages: list[str],
                                         devices: list[jax.Device]) -> None:
    model = nnx.eval_shape(lambda: build_model(CONFIG, devices=make_mesh(devices[:1]), dtype="float32"))
    for message in messages:
        with pytest.raises(ValueError, match=message):
            make_optimizer(OptimizerConfig(**fields), model)
