"""Losses worked out by chunks: against the plain formulas on whole logits, and what memory they take."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from maxlike.kernels.ragged_attention import ragged_attention
from maxlike.mesh import ShardingRules, make_mesh
from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn.rotary_embedding import RotaryEmbedding
from maxlike.train.loss import cross_entropy, dpo_loss, token_logprobs

V, T, D = 130, 64, 64
CAPPED = TransformerConfig("llama", V, D, 128, 8, 4, 16, (LayerConfig(RotaryEmbedding(16)),), 512,
                           final_logit_softcapping=5.0)


def plain(model: Any, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model.output(hidden).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(targets[:, None] == jnp.arange(V), logits, 0).sum(1) - log_z, log_z


@pytest.mark.parametrize(("n", "axes", "chunk"), [
    (1, {}, 3), (1, {}, None), (8, {}, 64), (8, {"fsdp": 8}, 3), (8, {"data": 2, "fsdp": 2}, None)], ids=str)
def test_losses_and_gradients_are_those_of_whole_logits(n: int, axes: dict[str, int], chunk: int | None,
                                                        devices: list[jax.Device]) -> None:
    """With a soft cap, and a vocabulary that does not divide; log-probabilities under a function that is not linear."""
    mesh = make_mesh(devices[:n], n_heads=8, n_kv_heads=4, **axes)
    graphdef, state = nnx.split(build_model(CAPPED, devices=mesh, dtype="float32", rngs=nnx.Rngs(0)))
    rows = NamedSharding(mesh, P(ShardingRules().mesh_axes(mesh, "tokens") or None))
    rng = np.random.default_rng(0)
    hidden = jax.device_put(3 * rng.standard_normal((T, D), np.float32), rows)
    targets = jax.device_put(rng.integers(V, size=T, dtype=np.int32), rows)
    weights = jax.device_put(rng.random(T, dtype=np.float32), rows)

    def run(losses: Any, state: nnx.State) -> Any:
        def of(which: int, args: Any) -> jax.Array:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return losses(nnx.merge(graphdef, args[0]), args[1])[which]

        return [jax.value_and_grad(partial(of, which))((state, hidden)) for which in range(2)]

    def whole(model: Any, hidden: jax.Array) -> Any:
        logprobs, log_z = plain(model, hidden, targets)
        return jnp.sum(weights * (0.01 * log_z**2 - logprobs)), jnp.sum(jnp.sin(logprobs))

    def chunked(model: Any, hidden: jax.Array) -> Any:
        sums = cross_entropy(model, hidden, targets, weights, z_loss=0.01, chunk=chunk)
        return sums.loss, jnp.sum(jnp.sin(token_logprobs(model, hidden, targets, chunk=chunk)))

    expected, found = jax.jit(lambda state: (run(whole, state), run(chunked, state)))(state)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert jax.typeof(a) == jax.typeof(b)  # gradients are sharded alike too
        assert np.linalg.norm(b - a) <= 2e-5 * np.linalg.norm(a)


def test_the_sums(devices: list[jax.Device]) -> None:
    model = build_model(CAPPED, devices=devices[:1], dtype="float32", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.standard_normal((T, D), np.float32))
    weights = jnp.asarray(rng.random(T, dtype=np.float32))
    best = jnp.argmax(model.output(hidden), axis=1)
    targets = jnp.where(jnp.arange(T) % 3 == 0, best, (best + 1) % V)
    logprobs, log_z = plain(model, hidden, targets)
    sums = jax.jit(lambda *x: cross_entropy(model, *x, z_loss=0.5, chunk=7))(hidden, targets, weights)
    np.testing.assert_allclose(sums.nll, -(weights * logprobs).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.z, 0.5 * (weights * log_z**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.loss, sums.nll + sums.z, rtol=1e-6)
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, weights[::3].sum(), rtol=1e-6)


def test_a_vocabulary_of_128k_takes_a_fraction_of_the_memory(devices: list[jax.Device]) -> None:
    """Forward and backward, 4096 tokens: the logits alone are 2.1 GB in float32, of which one chunk is 134 MB."""
    config = TransformerConfig("llama", 128256, 128, 128, 2, 2, 64, (LayerConfig(RotaryEmbedding(64)),), 8192)
    model = nnx.eval_shape(lambda: build_model(config, devices=make_mesh(devices[:1]), dtype="float32"))
    graphdef, state = nnx.split(model)
    hidden, ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((4096, 128), jnp.float32), ((4096,), jnp.int32), ((4096,), jnp.float32)))

    def temporaries(loss: Any) -> int:
        def of(state: Any, hidden: Any, targets: Any, weights: Any) -> jax.Array:
            with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
                return loss(nnx.merge(graphdef, state), hidden, targets, weights)

        lowered = jax.jit(jax.grad(of, (0, 1))).lower(jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                           sharding=NamedSharding(model.mesh, jax.typeof(x).sharding.spec)), state),
            hidden, ints, floats)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def whole(model: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = model.output(hidden).astype(jnp.float32)
        chosen = jnp.where(targets[:, None] == jnp.arange(config.vocab_size), logits, 0).sum(1)
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))

    logits = 4 * 4096 * 128256
    naive, chunked = temporaries(whole), temporaries(lambda *args: cross_entropy(*args).loss)
    by_logprobs = temporaries(lambda model, hidden, targets, weights: jnp.sum(
        weights * token_logprobs(model, hidden, targets)))
    print(f"temporaries: naive {naive / 1e6:.0f} MB, cross_entropy {chunked / 1e6:.0f} MB, token_logprobs "
          f"{by_logprobs / 1e6:.0f} MB")
    assert naive >= logits
    assert max(chunked, by_logprobs) < logits / 3


def test_attentions_temporaries_are_linear_in_the_number_of_tokens() -> None:
    def temporaries(tokens: int) -> int:
        q, k, v = (jax.ShapeDtypeStruct((tokens, n, 64), jnp.float32) for n in (4, 2, 2))

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return ragged_attention(q, k, v, jnp.int32([0, tokens]), scale=0.125).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(16384)
    print(f"temporaries of attention, forward and backward: 8k {short / 1e6:.0f} MB, 16k {long / 1e6:.0f} MB")
    assert 1.8 * short < long < 2.2 * short
    assert long < 4 * 16384**2 / 8  # a single head's scores


def test_dpo_by_hand() -> None:
    margins, reference = jnp.float32([2.0, -1.0, 0.5]), jnp.float32([0.5, 0.5, 0.5])
    h = np.float64([1.5, -1.5, 0.0])
    good, bad = np.log1p(np.exp(-0.2 * h)), np.log1p(np.exp(0.2 * h))
    np.testing.assert_allclose(dpo_loss(margins, reference, beta=0.2), good, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(margins, reference, beta=0.2, label_smoothing=0.1), 0.9 * good + 0.1 * bad,
                               rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(margins, reference, beta=0.2, kind="ipo"), (h - 2.5) ** 2, rtol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    (dict(beta=0.0), "beta is 0.0"), (dict(beta=0.1, label_smoothing=0.5), "label_smoothing is 0.5"),
    (dict(beta=0.1, kind="hinge"), "kind of loss is 'hinge'; expected 'sigmoid' or 'ipo'"),
    (dict(beta=0.1, kind="ipo", label_smoothing=0.1), "and 0 with 'ipo'"),
])
def test_preferences_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(jnp.zeros(2), jnp.zeros(2), **options)


def test_shapes_that_are_refused(devices: list[jax.Device]) -> None:
    model = build_model(CAPPED, devices=devices[:1], dtype="float32", rngs=nnx.Rngs(0))
    hidden, targets = jnp.zeros((4, D)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"int32\[T\]; got shapes \(4, 64\) and \(3,\)"):
        token_logprobs(model, hidden, targets[:3])
    with pytest.raises(ValueError, match=r"needs a weight: got shapes \(4,\) and \(3,\)"):
        cross_entropy(model, hidden, targets, jnp.zeros(3))
    with pytest.raises(ValueError, match="at least 1 token; got 0"):
        token_logprobs(model, hidden, targets, chunk=0)
