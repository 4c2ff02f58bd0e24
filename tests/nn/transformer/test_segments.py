"""Groups become the fewest scans, a scan traces its body once, and parameters keep their layers' names."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from maxlike import nn
from maxlike.mesh import make_mesh
from maxlike.nn.transformer import DistributedTransformer, DistributedTransformerBlock
from maxlike.nn.transformer.segments import SegmentPlan, make_segments, named_parameters, plan_segments
from tests.nn.transformer.tiny import ROOM, Tiny, abstract

# --- The plan ---------------------------------------------------------------------------------------------------

Labels = list[int | None]


def groups_of(labels: Labels) -> list[list[int]]:
    """The groups that give layers these labels."""
    return [[i for i, label in enumerate(labels) if label == group] for group in range(4)]


def least_cost(labels: Labels) -> tuple[int, int]:
    """(scans, layer bodies) of the best of all ways to cut the layers into pieces, each tried.

    A piece is one layer, or a pattern of grouped layers that repeats at least twice. One layer in no group is no scan.
    """
    n = len(labels)

    @functools.cache
    def piece(begin: int, end: int) -> tuple[int, int] | None:
        part = labels[begin:end]
        if len(part) == 1:
            return (0 if part == [None] else 1), 1
        periods = [p for p in range(1, len(part) // 2 + 1)
                   if len(part) % p == 0 and part == part[:p] * (len(part) // p)]
        return None if None in part or not periods else (1, periods[0])

    costs = []
    for cuts in itertools.product((False, True), repeat=n - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        pieces = [piece(*pair) for pair in itertools.pairwise(ends)]
        if None not in pieces:
            costs.append((sum(p[0] for p in pieces), sum(p[1] for p in pieces)))
    return min(costs)


@given(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=11))
@example([0, 0, 1, 0, 0, 1, 0])
@example([0, 1, 0, 1, 1, 1])  # the longest repetition first would cost a scan
@example([None, 0, 1, None, 0, 1])
def test_plans_cover_every_layer_in_order_with_the_fewest_scans(labels: Labels) -> None:
    plan = plan_segments(len(labels), groups_of(labels))
    covered = [i for segment in plan for i in range(segment.start, segment.start + segment.period * segment.repeats)]
    assert covered == list(range(len(labels)))
    for segment in plan:
        for position in range(segment.period):
            at_position = [segment.start + position + r * segment.period for r in range(segment.repeats)]
            assert len({labels[i] for i in at_position}) == 1
            assert (labels[at_position[0]] is not None) == segment.scanned
        if not segment.scanned:
            assert (segment.period, segment.repeats) == (1, 1)
    assert (sum(s.scanned for s in plan), sum(s.period for s in plan)) == least_cost(labels)


@given(st.lists(st.sampled_from([None, 0, 1]), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_the_order_of_groups_and_members_does_not_matter(labels: Labels, random: Any) -> None:
    groups = groups_of(labels)
    shuffled = [random.sample(group, len(group)) for group in random.sample(groups, len(groups))]
    assert plan_segments(len(labels), shuffled) == plan_segments(len(labels), groups)


def test_plans_of_real_models() -> None:
    assert plan_segments(80, None) == [SegmentPlan(0, 1, 80, True)]
    assert plan_segments(3, []) == [SegmentPlan(i, 1, 1, False) for i in range(3)]
    for n, tail in [(26, 2), (34, 4), (62, 2)]:  # Gemma 3 1B, 4B, 27B
        full = list(range(5, n, 6))
        window = [i for i in range(n) if i not in full]
        assert plan_segments(n, [window, full]) == [
            SegmentPlan(0, 6, n // 6, True), SegmentPlan(n - tail, 1, tail, True)]  # fmt: skip


def test_plans_of_deep_models_take_no_time() -> None:
    labels: Labels = [[0, 1, 0, 0, 2][i * i % 5] for i in range(200)]
    assert sum(s.period * s.repeats for s in plan_segments(200, groups_of(labels))) == 200


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1, 5]], r"layer 5 \(group 0\).*layers 0 to 4"),
        ([[0], [-1]], r"layer -1 \(group 1\)"),
        ([[0, 1], [1, 2]], r"layer 1 twice \(groups 0 and 1\)"),
        ([[3, 3]], r"layer 3 twice"),
    ],
)
@pytest.mark.parametrize("use_subgraphs", [False, True])
def test_groups_that_name_no_layer_or_one_twice(devices: list[jax.Device], groups: list[list[int]], message: str,
                                                use_subgraphs: bool) -> None:
    with pytest.raises(ValueError, match=message):
        plan_segments(5, groups)
    with pytest.raises(ValueError, match=message):
        abstract(Tiny(windows=(None,) * 5), devices[:1], use_subgraphs=use_subgraphs, groups=groups)


# --- What must not be mixed -------------------------------------------------------------------------------------


def block(devices: list[jax.Device], **different: Any) -> DistributedTransformerBlock:
    """A layer like all others here but for what is named."""
    mesh = make_mesh(devices[:2])
    settings = dict(heads=(4, 2), mlp_dim=32, activation="silu", gemm=None, eps=1e-6, dtype=jnp.float32, bias=False,
                    window=None, rope=None, qk_norm=None, sandwich=False) | different  # fmt: skip
    common: dict[str, Any] = dict(dtype=settings["dtype"], devices=mesh, rngs=nnx.Rngs(0))
    norm = nn.RMSNorm(16, eps=settings["eps"], **common)
    attention: Any = nn.AttentionWithRope(
        *settings["heads"], 16, 8, sliding_window=settings["window"], rope=settings["rope"],
        has_bias=settings["bias"], qk_norm_eps=settings["qk_norm"], **common)  # fmt: skip
    if settings["sandwich"]:
        attention = nn.OutputNorm(attention, nn.RMSNorm(16, **common))
    return DistributedTransformerBlock(attention, nn.MLP(16, settings["mlp_dim"], activation=settings["activation"],
                                                         **common), norm, norm, mesh, settings["gemm"])


@pytest.mark.parametrize(
    ("different", "message"),
    [
        (dict(heads=(4, 4)), r"attention\.(n_kv_heads \(2, 4\)|k_proj)"),
        (dict(mlp_dim=64), r"mlp\.gate_proj\.(out_dim \(32, 64\)|weight)"),
        (dict(activation="gelu"), r"mlp\.activation \(silu, gelu\)"),
        (dict(eps=1e-5), r"attention_norm\.eps \(1e-06, 1e-05\)"),
        (dict(dtype=jnp.bfloat16), r"weight \(float32.*, bfloat16.*\)"),
        (dict(bias=True), r"attention\.q_proj\.bias \(NoneType, Param\)"),
        (dict(window=4), r"attention\.sliding_window \((None|NoneType), (4|int)\)"),
        (dict(rope=nn.RotaryEmbedding(8)), r"attention\.rope \(NoneType, RotaryEmbedding\)"),
        (dict(qk_norm=1e-6), r"attention\.q_norm \(NoneType, RMSNorm\)"),
        (dict(sandwich=True), r"attention \(AttentionWithRope, OutputNorm\)"),
        (dict(gemm=nn.DistributedGemmConfig(True)), r"o_proj\.distributed_gemm_config \(NoneType, "),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_group_that_mixes_structures(devices: list[jax.Device], different: dict[str, Any], message: str) -> None:
    def make(groups: list[list[int]] | None, use_subgraphs: bool) -> list[Any]:
        layers = [block(devices, **(different if i == 2 else {})) for i in range(4)]
        return make_segments(layers, groups, use_subgraphs)

    for groups, use_subgraphs, pair in [(None, True, "0 and 2"), ([[1, 3], [0, 2]], True, "0 and 2"),
                                        ([[1, 2]], False, "1 and 2")]:
        with pytest.raises(ValueError, match=f"layers {pair} in one group, but they differ in layer.*{message}"):
            nnx.eval_shape(lambda groups=groups, scan=use_subgraphs: make(groups, scan))
    nnx.eval_shape(lambda: make(None, False))
    assert len(nnx.eval_shape(lambda: make([[0, 1, 3], [2]], True))) == 3


def test_like_layers_made_apart_are_one_structure(devices: list[jax.Device]) -> None:
    def make() -> list[Any]:
        ropes = [nn.RotaryEmbedding(8, scaling=nn.Llama3Scaling(8.0, 1.0, 4.0, 64)) for _ in range(3)]
        return make_segments([block(devices, rope=rope, bias=True, qk_norm=1e-6) for rope in ropes], None, True)

    (segment,) = nnx.eval_shape(make)
    assert segment.repeats == 3


# --- What is traced ---------------------------------------------------------------------------------------------


def traced(model: DistributedTransformer, n_pages: int = 4) -> Any:
    """The jaxpr of a step over the cache."""
    graphdef, state = nnx.split(model)

    def typed(array: Any) -> jax.ShapeDtypeStruct:
        spec = jax.typeof(array).sharding.spec
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(model.mesh, spec))

    params = model.kv_params
    pages = jax.ShapeDtypeStruct(params.shape(n_pages, "cpu"), params.dtype, sharding=params.sharding(model.mesh))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return jax.make_jaxpr(lambda state, pages, tokens, lengths, table, offsets: nnx.merge(graphdef, state)(
        tokens, (pages, lengths, table), None, offsets))(
            jax.tree.map(typed, state), pages, ints((ROOM,)), ints((2,)), ints((2, 2)), ints((3,))).jaxpr  # fmt: skip


def equations(jaxpr: Any, into_scans: bool = True) -> Iterator[Any]:
    """All equations, those of nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "scan" or into_scans:
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(value, "eqns"):
                    yield from equations(getattr(value, "jaxpr", value), into_scans)


def layer_scans(jaxpr: Any) -> list[int]:
    """The lengths of the scans that no scan contains, in order."""
    return [eqn.params["length"] for eqn in equations(jaxpr, into_scans=False) if eqn.primitive.name == "scan"]


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts under `"calls"` how often a layer's Python code runs."""
    calls: Counter[str] = Counter()
    original = DistributedTransformerBlock.__call__

    def counted(self: DistributedTransformerBlock, *args: Any) -> Any:
        calls["calls"] += 1
        return original(self, *args)

    monkeypatch.setattr(DistributedTransformerBlock, "__call__", counted)
    return calls


def test_eighty_layers_are_traced_as_two(devices: list[jax.Device], block_calls: Counter[str]) -> None:
    counts, calls = [], []
    for n in (2, 80):
        # Of widths of their own: jax remembers what it traced before.
        model = abstract(Tiny(windows=(None,) * n, dim=20 + n), devices[:1], use_subgraphs=True)
        block_calls.clear()
        jaxpr = traced(model)
        assert layer_scans(jaxpr) == [n]
        calls.append(block_calls["calls"])
        counts.append(Counter(eqn.primitive.name for eqn in equations(jaxpr)))
    assert counts[0] == counts[1]
    assert calls == [1, 1]


def test_layers_that_are_not_scanned_are_not_in_a_scan(devices: list[jax.Device], block_calls: Counter[str]) -> None:
    model = abstract(Tiny(windows=(None,) * 4, dim=28), devices[:1])
    assert layer_scans(traced(model)) == []
    assert block_calls["calls"] == 1  # called four times, and traced once all the same


def test_gemma_is_one_scan_and_a_tail(devices: list[jax.Device], block_calls: Counter[str]) -> None:
    windows = tuple(None if i % 6 == 5 else 4 for i in range(26))
    full = [i for i, window in enumerate(windows) if window is None]
    groups = [[i for i in range(26) if i not in full], full]
    model = abstract(Tiny(windows=windows, dim=32), devices[:1], use_subgraphs=True, groups=groups)
    assert layer_scans(traced(model)) == [4, 2]
    assert block_calls["calls"] <= 3  # a window's body, a full one's, and the tail's if it cannot be shared
    assert [(s.period, s.repeats) for s in model.segments] == [(6, 4), (1, 2)]


def test_layers_in_no_group_are_called_directly(devices: list[jax.Device]) -> None:
    model = abstract(Tiny(windows=(None,) * 6, dim=24), devices[:1], use_subgraphs=True, groups=[[1, 2, 4, 5]])
    assert layer_scans(traced(model)) == [2, 2]
    assert [(type(s).__name__, s.start, len(s.layers)) for s in model.segments] == [
        ("DirectSegment", 0, 1), ("ScannedSegment", 1, 1), ("DirectSegment", 3, 1), ("ScannedSegment", 4, 1),
    ]  # fmt: skip


# --- Parameters -------------------------------------------------------------------------------------------------


def by_name(model: DistributedTransformer) -> dict[str, Any]:
    """Every parameter under its layer's name."""
    found = {}
    for names, stacked, param in named_parameters(model):
        value = param.get_value()
        assert len(names) == (value.shape[0] if stacked else 1)
        found |= dict(zip(names, np.asarray(value) if stacked else [np.asarray(value)], strict=True))
    return found


def initialised(devices: list[jax.Device], make: Callable[..., Any] = Tiny, **options: Any) -> DistributedTransformer:
    """A model with the values that its initializers give, rather than those of `tiny.weights()`."""
    tiny = make()
    mesh = make_mesh(devices, n_heads=tiny.n_heads, n_kv_heads=tiny.n_kv_heads)
    common: dict[str, Any] = dict(dtype=jnp.float32, devices=mesh, rngs=nnx.Rngs(7))
    norm = functools.partial(nn.RMSNorm, tiny.dim, **common)
    attention = functools.partial(nn.AttentionWithRope, tiny.n_heads, tiny.n_kv_heads, tiny.dim, tiny.head_dim)
    layers = [
        DistributedTransformerBlock(attention(sliding_window=window, **common),
                                    nn.MLP(tiny.dim, tiny.mlp_dim, **common), norm(), norm(), mesh)
        for window in tiny.windows
    ]  # fmt: skip
    embedding = nn.VocabParallelEmbedding(tiny.vocab, tiny.dim, **common)
    head = nn.ColumnParallelLinear(tiny.dim, tiny.vocab, out_axis="vocab", gather_output=True,
                                   tied_weight=embedding.weight, **common)
    params = nn.KVCacheParams(jnp.float32, tiny.n_kv_heads, tiny.head_dim, len(tiny.windows))
    return DistributedTransformer(tiny.dim, tiny.n_heads, layers, norm(), head, embedding, params,
                                  nn.kv_cache.FetchPagedKVCacheCollection(params), mesh,
                                  nn.RotaryEmbedding(tiny.head_dim), **options)


def test_parameters_have_their_layers_names_whichever_way_layers_execute(devices: list[jax.Device]) -> None:
    tiny = Tiny(windows=(3, 3, None, 3, 3, None, 3))
    groups = [[0, 1, 3, 4, 6], [2, 5]]
    direct = initialised(devices, lambda: tiny)
    scanned = initialised(devices, lambda: tiny, use_subgraphs=True, subgraph_layer_groups=groups)
    partly = initialised(devices, lambda: tiny, use_subgraphs=True, subgraph_layer_groups=[[3, 4]])
    expected = by_name(direct)
    shapes = replace(tiny, vocab=64).shapes()  # on eight devices the vocabulary of 61 is padded
    del shapes["output.weight"]  # tied: one parameter, under the name of the embedding
    assert {name: value.shape for name, value in expected.items()} == shapes
    for model in (scanned, partly):
        found = by_name(model)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
    # No two layers began alike, so that a layer under another's name would have shown.
    weights = [value for name, value in expected.items() if name.endswith("q_proj.weight")]
    assert len({value.tobytes() for value in weights}) == len(tiny.windows)


def test_stacked_parameters_are_sharded_as_their_slices(devices: list[jax.Device]) -> None:
    direct, scanned = (dict((tuple(names), param) for names, _, param in named_parameters(
        abstract(Tiny(), devices, use_subgraphs=scan))) for scan in (False, True))
    for names, param in scanned.items():
        value = jax.typeof(param.get_value())
        for name in names:
            one = jax.typeof(direct[name,].get_value())
            lead = (len(names),) if len(names) > 1 else ()
            assert value.shape == lead + one.shape
            assert tuple(value.sharding.spec) == (None,) * len(lead) + tuple(one.sharding.spec)
            assert param.get_metadata("logical_shape") == direct[name,].get_metadata("logical_shape")
