"""The transformer's surface, and its numbers in every form of execution against a plain account of them."""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import Mesh

from maxlike import nn
from maxlike.mesh import DeviceRef, make_mesh
from maxlike.nn import ReturnLogits, kv_cache
from maxlike.nn.kv_cache import KVCacheStrategy
from maxlike.nn.transformer import distributed_transformer
from maxlike.nn.transformer.distributed_transformer import (
    DistributedTransformer,
    DistributedTransformerBlock,
    ShardableCallable,
    distribute_value,
    forward_sharded_layers,
    take,
)
from maxlike.nn.transformer.segments import named_parameters
from tests.nn.transformer.tiny import (
    ROOM,
    STEPS,
    Tiny,
    abstract,
    build,
    check_served,
    garbage_cache,
    page_table,
    plain_logits,
    ragged,
    sequences,
)

PAGED, CONTINUOUS = KVCacheStrategy.PAGED, KVCacheStrategy.CONTINUOUS
SMALL = Tiny()

# --- The surface ------------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Each parameter's default, in order; `...` where there is none."""
    return {name: ... if p.default is p.empty else p.default
            for name, p in inspect.signature(getattr(function, "__init__", function) if inspect.isclass(function)
                                             else function).parameters.items() if name != "self"}


def test_the_public_names_and_their_parameters() -> None:
    assert list(parameters(DistributedTransformer).items()) == [
        ("dim", ...), ("n_heads", ...), ("layers", ...), ("norm", ...), ("output", ...), ("embedding", ...),
        ("kv_params", ...), ("kv_collection_constructor", ...), ("devices", ...), ("rope", ...),
        ("return_logits", ReturnLogits.LAST_TOKEN), ("use_subgraphs", False), ("subgraph_layer_groups", None),
    ]  # fmt: skip
    assert list(parameters(DistributedTransformer.__call__).items()) == [
        ("tokens", ...), ("kv_cache_inputs", ...), ("return_n_logits", ...), ("input_row_offsets", ...),
    ]  # fmt: skip
    assert list(parameters(DistributedTransformerBlock).items()) == [
        ("attention", ...), ("mlp", ...), ("attention_norm", ...), ("mlp_norm", ...), ("devices", ...),
        ("distributed_gemm_config", None),
    ]  # fmt: skip
    assert parameters(distribute_value) == {"v": ..., "devices": ...}
    assert parameters(forward_sharded_layers) == {"layers": ..., "xs": ...}
    assert parameters(take) == {"it": ..., "n": ...}
    assert parameters(nn.DistributedGemmConfig) == {"enable_matmul_allreduce": False}
    assert issubclass(DistributedTransformer, nnx.Module) and issubclass(DistributedTransformerBlock, nnx.Module)
    assert set(distributed_transformer.__all__) >= {
        "DistributedTransformer", "DistributedTransformerBlock", "ShardableCallable", "distribute_value",
        "forward_sharded_layers", "take",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((nn, name) for name in (
            "ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "RMSNorm", "RotaryEmbedding",
            "AttentionWithRope", "MLP", "ReturnLogits", "DistributedGemmConfig", "DeviceRef")),
        *((kv_cache, name) for name in (
            "KVCacheParams", "KVCacheStrategy", "PagedKVCacheCollection", "ContinuousBatchingKVCacheCollection",
            "FetchPagedKVCacheCollection", "FetchContinuousBatchingKVCacheCollection")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_companions(module: Any, name: str) -> None:
    assert inspect.isclass(getattr(module, name)) and getattr(module, name).__doc__


def test_return_logits_has_three_modes() -> None:
    assert [mode.name for mode in ReturnLogits] == ["LAST_TOKEN", "VARIABLE", "ALL"]


def test_take() -> None:
    it = iter(range(5))
    assert (take(it, 2), take(it, 0), take(it, 2), take(it, 2), take(it, 2)) == ([0, 1], [], [2, 3], [4], [])
    assert take([7, 8, 9], 2) == [7, 8]


def test_forward_sharded_layers() -> None:
    assert forward_sharded_layers([lambda x: x + 1, lambda x: 2 * x], [10, 20]) == [11, 40]
    assert forward_sharded_layers([], []) == []
    with pytest.raises(AssertionError, match=r"3\b.*\b2\b"):
        forward_sharded_layers([abs, abs], [1, 2, 3])


def test_distribute_value(devices: list[jax.Device]) -> None:
    mesh = make_mesh(devices[:4])
    for given, where in [
        ([DeviceRef.CPU(3), DeviceRef.CPU(0)], [devices[3], devices[0]]),
        (devices[:2], devices[:2]),
        (mesh, list(mesh.devices.flat)),
    ]:
        copies = distribute_value(np.arange(3), given)
        assert [copy.devices() for copy in copies] == [{device} for device in where]
        assert all((np.asarray(copy) == [0, 1, 2]).all() for copy in copies)
    (tree,) = distribute_value({"a": np.ones(2), "b": 3}, [DeviceRef.CPU(5)])
    assert tree["a"].devices() == tree["b"].devices() == {devices[5]} and int(tree["b"]) == 3


def test_shardable_callable(devices: list[jax.Device]) -> None:
    common: dict[str, Any] = dict(dtype=jnp.float32, devices=make_mesh(devices[:2]), rngs=nnx.Rngs(0))
    model = abstract(SMALL, devices[:1])
    block = model.segments[0].layers[0]
    for layer in (nn.ColumnParallelLinear(4, 4, **common), nn.RMSNorm(4, **common), model.embedding, model.output,
                  model.norm, block.mlp, block.mlp.down_proj):
        assert isinstance(layer, ShardableCallable)

    class NoSpecs:
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    class NoCall:
        def partition_specs(self) -> dict[str, P]:
            return {}

    assert not isinstance(NoSpecs(), ShardableCallable) and not isinstance(NoCall(), ShardableCallable)
    assert not isinstance(jax.nn.silu, ShardableCallable)


@pytest.mark.parametrize("use_subgraphs", [False, True])
def test_partition_specs(devices: list[jax.Device], use_subgraphs: bool) -> None:
    specs = abstract(Tiny(), devices, use_subgraphs=use_subgraphs).partition_specs()
    both = ("kv", "rep")  # two KV heads on eight devices: the factored axis
    expected = {
        "embedding.weight": P(both, None), "output.weight": P(both, None), "norm.weight": P(None),
    }  # fmt: skip
    layer = {
        "attention.q_proj.weight": P(both, None), "attention.k_proj.weight": P("kv", None),
        "attention.v_proj.weight": P("kv", None), "attention.o_proj.weight": P(None, both),
        "mlp.gate_proj.weight": P(both, None), "mlp.up_proj.weight": P(both, None),
        "mlp.down_proj.weight": P(None, both), "attention_norm.weight": P(None), "mlp_norm.weight": P(None),
    }  # fmt: skip
    for i in range(1 if use_subgraphs else 2):
        for name, spec in layer.items():
            expected[f"segments.0.layers.{i}.{name}"] = P(None, *spec) if use_subgraphs else spec
    assert specs == expected


def test_devices_may_be_a_list_for_every_part() -> None:
    two = [DeviceRef.CPU(0), DeviceRef.CPU(1)]

    def make() -> DistributedTransformer:
        common: dict[str, Any] = dict(dtype=jnp.float32, devices=two, rngs=nnx.Rngs(0))
        block = DistributedTransformerBlock(nn.AttentionWithRope(4, 2, 16, 8, **common), nn.MLP(16, 32, **common),
                                            nn.RMSNorm(16, **common), nn.RMSNorm(16, **common), two)
        params = nn.KVCacheParams(jnp.float32, 2, 8, 1)
        return DistributedTransformer(
            16, 4, [block], nn.RMSNorm(16, **common),
            nn.ColumnParallelLinear(16, 11, out_axis="vocab", gather_output=True, **common),
            nn.VocabParallelEmbedding(11, 16, **common), params, kv_cache.FetchPagedKVCacheCollection(params), two,
            nn.RotaryEmbedding(8))  # fmt: skip

    assert dict(nnx.eval_shape(make).mesh.shape) == {"model": 2}


# --- The numbers, in every form of execution --------------------------------------------------------------------

# Every pair of choices, among the forms that run by default: (devices, KV heads) -> scanned, cache, gemm config.
COVERING = {
    (1, 8): (True, CONTINUOUS, True), (1, 2): (False, PAGED, False), (1, 1): (True, PAGED, True),
    (2, 8): (False, CONTINUOUS, False), (2, 2): (True, PAGED, True), (2, 1): (False, CONTINUOUS, True),
    (4, 8): (True, PAGED, False), (4, 2): (False, CONTINUOUS, True), (4, 1): (True, CONTINUOUS, False),
    (8, 8): (False, PAGED, True), (8, 2): (True, CONTINUOUS, False), (8, 1): (False, PAGED, False),
}  # fmt: skip
FORMS = [(n, kv_heads, *form) for n, kv_heads in COVERING
         for form in itertools.product((False, True), (PAGED, CONTINUOUS), (False, True))]


@pytest.mark.parametrize(
    ("n_devices", "n_kv_heads", "use_subgraphs", "strategy", "gemm"),
    [pytest.param(*form, marks=[] if COVERING[form[:2]] == form[2:] else pytest.mark.exhaustive) for form in FORMS],
)
def test_all_forms_give_the_plain_logits(devices: list[jax.Device], n_devices: int, n_kv_heads: int,
                                         use_subgraphs: bool, strategy: KVCacheStrategy, gemm: bool) -> None:
    tiny = Tiny(n_kv_heads=n_kv_heads)
    check_served(tiny, build(tiny, devices[:n_devices], use_subgraphs=use_subgraphs, strategy=strategy, gemm=gemm))
    jax.clear_caches()  # no other form runs these programs, and there are many


@pytest.mark.parametrize(
    ("n_heads", "n_devices"),
    [(6, 1), (6, 3), pytest.param(3, 3, marks=pytest.mark.slow), pytest.param(6, 6, marks=pytest.mark.slow)],
)
def test_three_kv_heads(devices: list[jax.Device], n_heads: int, n_devices: int) -> None:
    tiny = Tiny(n_heads=n_heads, n_kv_heads=3)
    check_served(tiny, build(tiny, devices[:n_devices], use_subgraphs=True))


@pytest.mark.parametrize("n_heads", [3, 6])
@pytest.mark.parametrize("n_devices", [2, 4, 8])
def test_three_kv_heads_refuse_other_sizes(devices: list[jax.Device], n_heads: int, n_devices: int) -> None:
    legal = {3: "1, 3", 6: "1, 3, 6"}[n_heads]
    with pytest.raises(ValueError, match=f"size {n_devices} .*{n_heads} heads and 3 KV heads.*Legal sizes: {legal}\\."):
        make_mesh(devices[:n_devices], n_heads=n_heads, n_kv_heads=3)
    with pytest.raises(ValueError, match=f"size {n_devices} .*Legal sizes: {legal}\\."):
        nn.AttentionWithRope(n_heads, 3, 32, 8, jnp.float32, devices[:n_devices], rngs=nnx.Rngs(0))


@pytest.mark.parametrize("n_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("n_kv_heads", [8, 2, 1])
def test_the_mesh_is_factored_where_there_are_fewer_kv_heads(devices: list[jax.Device], n_kv_heads: int,
                                                             n_devices: int) -> None:
    mesh = make_mesh(devices[:n_devices], n_heads=8, n_kv_heads=n_kv_heads)
    factored = {"kv": n_kv_heads, "rep": n_devices // n_kv_heads}
    assert dict(mesh.shape) == (factored if n_devices > n_kv_heads else {"model": n_devices})


def test_interleaved_windows_scanned_and_direct(devices: list[jax.Device]) -> None:
    # A scan of two periods, a layer in no group, and a scan of a run; ropes and windows differ along the way.
    tiny = Tiny(windows=(3, None, 3, None, 2, 3, 3))
    groups = [[0, 2, 5, 6], [3, 1]]
    model = build(tiny, devices[:2], use_subgraphs=True, groups=groups)
    assert [type(segment).__name__ for segment in model.segments] == [
        "ScannedSegment", "DirectSegment", "ScannedSegment"]  # fmt: skip
    check_served(tiny, model)


# --- Which logits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_four(devices: list[jax.Device]) -> Callable[[ReturnLogits], DistributedTransformer]:
    """A model over a factored mesh, by the logits that it returns."""
    return partial(lambda mode: build(SMALL, devices[:4], use_subgraphs=True, return_logits=mode))


BEGIN, NEW = (5, 0, 1, 7), (1, 3, 4, 1)  # a step of chunks and decoding, behind STEPS[0]


def cache_inputs(model: DistributedTransformer, begin: tuple[int, ...]) -> tuple[Any, ...]:
    table = page_table(PAGED, len(begin))
    return garbage_cache(model, table.size + 1), np.array(begin, np.int32), table


def all_rows(begin: tuple[int, ...], new: tuple[int, ...]) -> list[np.ndarray]:
    """For each sequence the plain logits of its new tokens."""
    expected = plain_logits(SMALL, SMALL.weights(), sequences(SMALL))
    return [rows[b : b + n] for rows, b, n in zip(expected, begin, new, strict=True)]


def last_or_nan(rows: list[np.ndarray]) -> np.ndarray:
    return np.stack([r[-1] if len(r) else np.full(SMALL.vocab, np.nan) for r in rows])


def close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=1e-4)


def test_last_token_without_a_cache(on_four: Callable[..., DistributedTransformer]) -> None:
    tokens, offsets = ragged(sequences(SMALL), (0,) * 4, STEPS[0])
    (last,), pages = on_four(ReturnLogits.LAST_TOKEN)(tokens, None, None, offsets)
    assert pages is None and last.dtype == jnp.float32 and last.shape == (4, SMALL.vocab)
    close(last, last_or_nan(all_rows((0,) * 4, STEPS[0])))


def test_all(on_four: Callable[..., DistributedTransformer]) -> None:
    model, tokens = on_four(ReturnLogits.ALL), sequences(SMALL)

    def check(outputs: tuple[jax.Array, ...], begin: tuple[int, ...], new: tuple[int, ...], offsets: np.ndarray):
        last, logits, returned = outputs
        rows = all_rows(begin, new)
        assert logits.dtype == jnp.float32 and logits.shape == (ROOM, SMALL.vocab)
        close(logits[: offsets[-1]], np.concatenate(rows))
        assert np.isfinite(logits).all()  # padding is numbers, if meaningless ones
        close(last, last_or_nan(rows))
        np.testing.assert_array_equal(returned, offsets)
        assert returned.dtype == jnp.int32

    ids, offsets = ragged(tokens, (0,) * 4, STEPS[0])
    scored, pages = model(ids, None, None, offsets)
    assert pages is None
    check(scored, (0,) * 4, STEPS[0], offsets)
    prefilled, pages = model(ids, cache_inputs(model, (0,) * 4), None, offsets)
    check(prefilled, (0,) * 4, STEPS[0], offsets)
    close(prefilled[1][: offsets[-1]], np.asarray(scored[1][: offsets[-1]]))
    ids, offsets = ragged(tokens, BEGIN, NEW)
    outputs, _ = model(ids, (pages, *cache_inputs(model, BEGIN)[1:]), None, offsets)
    check(outputs, BEGIN, NEW, offsets)


def test_variable(on_four: Callable[..., DistributedTransformer]) -> None:
    model, n, tokens = on_four(ReturnLogits.VARIABLE), 3, sequences(SMALL)

    def check(outputs: tuple[jax.Array, ...], begin: tuple[int, ...], new: tuple[int, ...]) -> None:
        last, logits, offsets = outputs
        rows = all_rows(begin, new)
        nan = np.full((n, SMALL.vocab), np.nan)  # cached tokens are not new: their rows are NaN as well
        assert logits.dtype == jnp.float32 and logits.shape == (4 * n, SMALL.vocab)
        close(logits, np.concatenate([np.concatenate([nan, r])[-n:] for r in rows]))
        close(last, last_or_nan(rows))
        np.testing.assert_array_equal(offsets, n * np.arange(5))
        assert offsets.dtype == jnp.int32

    ids, offsets = ragged(tokens, (0,) * 4, STEPS[0])
    check(model(ids, None, n, offsets)[0], (0,) * 4, STEPS[0])
    outputs, pages = model(ids, cache_inputs(model, (0,) * 4), n, offsets)
    check(outputs, (0,) * 4, STEPS[0])
    ids, offsets = ragged(tokens, BEGIN, NEW)
    check(model(ids, (pages, *cache_inputs(model, BEGIN)[1:]), n, offsets)[0], BEGIN, NEW)


def test_variable_of_more_rows_than_tokens(on_four: Callable[..., DistributedTransformer]) -> None:
    model = on_four(ReturnLogits.VARIABLE)
    ids, offsets = ragged(sequences(SMALL), (0,) * 4, STEPS[0])
    (last, logits, _), _ = model(ids, None, ROOM + 3, offsets)
    by_sequence = np.asarray(logits).reshape(4, ROOM + 3, -1)
    for rows, found in zip(all_rows((0,) * 4, STEPS[0]), by_sequence, strict=True):
        assert np.isnan(found[: ROOM + 3 - len(rows)]).all()
        close(found[ROOM + 3 - len(rows) :], rows)
    np.testing.assert_array_equal(last, by_sequence[:, -1])


def test_hidden_states_are_what_the_head_reads(on_four: Callable[..., DistributedTransformer]) -> None:
    model = on_four(ReturnLogits.ALL)
    ids, offsets = ragged(sequences(SMALL), (0,) * 4, STEPS[0])
    hidden, pages = model.hidden_states(ids, None, offsets)
    assert pages is None and hidden.shape == (ROOM, SMALL.dim)
    logits = np.asarray(hidden) @ SMALL.weights()["output.weight"].T
    close(logits[: offsets[-1]], np.concatenate(all_rows((0,) * 4, STEPS[0])))


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [None, 0, -1, 2.0, "2", np.arange(2)], ids=repr)
def test_variable_needs_a_number_of_rows(on_four: Callable[..., DistributedTransformer], n: Any) -> None:
    with pytest.raises(ValueError, match=r"return_n_logits, an int of at least 1; got"):
        on_four(ReturnLogits.VARIABLE)(np.zeros(4, np.int32), None, n, np.array([0, 4]))


@pytest.mark.parametrize(
    ("tokens", "offsets", "message"),
    [
        ([1, 2, 61, 3], [0, 4], "Token id 61 .*0 to 60"),
        ([1, -1, 2, 3], [0, 4], "Token id -1 .*0 to 60"),
        ([1, 2, 3, 4], [0, 5], r"at most the number of tokens, 4; got \[0, 5\]"),
        ([1, 2, 3, 4], [0, 3, 2], r"rise from 0.*\[0, 3, 2\]"),
        ([1, 2, 3, 4], [1, 4], r"rise from 0.*\[1, 4\]"),
        ([1, 2, 3, 4], [0], r"shapes \(4,\) and \(1,\)"),
        ([[1, 2, 3, 4]], [0, 4], r"shapes \(1, 4\) and \(2,\)"),
        ([], [0, 0], r"shapes \(0,\)"),
    ],
)
@pytest.mark.parametrize("make", [np.array, lambda values, dtype: jnp.array(values, dtype)], ids=["numpy", "jax"])
def test_bad_batches(devices: list[jax.Device], tokens: Any, offsets: Any, message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        abstract(SMALL, devices[:1])(make(tokens, np.int32), None, None, make(offsets, np.int32))


def test_bad_caches(devices: list[jax.Device]) -> None:
    model = build(SMALL, devices[:1])
    params, (tokens, offsets) = model.kv_params, ragged(sequences(SMALL), (0,) * 4, STEPS[0])
    lengths, table = np.zeros(4, np.int32), page_table(PAGED, 4)
    with pytest.raises(ValueError, match="cache_lengths has 3 sequences, input_row_offsets 4"):
        model(tokens, (params.allocate(9, model.mesh), lengths[:3], table[:3]), None, offsets)
    with pytest.raises(ValueError, match=r"page_table int32\[S, M\]; got shapes \(4,\) and \(3, 3\)"):
        model(tokens, (params.allocate(9, model.mesh), lengths, table[:3]), None, offsets)
    with pytest.raises(ValueError, match=r"\(18, 2, 4, 16\) and dtype bfloat16"):
        model(tokens, (params.allocate(9, model.mesh).astype(jnp.bfloat16), lengths, table), None, offsets)
    with pytest.raises(ValueError, match=r"\(18, 1, 4, 16\)"):
        model(tokens, (params.allocate(9, model.mesh)[:, :1], lengths, table), None, offsets)


def test_parts_that_do_not_fit(devices: list[jax.Device]) -> None:
    mesh = make_mesh(devices[:1])

    def assemble(dim=16, n_heads=4, n_layers=2, rope=8, devices: Any = mesh, kv_heads=2, attention=(4, 2, 16, 8)):
        common: dict[str, Any] = dict(dtype=jnp.float32, devices=mesh, rngs=nnx.Rngs(0))
        norm = partial(nn.RMSNorm, 16, **common)
        layers = [DistributedTransformerBlock(nn.AttentionWithRope(*attention, **common), nn.MLP(16, 32, **common),
                                              norm(), norm(), mesh) for _ in range(2)]
        params = nn.KVCacheParams(jnp.float32, kv_heads, 8, n_layers)
        return DistributedTransformer(
            dim, n_heads, layers, norm(), nn.ColumnParallelLinear(16, 11, gather_output=True, **common),
            nn.VocabParallelEmbedding(11, 16, **common), params, kv_cache.FetchPagedKVCacheCollection(params),
            devices, nn.RotaryEmbedding(rope))  # fmt: skip

    def build_abstract(**wrong: Any) -> None:
        nnx.eval_shape(partial(assemble, **wrong))

    build_abstract()
    for wrong, message in [
        (dict(n_layers=3), "2 layers were given, but kv_params has n_layers=3"),
        (dict(n_heads=3), r"3 heads cannot share kv_params.n_kv_heads=2 evenly"),
        (dict(rope=16), "rope.head_dim=16, but kv_params.head_dim=8"),
        (dict(devices=make_mesh(devices[:2])), r"embedding.weight was built on mesh \{'model': 1\}.*\{'model': 2\}"),
        (dict(devices=Mesh(np.array(devices[:1]), ("model",))), "needs AxisType.Explicit"),
        (dict(dim=24), "dim=24 was given, but the embedding gives rows of 16"),
        (dict(n_heads=8), r"has .*'n_heads': 8.* but a layer has .*'n_heads': 4"),
        (dict(attention=(4, 1, 16, 8)), r"has .*'n_kv_heads': 2.* but a layer has .*'n_kv_heads': 1"),
        (dict(attention=(4, 2, 16, 12)), r"has .*'head_dim': 8.* but a layer has .*'head_dim': 12"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_abstract(**wrong)


def test_a_block_on_another_mesh(devices: list[jax.Device]) -> None:
    one, two = make_mesh(devices[:1]), make_mesh(devices[:2])
    norm = nnx.eval_shape(lambda: nn.RMSNorm(16, jnp.float32, one, rngs=nnx.Rngs(0)))
    mlp = nnx.eval_shape(lambda: nn.MLP(16, 32, jnp.float32, two, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"Parameter mlp.down_proj.weight .*'model': 2"):
        DistributedTransformerBlock(norm, mlp, norm, norm, one)


# --- A call as the caller sees it -------------------------------------------------------------------------------


def compilations(caplog: pytest.LogCaptureFixture, call: Callable[[], Any]) -> int:
    """How many programs a call compiles."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.block_until_ready(call())
    return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)


def test_the_cache_is_donated_and_nothing_compiles_twice(devices: list[jax.Device],
                                                         caplog: pytest.LogCaptureFixture) -> None:
    jax.clear_caches()  # another test may have run the same program
    model, tokens = build(SMALL, devices[:2]), sequences(SMALL)
    ids, offsets = ragged(tokens, (0,) * 4, STEPS[0])
    inputs = cache_inputs(model, (0,) * 4)
    returned = []
    assert compilations(caplog, lambda: returned.append(model(ids, inputs, None, offsets)) or returned[0]) > 0
    (_, pages) = returned[0]
    assert inputs[0].is_deleted() and not pages.is_deleted()
    assert pages.shape == inputs[0].shape and pages.sharding == model.kv_params.sharding(model.mesh)
    written = np.isfinite(np.asarray(pages)).all((1, 3)).sum()
    assert written == 2 * sum(STEPS[0])

    ids, offsets = ragged(tokens, BEGIN, NEW)
    lengths, table = cache_inputs(model, BEGIN)[1:]

    def step() -> Any:
        nonlocal pages
        (last,), pages = model(ids, (pages, lengths, table), None, offsets)
        return last

    assert compilations(caplog, step) == 0
    first = np.asarray(step())  # the step writes what it wrote before
    close(first, last_or_nan(all_rows(BEGIN, NEW)))

    # From another thread, from inside a jit, and with a mesh in context: the same.
    from_thread: list[Any] = []
    thread = threading.Thread(target=lambda: from_thread.append(np.asarray(step())))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(from_thread[0], first)
    with jax.set_mesh(model.mesh):
        np.testing.assert_array_equal(step(), first)
    (last,), _ = jax.jit(model)(ids, (pages, lengths, table), None, offsets)
    close(last, first)


def test_weights_may_change_between_calls(devices: list[jax.Device]) -> None:
    model = build(SMALL, devices[:2])
    ids, offsets = ragged(sequences(SMALL), (0,) * 4, STEPS[0])
    (before,), _ = model(ids, None, None, offsets)
    weight = model.output.weight
    weight.set_value(2 * weight.get_value())
    (after,), _ = model(ids, None, None, offsets)
    close(after, 2 * np.asarray(before))


# --- Gradients --------------------------------------------------------------------------------------------------


def next_token_loss(logits: Any, targets: np.ndarray) -> jax.Array:
    """Mean negative log-likelihood of `targets` `[n]` under `logits` `[n, V]`."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1).mean()


@pytest.fixture(scope="module")
def plain_gradients() -> dict[str, np.ndarray]:
    tokens, new = sequences(SMALL), STEPS[0]

    @jax.jit
    @jax.grad
    def gradients(weights: dict[str, jax.Array]) -> jax.Array:
        logits = plain_logits(SMALL, weights, tokens, jnp)
        rows = [logits[s, : n - 1] for s, n in enumerate(new) if n > 1]
        targets = [tokens[s, 1:n] for s, n in enumerate(new) if n > 1]
        return next_token_loss(jnp.concatenate(rows), np.concatenate(targets))

    return jax.tree.map(np.asarray, gradients(SMALL.weights()))


@pytest.mark.parametrize(
    ("n_devices", "options"),
    [(1, {}), (1, dict(use_subgraphs=True)), (8, dict(use_subgraphs=True, gemm=True))],
    ids=str,
)
def test_gradients(devices: list[jax.Device], plain_gradients: dict[str, np.ndarray], n_devices: int,
                   options: dict[str, Any]) -> None:
    model = build(SMALL, devices[:n_devices], return_logits=ReturnLogits.ALL, **options)
    assert n_devices == 1 or model.mesh.axis_names == ("kv", "rep")
    ids, offsets = ragged(sequences(SMALL), (0,) * 4, STEPS[0])
    has_next = np.concatenate([np.arange(b, e - 1) for b, e in itertools.pairwise(offsets)]).astype(int)
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradients(state: nnx.State) -> jax.Array:
        (_, logits, _), _ = nnx.merge(graphdef, state)(ids, None, None, offsets)
        with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
            return next_token_loss(logits[has_next], ids[has_next + 1])

    grads = gradients(state)
    found = {}
    for (names, stacked, grad), (_, _, param) in zip(
            named_parameters(nnx.merge(graphdef, grads)), named_parameters(model), strict=True):
        assert grad.get_value().sharding == param.get_value().sharding
        value = np.asarray(grad.get_value())
        found |= dict(zip(names, value if stacked else [value], strict=True))
    assert found.keys() == plain_gradients.keys()
    for name, expected in plain_gradients.items():
        padding = [(0, full - part) for full, part in zip(found[name].shape, expected.shape, strict=True)]
        np.testing.assert_allclose(found[name], np.pad(expected, padding), rtol=0, atol=1e-4, err_msg=name)
        assert np.abs(expected).max() > 1e-3  # of a size that an error would show at
