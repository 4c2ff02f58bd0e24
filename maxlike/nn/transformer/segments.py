"""Layer groups become segments: runs of layers that execute as one `lax.scan` over stacked parameters.

A group lists layers of one structure. Looking along the layers, each is labelled by its group, and the sequence
of labels is cut into the fewest scans: a run of one group (`A A A A`), or a pattern that repeats, scanned a
period at a time (Gemma 3: `L L L L L G` five times over, and a tail of `L L`). Layers named in no group are
called directly.

Stacked parameters exist only inside a model. `named_parameters` is the way back to one name a layer, which is what
checkpoints speak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Groups = Sequence[Sequence[int]]
CheckpointPolicy = Callable[..., Any]
"""What `jax.checkpoint` takes as its `policy`: one of `jax.checkpoint_policies`."""


@dataclass(frozen=True)
class SegmentPlan:
    """Layers `[start, start + period * repeats)`: a pattern of `period` layers, `repeats` times."""

    start: int
    period: int
    repeats: int
    scanned: bool


def plan_segments(n_layers: int, groups: Groups | None) -> list[SegmentPlan]:
    """The cut into the fewest scanned segments; among those, the one that traces the fewest layer bodies.

    Args:
        groups: layer indices of one structure each; `None` is one group of all layers.

    Raises:
        ValueError: an index is out of range, or named twice.
    """
    labels: list[int | None] = [None] * n_layers
    for group, members in enumerate([range(n_layers)] if groups is None else groups):
        for i in members:
            if not 0 <= i < n_layers:
                raise ValueError(f"subgraph_layer_groups names layer {i} (group {group}); the model has layers 0 to "
                                 f"{n_layers - 1}.")
            if labels[i] is not None:
                raise ValueError(f"subgraph_layer_groups names layer {i} twice (groups {labels[i]} and {group}); "
                                 "a layer belongs to one group at most.")
            labels[i] = group
    # best[i]: (scans, bodies) of the best cut of the first i layers, and the last segment of that cut.
    best: list[tuple[tuple[int, int], SegmentPlan | None]] = [((0, 0), None)]
    for end in range(1, n_layers + 1):
        if labels[end - 1] is None:
            candidates = [SegmentPlan(end - 1, 1, 1, scanned=False)]
        else:
            candidates = [SegmentPlan(end - 1, 1, 1, scanned=True)]
            for period in range(1, end // 2 + 1):
                repeats = 1
                pattern = labels[end - period:end]
                if None in pattern:
                    break
                while end - (repeats + 1) * period >= 0 and (
                        labels[end - (repeats + 1) * period:end - repeats * period] == pattern):
                    repeats += 1
                    candidates.append(SegmentPlan(end - repeats * period, period, repeats, scanned=True))
        costs = [(best[c.start][0][0] + c.scanned, best[c.start][0][1] + c.period) for c in candidates]
        best.append(min(zip(costs, candidates, strict=True), key=lambda pair: pair[0]))
    plan: list[SegmentPlan] = []
    end = n_layers
    while end:
        segment = best[end][1]
        assert segment is not None
        plan.insert(0, segment)
        end = segment.start
    return plan


class DirectSegment(nnx.Module):
    """Layers called one after the other, each with parameters of its own."""

    def __init__(self, layers: Sequence[nnx.Module], start: int):
        self.start = start
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array, kv_collection: Any, metadata: Any,
                 remat: CheckpointPolicy | None = None) -> tuple[jax.Array, Any]:
        """`[T, D] -> [T, D]`, and the collection to go on with."""
        call = _caller(remat)
        for i, layer in enumerate(self.layers):
            graphdef, state = nnx.split(layer)
            x, kv_collection = call(graphdef, state, x, self.start + i, kv_collection, metadata)
        return x, kv_collection

    def layer_indices(self, position: int) -> list[int]:
        """The layers that `self.layers[position]` stands for."""
        return [self.start + position]


class ScannedSegment(nnx.Module):
    """A pattern of layers repeated, as one `lax.scan`: `layers[j]` holds the parameters of every `j`-th of a
    period, stacked along a new first axis."""

    def __init__(self, layers: Sequence[nnx.Module], plan: SegmentPlan):
        self.start, self.period, self.repeats = plan.start, plan.period, plan.repeats
        self.layers = nnx.List([_stack(layers[j::plan.period]) for j in range(plan.period)])

    def __call__(self, x: jax.Array, kv_collection: Any, metadata: Any,
                 remat: CheckpointPolicy | None = None) -> tuple[jax.Array, Any]:
        """`[T, D] -> [T, D]`, and the collection to go on with."""
        # A loop's backward pass is a loop of its own, which shares nothing with the forward one.
        call = _caller(remat, prevent_cse=False)
        graphdefs, states = zip(*(nnx.split(layer) for layer in self.layers), strict=True)

        def body(carry: tuple[jax.Array, Any, jax.Array], states: Any) -> tuple[Any, None]:
            x, kv_collection, i = carry
            for j, (graphdef, state) in enumerate(zip(graphdefs, states, strict=True)):
                x, kv_collection = call(graphdef, state, x, i + j, kv_collection, metadata)
            return (x, kv_collection, i + self.period), None

        (x, kv_collection, _), _ = jax.lax.scan(body, (x, kv_collection, jnp.int32(self.start)), states)
        return x, kv_collection

    def layer_indices(self, position: int) -> list[int]:
        """The layers that `self.layers[position]` stands for, in the order in which they are stacked."""
        return [self.start + position + self.period * r for r in range(self.repeats)]


Segment = DirectSegment | ScannedSegment


@partial(jax.jit, static_argnums=0)
def _call_layer(graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array, layer_index: jax.Array | int,
                kv_collection: Any, metadata: Any) -> tuple[jax.Array, Any]:
    # Jitted so that layers of one structure are traced once, whether scanned or not.
    return nnx.merge(graphdef, state)(x, layer_index, kv_collection, metadata)


def _caller(remat: CheckpointPolicy | None, prevent_cse: bool = True) -> Callable[..., tuple[jax.Array, Any]]:
    if remat is None:
        return _call_layer
    return jax.checkpoint(_call_layer, policy=remat, static_argnums=0, prevent_cse=prevent_cse)


def _stack(layers: Sequence[nnx.Module]) -> nnx.Module:
    graphdef, _ = nnx.split(layers[0])
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(la) for la in layers)))


def make_segments(layers: Sequence[nnx.Module], groups: Groups | None, use_subgraphs: bool) -> list[Segment]:
    """Takes the layers apart into segments; without subgraphs, one direct segment of all of them.

    Raises:
        ValueError: as `plan_segments`, or a group mixes structures: names two of its layers and what differs.
    """
    plan = plan_segments(len(layers), groups)
    for group in [range(len(layers))] if groups is None else groups:
        for i in group[1:]:
            if (use_subgraphs or groups is not None) and (leaf := first_difference(layers[group[0]], layers[i])):
                raise ValueError(f"subgraph_layer_groups puts layers {group[0]} and {i} in one group, but they differ "
                                 f"in {leaf}. Give each structure a group of its own.")
    if not use_subgraphs:
        return [DirectSegment(layers, 0)]
    return [ScannedSegment(layers[s.start:s.start + s.period * s.repeats], s) if s.scanned
            else DirectSegment(layers[s.start:s.start + 1], s.start) for s in plan]


def first_difference(a: Any, b: Any, path: str = "layer") -> str | None:
    """What keeps two layers from being scanned together, `"path (this, that)"`; `None` if nothing does."""
    if isinstance(a, nnx.Variable) and isinstance(b, nnx.Variable):
        one, other = (jax.typeof(v.get_value()) for v in (a, b))
        return None if one == other else f"{path} ({one}, {other})"
    if type(a) is not type(b):
        return f"{path} ({type(a).__name__}, {type(b).__name__})"
    if isinstance(a, nnx.Module):
        parts, others = vars(a), vars(b)
    elif isinstance(a, list | tuple):
        parts, others = ({str(i): item for i, item in enumerate(items)} for items in (a, b))
    else:
        return None if a == b else f"{path} ({a}, {b})"
    for name in [*parts, *(name for name in others if name not in parts)]:
        if name.startswith("_pytree__"):
            continue
        if name not in parts or name not in others:
            return f"{path}.{name} (only one has it)"
        if found := first_difference(parts[name], others[name], f"{path}.{name}"):
            return found
    return None


def named_parameters(model: Any) -> Iterator[tuple[list[str], bool, nnx.Param]]:
    """Every parameter of a `DistributedTransformer`, each once: (its names, whether it is stacked, itself).

    Names are dotted and per layer, `layers.3.attention.q_proj.weight`, whichever way the layers execute. A stacked
    parameter has one name for each slice of its first axis, in order; any other has one name.
    """
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield *names_at(model, path), param


def names_at(model: Any, path: Sequence[Any]) -> tuple[list[str], bool]:
    """The names, one a layer, of what lies at `path` in a `DistributedTransformer`, and whether it is stacked."""
    if path[0] != "segments":
        return [".".join(map(str, path))], False
    segment = model.segments[path[1]]
    suffix = ".".join(map(str, path[4:]))
    return [f"layers.{i}.{suffix}" for i in segment.layer_indices(path[3])], isinstance(segment, ScannedSegment)
