"""Attention without a cache, against attention written out: numbers, derivatives, memory, work, meshes."""

import functools
import itertools
import math
import re
import time
from dataclasses import dataclass

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from maxlike.kernels.ragged_attention import ragged_attention
from maxlike.kernels.ragged_attention.xla import BLOCK


@dataclass(frozen=True)
class Shape:
    """What one compilation serves; offsets vary within it."""

    tokens: int
    heads: int
    kv_heads: int
    width: int
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def options(self):
        return {"scale": self.width**-0.5, "sliding_window": self.sliding_window, "soft_cap": self.soft_cap}

    def inputs(self, dtype=jnp.float32):
        """q, k, v and a gradient of the output."""
        random = np.random.default_rng(self.tokens * self.heads + self.width)
        # Queries three times larger than usual make weights that are far from even.
        q, k, v, d_out = (
            jnp.asarray(size * random.normal(size=(self.tokens, heads, self.width)), dtype)
            for size, heads in ((3, self.heads), (1, self.kv_heads), (1, self.kv_heads), (1, self.heads))
        )
        return q, k, v, d_out


TOKENS = 3 * BLOCK + 6
PLAIN = Shape(TOKENS, 4, 2, 32)
WINDOW = Shape(TOKENS, 4, 2, 32, sliding_window=17)
WINDOW_AND_CAP = Shape(TOKENS, 6, 2, 24, sliding_window=BLOCK + 30, soft_cap=2.0)
WIDTH_80 = Shape(BLOCK, 8, 8, 80, sliding_window=1000)
FEW_TOKENS = Shape(13, 8, 1, 16, soft_cap=1.5)
ROWS = 16

CASES = {
    "one sequence": (PLAIN, (0, TOKENS)),
    "sequences across blocks": (PLAIN, (0, 3, 100, 300, 301, TOKENS - 5)),
    "single-token sequences": (PLAIN, tuple(range(ROWS + 1))),
    "empty rows, first, between and last": (PLAIN, (0, 0, 0, 60, 60, 60, TOKENS, TOKENS)),
    "padding tail of several blocks": (PLAIN, (0, 1, 70, 100)),
    "sequences that end where blocks do": (PLAIN, (0, BLOCK, 3 * BLOCK)),
    "nothing but padding": (PLAIN, (0, 0, 0)),
    "window shorter than a block": (WINDOW, (0, 5, 50, TOKENS - 1)),
    "window longer than a block, soft cap": (WINDOW_AND_CAP, (0, 20, TOKENS - 9)),
    "exactly one block, head width 80": (WIDTH_80, (0, 100, BLOCK)),
    "fewer tokens than a block, one KV head": (FEW_TOKENS, (0, 4, 13)),
}


def offsets_of(*offsets):
    """As many rows for every case, the last ones empty, so that cases share compilations."""
    return np.int32(offsets + (ROWS + 1 - len(offsets)) * offsets[-1:])


def written_out(q, k, v, offsets, *, scale, sliding_window, soft_cap, sinks=None):
    """One token and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for begin, end in itertools.pairwise(offsets):
        for p in range(begin, end):
            first = begin if sliding_window is None else max(begin, p - sliding_window + 1)
            for n in range(q.shape[1]):
                scores = scale * k[first : p + 1, n // group] @ q[p, n]
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = -np.inf if sinks is None else np.float64(sinks[n])
                weights = np.exp(scores - max(scores.max(), sink))
                total = weights.sum() + np.exp(sink - max(scores.max(), sink))
                out[p, n] = weights @ v[first : p + 1, n // group] / total
    return out


def dense(q, k, v, offsets, *, scale, sliding_window, soft_cap, sinks=None):
    """With the whole [N, T, T] matrix, for JAX to differentiate."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scale * jnp.einsum("pnh,jnh->npj", q, k, precision="highest")
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    position = jnp.arange(len(q))
    row = jnp.searchsorted(offsets, position, side="right")
    visible = (row[:, None] == row) & (position <= position[:, None]) & (position < offsets[-1])
    if sliding_window is not None:
        visible &= position > position[:, None] - sliding_window
    scores = jnp.where(visible, scores, -1e30)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], -1)
    weights = jnp.where(visible, jax.nn.softmax(scores)[..., : len(q)], 0)
    return jnp.einsum("npj,jnh->pnh", weights, v, precision="highest")


@functools.partial(jax.jit, static_argnames=("attention", "scale", "sliding_window", "soft_cap"))
def with_gradients(attention, q, k, v, offsets, d_out, **options):
    """The output, and the gradients of q, k and v for the output's gradient `d_out`."""
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, offsets, **options), q, k, v)
    return out, vjp(d_out.astype(out.dtype))


def assert_close(got, expected, relative):
    """No element differs by more than `relative` of the largest, or of 0.1 where all ought to be smaller."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * max(np.abs(expected).max(), 0.1))


@pytest.mark.parametrize("shape, offsets", CASES.values(), ids=CASES)
def test_equals_attention_written_out(shape, offsets):
    q, k, v, d_out = shape.inputs()
    offsets = offsets_of(*offsets)
    out, grads = with_gradients(ragged_attention, q, k, v, offsets, d_out, **shape.options)
    assert out.shape == q.shape
    np.testing.assert_allclose(out, written_out(q, k, v, offsets, **shape.options), rtol=0, atol=2e-5)
    _, expected = with_gradients(dense, q, k, v, offsets, d_out, **shape.options)
    for g, e in zip(grads, expected, strict=True):
        assert_close(g, e, 1e-4)
    for x in (out, *grads):
        assert x.dtype == jnp.float32
        assert not np.asarray(x)[offsets[-1] :].any()


@settings(max_examples=25)
@given(st.lists(st.integers(0, TOKENS), min_size=3, max_size=ROWS))
def test_any_offsets(cuts):
    q, k, v, d_out = PLAIN.inputs()
    offsets = offsets_of(0, *sorted(cuts))
    got = with_gradients(ragged_attention, q, k, v, offsets, d_out, **PLAIN.options)
    expected = with_gradients(dense, q, k, v, offsets, d_out, **PLAIN.options)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(g, e, 1e-4)


def test_bfloat16():
    """The inputs are exact and the arithmetic is float32: only the saved output and the results are rounded."""
    inputs = PLAIN.inputs(jnp.bfloat16)
    offsets = offsets_of(*CASES["sequences across blocks"][1])

    def run(attention, q, k, v, d_out):
        return with_gradients(attention, q, k, v, offsets, d_out, **PLAIN.options)

    out, grads = run(ragged_attention, *inputs)
    expected, expected_grads = run(dense, *(x.astype(jnp.float32) for x in inputs))
    rounding = 2.0**-8
    assert_close(out, expected, rounding)
    for g, e in zip(grads, expected_grads, strict=True):
        assert_close(g, e, 2 * rounding)
    for x in (out, *grads):
        assert x.dtype == jnp.bfloat16


def test_large_scores_do_not_overflow():
    q, k, v, d_out = PLAIN.inputs()
    q, offsets = 300 * q, offsets_of(0, 90, TOKENS)
    out, grads = with_gradients(ragged_attention, q, k, v, offsets, d_out, **PLAIN.options)
    # Scores of a few thousand carry float32 errors of about 1e-3, and so do the weights.
    np.testing.assert_allclose(out, written_out(q, k, v, offsets, **PLAIN.options), rtol=0, atol=1e-2)
    assert all(np.isfinite(g).all() for g in grads)


def test_padding_may_hold_anything():
    inputs = PLAIN.inputs()
    offsets = offsets_of(0, 60, 130)

    def run(q, k, v, d_out):
        return with_gradients(ragged_attention, q, k, v, offsets, d_out, **PLAIN.options)

    bad = np.where(np.arange(TOKENS) % 2, np.nan, np.inf)[130:, None, None]
    got, expected = run(*(x.at[130:].set(bad) for x in inputs)), run(*inputs)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(g, e)


@pytest.mark.parametrize("shape, offsets, clean", [(PLAIN, (0, BLOCK, TOKENS), 1), (WINDOW, (0, TOKENS), 2)])
def test_only_the_blocks_that_are_seen_are_read(shape, offsets, clean):
    """A hidden key's weight is zero, and zero times NaN is NaN: a block of NaN that was read would show."""
    q, k, v, d_out = shape.inputs()
    k, v = k.at[:BLOCK].set(np.nan), v.at[:BLOCK].set(np.nan)
    out, grads = with_gradients(ragged_attention, q, k, v, offsets_of(*offsets), d_out, **shape.options)
    for x in (out, *grads):
        assert np.isnan(x[:BLOCK]).any()
    for x in (out, *grads):
        assert np.isfinite(x[clean * BLOCK :]).all()


@functools.cache
def compiled_at(tokens):
    """Forward and backward, compiled; 64 rows."""
    shape = Shape(tokens, 4, 2, 16)
    run = functools.partial(with_gradients.__wrapped__, ragged_attention, **shape.options)
    q, k, v, d_out = (jax.ShapeDtypeStruct((tokens, heads, 16), jnp.float32) for heads in (4, 2, 2, 4))
    return jax.jit(run).lower(q, k, v, jax.ShapeDtypeStruct((65,), jnp.int32), d_out).compile()


def test_memory_is_linear_in_tokens():
    at_8k, at_16k = (compiled_at(n).memory_analysis().temp_size_in_bytes for n in (8192, 16384))
    assert 1.8 * at_8k < at_16k < 2.1 * at_8k
    inputs = 4 * 16 * (4 + 2 + 2 + 4) * 16384
    assert at_16k < 4 * inputs


def test_work_follows_the_sequences():
    """64 short sequences, or a short one and padding, take a small part of the time of one long sequence."""
    q, k, v, d_out = Shape(8192, 4, 2, 16).inputs()

    def seconds(*offsets):
        offsets = jnp.int32(offsets + (65 - len(offsets)) * offsets[-1:])

        def once():
            begin = time.perf_counter()
            jax.block_until_ready(compiled_at(8192)(q, k, v, offsets, d_out))
            return time.perf_counter() - begin

        return min(once() for _ in range(3))

    one_long = seconds(0, 8192)
    assert seconds(*range(0, 8193, 128)) < one_long / 4  # of 2,080 blocks of the matrix it visits 64
    assert seconds(0, 128) < one_long / 4


def test_in_a_checkpointed_scan():
    q, k, v, _ = WINDOW.inputs()
    offsets = offsets_of(0, 50, 300)
    factors = jnp.asarray([1.0, 0.5, 2.0])

    def layer(attention, x, factor):
        return x + attention(factor * x, k, v, offsets, **WINDOW.options), None

    def scanned(factors, x):
        x, _ = jax.lax.scan(jax.checkpoint(functools.partial(layer, ragged_attention)), x, factors)
        return (x**2).mean()

    def unrolled(factors, x):
        for factor in factors:
            x, _ = layer(dense, x, factor)
        return (x**2).mean()

    got = jax.jit(jax.value_and_grad(scanned, (0, 1)))(factors, q)
    expected = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(factors, q)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(g, e, 1e-4)


def test_eagerly():
    q, k, v, d_out = FEW_TOKENS.inputs()
    got = with_gradients.__wrapped__(ragged_attention, q, k, v, [0, 4, 13], d_out, **FEW_TOKENS.options)
    expected = with_gradients(dense, q, k, v, offsets_of(0, 4, 13), d_out, **FEW_TOKENS.options)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(g, e, 1e-4)


# Mesh sizes by axis, KV heads (of 8 heads), the axes of the query heads and those of the KV heads.
MESHES = [
    ({"model": 8}, 8, "model", "model"),
    ({"kv": 2, "rep": 4}, 2, ("kv", "rep"), "kv"),
    ({"kv": 1, "rep": 8}, 1, ("kv", "rep"), "kv"),
    ({"model": 8}, 1, "model", None),
    ({"data": 2, "model": 4}, 4, "model", "model"),
]


def explicit_mesh(sizes, devices):
    kinds = (jax.sharding.AxisType.Explicit,) * len(sizes)
    count = math.prod(sizes.values())
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:count])


def place(mesh, x, *axes):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))


@pytest.mark.parametrize("sizes, kv_heads, q_axes, kv_axes", MESHES, ids=str)
def test_on_a_mesh(sizes, kv_heads, q_axes, kv_axes, devices):
    mesh = explicit_mesh(sizes, devices)
    shape = Shape(200, 8, kv_heads, 16)
    offsets = offsets_of(0, 7, 150, 190)
    inputs = shape.inputs()
    expected = with_gradients(dense, *inputs[:3], offsets, inputs[3], **shape.options)
    inputs = [place(mesh, x, None, axes) for x, axes in zip(inputs, (q_axes, kv_axes, kv_axes, q_axes), strict=True)]

    def run(q, k, v, d_out):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return with_gradients(ragged_attention, q, k, v, offsets, d_out, **shape.options)

    compiled = jax.jit(run).lower(*inputs).compile()
    got = compiled(*inputs)
    for x, y in zip((inputs[0], *inputs[:3]), jax.tree.leaves(got), strict=True):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(g, e, 1e-4)
    if sizes == {"model": 8} and kv_heads == 8:
        collectives = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
        assert not re.search(collectives, compiled.as_text())


SINKS = {
    "plain": (PLAIN, (0, 3, 100, 300, TOKENS - 5)),
    "window and cap": (WINDOW_AND_CAP, (0, 20, TOKENS - 9)),
    "nothing but padding": (PLAIN, (0, 0, 0)),
}


@pytest.mark.parametrize(("shape", "offsets"), SINKS.values(), ids=SINKS)
def test_sinks(shape, offsets):
    q, k, v, d_out = shape.inputs()
    sinks, offsets = jnp.asarray(np.random.default_rng(0).normal(0, 3, shape.heads), jnp.float32), offsets_of(*offsets)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attention, *inputs):
        out, vjp = jax.vjp(lambda q, k, v, s: attention(q, k, v, offsets, sinks=s, **shape.options), *inputs)
        return out, vjp(d_out)

    out, got = gradients(ragged_attention, q, k, v, sinks)
    assert_close(out, written_out(q, k, v, offsets, sinks=sinks, **shape.options), 1e-5)
    for g, e in zip(got, gradients(dense, q, k, v, sinks)[1], strict=True):
        assert_close(g, e, 1e-4)


def test_sinks_on_a_mesh(devices):
    mesh = explicit_mesh({"kv": 2, "rep": 4}, devices)
    shape = Shape(40, 8, 2, 16)
    q, k, v, d_out = shape.inputs()
    sinks, offsets = jnp.linspace(-3.0, 3.0, 8), offsets_of(0, 7, 30)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attention, *inputs):
        out, vjp = jax.vjp(lambda q, k, v, s: attention(q, k, v, offsets, sinks=s, **shape.options), *inputs[:4])
        return out, *vjp(inputs[4])

    heads = (None, ("kv", "rep"))
    placed = [place(mesh, x, *axes) for x, axes in ((q, heads), (k, (None, "kv")), (v, (None, "kv")),
                                                    (sinks, (("kv", "rep"),)), (d_out, heads))]  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        got = gradients(ragged_attention, *placed)
    for g, e in zip(got, gradients(dense, q, k, v, sinks, d_out), strict=True):
        assert_close(g, e, 1e-4)
    assert got[-1].sharding.is_equivalent_to(placed[3].sharding, 1)


def test_eagerly_on_a_mesh(devices):
    mesh = explicit_mesh({"kv": 1, "rep": 8}, devices)
    q, k, v, d_out = FEW_TOKENS.inputs()
    offsets = offsets_of(0, 4, 13)
    expected, _ = with_gradients(dense, q, k, v, offsets, d_out, **FEW_TOKENS.options)
    q, k, v = place(mesh, q, None, ("kv", "rep")), place(mesh, k, None, "kv"), place(mesh, v, None, "kv")
    offsets = jnp.asarray(offsets)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out = ragged_attention(q, k, v, offsets, **FEW_TOKENS.options)
    assert_close(out, expected, 1e-5)


def test_inside_a_shard_map_over_tokens(devices):
    """Each shard of the tokens has sequences of its own, while the types still carry the shards of the heads."""
    mesh = explicit_mesh({"data": 2, "model": 4}, devices)
    shape = Shape(300, 8, 4, 16)
    q, k, v, d_out = shape.inputs()
    # The same sequences for all tokens: the first half's padding is a sequence to which no gradient flows.
    d_out = d_out.at[140:150].set(0)
    expected, expected_grads = with_gradients(dense, q, k, v, offsets_of(0, 70, 140, 150, 300), d_out, **shape.options)

    def shard(q, k, v, offsets):
        return ragged_attention(q, k, v, offsets[0], **shape.options)

    def run(q, k, v, offsets, d_out):
        sharded = jax.shard_map(
            shard, in_specs=jax.P("data"), out_specs=jax.P("data"), axis_names={"data"}, check_vma=False
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, vjp = jax.vjp(lambda q, k, v: sharded(q, k, v, offsets), q, k, v)
            return out, vjp(d_out)

    q, k, v, d_out = (place(mesh, x, "data", "model") for x in (q, k, v, d_out))
    offsets = place(mesh, jnp.int32([[0, 70, 140], [0, 150, 150]]), "data")
    out, grads = jax.jit(run)(q, k, v, offsets, d_out)
    assert_close(out, expected.at[140:150].set(0), 1e-5)
    for g, e in zip(grads, expected_grads, strict=True):
        assert_close(g, e, 1e-4)


@pytest.mark.parametrize(
    "q_axes, kv_axes, kv_heads, message",
    [
        (("kv", "rep"), "kv", 4, "2 of the 4 KV heads"),
        (("rep", "kv"), "kv", 2, "leading ones of q's"),
        ("kv", ("kv", "rep"), 8, "leading ones of q's"),
    ],
)
def test_heads_that_are_sharded_apart_are_refused(q_axes, kv_axes, kv_heads, message, devices):
    mesh = explicit_mesh({"kv": 2, "rep": 4}, devices)
    q, k, v, _ = Shape(16, 16, kv_heads, 8).inputs()
    q, k, v = place(mesh, q, None, q_axes), place(mesh, k, None, kv_axes), place(mesh, v, None, kv_axes)
    with pytest.raises(ValueError, match=message):
        ragged_attention(q, k, v, jnp.int32([0, 16]), scale=1.0)


@pytest.mark.parametrize(
    "q_axes, kv_axes, offsets, message",
    [
        (("data",), ("data",), [0, 16], r"int32\[2\], and the tokens are cut into 2 shards.*int32\[2, S \+ 1\]"),
        (("data",), (None,), [[0, 8], [0, 8]], "all four must be, in the same way"),
        (("data",), ("data",), [[0, 8], [0, 8]], "all four must be, in the same way"),  # the offsets are not
        ((None, None, "data"), (None, None, "data"), [0, 16], "reshard the last dimension"),
    ],
)
def test_shardings_that_are_refused(q_axes, kv_axes, offsets, message, devices):
    mesh = explicit_mesh({"data": 2}, devices)
    q, k, v, _ = (place(mesh, x) for x in Shape(16, 2, 2, 8).inputs())
    q, k, v = (jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
               for x, axes in ((q, q_axes), (k, kv_axes), (v, kv_axes)))
    with pytest.raises(ValueError, match=message):
        ragged_attention(q, k, v, place(mesh, jnp.int32(offsets)), scale=1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (16, 4)}, r"\(16, 4\).*expected \[T, N, H\]"),
        ({"k": (16, 3, 8), "v": (16, 3, 8)}, "4 query heads cannot share 3 KV heads"),
        ({"v": (16, 4, 8)}, r"\(16, 4, 8\); expected"),
        ({"k": (8, 2, 8), "v": (8, 2, 8)}, "expected"),
        ({"row_offsets": (1,)}, r"int32\[1\]; expected int32\[S \+ 1\]"),
        ({"row_offsets": (2, 2)}, r"int32\[2, 2\]"),
        ({"sliding_window": 0}, "sliding_window is 0; expected at least 1"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0; expected a positive number"),
        ({"sinks": jnp.zeros(2)}, r"sinks is float32\[2\]; expected float32\[4\]"),
        ({"sinks": jnp.zeros(4, jnp.bfloat16)}, r"sinks is bfloat16\[4\]; expected float32\[4\]"),
    ],
)
def test_mistakes_are_named(change, message):
    shapes = {"q": (16, 4, 8), "k": (16, 2, 8), "v": (16, 2, 8), "row_offsets": (2,)}
    shapes |= {name: shape for name, shape in change.items() if name in shapes}
    options = {name: value for name, value in change.items() if name not in shapes}
    kinds = {"row_offsets": jnp.int32}
    arrays = {name: jnp.zeros(shape, kinds.get(name, jnp.float32)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ragged_attention(**arrays, scale=1.0, **options)


def test_no_tokens():
    q, k, v, d_out = Shape(0, 4, 2, 8).inputs()
    out, grads = with_gradients(ragged_attention, q, k, v, np.int32([0, 0]), d_out, **PLAIN.options)
    assert [x.shape for x in (out, *grads)] == [(0, 4, 8), (0, 4, 8), (0, 2, 8), (0, 2, 8)]
