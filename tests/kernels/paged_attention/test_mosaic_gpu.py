"""The Hopper kernels: lowered for every case, interpreted (or run) against the reference, and what they refuse."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from maxlike.kernels.paged_attention import ragged_paged_attention
from maxlike.kernels.paged_attention.cases import CASES, Case, check, make_inputs
from maxlike.kernels.paged_attention.mosaic_gpu import MosaicGpu, _cut_decode, _Plan

NEW_JAX = hasattr(plgpu, "InterpretGPUParams")  # from 0.11.2
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="jax before 0.11.2: the kernels are refused")

STATIC = ("scale", "sliding_window", "soft_cap", "implementation")
attend = jax.jit(ragged_paged_attention, static_argnames=STATIC)


def in_bfloat16(case: Case) -> Case:
    """The case as the kernels take it: its float32 is bfloat16."""
    cache_dtype = case.cache_dtype if case.cache_dtype in ("int8", "float8_e4m3fn") else "bfloat16"
    return dataclasses.replace(case, dtype="bfloat16", cache_dtype=cache_dtype)


# Cases that differ in their dtypes only have become one.
HOPPER_CASES = list({dataclasses.replace(case, name=""): case for case in map(in_bfloat16, reversed(CASES))}.values())


# --- Lowering: layouts, transfers and shared memory fit the hardware


def lowered_text(case, implementation=MosaicGpu()):  # noqa: B008
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_inputs(case))
    traced = attend.trace(**spec, **case.options(), implementation=implementation)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_new_jax
@pytest.mark.parametrize("case", HOPPER_CASES, ids=lambda case: case.name)
def test_lowers(case):
    kernels = lowered_text(case).count("@mosaic_gpu")
    assert kernels == (1 if case.exact and sum(new for _, new in case.rows) == 1 else 2)


@needs_new_jax
@pytest.mark.parametrize("cache_dtype", ["same", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "head_dim, page_size, heads, dtype",
    [
        (16, 128, (2, 2), "bfloat16"),
        (64, 256, (5, 1), "bfloat16"),
        (80, 16, (12, 2), "bfloat16"),
        (96, 112, (8, 8), "float16"),
        (128, 64, (64, 1), "float16"),
        (128, 80, (32, 8), "bfloat16"),
        (192, 32, (3, 1), "bfloat16"),
        (256, 16, (64, 1), "bfloat16"),
        (256, 240, (8, 8), "float16"),
    ],
)
def test_lowers_for_every_shape(head_dim, page_size, heads, dtype, cache_dtype):
    case = Case(
        "shape", ((40, 1), (0, 33)), n_heads=heads[0], kv_heads=heads[1], head_dim=head_dim, page_size=page_size,
        dtype=dtype, cache_dtype=dtype if cache_dtype == "same" else cache_dtype, sinks=True,
    )  # fmt: skip
    assert lowered_text(case).count("@mosaic_gpu") == 2


@needs_new_jax
def test_lowers_sharded_over_heads(devices):
    case = Case("sharded", ((40, 1), (0, 9)), n_heads=8, kv_heads=2, sinks=True, dtype="bfloat16", cache_dtype="int8")
    mesh = jax.make_mesh((2, 2), ("kv", "rep"), (AxisType.Explicit,) * 2, devices=devices[:4])
    specs = dict(q=P(None, ("kv", "rep")), k=P(None, "kv"), v=P(None, "kv"), pages=P(None, "kv"))
    spec = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs.get(name, P())))
        for name, x in make_inputs(case).items()
    }
    traced = attend.trace(**spec, **case.options(), implementation=MosaicGpu())
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


@needs_new_jax
def test_the_cache_is_written_in_place_and_read_as_it_is():
    case = in_bfloat16(Case("in_place", ((40, 1), (0, 33))))
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_inputs(case))
    step = jax.jit(ragged_paged_attention, static_argnames=STATIC, donate_argnames="pages")
    traced = step.trace(**spec, **case.options(), implementation=MosaicGpu())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    cache = "x".join(map(str, spec["pages"].shape)) + "xbf16"
    makers = {line.split(" = ")[1].split("(")[0].strip('" ') for line in text.splitlines()
              if " = " in line and line.rstrip().endswith(f"tensor<{cache}>")}  # fmt: skip
    assert "tf.aliasing_output" in text
    assert makers <= {"stablehlo.scatter"}, makers


# --- The division of work


@hypothesis.given(
    rows=st.lists(st.tuples(st.integers(0, 40000), st.integers(0, 3)), min_size=8, max_size=8),
    kv_heads=st.sampled_from([1, 8, 200]),
    window=st.sampled_from([None, 1, 700]),
)
def test_items_cover_what_is_seen_once(rows, kv_heads, window):
    plan = _Plan.make(128, 64, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"), None, decode=True)
    cached, new = np.array(rows, np.int32).T
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32)
    items, owner, n_items = map(np.asarray, _cut_decode(plan, kv_heads, 132, jnp.asarray(cached), offsets, window))
    expected = []
    for s in np.flatnonzero(new == 1):
        first = 0 if window is None else max(0, cached[s] + 1 - window)
        expected += [(s, block) for block in range(first // 64, cached[s] // 64 + 1)]
    assert [(s, first + i) for s, first, n, *_ in items for i in range(n)] == expected
    assert (items[:, 2] > 0).sum() == n_items <= len(items) and (owner == items[:, 0]).all()


def test_long_sequences_are_cut_for_all_multiprocessors():
    plan = _Plan.make(128, 64, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"), None, decode=True)
    for n, length in ((1, 32768), (4, 4096), (17, 4096), (33, 4096), (256, 1024)):
        items, _, n_items = _cut_decode(plan, 8, 132, jnp.full(n, length - 1), jnp.arange(n + 1), None)
        waves = -(-8 * int(n_items) // 132)
        assert n * (length // 64) * 8 / 132 / (waves * int(items[:, 2].max())) > 0.7, (n, length)


# --- Numbers, on a Hopper GPU where there is one, else in interpret mode


def runnable(**options):
    device = jax.devices()[0]
    if device.platform == "gpu" and device.compute_capability == "9.0":
        return MosaicGpu()
    # Few multiprocessors: few thread blocks to interpret, and long sequences are cut all the same.
    return MosaicGpu(multiprocessors=2, interpret=plgpu.InterpretGPUParams(**options))


# Rows that nobody looks at hold NaN.
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

AT_ONCE = {
    "decode_one_long_many_short",
    "mixed_empty_rows",
    "window_mixed",
    "page_32_three_kv_heads_exact",
    "bfloat16_head_width_256_page_256",
    "int8_sinks_window_and_cap",
    "float8_lane_padding_decode",
}


@needs_new_jax
@quiet
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in AT_ONCE else pytest.mark.slow) for case in HOPPER_CASES],
)
def test_equals_reference(case):
    inputs = make_inputs(case)
    check(case, inputs, *attend(**inputs, **case.options(), implementation=runnable()))


def test_cases_to_run_at_once_exist():
    assert {case.name for case in HOPPER_CASES} >= AT_ONCE


@needs_new_jax
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("stages", [2, 3])
def test_no_races(stages, cache_dtype):
    rows = ((300, 1), (200, 150), (0, 20), (100, 70))
    case = Case("races", rows, dtype="bfloat16", cache_dtype=cache_dtype, sliding_window=150)
    inputs = make_inputs(case)
    implementation = dataclasses.replace(runnable(detect_races=True), stages=stages)  # a race raises
    check(case, inputs, *attend(**inputs, **case.options(), implementation=implementation))


@needs_new_jax
@quiet
@pytest.mark.slow
@hypothesis.given(
    rows=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=8)
def test_random_raggedness(rows, seed):
    case = Case("random", tuple(rows), sliding_window=100, dtype="bfloat16", cache_dtype="bfloat16")
    inputs = make_inputs(case, seed)
    check(case, inputs, *attend(**inputs, **case.options(), implementation=runnable()))


@needs_new_jax
@quiet
@pytest.mark.slow
def test_float8_takes_queries_beyond_float16():
    case = Case("large", ((40, 1), (0, 20)), dtype="bfloat16", cache_dtype="float8_e4m3fn", scale=1e-6)
    inputs = make_inputs(case)
    inputs["q"] = (inputs["q"].astype("float32") * 2e4).astype("bfloat16")
    inputs["q"][:, :, 0] = 1e30  # float16 ends at 65504
    out, _ = attend(**inputs, **case.options(), implementation=runnable())
    assert jnp.isfinite(out).all()


# --- What is refused


@needs_new_jax
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype="float32"), "q of float32 with pages of bfloat16: it takes bfloat16 or float16"),
        (dict(cache_dtype="float32"), "q of bfloat16 with pages of float32"),
        (dict(cache_dtype="float16"), "q of bfloat16 with pages of float16"),
        (dict(head_dim=72), "head width 72: it takes multiples of 16"),
        (dict(head_dim=272), "head width 272: it takes multiples of 16, from 16 to 256"),
        (dict(head_dim=240, cache_dtype="int8"), "head width 240 in int8"),
        (dict(page_size=12), "pages of 12 tokens: it takes multiples of 8"),
        (dict(n_heads=130), "65 query heads a KV head: it takes 64 at most"),
        (dict(head_dim=16, lanes=36), "slots of 36 lanes of bfloat16: it takes multiples of 16 bytes"),
        (dict(head_dim=72, page_size=12), "head width 72.*; pages of 12"),
    ],
    ids=str,
)
def test_refusals(change, message):
    case = dataclasses.replace(Case("refused", ((3, 1),), dtype="bfloat16", cache_dtype="bfloat16"), **change)
    with pytest.raises(ValueError, match=rf"MosaicGpu\(\) cannot do .*{message}.*implementation=Xla\(\)"):
        lowered_text(case)


@needs_new_jax
def test_too_many_stages():
    case = Case("refused", ((3, 1),), dtype="bfloat16", cache_dtype="bfloat16", head_dim=128)
    with pytest.raises(ValueError, match=r"stages=9\): 9 blocks of 64 tokens, 32768 bytes each, .*229376 bytes of sha"):
        lowered_text(case, MosaicGpu(stages=9))


def test_older_jax_is_refused(monkeypatch):
    monkeypatch.delattr(plgpu, "InterpretGPUParams", raising=False)
    inputs = make_inputs(Case("old", ((3, 1),), dtype="bfloat16", cache_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"jax .* is older than 0\.11\.2.*implementation=Xla\(\)"):
        jax.eval_shape(lambda x: ragged_paged_attention(**x, scale=1.0, implementation=MosaicGpu()), inputs)
