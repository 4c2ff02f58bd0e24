"""Each layer against its formula in float64, on one device and on meshes, with no mesh in context."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from maxlike import nn
from maxlike.mesh import ShardingRules, make_mesh
from maxlike.nn.attention import AttentionMetadata
from maxlike.nn.kv_cache import FetchPagedKVCacheCollection
from maxlike.nn.linear import matmul
from maxlike.nn.module import create_param
from maxlike.nn.norm import SoftCap
from maxlike.nn.rotary_embedding import RopeScaling, apply_rotary

F32, BF16 = jnp.float32, jnp.bfloat16
MESHES = [{"model": 1}, {"model": 4}, {"kv": 2, "rep": 4}]


def mesh_of(**axes: int) -> Mesh:
    devices = jax.devices("cpu")[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Explicit,) * len(axes), devices=devices)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def randomise(module: nnx.Module, seed: int = 0) -> None:
    """Values of order 1 for every parameter: biases begin at zero and norms at one, which hides mistakes."""
    for i, (_, param) in enumerate(nnx.to_flat_state(nnx.state(module, nnx.Param))):
        old = param.get_value()
        scale = old.shape[-1] ** -0.5 if old.ndim == 2 else 1.0
        param.set_value(jax.device_put(scale * normal(seed + i, *old.shape), old.sharding).astype(old.dtype))


def compiled(module: nnx.Module) -> Callable[..., Any]:
    """The module as one program."""
    graphdef, state = nnx.split(module)
    return partial(jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args)), state)


def close(actual: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(double(actual), expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


# --- Parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", MESHES[1:], ids=str)
def test_a_parameter_is_the_same_on_every_mesh(axes: dict[str, int]) -> None:
    init, mesh, rules = jax.nn.initializers.normal(1.0), mesh_of(**axes), ShardingRules()
    make = partial(create_param, init, shape=(24, 6), dtype=F32, logical_shape=(21, 6))
    there = make(nnx.Rngs(3), sharding=rules.sharding(mesh, (24, 6), "mlp", None))
    here = make(nnx.Rngs(3), sharding=rules.sharding(mesh_of(model=1), (24, 6), "mlp", None))
    np.testing.assert_array_equal(there.get_value(), here.get_value())
    value = np.asarray(there.get_value())
    assert not value[21:].any() and 0.8 < value[:21].std() < 1.2
    assert there.get_metadata("logical_shape") == (21, 6)
    spec = P(next(iter(axes)) if len(axes) == 1 else tuple(axes), None)
    assert jax.typeof(there.get_value()).sharding.spec == spec
    assert {shard.data.shape for shard in there.get_value().addressable_shards} == {(24 // mesh.size, 6)}
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(3), sharding=rules.sharding(mesh, (24, 6), "mlp", None)))
    assert jax.typeof(abstract.get_value()) == jax.typeof(there.get_value())


def test_parameters_begin_differently_and_at_their_scale(devices: list[jax.Device]) -> None:
    mlp = nn.MLP(256, 512, F32, devices[:1], rngs=nnx.Rngs(0))
    weights = {name: np.asarray(part.weight.get_value())
               for name, part in vars(mlp).items() if name.endswith("_proj")}
    assert {name: w.shape for name, w in weights.items()} == {
        "gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}  # [out, in], as checkpoints have it
    for w in weights.values():
        assert 0.95 < w.std() * math.sqrt(w.shape[1]) < 1.05
    assert np.abs(weights["gate_proj"] - weights["up_proj"]).max() > 0.1


# --- Linear layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out_dim", "gather_output"), [(40, False), (37, True), (3, True)])
def test_column_parallel(axes: dict[str, int], has_bias: bool, out_dim: int, gather_output: bool) -> None:
    mesh, x = mesh_of(**axes), normal(9, 5, 12)
    layer = nn.ColumnParallelLinear(12, out_dim, F32, mesh, rngs=nnx.Rngs(0), has_bias=has_bias,
                                    gather_output=gather_output)
    randomise(layer)  # also the padding: what stands there must not matter
    weight = layer.weight.get_value()
    rows = math.ceil(out_dim / mesh.size) * mesh.size
    assert weight.shape == (rows, 12) and layer.weight.get_metadata("logical_shape") == (out_dim, 12)
    assert layer.partition_specs().keys() == ({"weight", "bias"} if has_bias else {"weight"})
    y = layer(jax.device_put(x, jax.NamedSharding(mesh, P())))
    expected = double(x) @ double(weight)[:out_dim].T + (double(layer.bias.get_value())[:out_dim] if has_bias else 0)
    close(y, expected)
    axis = None if gather_output else tuple(axes) if len(axes) > 1 else next(iter(axes))
    assert y.shape == (5, out_dim) and jax.typeof(y).sharding.spec == P(None, axis)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("gemm", [None, nn.DistributedGemmConfig(), nn.DistributedGemmConfig(True)], ids=str)
def test_row_parallel(axes: dict[str, int], gemm: nn.DistributedGemmConfig | None) -> None:
    mesh, x = mesh_of(**axes), normal(9, 5, 40)
    layer = nn.RowParallelLinear(40, 13, F32, mesh, rngs=nnx.Rngs(0), has_bias=True, distributed_gemm_config=gemm)
    randomise(layer)
    axis = tuple(axes) if len(axes) > 1 else next(iter(axes))
    assert layer.partition_specs() == {"weight": P(None, axis), "bias": P(None)}
    y = compiled(layer)(jax.device_put(x, jax.NamedSharding(mesh, P(None, axis))))
    close(y, double(x) @ double(layer.weight.get_value()).T + double(layer.bias.get_value()))  # the bias once
    assert jax.typeof(y).sharding.spec == P(None, None)
    for shard in y.addressable_shards:
        np.testing.assert_array_equal(shard.data, y)


def test_a_dimension_that_cannot_be_cut(devices: list[jax.Device]) -> None:
    for layer in (partial(nn.ColumnParallelLinear, 8, 10), partial(nn.RowParallelLinear, 10, 8)):
        with pytest.raises(ValueError, match=r"'mlp' of size 10 .*'model'.* of size 4"):
            layer(F32, devices[:4], rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64, 65])
@pytest.mark.parametrize("n_out", [7, 24])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_accumulate_in_float32(rows: int, n_out: int, dtype: Any) -> None:
    x, weight = (jnp.asarray(normal(seed, n, 4096) + 1, dtype) for seed, n in ((0, rows), (1, n_out)))
    y = jax.jit(matmul)(x, weight)
    assert y.shape == (rows, n_out) and y.dtype == dtype
    # bfloat16: one rounding at the end; summed in it, 4096 terms would be percents off. float32: the sum's own error,
    # 1.4e-6 at most for the blocks in which XLA adds 4096 terms.
    close(y, double(x) @ double(weight).T, 2**-8 if dtype == BF16 else 4e-6)
    # Accelerators add up in float32 too, and are asked for a result that is as narrow as it travels between devices.
    lowered = jax.jit(matmul).trace(x, weight).lower(lowering_platforms=("tpu",)).as_text()
    (product,) = re.findall(r"dot_general .* -> tensor<\w+x(\w+)>", lowered)
    assert product == ("bf16" if dtype == BF16 else "f32")


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_of_few_rows_have_derivatives(rows: int, dtype: Any) -> None:
    x, weight, dy = (jnp.asarray(normal(seed, *shape), dtype)
                     for seed, shape in enumerate(((rows, 2048), (64, 2048), (rows, 64))))
    y, back = jax.vjp(jax.jit(matmul), x, weight)
    assert y.dtype == dtype
    for found, expected in zip(back(dy), (double(dy) @ double(weight), double(dy).T @ double(x)), strict=True):
        assert found.dtype == dtype
        close(found, expected, 2**-8 if dtype == BF16 else 4e-6)


@pytest.mark.parametrize("rows", [2, 8, 16])
def test_on_cpu_a_weight_is_the_left_operand_of_few_rows(rows: int) -> None:
    x, weight = jnp.zeros((rows, 8192), BF16), jnp.zeros((384, 8192), BF16)
    compiled = jax.jit(matmul).lower(x, weight).compile().as_text()
    # The right one would be rearranged at every call, and a result of fewer columns is computed more slowly.
    assert re.search(r"f32\[384,16\]\S* dot\(", compiled)
    assert "f32[384,8192]" not in compiled  # nor is the weight widened


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("I", [2048, 3072, 8192])
def test_on_cpu_one_row_reads_the_weight_once(I: int, dtype: DTypeLike) -> None:
    x, weight = jnp.zeros((1, I), dtype), jnp.zeros((384, I), dtype)
    compiled = jax.jit(matmul).lower(x, weight).compile()
    assert " dot(" not in compiled.as_text()
    # Nothing as large as the weight is written, only its partial sums: a float32 for some 15 columns and more.
    assert compiled.memory_analysis().temp_size_in_bytes < 384 * 4 * I / 14


@pytest.mark.parametrize("dtype, tolerance", [(BF16, 2**-7), (F32, 1e-5)], ids=str)
@pytest.mark.parametrize("I", [512, 896, 2048, 3072, 4864])
def test_one_row(I: int, dtype: DTypeLike, tolerance: float) -> None:
    x, weight = (jnp.asarray(normal(seed, n, I), dtype) for seed, n in ((0, 1), (1, 24)))
    close(jax.jit(matmul)(x, weight), double(x) @ double(weight).T, tolerance)
    for bad in (jnp.nan, jnp.inf):  # which no arrangement of the sum may hide
        assert not jnp.isfinite(jax.jit(matmul)(x.at[0, 7].set(bad), weight)).any()


def test_on_cpu_short_rows_of_a_weight_are_multiplied_together() -> None:
    x, weight = jnp.zeros((2, 2048), BF16), jnp.zeros((384, 2048), BF16)
    assert re.search(r"f32\[96,16\]\S* dot\(", jax.jit(matmul).lower(x, weight).compile().as_text())


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("spec", [P("model", None), P(None, "model"), P(None, None)], ids=str)
def test_few_bfloat16_rows_on_a_mesh(devices: list[jax.Device], rows: int, spec: P, size: int) -> None:
    mesh = make_mesh(devices[:size])
    x, weight = (jnp.asarray(normal(seed, n, 1024), BF16) for seed, n in ((0, rows), (1, 24)))
    on_mesh = [jax.device_put(y, jax.NamedSharding(mesh, s)) for y, s in ((x, P(None, spec[1])), (weight, spec))]
    y = jax.jit(partial(matmul, out_sharding=jax.NamedSharding(mesh, P(None, None)) if spec[1] else None))(*on_mesh)
    assert jax.typeof(y).sharding.spec == P(None, spec[0])
    close(y, double(x) @ double(weight).T, 2**-7)


def test_tied_weights(devices: list[jax.Device]) -> None:
    common: dict[str, Any] = dict(dtype=F32, devices=make_mesh(devices[:4]), rngs=nnx.Rngs(0))
    embedding = nn.VocabParallelEmbedding(61, 12, **common)
    head = partial(nn.ColumnParallelLinear, out_axis="vocab", gather_output=True, tied_weight=embedding.weight,
                   **common)
    assert head(12, 61).weight is embedding.weight
    x = normal(0, 5, 12)
    y = head(12, 61)(jax.device_put(x, jax.NamedSharding(common["devices"], P())))
    close(y, double(x) @ double(embedding.weight.get_value())[:61].T)
    with pytest.raises(ValueError, match=r"tied_weight has shape \(64, 12\).* from 12 to 65 .*\(68, 12\)"):
        head(12, 65)
    with pytest.raises(ValueError, match=r"tied_weight has shape \(64, 12\).*from 16 to 61"):
        head(16, 61)


# --- Embedding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_gradients_of_one_token_are_added_in_float32(axes: dict[str, int]) -> None:
    layer = nn.VocabParallelEmbedding(61, 8, BF16, mesh_of(**axes), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    tokens = jnp.where(jnp.arange(4096) % 4 == 0, 5, 60)
    total = jax.value_and_grad(lambda params: nnx.merge(graphdef, params)(tokens).astype(F32).sum())
    (found,) = jax.tree.leaves(jax.jit(total)(params)[1])
    assert jax.typeof(found) == jax.typeof(layer.weight.get_value())
    expected = np.zeros((61, 8))
    expected[5], expected[60] = 1024, 3072  # in bfloat16 a sum of ones ends at 256
    np.testing.assert_array_equal(double(found)[:61], expected)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_embedding(axes: dict[str, int]) -> None:
    mesh = mesh_of(**axes)
    layer = nn.VocabParallelEmbedding(61, 12, F32, mesh, rngs=nnx.Rngs(0))
    randomise(layer)
    table = np.asarray(layer.weight.get_value())
    assert table.shape == (math.ceil(61 / mesh.size) * mesh.size, 12)
    ids = np.array([0, 60, 7, 7, 15, 16, 31, 32, 59])
    x = layer(jnp.asarray(ids))
    np.testing.assert_array_equal(x, table[ids])
    assert jax.typeof(x).sharding.spec == P(None, None)
    # Nothing reaches the padding, or another device's rows by wrapping around.
    np.testing.assert_array_equal(layer(jnp.array([61, 63, 10**9, -1, -61])), table[[60, 60, 60, 0, 0]])


def test_embedding_scale_is_rounded_as_gemma_does(devices: list[jax.Device]) -> None:
    layer = nn.VocabParallelEmbedding(16, 8, BF16, devices[:1], rngs=nnx.Rngs(0), scale=math.sqrt(1152))
    rows = np.asarray(layer.weight.get_value())[:3]
    scale = np.float32(34.0)  # sqrt(1152) is 33.94; the nearest bfloat16 is 34
    expected = jnp.asarray(rows.astype(np.float32) * scale, BF16)
    out = layer(jnp.arange(3))
    assert out.dtype == BF16
    np.testing.assert_array_equal(double(out), double(expected))
    assert not np.array_equal(double(expected), double(jnp.asarray(rows.astype(np.float32) * 33.941125, BF16)))


# --- Norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (BF16, 2**-8)])
@pytest.mark.parametrize(("eps", "offset"), [(1e-6, 0.0), (0.5, 1.0)])
def test_rms_norm(devices: list[jax.Device], dtype: Any, tolerance: float, eps: float, offset: float) -> None:
    layer = nn.RMSNorm(24, dtype, devices[:2], rngs=nnx.Rngs(0), eps=eps, weight_offset=offset)
    np.testing.assert_array_equal(double(layer.weight.get_value()), np.full(24, 1 - offset))
    assert layer.partition_specs() == {"weight": P(None)}
    randomise(layer)
    x = jnp.asarray(10 * normal(5, 3, 2, 24), dtype)
    y = layer(x)
    assert y.dtype == dtype
    weight = double(layer.weight.get_value()) + offset
    h = double(x)
    close(y, h / np.sqrt((h * h).mean(-1, keepdims=True) + eps) * weight, tolerance)


def test_rms_norm_of_values_whose_squares_bfloat16_cannot_tell_apart(devices: list[jax.Device]) -> None:
    layer = nn.RMSNorm(4096, BF16, devices[:1], rngs=nnx.Rngs(0))
    x = jnp.asarray(1 + 0.01 * normal(0, 2, 4096), BF16)  # a bfloat16 sum of ones stops at 256
    close(layer(x), double(x) / np.sqrt((double(x) ** 2).mean(-1, keepdims=True)), 2**-8)


def test_output_norm_and_soft_cap(devices: list[jax.Device]) -> None:
    norm = nn.RMSNorm(6, F32, devices[:1], rngs=nnx.Rngs(0))
    randomise(norm)
    x = jnp.asarray(normal(1, 4, 6))
    close(nn.OutputNorm(lambda x, a: 3 * x + a, norm)(x, 2.0), double(norm(3 * x + 2)))
    y, first, second = nn.OutputNorm(lambda x, a, b: (x, a, b), norm)(x, "the cache", None)
    close(y, double(norm(x)))
    assert (first, second) == ("the cache", None)
    capped = SoftCap(lambda x: 100 * x, 30.0)(x.astype(BF16))
    assert capped.dtype == F32
    close(capped, 30 * np.tanh(double(100 * x.astype(BF16)) / 30))


# --- MLP --------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize(("activation", "axes"), [*((name, MESHES[0]) for name in ACTIVATIONS), ("gelu", MESHES[2])],
                         ids=str)  # fmt: skip
def test_mlp(activation: str, axes: dict[str, int]) -> None:
    mesh, x = mesh_of(**axes), normal(7, 5, 12)
    mlp = nn.MLP(12, 24, F32, mesh, rngs=nnx.Rngs(0), activation=activation, has_bias=True)
    randomise(mlp)

    def product(x: np.ndarray, part: Any) -> np.ndarray:
        return x @ double(part.weight.get_value()).T + double(part.bias.get_value())

    hidden = ACTIVATIONS[activation](product(double(x), mlp.gate_proj)) * product(double(x), mlp.up_proj)
    close(compiled(mlp)(x), product(hidden, mlp.down_proj))


def test_unknown_activations(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=r"Unknown activation 'geglu'; known are silu, .*relu"):
        nn.MLP(8, 8, F32, devices[:1], rngs=nnx.Rngs(0), activation="geglu")


# --- Rotary embedding -------------------------------------------------------------------------------------------


def rotated(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """Dimensions i and i + n of the first 2 n are a complex number; the rest stay."""
    n = len(inv_freq)
    turned = (x[..., :n] + 1j * x[..., n : 2 * n]) * np.exp(1j * positions[:, None, None] * inv_freq)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * n :]], -1)


@pytest.mark.parametrize("rotary_dim", [None, 8, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (BF16, 2**-8)])
def test_rotary(rotary_dim: int | None, dtype: Any, tolerance: float) -> None:
    rope = nn.RotaryEmbedding(16, theta=500.0, rotary_dim=rotary_dim)
    n = (rotary_dim or 16) // 2
    positions = np.array([0, 1, 2, 17, 1000])
    cos, sin = rope(jnp.asarray(positions))
    assert cos.shape == sin.shape == (5, n) and cos.dtype == sin.dtype == F32
    x = jnp.asarray(normal(0, 5, 3, 16), dtype)
    y = apply_rotary(x, cos, sin)
    assert y.dtype == dtype
    # At position 1000 a float32 angle is off by 6e-5.
    close(y, rotated(double(x), positions, 500.0 ** (-np.arange(n) / n)), max(tolerance, 1e-4))
    np.testing.assert_array_equal(y[0], x[0])


def test_scores_depend_on_distance_alone() -> None:
    rope = nn.RotaryEmbedding(16)
    q, k = normal(0, 1, 1, 16), normal(1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        return float((apply_rotary(q, *rope(jnp.array([i]))) * apply_rotary(k, *rope(jnp.array([j])))).sum())

    assert abs(score(9, 4) - score(105, 100)) < 1e-4
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


@pytest.mark.parametrize("rotary_dim", [0, 3, 18, -2])
def test_rotary_dims_that_cannot_be(rotary_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim 16; got {rotary_dim}"):
        nn.RotaryEmbedding(16, rotary_dim=rotary_dim)


def frequencies(theta: float, dim: int, scaling: RopeScaling | None = None) -> np.ndarray:
    return double(nn.RotaryEmbedding(dim, theta, scaling=scaling).inv_freq)


def test_linear_scaling() -> None:
    np.testing.assert_allclose(frequencies(1e4, 16, nn.LinearScaling(4.0)), frequencies(1e4, 16) / 4, rtol=1e-6)


def test_llama3_scaling() -> None:
    # Llama 3.1's own: wavelengths above 8192 are divided by 8, those below 2048 kept (their report, and the code
    # that Meta released with it).
    plain, scaled = frequencies(5e5, 128), frequencies(5e5, 128, nn.Llama3Scaling(8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    expected = []
    for f, w in zip(plain, wavelength, strict=True):
        if w < 8192 / 4:
            expected.append(f)
        elif w > 8192 / 1:
            expected.append(f / 8)
        else:
            smooth = (8192 / w - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    assert (scaled == plain).any() and np.isclose(scaled, plain / 8).any()
    assert len({round(ratio, 6) for ratio in scaled / plain}) > 4  # and a ramp between


def test_yarn_scaling() -> None:
    # Equations 17 to 23 of the paper, for LLaMA's theta of 10000 and width of 128, from 4096 tokens to 16 times that.
    plain, scaled = frequencies(1e4, 128), frequencies(1e4, 128, nn.YarnScaling(16.0, 4096, truncate=False))
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 32], plain[turns > 32], rtol=1e-5)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 16, rtol=1e-5)
    between = (turns < 32) & (turns > 1)
    # The ramp is linear in the dimension, which goes with the logarithm of the turns.
    kept = np.log(turns[between]) / np.log(32)
    np.testing.assert_allclose(scaled[between], plain[between] * (kept + (1 - kept) / 16), rtol=1e-3)

    # Rounded to whole dimensions, as the released code does: kept up to 20, divided from 46.
    ends = frequencies(1e4, 128, nn.YarnScaling(16.0, 4096)) / plain
    np.testing.assert_allclose(ends[[20, 46]], [1, 1 / 16], rtol=1e-5)
    assert 1 / 16 < ends[45] < ends[33] < ends[21] < 1
    np.testing.assert_allclose(ends[33], (1 + 1 / 16) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (nn.YarnScaling(16.0, 4096), 0.1 * math.log(16) + 1),
        (nn.YarnScaling(0.5, 4096), 1.0),
        (nn.YarnScaling(16.0, 4096, explicit_attention_factor=1.3), 1.3),
        (nn.YarnScaling(16.0, 4096, mscale=0.707, mscale_all_dim=0.5),
         (0.0707 * math.log(16) + 1) / (0.05 * math.log(16) + 1)),
        (nn.YarnScaling(16.0, 4096, mscale=1.0, mscale_all_dim=1.0), 1.0),
        (nn.LinearScaling(4.0), 1.0),
        (nn.Llama3Scaling(8.0, 1.0, 4.0, 8192), 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_attention_factors(scaling: RopeScaling, factor: float) -> None:
    cos, sin = nn.RotaryEmbedding(16, scaling=scaling)(jnp.array([0, 5]))
    close(cos[0], np.full(8, factor))
    close(cos[1] ** 2 + sin[1] ** 2, np.full(8, factor**2))


# --- Attention --------------------------------------------------------------------------------------------------


def test_metadata_places_every_token() -> None:
    create = partial(AttentionMetadata.create, rope=nn.RotaryEmbedding(8))
    offsets = jnp.array([0, 0, 3, 3, 4, 4], jnp.int32)  # with empty sequences before, between and behind
    assert create(4, offsets, None).positions.tolist() == [0, 1, 2, 0]
    metadata = create(6, offsets, jnp.array([50, 10, 60, 7, 70], jnp.int32))
    assert metadata.positions[:4].tolist() == [10, 11, 12, 7]  # two tokens of padding follow
    cos, sin = nn.RotaryEmbedding(8)(metadata.positions)
    np.testing.assert_array_equal(metadata.freqs[0], cos)
    np.testing.assert_array_equal(metadata.freqs[1], sin)


def plain_attention(layer: nn.AttentionWithRope, x: np.ndarray, offsets: np.ndarray, *, n_heads: int, head_dim: int,
                    scale: float, window: int | None, cap: float | None, qk_norm: float | None, norm_offset: float,
                    inv_freq: np.ndarray) -> np.ndarray:
    """Dense attention inside each sequence, in float64."""

    def product(x: np.ndarray, part: Any) -> np.ndarray:
        y = x @ double(part.weight.get_value()).T
        return y if part.bias is None else y + double(part.bias.get_value())

    def prepared(part: Any, norm: Any) -> np.ndarray:
        h = product(x, part).reshape(len(x), -1, head_dim)
        if qk_norm is not None:
            h = h / np.sqrt((h * h).mean(-1, keepdims=True) + qk_norm)
            h = h * (double(norm.weight.get_value()) + norm_offset)
        position = np.concatenate([np.arange(n) for n in np.diff(offsets)])
        return rotated(h, position, inv_freq)

    q, k = prepared(layer.q_proj, layer.q_norm), prepared(layer.k_proj, layer.k_norm)
    v = product(x, layer.v_proj).reshape(k.shape)
    k, v = (np.repeat(each, n_heads // each.shape[1], axis=1) for each in (k, v))
    out = np.zeros_like(q)
    for begin, end in itertools.pairwise(offsets):
        for i in range(begin, end):
            first = begin if window is None else max(begin, i - window + 1)
            scores = scale * np.einsum("nh,jnh->nj", q[i], k[first : i + 1])
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            if layer.sinks is not None:  # one more score, whose weight goes to nothing
                scores = np.concatenate([scores, double(layer.sinks.get_value())[:, None]], 1)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = p / p.sum(-1, keepdims=True)
            out[i] = np.einsum("nj,jnh->nh", p[:, : i + 1 - first], v[first : i + 1])
    return product(out.reshape(len(x), -1), layer.o_proj)


EVERYTHING = dict(has_bias=True, has_output_bias=True, qk_norm_eps=1e-3, qk_norm_offset=1.0, scale=0.7,
                  sliding_window=4, logit_soft_cap=2.0, rope=nn.RotaryEmbedding(10, 50.0, rotary_dim=4),
                  has_sinks=True)


@pytest.mark.parametrize(
    ("n_devices", "n_heads", "n_kv_heads", "options"),
    [(1, 4, 4, {}), (8, 8, 2, EVERYTHING), (4, 8, 1, dict(qk_norm_eps=1e-6)), (3, 6, 3, dict(sliding_window=1))],
    ids=["plain", "everything", "one-kv-head", "three-kv-heads"],
)
def test_attention(devices: list[jax.Device], n_devices: int, n_heads: int, n_kv_heads: int,
                   options: dict[str, Any]) -> None:
    mesh = make_mesh(devices[:n_devices], n_heads=n_heads, n_kv_heads=n_kv_heads)
    layer = nn.AttentionWithRope(n_heads, n_kv_heads, 20, 10, F32, mesh, rngs=nnx.Rngs(0), **options)
    randomise(layer)
    offsets = np.array([0, 7, 7, 8, 13], np.int32)
    x = 2 * normal(50, 13, 20)
    model_rope = nn.RotaryEmbedding(10, 300.0)
    metadata = AttentionMetadata.create(16, jnp.asarray(offsets), None, model_rope)
    padded = jax.device_put(np.pad(x, ((0, 3), (0, 0))), jax.NamedSharding(mesh, P(None, None)))
    y, collection = compiled(layer)(padded, 0, None, metadata)
    assert collection is None and y.shape == (16, 20) and jax.typeof(y).sharding.spec == P(None, None)
    rope = options.get("rope", model_rope)
    n = (rope.rotary_dim or 10) // 2
    expected = plain_attention(
        layer, double(x), offsets, n_heads=n_heads, head_dim=10, scale=options.get("scale", 10**-0.5),
        window=options.get("sliding_window"), cap=options.get("logit_soft_cap"), qk_norm=options.get("qk_norm_eps"),
        norm_offset=options.get("qk_norm_offset", 0.0), inv_freq=rope.theta ** (-np.arange(n) / n))  # fmt: skip
    close(y[:13], expected)
    # The same through a cache, in which the sequences have no tokens yet.
    params = nn.KVCacheParams(F32, n_kv_heads, 10, 1, page_size=4)
    cache = FetchPagedKVCacheCollection(params)(
        params.allocate(8, mesh), np.zeros(4), np.arange(8).reshape(4, 2).astype(np.int32))
    y, _ = compiled(layer)(padded, 0, cache, metadata)
    close(y[:13], expected)
    if options.get("has_sinks"):
        assert layer.partition_specs()["sinks"] == P(layer.q_axes)
        assert layer.sinks is not None and layer.sinks.get_value().dtype == F32


def test_sinks_are_float32_and_start_at_zero(devices: list[jax.Device]) -> None:
    layer = nn.AttentionWithRope(4, 2, 16, 8, jnp.bfloat16, devices[:2], rngs=nnx.Rngs(0), has_sinks=True)
    assert layer.sinks is not None
    np.testing.assert_array_equal(layer.sinks.get_value(), np.zeros(4, np.float32), strict=True)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ((6, 4), {}, "6 query heads cannot share 4 KV heads"),
        ((4, 2), dict(sliding_window=0), "sliding_window must be at least 1, or None for all tokens; got 0"),
        ((4, 2), dict(rope=nn.RotaryEmbedding(16)), "rope.head_dim is 16, but attention has head_dim 8"),
        ((4, 2), dict(logit_soft_cap=0.0), "logit_soft_cap must be above 0, or None for no cap; got 0.0"),
        ((0, 1), {}, "0 query heads cannot share 1 KV heads"),
        ((4, 0), {}, "4 query heads cannot share 0 KV heads"),
    ],
    ids=str,
)
def test_attention_that_cannot_be(devices: list[jax.Device], heads: tuple[int, int], options: dict[str, Any],
                                  message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.AttentionWithRope(*heads, 16, 8, F32, devices[:1], rngs=nnx.Rngs(0), **options)


def test_attention_on_a_mesh_for_other_heads(devices: list[jax.Device]) -> None:
    mesh = make_mesh(devices[:4])  # made without the heads, so not factored
    with pytest.raises(ValueError, match=r"cuts 2 KV heads into 4.*make_mesh\(devices, n_heads=4, n_kv_heads=2\)"):
        nn.AttentionWithRope(4, 2, 16, 8, F32, mesh, rngs=nnx.Rngs(0))
