"""A model's bytes and operations on any mesh, from shapes alone: no devices, no compiler."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from maxlike.engine.runner import SCORED_ROWS
from maxlike.models.build import abstract_model, build_model
from maxlike.models.config import TransformerConfig
from maxlike.nn.kv_cache import KVCacheParams
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters
from maxlike.plan.collectives import Collective, collective, together

_FLOATS = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, a stack of layers being one.

    Args:
        name: of its first layer's.
        shape: as the mesh does not change it, a stack's number of layers first.
        axes: for each dimension the mesh axes that cut it.
        stacked: whether the first dimension is that of a stack.
        itemsize: bytes of a number.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    stacked: bool
    itemsize: int

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies: not norms and biases."""
        return len(self.shape) - self.stacked >= 2

    def adapters(self, rank: int) -> Iterator[Parameter]:
        """A and B of LoRA for a matrix: each is cut as the weight along the dimension that they share."""
        for dimension in (-1, -2):
            yield replace(self, shape=(*self.shape[:-2], rank, self.shape[dimension]),
                          axes=(*self.axes[:-2], (), self.axes[dimension]), itemsize=_FLOATS)

    def elements(self, mesh: Mapping[str, int]) -> int:
        """Numbers on each device of a mesh with axes of these sizes, padding included."""
        return math.prod(-(-size // math.prod(mesh.get(axis, 1) for axis in axes))
                         for size, axes in zip(self.shape, self.axes, strict=True))

    def nbytes(self, mesh: Mapping[str, int]) -> int:
        """Bytes on each device."""
        return self.elements(mesh) * self.itemsize


@dataclass(frozen=True)
class Shapes:
    """A model as a planner sees it.

    Args:
        parameters: see `Parameter`.
        config: of the model.
        kv_params: of its cache.
        itemsize: bytes of an activation's number.
    """

    parameters: tuple[Parameter, ...]
    config: TransformerConfig
    kv_params: KVCacheParams
    itemsize: int

    def weights(self, mesh: Mapping[str, int]) -> int:
        """Bytes of all parameters on each device."""
        return sum(parameter.nbytes(mesh) for parameter in self.parameters)

    def bytes_per_page(self, mesh: Mapping[str, int], platform: str) -> int:
        """As `KVCacheParams.bytes_per_page`."""
        elements = math.prod(self.kv_params.shape(1, platform))
        return elements * jnp.dtype(self.kv_params.dtype).itemsize // (mesh.get("model", 1) * mesh.get("kv", 1))

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one."""
        return self.config.tie_word_embeddings

    def _used(self) -> Iterator[tuple[Parameter, bool]]:
        """The parameters that a step uses whole, and whether it is the head's: all but the embedding's, of which a
        step needs few rows."""
        for parameter in self.parameters:
            head = parameter.name.startswith("embedding." if self.tied else "output.")
            if head or not parameter.name.startswith("embedding."):
                yield parameter, head

    def read(self, mesh: Mapping[str, int], *, head: bool) -> int:
        """Bytes of weights that a step reads on each device, with those of the head or without."""
        return sum(parameter.nbytes(mesh) for parameter, heads in self._used() if head or not heads)

    def flops(self, mesh: Mapping[str, int], tokens: int, rows: int, attended: float) -> float:
        """Operations of a step on each device: two for each weight and token, of the head for each row that is drawn
        from; and attention's four for each query head, channel and token attended to.

        Args:
            attended: by all tokens together, `attended_by`.
        """
        products = sum(2 * parameter.elements(mesh) * (rows if head else tokens)
                       for parameter, head in self._used() if parameter.is_matrix)
        width = self.config.num_attention_heads * self.config.head_dim / tensor_parallel(mesh)
        return products + 4 * width * attended

    def attended_by(self, tokens: int, context: int, *, prompt: bool) -> float:
        """Tokens of all layers that `tokens` tokens attend to: each to `context`, or as a prompt to those before it."""
        total = 0.0
        for layer in self.config.layers:
            longest = min(context, layer.sliding_window or context)
            if prompt:  # within the window the i-th sees i, behind its end the window
                n, seen = min(tokens, context), longest
                total += tokens / n * (seen * (seen + 1) / 2 + (n - seen) * seen if n > seen else n * (n + 1) / 2)
            else:
                total += tokens * longest
        return total

    def cache_read(self, mesh: Mapping[str, int], platform: str, attended: float) -> float:
        """Bytes of keys and values on each device of so many tokens of single layers."""
        of_a_token = self.bytes_per_page(mesh, platform) / self.kv_params.page_size / len(self.config.layers)
        return of_a_token * attended

    def step_collectives(self, mesh: Mapping[str, int], tokens: int, rows: int) -> tuple[Collective, ...]:
        """A step's as they are written down: two all-reduces a layer and the embedding's, the logits gathered."""
        n = tensor_parallel(mesh)
        if n == 1:
            return ()
        reduced = collective("all-reduce", tokens * self.config.hidden_size * self.itemsize, n,
                             2 * len(self.config.layers) + 1)
        logits = rows * -(-self.config.vocab_size // n) * self.itemsize
        return together([(reduced,), (collective("all-gather", logits, n),) if rows else ()])

    def temporaries(self, mesh: Mapping[str, int], tokens: int, rows: int) -> int:
        """Bytes on each device beside weights, cache and slots that a step needs at most, reckoned generously: some
        activations of each width, or the logits several times over, whichever is more."""
        config, n = self.config, tensor_parallel(mesh)
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        layers = tokens * self.itemsize * (8 * config.hidden_size + 4 * (config.intermediate_size + heads) // n)
        return max(layers, 4 * max(rows, SCORED_ROWS) * config.vocab_size * _FLOATS)


def mesh_sizes(config: TransformerConfig, tp: int, data: int = 1, fsdp: int = 1) -> dict[str, int]:
    """The axes that `make_mesh` makes, and their sizes."""
    outer = {name: size for name, size in (("data", data), ("fsdp", fsdp)) if size > 1}
    kv = config.num_key_value_heads
    return outer | ({"model": tp} if tp <= kv else {"kv": kv, "rep": tp // kv})


def tensor_parallel(mesh: Mapping[str, int]) -> int:
    """The tensor-parallel size of a mesh."""
    return math.prod(mesh.get(axis, 1) for axis in ("model", "kv", "rep"))


def shapes_of(config: TransformerConfig, dtype: DTypeLike, kv_params: KVCacheParams, *,
              factored: bool = False) -> Shapes:
    """A model's shapes, for meshes whose model axis is factored into `(kv, rep)` or not."""
    axes = ("data", "fsdp", *(("kv", "rep") if factored else ("model",)))
    # On a single device every axis has size 1, yet names what would lie on it.
    device = np.array(jax.devices("cpu")[:1]).reshape((1,) * len(axes))
    mesh = Mesh(device, axes, axis_types=(AxisType.Explicit,) * len(axes))
    # One layer of each kind is made, and counted as often as there are such.
    counts = Counter(config.layers)
    few = replace(config, layers=tuple(counts))
    model = abstract_model(partial(build_model, few, devices=mesh, dtype=dtype, use_subgraphs=False,
                                   kv_params=replace(kv_params, n_layers=len(counts), scales=None, dtype=jnp.bfloat16)))
    found = []
    for parameter in parameters_of(model):
        if match := re.match(r"layers\.(\d+)\.", parameter.name):
            count = counts[few.layers[int(match[1])]]
            parameter = replace(parameter, shape=(count, *parameter.shape), axes=((), *parameter.axes), stacked=True)
        found.append(parameter)
    return Shapes(tuple(found), config, kv_params, jnp.dtype(dtype).itemsize)


class KnownShapes:
    """A model's shapes, each worked out once."""

    def __init__(self, config: TransformerConfig):
        self.config = config
        self._known: dict[tuple[str, bool], Shapes] = {}

    def of(self, mesh: Mapping[str, int], dtype: DTypeLike, kv_params: KVCacheParams) -> Shapes:
        """For a mesh with these axes."""
        key = jnp.dtype(dtype).name, "kv" in mesh
        if key not in self._known:
            self._known[key] = shapes_of(self.config, dtype, kv_params, factored=key[1])
        return replace(self._known[key], kv_params=kv_params)


def parameters_of(model: DistributedTransformer) -> tuple[Parameter, ...]:
    """The parameters of a model, which may be abstract."""
    found = []
    for names, stacked, param in named_parameters(model):
        array = jax.typeof(param.get_value())
        entries = (*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec)))
        axes = tuple(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries)
        shape = (*((len(names),) if stacked else ()), *param.get_metadata("logical_shape"))
        found.append(Parameter(names[0], shape, axes, bool(stacked), array.dtype.itemsize))
    return tuple(found)


def bytes_on_a_device(tree: nnx.State | object) -> int:
    """Bytes on each device of a pytree of arrays, abstract or not."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
