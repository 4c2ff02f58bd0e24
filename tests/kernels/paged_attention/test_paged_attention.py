"""Ragged paged attention: every case against the reference, sharded, in place, by cost, and with bad input."""

import dataclasses
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from maxlike.kernels.paged_attention import MosaicTpu, Xla, api, mosaic_gpu, ragged_paged_attention, xla
from maxlike.kernels.paged_attention.cases import CASES, Case, check, make_inputs
from tests.tpu_compile import requires_libtpu

STATIC = ("scale", "sliding_window", "soft_cap", "implementation")
attend = jax.jit(ragged_paged_attention, static_argnames=STATIC, donate_argnames="pages")


# Plain JAX has no code of its own for what these differ in from their neighbours in the list; other implementations do.
VARIANTS = {
    "head_width_256_group_of_4", "group_of_16", "bfloat16_decode", "bfloat16_head_width_128", "bfloat16_head_width_80",
    "bfloat16_head_width_96", "bfloat16_head_width_256_page_256", "bfloat16_group_of_64",
    "bfloat16_page_32_group_of_6", "sinks_bfloat16_window_group_of_8", "int8_decode", "int8_lane_padding_decode",
    "int8_bfloat16_decode", "float8_decode", "float8_lane_padding", "float8_lane_padding_decode",
    "float8_sinks_window_and_cap", "float8_bfloat16_decode",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.exhaustive] * (case.name in VARIANTS)) for case in CASES],
)
def test_equals_reference(case):
    inputs = make_inputs(case)
    check(case, inputs, *attend(**inputs, **case.options(), implementation=Xla()))


def test_cases_are_named_once():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.name for case in CASES} > VARIANTS


# Raggedness of every kind, in shapes that the cases have compiled already.
RAGGED = st.lists(
    st.tuples(st.integers(0, 300), st.one_of(st.integers(0, 1), st.integers(0, 16))), min_size=1, max_size=8
)


@hypothesis.given(rows=RAGGED, sliding_window=st.sampled_from([None, 33]), seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=25)
def test_random_raggedness(rows, sliding_window, seed):
    case = Case("random", tuple(rows), sliding_window=sliding_window)
    inputs = make_inputs(case, seed)
    check(case, inputs, *attend(**inputs, **case.options(), implementation=Xla()))


@pytest.mark.slow
@hypothesis.given(
    rows=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 60)), min_size=1, max_size=8),
    page_size=st.sampled_from([8, 24, 64, 256]),
    heads=st.sampled_from([(4, 2), (3, 3), (8, 1)]),
    head_dim=st.sampled_from([16, 80]),
    sliding_window=st.sampled_from([None, 7, 64, 500]),
    soft_cap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=20)  # each compiles anew
def test_random_shapes(rows, page_size, heads, head_dim, sliding_window, soft_cap, seed):
    case = Case(
        "random", tuple(rows), n_heads=heads[0], kv_heads=heads[1], head_dim=head_dim, page_size=page_size,
        sliding_window=sliding_window, soft_cap=soft_cap,
    )  # fmt: skip
    inputs = make_inputs(case, seed)
    check(case, inputs, *attend(**inputs, **case.options(), implementation=Xla()))


# --- Sharded over heads


def shard(inputs, mesh, heads, kv_heads):
    specs = dict(q=P(None, heads), k=P(None, kv_heads), v=P(None, kv_heads), pages=P(None, kv_heads))
    return {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in inputs.items()}


def explicit_mesh(devices, shape, names):
    return jax.make_mesh(shape, names, (AxisType.Explicit,) * len(names), devices=devices)


@pytest.mark.parametrize(
    "shape, names, heads, kv_heads, n_heads, n_kv_heads",
    [
        ((8,), ("model",), "model", "model", 16, 8),
        ((2, 4), ("kv", "rep"), ("kv", "rep"), "kv", 8, 2),
        ((1, 8), ("kv", "rep"), ("kv", "rep"), "kv", 16, 1),
        ((2,), ("model",), None, None, 4, 2),
    ],
    ids=["model", "kv_2_rep_4", "kv_1_rep_8", "replicated"],
)
@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "int8_sinks"])
def test_sharded_over_heads(devices, shape, names, heads, kv_heads, n_heads, n_kv_heads, quantised):
    rows = ((40, 1), (0, 9), (30, 3), (5, 0), (100, 1))
    case = Case(
        "sharded", rows, n_heads=n_heads, kv_heads=n_kv_heads, head_dim=16, layers=2, layer=1, sinks=quantised,
        cache_dtype="int8" if quantised else "float32",
    )  # fmt: skip
    mesh = explicit_mesh(devices, shape, names)

    def step(inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, pages = ragged_paged_attention(**inputs, **case.options())
            assert jax.typeof(out).sharding.spec == jax.typeof(inputs["q"]).sharding.spec
            assert jax.typeof(pages).sharding.spec == jax.typeof(inputs["pages"]).sharding.spec
            return out, pages

    inputs = make_inputs(case)
    check(case, inputs, *jax.jit(step)(shard(inputs, mesh, heads, kv_heads)))


def test_sharding_that_splits_a_group_is_refused(devices):
    mesh = explicit_mesh(devices[:4], (2, 2), ("kv", "rep"))
    inputs = make_inputs(Case("refused", ((3, 1),), n_heads=8, kv_heads=4, head_dim=16))
    for heads, kv_heads, message in (
        (("kv", "rep"), "kv", "2 KV heads a device"),  # two KV heads a device, and each rep needs one of them
        ("rep", "kv", "sharded over the mesh axes of the KV heads"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda x: ragged_paged_attention(**x, scale=1.0), shard(inputs, mesh, heads, kv_heads))
    mixed = shard(inputs, mesh, "kv", "kv") | dict(pages=shard(inputs, mesh, "kv", None)["pages"])
    with pytest.raises(ValueError, match="same mesh axes"):
        jax.eval_shape(lambda x: ragged_paged_attention(**x, scale=1.0), mixed)
    tokens = shard(inputs, mesh, "kv", "kv") | dict(q=jax.device_put(inputs["q"], NamedSharding(mesh, P("rep", "kv"))))
    with pytest.raises(ValueError, match=r"dimension 1\) only"):
        jax.eval_shape(lambda x: ragged_paged_attention(**x, scale=1.0), tokens)


# --- The cache stays where it is

LAYERS = 3


def unrolled(q, k, v, pages, batch, pages_per_layer):
    for layer in range(LAYERS):
        out, pages = ragged_paged_attention(q, k, v, pages, first_page=layer * pages_per_layer, scale=0.1, **batch)
        q, k, v = q + out, k + out[:, :2], v - out[:, :2]  # the next layer's input comes from this one's output
    return q, pages


def scanned(q, k, v, pages, batch, pages_per_layer):
    def body(carry, layer):
        q, k, v, pages = carry
        out, pages = ragged_paged_attention(q, k, v, pages, first_page=layer * pages_per_layer, scale=0.1, **batch)
        return (q + out, k + out[:, :2], v - out[:, :2], pages), None

    (q, _, _, pages), _ = lax.scan(body, (q, k, v, pages), jnp.arange(LAYERS))
    return q, pages


# jax 0.10 upcasts a whole bfloat16 cache on CPU at each scatter, and every jax a whole float8 cache.
OLD_JAX = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)


@pytest.mark.parametrize(
    "cache_dtype",
    ["float32", "int8", pytest.param("bfloat16", marks=pytest.mark.skipif(OLD_JAX, reason="upcast on CPU"))],
)
def test_cache_is_never_copied(cache_dtype):
    case = Case("layers", ((0, 1), (0, 33), (0, 15)), head_dim=16, cache_dtype=cache_dtype)
    inputs = make_inputs(case)
    pages_per_layer = 2**24 // inputs["pages"][0].size // LAYERS
    poison = -128 if cache_dtype == "int8" else np.nan
    names = ("cache_lengths", "page_table", "row_offsets", "k_scale", "v_scale")
    results = []
    for layers in (unrolled, scanned):
        shape = (LAYERS * pages_per_layer, *inputs["pages"].shape[1:])
        arrays = jax.device_put(inputs | dict(pages=np.full(shape, poison, cache_dtype)))
        arrays = [*(arrays[name] for name in ("q", "k", "v", "pages")), {name: arrays[name] for name in names}]
        cache_bytes = arrays[3].nbytes
        step = jax.jit(layers, static_argnames="pages_per_layer", donate_argnums=3)
        step = step.lower(*arrays, pages_per_layer=pages_per_layer).compile()
        memory = step.memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 30
        out, pages = step(*arrays)
        assert arrays[3].is_deleted()
        results.append((np.asarray(out[:49], np.float32), np.asarray(pages, np.float32)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.isfinite(results[0][0]).all()


# --- Cost follows the lengths


def test_work_follows_actual_lengths():
    """Slots that the loops of plain JAX read, by their trip counts; scripts/bench_attention.py has the seconds."""

    def slots_read(lengths):
        inputs = make_inputs(Case("cost", tuple((n, 1) for n in lengths), n_heads=16, kv_heads=4, page_size=32))
        pages, offsets = inputs["pages"], jnp.asarray(inputs["row_offsets"])
        tiles = xla._cut(1, offsets[1:] - offsets[:-1], inputs["cache_lengths"], offsets, pages, len(lengths), None)
        tile = xla._Tile(*np.asarray(tiles)[: len(lengths)].T)
        small, large = xla._block_sizes(pages)
        return int((tile.n_small * small + tile.n_large * large).sum())

    short, long, one_long = (slots_read(lengths) for lengths in (8 * (50,), 8 * (2000,), (2000, *7 * (50,))))
    assert 8 * 51 <= short <= 8 * 128 and 8 * 2001 <= long <= 8 * 2112
    assert one_long == (long + 7 * short) // 8


# --- Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(12, 4)), r"q must be \[T, N, H\].*given q \(12, 4\)"),
        (dict(k=(11, 2, 16)), r"k \(11, 2, 16\)"),
        (dict(v=(12, 2, 8)), r"v \(12, 2, 8\)"),
        (dict(q=(12, 5, 16)), "query heads must be a multiple of the KV heads"),
        (dict(pages=(8, 4, 16, 32)), "K = 2 KV heads"),
        (dict(pages=(8, 2, 16, 31)), "W >= 32 lanes"),
        (dict(pages=(8, 2, 16, 2, 16)), r"pages \(8, 2, 16, 2, 16\)"),
        (dict(row_offsets=(3,)), r"row_offsets \[S \+ 1\]; given cache_lengths \(3,\)"),
        (dict(page_table=(4, 5)), r"page_table \(4, 5\)"),
        (dict(cache_lengths=(3, 1)), r"cache_lengths \(3, 1\)"),
        (dict(cache_lengths=jnp.float32), "cache_lengths must be int32, not float32"),
        (dict(page_table=jnp.int16), "page_table must be int32, not int16"),
        (dict(pages=jnp.int16), "pages must be of float32, .*int8, float8_e4m3fn; given int16"),
        (dict(q=jnp.bfloat16), "one dtype, of .*given q bfloat16, k float32, v float32"),
        (dict(v=jnp.bfloat16), "one dtype, of .*v bfloat16"),
        (dict(q=jnp.int8, k=jnp.int8, v=jnp.int8), "of float32, bfloat16, float16; given q int8"),
        (dict(pages=jnp.int8), "int8 pages need both k_scale and v_scale; given neither"),
        (dict(pages=jnp.int8, v_scale=jnp.ones(2)), "int8 pages need both .*given v_scale"),
        (dict(pages=jnp.float8_e4m3fn, k_scale=jnp.ones(2)), "float8_e4m3fn pages need both .*given k_scale"),
        (dict(k_scale=jnp.ones(2), v_scale=jnp.ones(2)), "scales belong to pages of int8 or float8_e4m3fn; given "
         "k_scale and v_scale for float32"),
        (dict(pages=jnp.int8, k_scale=jnp.ones(4), v_scale=jnp.ones(2)), r"k_scale must be float32\[2\].*float32\[4\]"),
        (dict(sinks=jnp.ones(2)), r"sinks must be float32\[4\].*float32\[2\]"),
        (dict(sinks=jnp.ones(4, jnp.bfloat16)), r"sinks must be float32\[4\].*bfloat16\[4\]"),
        (dict(page_table=(3, 0)), r"a page at least; given .*page_table \(3, 0\)"),
        (dict(sliding_window=0), "sliding_window must be at least 1"),
        (dict(soft_cap=0.0), "soft_cap must be positive"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    arguments = dict(
        q=jax.ShapeDtypeStruct((12, 4, 16), jnp.float32),
        k=jax.ShapeDtypeStruct((12, 2, 16), jnp.float32),
        v=jax.ShapeDtypeStruct((12, 2, 16), jnp.float32),
        pages=jax.ShapeDtypeStruct((8, 2, 16, 32), jnp.float32),
        cache_lengths=jax.ShapeDtypeStruct((3,), jnp.int32),
        page_table=jax.ShapeDtypeStruct((3, 5), jnp.int32),
        row_offsets=jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    options = dict(scale=1.0)
    for name, value in change.items():
        if name not in arguments or isinstance(value, jax.Array):
            options[name] = value
        elif isinstance(value, tuple):
            arguments[name] = jax.ShapeDtypeStruct(value, arguments[name].dtype)
        else:
            arguments[name] = jax.ShapeDtypeStruct(arguments[name].shape, value)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: ragged_paged_attention(**x, **options), arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cache_lengths=[40, 10]), r"sequence 0 comes to 41 tokens \(40 in the cache, 1 new\); 2 pages of 16"),
        (dict(cache_lengths=[-1, 10]), "cache_lengths must not be negative; given -1 for sequence 0"),
        (dict(page_table=[[0, 1], [2, 8]]), r"sequence 1 needs page row 9 \(first_page 1.*rows 0 to 8"),
        (dict(page_table=[[0, -2], [2, 3]]), "sequence 0 needs page row -1"),
        (dict(row_offsets=[1, 1, 4]), r"must ascend from 0 to at most the 4 tokens.*given \[1 1 4\]"),
        (dict(row_offsets=[0, 2, 1]), r"must ascend from 0"),
        (dict(row_offsets=[0, 1, 5]), r"at most the 4 tokens"),
    ],
    ids=str,
)
def test_numbers_are_looked_at_outside_jit(change, message):
    x = jnp.zeros((4, 2, 16))
    batch = dict(cache_lengths=[20, 14], page_table=[[0, 1], [2, 3]], row_offsets=[0, 1, 4])

    def call(batch):
        batch = {name: np.array(numbers, np.int32) for name, numbers in batch.items()}
        return ragged_paged_attention(x, x, x, jnp.zeros((9, 2, 16, 32)), **batch, first_page=1, scale=1.0)

    call(batch)
    call(batch | dict(cache_lengths=[20, -7], row_offsets=[0, 1, 1]))  # a sequence without new tokens needs nothing
    with pytest.raises(ValueError, match=message):
        call(batch | change)


def test_pages_left_behind_by_the_window_are_not_looked_at():
    x = jnp.zeros((1, 2, 16))
    batch = np.array([40], np.int32), np.array([[99, 1, 2]], np.int32), np.array([0, 1], np.int32)
    ragged_paged_attention(x, x, x, jnp.zeros((9, 2, 16, 32)), *batch, scale=1.0, sliding_window=25)
    with pytest.raises(ValueError, match="needs page row 99"):
        ragged_paged_attention(x, x, x, jnp.zeros((9, 2, 16, 32)), *batch, scale=1.0, sliding_window=26)


# --- The choice of implementation


@dataclasses.dataclass(frozen=True)
class Told:
    """Tells its options and the local shapes of sinks and scales that reach it."""

    name: str

    def __call__(self, q, k, v, pages, *arrays, **options):
        first_page, per_head = arrays[3], arrays[4:]
        assert first_page.dtype == jnp.int32 and first_page.shape == ()
        raise RuntimeError(self.name, jax.tree.map(jnp.shape, per_head), options)


def test_implementation_is_called_with_what_the_contract_says(devices):
    case = Case("told", ((3, 1),), n_heads=8, sinks=True, cache_dtype="int8", sliding_window=5, soft_cap=2.0)
    inputs = make_inputs(case)
    with pytest.raises(RuntimeError) as error:
        attend(**inputs, **case.options(), implementation=Told("one"))
    assert error.value.args == ("one", ((8,), (2,), (2,)), case.options())
    mesh = explicit_mesh(devices, (2, 4), ("kv", "rep"))
    sharded = shard(inputs, mesh, ("kv", "rep"), "kv")
    with pytest.raises(RuntimeError) as error:
        attend(**sharded, **case.options(), implementation=Told("two"))
    assert error.value.args == ("two", ((1,), (1,), (1,)), case.options())


@requires_libtpu
def test_implementation_is_chosen_by_the_platform_compiled_for(devices, monkeypatch):
    asked = []
    choose = lambda device, dtype: asked.append(device) or (Told(device.platform), "")  # noqa: E731
    monkeypatch.setattr(api, "choose_implementation", choose)
    tpu = topologies.get_topology_desc("v6e:2x2", platform="tpu").devices
    for mesh in (explicit_mesh(devices[:2], (2,), ("model",)), explicit_mesh(tpu[:2], (2,), ("model",)), None):
        inputs = make_inputs(Case("told", ((3, 1),)))
        if mesh is not None:
            sharding = NamedSharding(mesh.abstract_mesh, P(None, "model"))
            inputs = {name: x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                      if name in ("q", "k", "v", "pages") else x for name, x in inputs.items()}  # fmt: skip
        with pytest.raises(RuntimeError):
            jax.eval_shape(lambda x: ragged_paged_attention(**x, scale=1.0), inputs)
    assert [device.platform for device in asked] == ["cpu", "tpu", jax.default_backend()]
    assert asked[1].device_kind == "TPU v6 lite"


def test_the_choice_and_its_reason(monkeypatch):
    def choose(platform, kind, dtype=jnp.bfloat16):
        return api.choose_implementation(types.SimpleNamespace(platform=platform, device_kind=kind), jnp.dtype(dtype))

    assert choose("cpu", "cpu") == (Xla(), "")
    assert choose("tpu", "TPU v6 lite", jnp.float32) == (MosaicTpu(), "")
    implementation, why = choose("gpu", "NVIDIA A100-SXM4-40GB")
    assert implementation == Xla() and "this is NVIDIA A100-SXM4-40GB" in why
    monkeypatch.setattr(mosaic_gpu, "supported", lambda: True)
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20-3e"):
        assert choose("gpu", kind) == (mosaic_gpu.MosaicGpu(), "")
    implementation, why = choose("gpu", "NVIDIA H200", jnp.float32)
    assert implementation == Xla() and "float32" in why
    monkeypatch.setattr(mosaic_gpu, "supported", lambda: False)
    implementation, why = choose("gpu", "NVIDIA H200")
    assert implementation == Xla() and "needs jax 0.11.2 or newer" in why and f"this is {jax.__version__}" in why


@pytest.mark.parametrize("wrong", ["mosaic_tpu", MosaicTpu], ids=["name", "class"])
def test_what_is_no_implementation_is_refused(wrong):
    inputs = make_inputs(CASES[0])
    with pytest.raises(ValueError, match=r"an object such as Xla\(\) or MosaicTpu\(\), .* given .*(mosaic|Mosaic)"):
        ragged_paged_attention(**inputs, **CASES[0].options(), implementation=wrong)


def test_check_can_fail():
    case = dataclasses.replace(CASES[0], name="failing")
    inputs = make_inputs(case)
    out, pages = map(np.array, attend(**inputs, **case.options()))
    check(case, inputs, out, pages)
    wrong = out.copy()
    wrong[0, 0, 0] += 1e-3
    with pytest.raises(AssertionError):
        check(case, inputs, wrong, pages)
    unused = np.argwhere(np.isnan(pages).all(axis=(1, 2, 3)))[0, 0]
    pages[unused, 0, 0, 0] = 1.0
    with pytest.raises(AssertionError):
        check(case, inputs, out, pages)
