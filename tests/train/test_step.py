"""Steps: the same on every mesh, with micro-batches and without; what is frozen, donated, reported and skipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlike.mesh import ShardingRules, make_mesh
from maxlike.models.build import build_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn.rotary_embedding import RotaryEmbedding
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.train.batch import Batch
from maxlike.train.objective import PreferenceBatch, PreferenceObjective
from maxlike.train.optimizer import OptimizerConfig, make_optimizer
from maxlike.train.step import (
    StepConfig,
    TrainState,
    init_state,
    make_eval_step,
    make_scoring_step,
    make_train_step,
    model_of,
    place_batch,
    reference_state,
)

V, T, STEPS = 130, 128, 20
CONFIG = TransformerConfig("llama", V, 64, 128, 8, 4, 16, (LayerConfig(RotaryEmbedding(16)),) * 2, 512,
                           tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2,), qk_norm=True)
FLOAT32 = StepConfig("float32", "none")
MESHES: dict[str, dict[str, int]] = {"1x1": dict(n=1), "8x1": dict(n=8, fsdp=8), "1x8": dict(n=8),
                                     "2x4": dict(n=8, fsdp=2), "2x2x2": dict(n=8, data=2, fsdp=2)}


def model_on(devices: list[jax.Device], n: int = 1, scanned: bool = True, **axes: int) -> DistributedTransformer:
    mesh = make_mesh(devices[:n], n_heads=8, n_kv_heads=4, **axes)
    return build_model(CONFIG, devices=mesh, dtype="float32", use_subgraphs=scanned, rngs=nnx.Rngs(0))


def batch_for(model: DistributedTransformer, seed: int, accumulation: int = 1) -> Batch:
    """Sequences of four tokens, so that they fall on no border however the batch is cut."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(V, size=T, dtype=np.int32) // 8 * 8  # there is something to be learned
    targets, weights = np.roll(tokens, -1) ^ 1, rng.random(T, dtype=np.float32)
    shards = ShardingRules().shards(model.mesh, "tokens")
    offsets = np.tile(np.arange(0, T // shards // accumulation + 1, 4, dtype=np.int32), (accumulation, shards, 1))
    if accumulation == 1:
        return place_batch(Batch(tokens, targets, weights, offsets[0]), model.mesh)
    return place_batch(Batch(*(x.reshape(accumulation, -1) for x in (tokens, targets, weights)), offsets), model.mesh)


def losses(devices: list[jax.Device], config: StepConfig, scanned: bool = True, **mesh: int) -> list[float]:
    model = model_on(devices, scanned=scanned, **mesh)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3, total_steps=STEPS,
                                               weight_decay=0.1), model)
    state, step = init_state(model, optimizer), make_train_step(model, optimizer, config)
    found = []
    for i in range(STEPS):
        state, metrics = step(state, batch_for(model, i, config.accumulation))
        found.append(metrics["loss"])
    assert int(state.step) == STEPS
    return list(map(float, found))


@pytest.fixture(scope="module")
def curve(devices: list[jax.Device]) -> list[float]:
    found = losses(devices, FLOAT32, scanned=False)
    assert found[0] > 4.5 and found[-1] < 3.5  # it learns, so that later losses depend on all steps before
    return found


@pytest.mark.parametrize(("mesh", "config"), [
    ("1x1", StepConfig("float32", "full", 4)), ("8x1", StepConfig("float32", "full")),
    ("1x8", StepConfig("float32", "none", 4)), ("2x4", StepConfig("float32", "dots", 4)),
    ("2x2x2", StepConfig("float32", "none")),
    *(pytest.param(mesh, StepConfig("float32", remat, accumulation), marks=pytest.mark.exhaustive)
      for mesh in MESHES for remat in ("none", "full") for accumulation in (1, 4)),
], ids=str)
def test_the_curve_of_losses_is_the_same_on_every_mesh(mesh: str, config: StepConfig, curve: list[float],
                                                       devices: list[jax.Device]) -> None:
    np.testing.assert_allclose(losses(devices, config, **MESHES[mesh]), curve, atol=1e-4)


def started(model: DistributedTransformer, trainable: Any = None, **options: Any) -> tuple[Any, TrainState]:
    optimizer = make_optimizer(OptimizerConfig(**dict(learning_rate=1e-2, schedule="constant") | options), model)
    return optimizer, init_state(model, optimizer, trainable)


def by_path(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}


def test_what_is_frozen_stays_and_what_is_trained_moves(devices: list[jax.Device]) -> None:
    model = model_on(devices, 8, fsdp=2)
    before = {name: np.array(x) for name, x in by_path(nnx.state(model)).items()}
    frozen = nnx.state(model, lambda path, _: "norm" not in ".".join(map(str, path)))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen))
    optimizer, state = started(model, lambda name: "norm" in name)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype(jnp.bfloat16)}
    assert len(jax.tree.leaves(state.opt_state)) < 2 * len(jax.tree.leaves(state.params)) + 4  # nothing for the rest
    kept = by_path(state.frozen)
    step = make_train_step(model, optimizer, StepConfig("bfloat16", "full"))
    for i in range(2):
        state, metrics = step(state, batch_for(model, i))
    assert by_path(state.frozen).keys() == kept.keys()
    assert all(by_path(state.frozen)[name] is x for name, x in kept.items())  # neither copied nor donated
    assert all("norm" in name and not np.array_equal(x, before[name]) for name, x in by_path(state.params).items())
    assert metrics["grad_norm"] > 0
    # The head's gradient, the largest product that is not needed, is not worked out.
    def products(trainable: Any) -> int:
        optimizer, state = started(model_on(devices), trainable)
        text = make_train_step(model_on(devices), optimizer, FLOAT32).lower(state, batch_for(model_on(devices), 0))
        return text.as_text().count("stablehlo.dot_general")

    assert products(lambda name: "norm" in name) < products(None)


def test_trainable_parameters_are_chosen_by_name(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=r"No parameter is to be trained. Names are such as embedding.weight"):
        started(model_on(devices), lambda name: "lora" in name)
    with pytest.raises(ValueError, match=r"layers.1.\S+ is to be trained and layers.0.\S+ not, .* use_subgraphs=False"):
        started(model_on(devices), lambda name: "layers.1." in name)
    _, state = started(model_on(devices, scanned=False), lambda name: "layers.1." in name)
    assert all(".layers.1." in name for name in by_path(state.params))
    assert not any(".layers.1." in name for name in by_path(state.frozen))


def test_the_optimizers_state_is_sharded_as_the_parameters(devices: list[jax.Device]) -> None:
    model = model_on(devices, 8, data=2, fsdp=2)
    optimizer, state = started(model)
    for of_it in (state, make_train_step(model, optimizer, FLOAT32)(state, batch_for(model, 0))[0]):
        adam = next(x for x in jax.tree.leaves(of_it.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
        for name, param in by_path(of_it.params).items():
            for moment in (adam.mu, adam.nu):
                assert by_path(moment)[name].sharding == param.sharding, name
                assert by_path(moment)[name].dtype == jnp.float32
        assert len({str(param.sharding.spec) for param in by_path(of_it.params).values()}) > 2


def test_an_abstract_state_is_the_state_in_shapes(devices: list[jax.Device]) -> None:
    model = model_on(devices, 8, fsdp=2)
    abstract = nnx.eval_shape(lambda: model_on(devices, 8, fsdp=2))
    optimizer, state = started(model)
    _, shapes = started(abstract)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)
    memory = make_train_step(abstract, optimizer, FLOAT32).lower(shapes, batch_for(model, 0)).compile()
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    # Donated: what comes out takes the place of what went in (each device's part of it).
    assert memory.memory_analysis().alias_size_in_bytes > held / 8


def test_metrics_are_means_over_the_weight_of_all_micro_batches(devices: list[jax.Device]) -> None:
    model = model_on(devices)
    one, parts = batch_for(model, 0), batch_for(model, 0, 4)
    weights = np.array(parts.weights)
    weights[1] = 0  # a micro-batch that is padding only
    weights[2] *= 5
    one, parts = replace(one, weights=jnp.asarray(weights.reshape(-1))), replace(parts, weights=jnp.asarray(weights))
    optimizer, state = started(model)
    evaluate = make_eval_step(model, FLOAT32)
    sums = evaluate(state, one)
    _, _, whole = *(state,), *make_train_step(model, optimizer, FLOAT32)(started(model_on(devices))[1], one)
    _, cut = make_train_step(model, optimizer, StepConfig("float32", "none", 4))(started(model_on(devices))[1], parts)
    assert whole.keys() == cut.keys() == {"loss", "nll", "accuracy", "weight", "grad_norm", "learning_rate"}
    for name in whole:
        assert whole[name].dtype == jnp.float32 and whole[name].shape == ()
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-4, err_msg=name)
        if name in sums and name != "weight":
            np.testing.assert_allclose(sums[name] / sums["weight"], whole[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(whole["weight"], weights.sum(), rtol=1e-6)


def test_a_batch_without_weight_changes_nothing(devices: list[jax.Device]) -> None:
    model = model_on(devices)
    optimizer, state = started(model)
    before = jax.tree.map(np.array, state.params)
    batch = replace(batch_for(model, 0), weights=jnp.zeros(T))
    state, metrics = make_train_step(model, optimizer, FLOAT32)(state, batch)
    assert {name: float(metrics[name]) for name in ("loss", "weight", "grad_norm")} == dict(loss=0, weight=0,
                                                                                           grad_norm=0)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_steps_that_are_not_finite_are_seen_and_skipped(devices: list[jax.Device]) -> None:
    model = model_on(devices)
    optimizer, state = started(model, skip_nonfinite=2)
    before = jax.tree.map(np.array, state.params)
    step, good = make_train_step(model, optimizer, FLOAT32), batch_for(model, 0)
    bad = replace(good, weights=good.weights.at[3].set(jnp.nan))
    for _ in range(2):
        state, metrics = step(state, bad)
        assert np.isnan(metrics["grad_norm"])
        jax.tree.map(np.testing.assert_array_equal, state.params, before)
    state, metrics = step(state, good)
    assert np.isfinite(metrics["grad_norm"]) and int(state.step) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(before)[0])
    optimizer, state = started(model_on(devices))
    state, _ = make_train_step(model, optimizer, FLOAT32)(state, bad)
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_trained_model_is_the_states(devices: list[jax.Device]) -> None:
    model = model_on(devices)
    optimizer, state = started(model, lambda name: name != "norm.weight")
    state, _ = make_train_step(model, optimizer, FLOAT32)(state, batch_for(model, 0))
    trained = model_of(model, state)
    assert trained.embedding.weight is trained.output.weight  # still tied
    assert trained.embedding.weight.get_value() is by_path(state.params)["embedding.weight"]
    batch = batch_for(model, 1)
    loss = make_eval_step(model, FLOAT32)(state, batch)["nll"]
    assert np.isfinite(loss)
    (last,), _ = trained(np.arange(3), None, None, np.array([0, 3]))
    assert np.isfinite(last).all()


def test_preferences_are_learned_the_same_on_every_mesh(devices: list[jax.Device]) -> None:
    curves = []
    for mesh, config in ((dict(n=1), FLOAT32), (dict(n=8, fsdp=2), StepConfig("float32", "full", 2))):
        model = model_on(devices, **mesh)
        optimizer, state = started(model)
        reference = reference_state(state, "float32")
        step = make_train_step(model, optimizer, config, PreferenceObjective(beta=0.5))
        score = make_scoring_step(model, config)
        batch = batch_for(model, 0, config.accumulation)
        found = []
        for _ in range(3):
            logprobs = score(reference, batch)
            assert logprobs.shape == (*batch.row_offsets.shape[:-1], batch.row_offsets.shape[-1] - 1)
            state, metrics = step(state, PreferenceBatch(batch, logprobs))
            found.append([float(metrics[name]) for name in ("loss", "reward_margin", "weight")])
        curves.append(found)
    (first, *_, last), _ = curves
    np.testing.assert_allclose(first, [np.log(2), 0, T / 8], atol=1e-5)  # the policy still is the reference
    assert last[0] < 0.3 and last[1] > 1
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


@pytest.mark.parametrize(("fields", "message"), [
    (dict(dtype="float16"), "dtype is 'float16'; expected 'float32' or 'bfloat16'"),
    (dict(remat="some"), "remat is 'some'; expected one of none, full, dots"),
    (dict(accumulation=0), "accumulation is 0; expected at least 1"),
])
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepConfig(**fields)


def test_batches_that_are_refused(devices: list[jax.Device]) -> None:
    model = model_on(devices)
    optimizer, state = started(model)
    with pytest.raises(ValueError, match=r"accumulation=4 .* along its first dimension; these have 2"):
        make_train_step(model, optimizer, StepConfig("float32", "none", 4))(state, batch_for(model, 0, 2))
    odd = batch_for(model, 0)
    odd = replace(odd, row_offsets=odd.row_offsets[:, :-1])
    pairs = PreferenceBatch(odd, jnp.zeros((1, 31)))
    with pytest.raises(ValueError, match=r"in pairs, chosen and rejected; .* 31 sequences a shard"):
        make_train_step(model, optimizer, FLOAT32, PreferenceObjective())(state, pairs)
