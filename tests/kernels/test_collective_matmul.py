"""matmul_allreduce: the plain product's numbers, and overlap in what the TPU compiler schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from maxlike.kernels.collective_matmul import matmul_allreduce
from tests.tpu_compile import (
    count_collectives,
    loop_body,
    overlapped_permutes,
    requires_libtpu,
    topology_mesh,
)

MESHES = [{"model": 1}, {"model": 2}, {"model": 4}, {"model": 8}, {"kv": 2, "rep": 4}, {"kv": 1, "rep": 8}]


def cpu_mesh(axes):
    devices = jax.devices("cpu")[: math.prod(axes.values())]
    types = (AxisType.Explicit,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def put(mesh, value, *spec):
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


def model_axes(mesh):
    names = mesh.axis_names
    return names[0] if len(names) == 1 else names


def check(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest value, elementwise."""
    expected = np.asarray(expected, np.float64)
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert error < tolerance


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("T", "D"),
    [(8, 64), (40, 64), (1, 1003), (40, 1003), (3, 5), (40, 5)],
    ids=lambda value: str(value),
)
def test_equals_the_plain_product(axes, T, D):
    F = 1024  # on four and eight devices the sums of 40 rows go both ways round, those of 8 one way
    mesh, x, weight = cpu_mesh(axes), normal(0, T, F), normal(1, D, F)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        operands = [put(mesh, value, None, model_axes(mesh)) for value in (x, weight)]
        out = jax.jit(matmul_allreduce)(*operands)
    assert out.dtype == jnp.float32
    assert jax.typeof(out).sharding.spec == P(None, None)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    for shard in out.addressable_shards:  # all devices hold all columns
        check(shard.data, expected)


@pytest.mark.parametrize("axes", [{"model": 1}, {"model": 4}, {"kv": 2, "rep": 2}], ids=str)
def test_eager_and_in_a_scan(axes):
    mesh, L, T, F, D = cpu_mesh(axes), 3, 20, 64, 64
    shared = model_axes(mesh)
    x, weights = normal(0, T, F), normal(1, L, D, F) / math.sqrt(F)

    def layer(x, weight):
        return jax.reshard(matmul_allreduce(x, weight), P(None, shared)), None

    with jax.set_mesh(mesh):
        eager = matmul_allreduce(put(mesh, x, None, shared), put(mesh, weights[0], None, shared))
        scanned, _ = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights))(
            put(mesh, x, None, shared), put(mesh, weights, None, None, shared)
        )
    check(eager, x @ weights[0].T)
    check(scanned, x @ weights[0].T @ weights[1].T @ weights[2].T)


def test_eager_with_only_an_abstract_mesh_in_context():
    mesh = cpu_mesh({"model": 4})
    x, weight = normal(0, 20, 64), normal(1, 24, 64)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        check(matmul_allreduce(put(mesh, x, None, "model"), put(mesh, weight, None, "model")), x @ weight.T)


def test_unsharded_operands():
    x, weight = normal(0, 8, 32), normal(1, 24, 32)
    check(matmul_allreduce(jnp.asarray(x), jnp.asarray(weight)), x @ weight.T)


@pytest.mark.parametrize("T", [8, 40])
def test_bfloat16_is_as_close_as_the_plain_product(T):
    mesh, F, D = cpu_mesh({"model": 8}), 1024, 192
    x, weight = (put(mesh, v.astype(jnp.bfloat16), None, "model") for v in (normal(0, T, F), normal(1, D, F)))
    with jax.set_mesh(mesh):
        out = jax.jit(matmul_allreduce)(x, weight)
    assert out.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # A sum is rounded to 8 bits up to eight times on its way: 2^-9 of its size each time at most.
    check(out, expected, tolerance=8 * 2**-9)
    error = np.asarray(out, np.float64) - expected
    assert np.sqrt((error**2).mean()) < 2**-8 * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("axes", [{"model": 1}, {"model": 8}, {"kv": 2, "rep": 4}], ids=str)
@pytest.mark.parametrize("D", [64, 43])
def test_gradient(axes, D):
    mesh, T, F = cpu_mesh(axes), 20, 64
    x, weight, d_out = normal(0, T, F), normal(1, D, F), normal(2, T, D)

    def loss(x, weight):
        return jnp.vdot(matmul_allreduce(x, weight), d_out)

    with jax.set_mesh(mesh):
        operands = [put(mesh, value, None, model_axes(mesh)) for value in (x, weight)]
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*operands)
    check(value, np.vdot(x @ weight.T, d_out))
    for operand, gradient, expected in zip(operands, gradients, (d_out @ weight, d_out.T @ x), strict=True):
        check(gradient, expected)
        assert gradient.sharding.spec == operand.sharding.spec


def test_rows_sharded_over_a_data_axis():
    mesh, T, F, D = cpu_mesh({"data": 2, "model": 4}), 24, 64, 40
    x, weight, d_out = normal(0, T, F), normal(1, D, F), normal(2, T, D)

    def pull_back(x, weight, d_out):
        out, back = jax.vjp(matmul_allreduce, x, weight)
        return out, *back(d_out)

    with jax.set_mesh(mesh):
        out, d_x, d_weight = jax.jit(pull_back)(
            put(mesh, x, "data", "model"), put(mesh, weight, None, "model"), put(mesh, d_out, "data", None)
        )
    assert jax.typeof(out).sharding.spec == P("data", None)
    check(out, x @ weight.T)
    check(d_x, d_out @ weight)
    check(d_weight, d_out.T @ x)


def test_operands_that_do_not_belong_together():
    mesh = cpu_mesh({"model": 4})
    x, weight = normal(0, 8, 32), normal(1, 24, 32)
    sharded = put(mesh, x, None, "model")
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"given \(8, 32\) and \(32, 24\); .* stored \[out, in\]"):
            matmul_allreduce(sharded, put(mesh, weight.T, None, "model"))
        with pytest.raises(ValueError, match=r"\[T, F\].*given \(1, 8, 32\)"):
            matmul_allreduce(put(mesh, x[None], None, None, "model"), put(mesh, weight, None, "model"))
        for spec in [("model", None), (None, None)]:
            with pytest.raises(ValueError, match=r"a weight sharded .*'model'.*but was given .*jax.reshard"):
                matmul_allreduce(sharded, put(mesh, weight, *spec))


def plain_product(x, weight):
    return jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, out_sharding=P(None, None)
    ).astype(x.dtype)


def compile_llama_8b_layers(topology, axes, T, reduced_product):
    """A decode step of Llama 3.1 8B's shape as the TPU compiler schedules it, all but its attention."""
    L, D, F, N, K, H = 32, 4096, 14336, 32, 8, 128
    mesh = topology_mesh(topology, axes)
    shared = model_axes(mesh)

    def project(x, weight):
        return jax.lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(x.dtype)

    def norm(x):
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(square + 1e-5)).astype(x.dtype)

    def attend(q, k, v):  # no attention, but like it of every head and local to it
        q = q.reshape(T, K, N // K, H, out_sharding=P(None, shared, None, None))
        k, v = (each.reshape(T, K, 1, H, out_sharding=P(None, shared, None, None)) for each in (k, v))
        return jax.nn.softmax(q * k, axis=-1) * v

    def layer(x, weights):
        w_q, w_k, w_v, w_o, w_gate, w_up, w_down = weights
        h = norm(x)
        heads = attend(project(h, w_q), project(h, w_k), project(h, w_v))
        x = x + reduced_product(heads.reshape(T, N * H, out_sharding=P(None, shared)), w_o)
        h = norm(x)
        return x + reduced_product(jax.nn.silu(project(h, w_gate)) * project(h, w_up), w_down), None

    def abstract(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    column, row = P(None, shared, None), P(None, None, shared)
    w_q, w_kv, w_o = abstract(column, L, N * H, D), abstract(column, L, K * H, D), abstract(row, L, D, N * H)
    w_up, w_down = abstract(column, L, F, D), abstract(row, L, D, F)
    weights = w_q, w_kv, w_kv, w_o, w_up, w_up, w_down
    with jax.set_mesh(mesh):
        step = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights)[0])
        return step.lower(abstract(P(None, None), T, D), weights).compile()


TOPOLOGIES = [("v5e:2x4", {"model": 8}), ("v6e:2x2", {"model": 4})]


@requires_libtpu
@pytest.mark.parametrize(("topology", "axes"), TOPOLOGIES, ids=lambda value: str(value))
def test_the_plain_product_reduces_twice_a_layer_on_tpu(topology, axes):
    body = loop_body(compile_llama_8b_layers(topology, axes, 64, plain_product).as_text())
    assert count_collectives(body) == {"all-reduce": 2}


@requires_libtpu
@pytest.mark.parametrize(
    ("topology", "axes", "T"),
    [
        *((*topology, 64) for topology in TOPOLOGIES),
        pytest.param("v5e:2x4", {"kv": 2, "rep": 4}, 8, marks=pytest.mark.slow),
        *(pytest.param(*topology, 2048, marks=pytest.mark.slow) for topology in TOPOLOGIES),
    ],
    ids=lambda value: str(value),
)
def test_every_message_travels_behind_a_product_on_tpu(topology, axes, T):
    compiled = compile_llama_8b_layers(topology, axes, T, matmul_allreduce)
    body = loop_body(compiled.as_text())
    collectives = count_collectives(body)
    assert collectives.keys() == {"collective-permute", "all-gather"}  # and no all-reduce
    assert collectives["all-gather"] == 2
    permutes = overlapped_permutes(body)
    assert len(permutes) == collectives["collective-permute"] >= 2 * (math.prod(axes.values()) - 1)
    assert [permute.name for permute in permutes if not permute.work] == []
    if T <= 64:  # a chunk is read where it lies in the stack: there is not even room for one of the smallest
        chunk_bytes = 4096 * 4096 * 2 // (2 * math.prod(axes.values()) ** 2)
        assert compiled.memory_analysis().temp_size_in_bytes < chunk_bytes
