"""The cache's measures and bytes, and the two ways to hand out its pages."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

from maxlike.kernels.paged_attention import Xla, reference
from maxlike.mesh import ShardingRules, make_mesh
from maxlike.nn.kv_cache import (
    ContinuousBatchingKVCacheCollection,
    FetchContinuousBatchingKVCacheCollection,
    FetchPagedKVCacheCollection,
    KVCacheParams,
    KVCacheStrategy,
    KVScales,
    PagedKVCacheCollection,
)
from tests.tpu_compile import requires_libtpu, topology_mesh

PAGED = KVCacheParams(jnp.float32, n_kv_heads=2, head_dim=8, n_layers=3, page_size=4)
CONTINUOUS = KVCacheParams(jnp.float32, 2, 8, 3, 4, KVCacheStrategy.CONTINUOUS, max_seq_len=10)

ONES = KVScales(3 * ((1.0, 1.0),), 3 * ((1.0, 1.0),))

# --- Measures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *((dict([(name, 0)]), f"{name} must be at least 1; got 0")
          for name in ("n_kv_heads", "head_dim", "n_layers", "page_size")),
        (dict(max_seq_len=64), "max_seq_len=64 with 'paged'"),
        (dict(cache_strategy=KVCacheStrategy.CONTINUOUS), "max_seq_len=None with 'continuous'"),
        (dict(cache_strategy="continuous"), "max_seq_len=None with 'continuous'"),
        (dict(cache_strategy="continuous", max_seq_len=0), "max_seq_len must be at least 1; got 0"),
        (dict(cache_strategy="contiguous"), "one of paged, continuous; got 'contiguous'"),
        (dict(dtype="float7"), "must name a dtype; got 'float7'"),
        (dict(dtype="int32"), "one of float32, bfloat16, float16, int8, float8_e4m3fn; got int32"),
        (dict(dtype="int8"), r"int8 cache needs KVCacheParams.scales: calibrate\("),
        (dict(scales=ONES), "scales belong to a cache of int8 or float8_e4m3fn; got float32"),
        (dict(dtype="int8", n_layers=2, scales=ONES), "of 3 layers with 2 KV heads; the cache has 2 with 2"),
        (dict(dtype=jnp.float8_e4m3fn, n_kv_heads=1, scales=ONES), "of 3 layers with 2 KV heads; .* has 3 with 1"),
    ],
    ids=str,
)  # fmt: skip
def test_params_that_mean_nothing(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCacheParams(**dict(dtype=jnp.float32, n_kv_heads=2, head_dim=8, n_layers=3) | wrong)


def test_params_are_equal_however_they_are_spelt() -> None:
    one = KVCacheParams(jnp.bfloat16, 2, 8, 3, cache_strategy=KVCacheStrategy.CONTINUOUS, max_seq_len=5)
    other = KVCacheParams("bfloat16", 2, 8, 3, cache_strategy="continuous", max_seq_len=5)
    assert one == other and hash(one) == hash(other)
    one = KVCacheParams(jnp.int8, 2, 8, 1, scales=KVScales(k=((1.0, 2.0),), v=((1.0, 3.0),)), implementation=Xla())
    other = KVCacheParams("int8", 2, 8, 1, scales=KVScales([[1, np.float32(2)]], np.array([[1, 3]])),
                          implementation=Xla())  # fmt: skip
    assert one == other and hash(one) == hash(other)
    assert [strategy.value for strategy in KVCacheStrategy] == ["paged", "continuous"]


@pytest.mark.parametrize(
    ("head_dim", "platform", "lanes"),
    [(8, "cpu", 16), (8, "gpu", 16), (8, "tpu", 128), (64, "tpu", 128), (80, "tpu", 256), (80, "cpu", 160),
     (128, "tpu", 256), (256, "tpu", 512)],
)  # fmt: skip
def test_shape(head_dim: int, platform: str, lanes: int) -> None:
    assert KVCacheParams(jnp.bfloat16, 4, head_dim, 3, 32).shape(10, platform) == (30, 4, 32, lanes)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ([[1.0]], [[1.0], [1.0]], "1 and 2 layers"),
        ([[1.0]], [[1.0, 2.0]], r"1 layers of \[1, 2\] KV heads"),
        ([], [], "0 and 0 layers"),
        ([[1.0, 0.0]], [[1.0, 2.0]], r"KVScales.k\[0\] has 0.0"),
        ([[1.0], [1.0]], [[1.0], [-2.0]], r"KVScales.v\[1\] has -2.0"),
        ([[float("inf")]], [[1.0]], "has inf"),
        ([[1.0]], [[float("nan")]], "has nan"),
    ],
)
def test_scales_that_mean_nothing(k: Any, v: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVScales(k, v)


def test_pages_for() -> None:
    assert [PAGED.pages_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("n_devices", "n_kv_heads"), [(1, 2), (2, 2), (4, 2), (8, 8), (8, 1)])
def test_bytes_are_those_that_are_allocated(devices: list[jax.Device], n_devices: int, n_kv_heads: int,
                                            dtype: Any) -> None:
    params = KVCacheParams(dtype, n_kv_heads, 16, 3, page_size=8)
    mesh = make_mesh(devices[:n_devices], n_heads=8, n_kv_heads=n_kv_heads)
    pages = params.allocate(7, mesh)
    assert pages.shape == params.shape(7, "cpu") and pages.dtype == dtype and not pages.any()
    assert pages.sharding == params.sharding(mesh) == NamedSharding(mesh, P(None, mesh.axis_names[0], None, None))
    per_page = params.bytes_per_page(mesh)
    assert per_page == 3 * 8 * 2 * 16 * jnp.dtype(dtype).itemsize * n_kv_heads // min(n_devices, n_kv_heads)
    assert {shard.data.nbytes for shard in pages.addressable_shards} == {7 * per_page}
    assert len(pages.addressable_shards) == n_devices
    assert [params.pages_within(b, mesh) for b in (7 * per_page - 1, 7 * per_page, 0)] == [6, 7, 0]


@requires_libtpu
def test_bytes_on_tpu_count_the_padding() -> None:
    mesh = topology_mesh("v5e:2x2", {"model": 4})
    assert KVCacheParams(jnp.bfloat16, 4, 80, 3, 16).bytes_per_page(mesh) == 3 * 16 * 256 * 2
    assert KVCacheParams(jnp.bfloat16, 4, 64, 3, 16).bytes_per_page(mesh) == 3 * 16 * 128 * 2


def test_the_cache_follows_the_models_rules(devices: list[jax.Device]) -> None:
    rules = ShardingRules(kv_heads=())
    params = KVCacheParams(jnp.float32, 3, 8, 1, rules=rules)
    mesh = make_mesh(devices[:2])
    assert params.sharding(mesh).spec == P(None, None, None, None)
    assert params.bytes_per_page(mesh) == 3 * 64 * 16 * 4
    with pytest.raises(ValueError, match=r"'kv_heads' of size 3 .* not divisible"):
        KVCacheParams(jnp.float32, 3, 8, 1).allocate(1, mesh)


# --- A step's numbers -------------------------------------------------------------------------------------------

CHECKS = [
    (PAGED, [0, 7], [[0, 1], [2, 3]], [8, 1], None),
    (PAGED, [0, 8], [[0, 1], [2, 3]], [1, 1], "Sequence 1 grows to 9 tokens, 3 pages of 4; its row .* has 2"),
    (PAGED, [8, 0], [[0, 1], [-5, 99]], [0, 0], None),  # no new tokens: nothing is looked at
    (PAGED, [-1], [[0]], [0], r"cache_lengths\[0\] is -1"),
    (PAGED, [3, 4], [[0, 99], [1, 6]], [1, 1], r"Sequence 1 needs pages \[1, 6\]; the cache has 0 to 5"),
    (PAGED, [3, 4], [[0, 99], [-1, 5]], [1, 1], r"Sequence 1 needs pages \[-1, 5\]"),
    (CONTINUOUS, [10, 0], [[0, 99], [3, 99]], [0, 10], None),
    (CONTINUOUS, [0, 12], [[0], [3]], [1, 1], "Sequence 1 grows to 13 tokens, 4 pages of 4; its slot has 3"),
    (CONTINUOUS, [8], [[4]], [1], r"Sequence 0 needs pages \[4, 5, 6\]; the cache has 0 to 5"),
    (CONTINUOUS, [0], [[5]], [4], None),
]


@pytest.mark.parametrize(("params", "lengths", "table", "new", "message"), CHECKS)
def test_steps_that_do_not_fit_the_cache(params: KVCacheParams, lengths: list[int], table: list[list[int]],
                                         new: list[int], message: str | None) -> None:
    arguments = 6, np.array(lengths), np.array(table), np.array(new)
    if message is None:
        params.check_step(*arguments)
    else:
        with pytest.raises(ValueError, match=message):
            params.check_step(*arguments)


# --- Collections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "lengths", "table", "message"),
    [
        (np.zeros((6, 2, 4, 15)), [0], [[0]], r"\(6, 2, 4, 15\).*\(6, 2, 4, 16\)"),
        (np.zeros((7, 2, 4, 16)), [0], [[0]], r"\(7, 2, 4, 16\)"),
        (np.zeros((6, 1, 4, 16)), [0], [[0]], r"\(6, 1, 4, 16\)"),
        (np.zeros((6, 2, 8, 16)), [0], [[0]], r"\(6, 2, 8, 16\)"),
        (np.zeros((6, 2, 4, 16), np.int32), [0], [[0]], "dtype int32"),
        (np.zeros((2, 4, 16)), [0], [[0]], r"\(2, 4, 16\)"),
        (np.zeros((6, 2, 4, 16)), [0, 0], [[0]], r"shapes \(2,\) and \(1, 1\)"),
        (np.zeros((6, 2, 4, 16)), [[0]], [[0]], r"shapes \(1, 1\) and \(1, 1\)"),
        (np.zeros((6, 2, 4, 16)), [0], [0], r"shapes \(1,\) and \(1,\)"),
    ],
)
@pytest.mark.parametrize(
    "fetch", [FetchPagedKVCacheCollection(PAGED), FetchContinuousBatchingKVCacheCollection(CONTINUOUS)],
    ids=["paged", "continuous"],
)  # fmt: skip
def test_inputs_that_are_not_this_cache(fetch: Any, pages: np.ndarray, lengths: Any, table: Any,
                                        message: str) -> None:
    pages = pages.astype(np.float32) if pages.dtype == np.float64 else pages
    with pytest.raises(ValueError, match=message):
        fetch(jnp.asarray(pages), np.array(lengths), np.array(table))


def test_lanes_may_be_padded() -> None:
    fetched = FetchPagedKVCacheCollection(PAGED)(jnp.zeros((6, 2, 4, 128)), np.zeros(1), np.zeros((1, 2)))
    assert type(fetched) is PagedKVCacheCollection
    assert fetched.cache_lengths.dtype == fetched.page_table.dtype == jnp.int32


def test_each_strategy_has_its_constructor() -> None:
    with pytest.raises(ValueError, match="needs KVCacheParams with cache_strategy='continuous'; got 'paged'"):
        FetchContinuousBatchingKVCacheCollection(PAGED)
    with pytest.raises(ValueError, match="needs KVCacheParams with cache_strategy='paged'; got 'continuous'"):
        FetchPagedKVCacheCollection(CONTINUOUS)


def test_a_slot_is_consecutive_pages() -> None:
    fetch = FetchContinuousBatchingKVCacheCollection(CONTINUOUS)
    collection = fetch(jnp.zeros((27, 2, 4, 16)), np.array([5, 0]), np.array([[6, -1, 99], [0, 7, 7]]))
    assert type(collection) is ContinuousBatchingKVCacheCollection
    np.testing.assert_array_equal(collection.page_table, [[6, 7, 8], [0, 1, 2]])  # ten tokens are three pages of four
    assert isinstance(collection, PagedKVCacheCollection)


@pytest.mark.parametrize("params", [PAGED, CONTINUOUS], ids=["paged", "continuous"])
def test_collections_are_trees(params: KVCacheParams) -> None:
    fetch = FetchPagedKVCacheCollection if params == PAGED else FetchContinuousBatchingKVCacheCollection
    collection = fetch(params)(jnp.zeros((27, 2, 4, 16)), np.array([5]), np.array([[0]]))
    leaves, treedef = jax.tree.flatten(collection)
    assert len(leaves) == 3
    again = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))(collection)
    assert type(again) is type(collection) and again.params == params
    assert jax.tree.structure(again) == treedef


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("strategy", "traced"), [(KVCacheStrategy.PAGED, True), (KVCacheStrategy.CONTINUOUS, False)],
    ids=["paged-traced", "continuous-static"],
)  # fmt: skip
def test_attending_writes_to_its_own_layer_and_reads_from_it(devices: list[jax.Device], strategy: KVCacheStrategy,
                                                             traced: bool, cache_dtype: str) -> None:
    paged = strategy == KVCacheStrategy.PAGED
    params = PAGED if paged else CONTINUOUS
    fetch = FetchPagedKVCacheCollection if paged else FetchContinuousBatchingKVCacheCollection
    mesh, layer, n_pages, rng = make_mesh(devices[:2]), 1, 9, np.random.default_rng(0)
    scales: dict[str, Any] = {}
    # The other layers' pages are NaN: reading them, or writing to them, shows.
    before: Any = np.full(params.shape(n_pages, "cpu"), np.nan, np.float32)
    if cache_dtype == "float32":
        before[layer * n_pages : (layer + 1) * n_pages] = rng.standard_normal((n_pages, 2, 4, 16))
    else:  # there is no NaN, but the other layers' scales would show
        before = rng.integers(-127, 128, before.shape).astype(np.int8)
        k_scale, v_scale = rng.uniform(0.01, 0.03, (2, 3, 2)).astype(np.float32)
        params = replace(params, dtype="int8", scales=KVScales(k_scale, v_scale))
        scales = dict(k_scale=k_scale[layer], v_scale=v_scale[layer])
    q, k, v = (rng.standard_normal((8, n, 8)).astype(np.float32) for n in (4, 2, 2))
    lengths, offsets = np.array([6, 0], np.int32), np.array([0, 1, 5], np.int32)
    table = np.array([[4, 7, 2], [0, 5, 1]] if paged else [[3], [6]], np.int32)
    sinks = np.float32([1, -2, 0, 3])

    @partial(jax.jit, static_argnums=() if traced else (0,), donate_argnums=1)
    def attend(layer: Any, pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        collection = fetch(params)(pages, lengths, table)
        return collection.attend(q, k, v, layer, jnp.asarray(offsets), scale=0.3, sliding_window=5, soft_cap=4.0,
                                 sinks=jnp.asarray(sinks))

    heads = NamedSharding(mesh, P(None, "model", None))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out, after = attend(layer, jax.device_put(before, params.sharding(mesh)),
                            *(jax.device_put(x, heads) for x in (q, k, v)))
    assert type(after) is type(fetch(params)(jnp.asarray(before), lengths, table))
    pages_of = table if paged else table + np.arange(3)
    expected, pages = reference.ragged_paged_attention(q, k, v, before, lengths, pages_of, offsets,
                                                       first_page=layer * n_pages, scale=0.3, sliding_window=5,
                                                       soft_cap=4.0, sinks=sinks, **scales)
    np.testing.assert_allclose(np.asarray(out)[:5], expected[:5], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(after.pages), pages)
    np.testing.assert_array_equal(after.cache_lengths, lengths)
    assert out.sharding == heads and after.pages.sharding == params.sharding(mesh)


@dataclass(frozen=True)
class Refusing:
    """An implementation that says that it was asked."""

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        raise RuntimeError("asked")


def test_the_params_choose_the_implementation() -> None:
    params = replace(PAGED, implementation=Refusing())
    collection = FetchPagedKVCacheCollection(params)(jnp.zeros((6, 2, 4, 16)), np.zeros(1), np.zeros((1, 2)))
    x = jnp.zeros((1, 2, 8))
    with pytest.raises(RuntimeError, match="asked"):
        collection.attend(x, x, x, 0, jnp.array([0, 1]), scale=1.0)


def test_errors_name_the_params() -> None:
    with pytest.raises(ValueError, match=re.escape("Make it with KVCacheParams.allocate")):
        FetchPagedKVCacheCollection(PAGED)(jnp.zeros((1, 1, 1, 1)), np.zeros(1), np.zeros((1, 1)))
