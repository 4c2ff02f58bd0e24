"""Adapters: what an adapted model computes, against the plain model with `W + factor * B @ A` for its weights."""

from __future__ import annotations

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from maxlike.mesh import make_mesh
from maxlike.nn.lora import (
    LoraConfig,
    add_lora,
    is_lora,
    linear_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
)
from maxlike.nn.transformer import DistributedTransformer, ReturnLogits
from maxlike.nn.transformer.segments import named_parameters
from tests.nn.transformer.tiny import Tiny, build, plain_logits

TINY = Tiny(windows=(None, 5, None, 5))
GROUPS = [[0, 2], [1, 3]]
HEADED = LoraConfig(rank=3, alpha=6.0, target_modules=r".*_proj|output")
N_LINEAR = 4 * 7 + 1
ROWS = np.random.default_rng(1).integers(0, TINY.vocab, (2, 8))
TOKENS, OFFSETS = ROWS.reshape(-1).astype(np.int32), np.array([0, 8, 16], np.int32)


def logits(model: DistributedTransformer) -> np.ndarray:
    return np.asarray(model(TOKENS, None, None, OFFSETS)[0][1])


def tiny_model(devices: Any, **options: Any) -> DistributedTransformer:
    return build(TINY, devices, return_logits=ReturnLogits.ALL, **options)


def adapters(model: DistributedTransformer) -> dict[str, np.ndarray]:
    """By the names of parameters, without the padding of the head."""
    return {name: np.asarray(param.get_value())[(i,) if stacked else ()][:param.get_metadata("logical_shape")[0]]
            for names, stacked, param in lora_parameters(model) for i, name in enumerate(names)}


def fill(model: DistributedTransformer) -> None:
    """Draws every A and B by its name, as large as makes them matter; padding stays zero."""
    for names, stacked, param in lora_parameters(model):
        value, logical = param.get_value(), param.get_metadata("logical_shape")
        drawn = []
        for name in names:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            array = rng.normal(0, 0.5 / math.sqrt(logical[1]), logical).astype(np.float32)
            drawn.append(np.pad(array, [(0, full - part) for full, part in zip(value.shape[stacked:], logical,
                                                                              strict=True)]))
        param.set_value(jax.device_put(np.stack(drawn) if stacked else drawn[0], value.sharding))


def effective(weights: dict[str, Any], lora: dict[str, Any], factor: float = 2.0, xp: Any = np) -> dict[str, Any]:
    """The weights with the adapters' products in them."""
    changed = dict(weights)
    for name, a in lora.items():
        if name.endswith("lora_a"):
            layer = name.removesuffix("lora_a")
            changed[f"{layer}weight"] = weights[f"{layer}weight"] + factor * xp.einsum(
                "or,ri->oi", lora[f"{layer}lora_b"], a)
    return changed


def expected_logits(lora: dict[str, np.ndarray], factor: float = 2.0) -> np.ndarray:
    weights = {name: value.astype(np.float64) for name, value in TINY.weights().items()}
    lora = {name: value.astype(np.float64) for name, value in lora.items()}
    return plain_logits(TINY, effective(weights, lora, factor), ROWS).reshape(-1, TINY.vocab)


def meshes(devices: list[jax.Device]) -> dict[str, Any]:
    heads = dict(n_heads=TINY.n_heads, n_kv_heads=TINY.n_kv_heads)
    return {
        "1": devices[:1], "factored": make_mesh(devices, **heads),
        "fsdp": make_mesh(devices[:4], fsdp=2, **heads),
    }


@pytest.mark.parametrize(("mesh", "options"), [
    ("1", dict(use_subgraphs=True, groups=GROUPS)), ("factored", {}),
    ("fsdp", dict(use_subgraphs=True, groups=GROUPS, gemm=True)),
])
def test_live_and_merged_are_the_plain_model_with_other_weights(mesh: str, options: dict[str, Any],
                                                                devices: list[jax.Device]) -> None:
    model = tiny_model(meshes(devices)[mesh], **options)
    base = logits(model)
    names = add_lora(model, HEADED, nnx.Rngs(0))
    assert len(names) == N_LINEAR and len(adapters(model)) == 2 * N_LINEAR
    np.testing.assert_array_equal(logits(model), base)  # B is zero
    fill(model)
    expected = expected_logits(adapters(model))
    assert np.abs(expected - base).max() > 1
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4)
    merge_lora(model)
    assert not list(lora_parameters(model))
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4)


def test_parameters_are_cut_as_the_weights(devices: list[jax.Device]) -> None:
    model = tiny_model(meshes(devices)["fsdp"], use_subgraphs=True, groups=GROUPS)
    weights = {linear.names: linear.layer for linear in linear_layers(model)}
    add_lora(model, HEADED, nnx.Rngs(0))
    for layer in weights.values():
        spec = jax.typeof(layer.weight.get_value()).sharding.spec
        *lead, out_axes, in_axes = spec
        assert layer.lora_a is not None and layer.lora_b is not None
        assert jax.typeof(layer.lora_a.get_value()).sharding.spec == jax.P(*lead, None, in_axes)
        assert jax.typeof(layer.lora_b.get_value()).sharding.spec == jax.P(*lead, out_axes, None)
    cut = {jax.typeof(layer.lora_a.get_value()).sharding.spec[-1] for layer in weights.values() if layer.lora_a}
    assert cut == {"fsdp", "model"}


def test_devices_exchange_no_more_than_rank_rows(devices: list[jax.Device]) -> None:
    """Of tensor-parallel layers the row-parallel ones add a sum of `[T, r]` each, and the others nothing."""
    model = tiny_model(meshes(devices)["factored"])
    add_lora(model, LoraConfig(rank=3), nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def hidden(state: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, state).hidden_states(TOKENS, None, OFFSETS)[0]

    program = jax.jit(hidden).lower(state).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*) ({kinds})(?:-start)?\(", program)
    sums = [shape for shapes, kind in found if kind == "all-reduce" for shape in re.findall(r"f32\[[\d,]*\]", shapes)]
    T, D, r, layers = TOKENS.size, TINY.dim, 3, len(TINY.windows)
    assert {kind for _, kind in found} == {"all-reduce"}
    assert sorted(sums) == sorted([f"f32[{T},{D}]"] * (1 + 2 * layers) + [f"f32[{T},{r}]"] * (2 * layers))


def test_the_beginning_is_pefts_and_the_same_in_every_form(devices: list[jax.Device]) -> None:
    drawn = []
    for mesh, options in (("1", {}), ("1", dict(use_subgraphs=True, groups=GROUPS)), ("fsdp", {})):
        model = tiny_model(meshes(devices)[mesh], **options)
        add_lora(model, HEADED, nnx.Rngs(5))
        drawn.append(adapters(model))
    for name, value in drawn[0].items():
        if name.endswith("lora_b"):
            assert not value.any()
            continue
        for other in drawn[1:]:
            np.testing.assert_array_equal(value, other[name])
        bound = value.shape[1] ** -0.5
        assert 0.8 * bound < np.abs(value).max() <= bound and abs(value.mean()) < 0.3 * bound
    a = {value.tobytes() for name, value in drawn[0].items() if name.endswith("lora_a")}
    assert len(a) == N_LINEAR  # no two layers begin alike
    other = tiny_model(devices[:1])
    add_lora(other, HEADED, nnx.Rngs(6))
    assert not {value.tobytes() for name, value in adapters(other).items() if name.endswith("lora_a")} & a


@pytest.mark.parametrize(("mesh", "options"), [
    ("1", dict(use_subgraphs=True, groups=GROUPS)), ("fsdp", {}),
])
def test_gradients_are_the_plain_models(mesh: str, options: dict[str, Any], devices: list[jax.Device]) -> None:
    # Over fsdp the tokens are cut too, a sequence for each part.
    where: Any = meshes(devices)[mesh]
    model = tiny_model(where, **options)
    add_lora(model, HEADED, nnx.Rngs(0))
    fill(model)
    tokens, offsets = TOKENS, OFFSETS[None]
    if mesh == "fsdp":
        offsets = np.array([[0, 8], [0, 8]], np.int32)
        tokens, offsets = (jax.device_put(x, jax.NamedSharding(where, jax.P("fsdp"))) for x in (tokens, offsets))
    target = np.random.default_rng(2).normal(size=(TOKENS.size, TINY.vocab)).astype(np.float32)
    graphdef, lora, rest = nnx.split(model, lambda path, _: is_lora(str(path[-1])), ...)

    @jax.jit
    def gradients(lora: Any, rest: Any) -> Any:
        def loss(lora: Any) -> jax.Array:
            model = nnx.merge(graphdef, lora, rest)
            with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
                hidden, _ = model.hidden_states(tokens, None, offsets)
                out = model.output(hidden).astype(jnp.float32)
                return jnp.sum(jax.reshard(out, jax.P()) * target)
        return jax.grad(loss)(lora)

    given = gradients(lora, rest)
    for (path, gradient), (_, param) in zip(nnx.to_flat_state(given), nnx.to_flat_state(lora), strict=True):
        assert gradient.get_value().sharding.spec == param.get_value().sharding.spec, path
    values, weights = adapters(model), {name: jnp.asarray(v) for name, v in TINY.weights().items()}

    def plain(lora: Any) -> jax.Array:
        return jnp.sum(plain_logits(TINY, effective(weights, lora, xp=jnp), ROWS, jnp).reshape(target.shape) * target)

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(plain))({name: jnp.asarray(value) for name, value in values.items()})
    nnx.update(model, given)
    ours = adapters(model)
    for name, gradient in expected.items():
        assert np.linalg.norm(ours[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_number_of_rows(rows: int, dtype: Any, devices: list[jax.Device]) -> None:
    from maxlike.nn.linear import ColumnParallelLinear, LoraScaling, RowParallelLinear
    mesh = make_mesh(devices[:2])
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 512)).astype(np.float32)
    A, B = rng.normal(0, 0.05, (6, 512)).astype(np.float32), rng.normal(0, 0.5, (64, 6)).astype(np.float32)
    for kind, spec, cut in ((ColumnParallelLinear, jax.P(), (jax.P(), jax.P("model", None))),
                            (RowParallelLinear, jax.P(None, "model"), (jax.P(None, "model"), jax.P()))):
        layer = kind(512, 64, dtype, mesh, rngs=nnx.Rngs(0))
        given = jax.device_put(jnp.asarray(x, dtype), jax.NamedSharding(mesh, spec))
        base = np.asarray(layer(given), np.float32)
        a, b = (jax.device_put(value, jax.NamedSharding(mesh, where)) for value, where in zip((A, B), cut, strict=True))
        layer.lora_a, layer.lora_b, layer.lora_scaling = nnx.Param(a), nnx.Param(b), LoraScaling(12.0)
        out = layer(given)
        assert out.dtype == dtype
        change = 2.0 * (np.asarray(given, np.float32) @ A.T) @ B.T
        tolerance = 1e-5 if dtype == jnp.float32 else 2 ** -7
        np.testing.assert_allclose(np.asarray(out, np.float32) - base, change, rtol=0,
                                   atol=tolerance * 4 * np.abs(change).max())


def test_scale_is_alpha_over_rank_or_its_root(devices: list[jax.Device]) -> None:
    for use_rslora, factor in ((False, 10 / 4), (True, 10 / 2)):
        model = tiny_model(devices[:1])
        add_lora(model, LoraConfig(4, 10, ("q_proj", "down_proj"), use_rslora=use_rslora), nnx.Rngs(0))
        fill(model)
        np.testing.assert_allclose(logits(model), expected_logits(adapters(model), factor), rtol=0, atol=1e-4)


def test_patterns_of_rank_and_alpha(devices: list[jax.Device]) -> None:
    model = tiny_model(devices[:1], use_subgraphs=True, groups=GROUPS)
    config = LoraConfig(4, 8, ["q_proj", "v_proj", "up_proj"], rank_pattern={"q_proj": 2, r"mlp\.up_.*": 5},
                        alpha_pattern={r".*attention\.v_proj": 1.0}, exclude_modules=r"layers\.\d\.mlp\..*")
    assert config.target_modules == ("q_proj", "v_proj", "up_proj")
    names = add_lora(model, config, nnx.Rngs(0))
    assert sorted(names) == [f"layers.{i}.attention.{x}_proj" for i in range(4) for x in "qv"]
    found = {linear.names[0].rsplit(".")[-1]: (linear.layer.lora_a.get_value().shape[-2],
                                               linear.layer.lora_scaling.alpha)
             for linear in linear_layers(model) if linear.layer.lora_a and linear.layer.lora_scaling}
    assert found == {"q_proj": (2, 8.0), "v_proj": (4, 1.0)}


def test_all_linear_leaves_the_head_out_and_layers_can_be_chosen(devices: list[jax.Device]) -> None:
    model = tiny_model(devices[:1])
    assert len(add_lora(model, LoraConfig(), nnx.Rngs(0))) == N_LINEAR - 1
    remove_lora(model)
    assert add_lora(model, LoraConfig(target_modules=r"layers\.[12]\.mlp\.up_proj"), nnx.Rngs(0)) == [
        "layers.1.mlp.up_proj", "layers.2.mlp.up_proj"]


def test_what_is_taken_off_leaves_the_model_as_it_was(devices: list[jax.Device]) -> None:
    model = tiny_model(devices[:1], use_subgraphs=True, groups=GROUPS)
    before, base = nnx.split(model)[0], logits(model)
    for end in (merge_lora, remove_lora):
        add_lora(model, HEADED, nnx.Rngs(0))
        if end is remove_lora:
            fill(model)
            assert np.abs(logits(model) - base).max() > 1
        end(model)  # the first time B is zero
        assert nnx.split(model)[0] == before  # so that compiled programs go on fitting
        np.testing.assert_array_equal(logits(model), base)


def test_merging_rounds_once(devices: list[jax.Device]) -> None:
    model = tiny_model(devices[:1])
    for _, _, param in named_parameters(model):
        param.set_value(param.get_value().astype(jnp.bfloat16))
    before = {linear.names[0]: np.asarray(linear.layer.weight.get_value(), np.float64)
              for linear in linear_layers(model)}
    add_lora(model, HEADED, nnx.Rngs(0))
    fill(model)
    lora = {name: value.astype(np.float64) for name, value in adapters(model).items()}
    merge_lora(model)
    for linear in linear_layers(model):
        name = linear.names[0]
        exact = before[name][:linear.logical_shape[0]] + 2.0 * lora[f"{name}.lora_b"] @ lora[f"{name}.lora_a"]
        merged = np.asarray(linear.layer.weight.get_value())[:linear.logical_shape[0]]
        assert merged.dtype == ml_dtypes.bfloat16
        agree = merged == exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert agree.mean() > 0.999, name  # float32 may lie on the other side of a tie


def test_an_abstract_model_takes_adapters(devices: list[jax.Device]) -> None:
    def make() -> DistributedTransformer:
        model = tiny_model(devices[:1])
        add_lora(model, HEADED, nnx.Rngs(0))
        return model

    shapes = {names[0]: param.get_value() for names, _, param in lora_parameters(nnx.eval_shape(make))}
    assert len(shapes) == 2 * N_LINEAR and all(isinstance(x, jax.ShapeDtypeStruct) for x in shapes.values())


@pytest.mark.parametrize(("config", "says"), [
    (LoraConfig(target_modules=["q_proj", "c_attn"]), r"names 'c_attn', but no linear layer is called so. There are "
                                                     r"layers.N.attention.k_proj, .*output"),
    (LoraConfig(target_modules="q_proj"), r"fits no linear layer. Names without their beginning go into a list"),
    (LoraConfig(target_modules=["embedding"]), "no linear layer is called so"),
    (LoraConfig(exclude_modules=".*"), "fits no linear layer"),
    (LoraConfig(target_modules=r".*\.0\..*"), "layers.0.* and layers.2.* are scanned together .* one has rank 8 and "
                                              "alpha 16 and the other none. Build the model with use_subgraphs=False"),
    (LoraConfig(rank_pattern={r"layers.2.*": 3}), "rank 8 and alpha 16 and the other rank 3"),
])
def test_layers_that_cannot_be_meant(config: LoraConfig, says: str, devices: list[jax.Device]) -> None:
    model = tiny_model(devices[:1], use_subgraphs=True, groups=GROUPS)
    with pytest.raises(ValueError, match=says):
        add_lora(model, config, nnx.Rngs(0))
    assert not list(lora_parameters(model))


def test_no_second_adapter_and_none_to_merge(devices: list[jax.Device]) -> None:
    model = tiny_model(devices[:1])
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_lora(model)
    add_lora(model, LoraConfig(target_modules=["q_proj"]), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers.0.attention.q_proj has an adapter already"):
        add_lora(model, LoraConfig(target_modules=["up_proj", "q_proj"]), nnx.Rngs(0))
    assert len(list(lora_parameters(model))) == 2 * 4


@pytest.mark.parametrize(("fields", "says"), [
    (dict(rank=0), "rank must be a whole number of at least 1; got 0"),
    (dict(rank=True), "rank must be"),
    (dict(rank_pattern={"q": 1.5}), r"rank_pattern\['q'\] must be a whole number"),
    (dict(rank_pattern=["q"]), "rank_pattern maps"),
    (dict(alpha="16"), "alpha must be a number; got '16'"),
    (dict(alpha=math.nan), "alpha must be a number"),
    (dict(alpha_pattern={"q": None}), r"alpha_pattern\['q'\]"),
    (dict(target_modules=()), "target_modules is empty"),
    (dict(target_modules=[3]), "target_modules is a regular expression, or a list of names"),
    (dict(target_modules="(q"), "is no regular expression"),
    (dict(exclude_modules="*"), "is no regular expression"),
])
def test_configurations_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoraConfig(**fields)
