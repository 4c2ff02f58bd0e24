"""Low-rank adapters on linear layers (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

An adapted layer gives `y + factor * (x @ A.T) @ B.T`, A `[r, in]` and B `[out, r]`: its `lora_a` and `lora_b`, beside a
`weight` that keeps its name (`layers.3.attention.q_proj.lora_a`). The arithmetic is `nn.linear.Linear`'s; here adapters
are put on, taken off and merged. What the fields of a configuration mean is what they mean to PEFT
(https://huggingface.co/docs/peft).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from maxlike.nn.linear import Linear, LoraScaling
from maxlike.nn.module import create_param
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters, names_at

ALL_LINEAR = "all-linear"
Naming = Callable[[str], Iterable[str]]
"""Other names for a layer of this name."""


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what kind.

    Args:
        rank: r, of A's rows and B's columns.
        alpha: what the product is multiplied by, divided by `rank` (by its square root with `use_rslora`).
        target_modules: names of linear layers, or the ends of names behind a dot, as `("q_proj", "v_proj")`; or one
            string, a regular expression that matches whole names, or `"all-linear"`: all but the head.
        exclude_modules: names, or a regular expression, of layers that get none all the same.
        rank_pattern, alpha_pattern: regular expression for names, or their ends behind a dot -> the `rank` or `alpha`
            there; the first that matches counts.
        use_rslora: see `alpha`.

    Raises:
        ValueError: a value is out of range, or a regular expression is none.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value: Any = getattr(self, name)
            if not isinstance(value, str):
                if not isinstance(value, Iterable) or not all(isinstance(item, str) and item for item in value):
                    raise ValueError(f"{name} is a regular expression, or a list of names; got {value!r}.")
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, set | frozenset) else value))
        if not self.target_modules:
            raise ValueError('target_modules is empty: name layers, as ["q_proj", "v_proj"], or "all-linear".')
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} maps regular expressions to numbers; got {getattr(self, name)!r}.")
        for where, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where} must be a whole number of at least 1; got {rank!r}.")
        for where, alpha in (("alpha", self.alpha),
                             *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(f"{where} must be a number; got {alpha!r}.")
        patterns = [pattern for pattern in (self.target_modules, self.exclude_modules) if isinstance(pattern, str)]
        for pattern in (*patterns, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error

    def targets(self, *names: str, is_head: bool = False) -> bool:
        """Whether the layer of these names, any of which counts, gets an adapter."""
        if _fits(self.exclude_modules, names):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            return not is_head
        return _fits(self.target_modules, names)

    def kind(self, *names: str) -> tuple[int, LoraScaling]:
        """Rank and scaling of the adapter of the layer of these names."""
        def at(pattern: Mapping[str, Any], default: Any) -> Any:
            return next((value for key, value in pattern.items()
                         if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names)), default)

        return at(self.rank_pattern, self.rank), LoraScaling(float(at(self.alpha_pattern, self.alpha)), self.use_rslora)


def _fits(patterns: str | tuple[str, ...], names: Iterable[str]) -> bool:
    if isinstance(patterns, str):
        return any(re.fullmatch(patterns, name) for name in names)
    return any(name == end or name.endswith("." + end) for end in patterns for name in names)


@dataclass(frozen=True)
class NamedLinear:
    """A linear layer of a model: `names` has one for each layer of the transformer that it stands for.

    `in_dim` and `out_dim` are those of checkpoints. `tied`: its weight is the embedding's.
    """

    layer: Linear
    names: tuple[str, ...]
    stacked: bool
    tied: bool
    is_head: bool

    @property
    def logical_shape(self) -> tuple[int, int]:
        """`(out, in)` of the weight in checkpoints."""
        out_dim, in_dim = self.layer.weight.get_metadata("logical_shape")
        return out_dim, in_dim


def linear_layers(model: DistributedTransformer) -> list[NamedLinear]:
    """Every linear layer of a model, the head last."""
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            names, stacked = names_at(model, path)
            found.append(NamedLinear(module, tuple(names), stacked, module.weight is model.embedding.weight,
                                     path[0] == "output"))
    return sorted(found, key=lambda linear: linear.is_head)


def add_lora(model: DistributedTransformer, config: LoraConfig, rngs: nnx.Rngs, *, dtype: DTypeLike = "float32",
             naming: Naming | None = None) -> list[str]:
    """Puts adapters on the layers of `model` that `config` names, and returns the names of these layers.

    A is drawn as PEFT draws it, uniformly within `1 / sqrt(in)`; B is zero, so the model's outputs are what they were.
    For one state of `rngs` a layer's A is the same whether layers are scanned or not, and on every mesh.

    Args:
        rngs: one key of its stream `params` is taken.
        dtype: of A and B. They are used in the dtype of the activations.
        naming: other names for each of ours, by which `config` may know it too.

    Raises:
        ValueError: a name fits no linear layer (lists those there are) or a head that is tied to the embedding, a layer
            has an adapter already, or layers that are scanned together would not get the same; nothing is changed.
    """
    chosen = choose_layers(model, config, naming=naming)
    key = rngs.params()
    for linear, (rank, scaling) in chosen:
        # A key for each layer, made of its name.
        keys = [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in linear.names]
        a, b = adapter_shapes(linear, rank, dtype, model.mesh)
        attach(linear.layer, scaling, _created(_kaiming_uniform, jnp.stack(keys) if linear.stacked else keys[0], a),
               _created(jax.nn.initializers.zeros, key, b))
    return [name for linear, _ in chosen for name in linear.names]


def choose_layers(model: DistributedTransformer, config: LoraConfig, *, naming: Naming | None = None,
                  lenient: bool = False) -> list[tuple[NamedLinear, tuple[int, LoraScaling]]]:
    """The layers that `config` names, with rank and scaling; raises what `add_lora` raises.

    Args:
        model, config, naming: as `add_lora` has them.
        lenient: of several names in `target_modules` some may fit no layer.
    """
    linears = linear_layers(model)
    known = {name: (name, *naming(name)) if naming else (name,) for linear in linears for name in linear.names}
    if isinstance(config.target_modules, tuple):
        unfit = [end for end in config.target_modules if not any(_fits((end,), names) for names in known.values())]
        if unfit and (not lenient or len(unfit) == len(config.target_modules)):
            raise ValueError(f"target_modules names {', '.join(map(repr, unfit))}, but no linear layer is called so. "
                             f"{_there_are(linears)}")
    chosen: list[tuple[NamedLinear, tuple[int, LoraScaling]]] = []
    for linear in linears:
        kinds = {name: config.kind(*known[name]) if config.targets(*known[name], is_head=linear.is_head) else None
                 for name in linear.names}
        first, *others = kinds.items()
        for name, kind in others:
            if kind != first[1]:
                raise ValueError(f"{first[0]} and {name} are scanned together and need the same adapter, but by "
                                 f"the configuration one has {_told(first[1])} and the other {_told(kind)}. Build the "
                                 "model with use_subgraphs=False, or let the patterns not tell layers apart.")
        if first[1] is None:
            continue
        if linear.tied:
            raise ValueError(f"{first[0]} is the head, and its weight is the embedding's: an adapter on it could not "
                             "be merged without changing the embedding. Leave it out of target_modules.")
        if linear.layer.lora_a is not None:
            raise ValueError(f"{first[0]} has an adapter already: merge_lora or remove_lora takes it away first.")
        chosen.append((linear, first[1]))
    if not chosen:
        hint = " Names without their beginning go into a list, as [\"q_proj\"]." if isinstance(
            config.target_modules, str) else ""
        raise ValueError(f"target_modules {config.target_modules!r} fits no linear layer.{hint} {_there_are(linears)}")
    return chosen


def _told(kind: tuple[int, LoraScaling] | None) -> str:
    return "none" if kind is None else f"rank {kind[0]} and alpha {kind[1].alpha:g}"


def _there_are(linears: Iterable[NamedLinear]) -> str:
    kinds = dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.N.", name) for linear in linears for name in linear.names)
    return f"There are {', '.join(kinds)}."


def adapter_shapes(linear: NamedLinear, rank: int, dtype: DTypeLike,
                   mesh: jax.sharding.Mesh) -> tuple[nnx.Param, nnx.Param]:
    """`lora_a` and `lora_b` for a layer, as shapes with their shardings: each dimension is cut as the weight's."""
    weight = jax.typeof(linear.layer.weight.get_value())
    spec = (*weight.sharding.spec, *[None] * (weight.ndim - len(weight.sharding.spec)))
    (*lead, out_size, in_size), (*lead_axes, out_axes, in_axes) = weight.shape, spec
    out_dim, in_dim = linear.logical_shape

    def param(shape: tuple[int, ...], axes: tuple[Any, ...], logical: tuple[int, int]) -> nnx.Param:
        sharding = NamedSharding(mesh, P(*lead_axes, *axes))
        return nnx.Param(jax.ShapeDtypeStruct((*lead, *shape), jnp.dtype(dtype), sharding=sharding),
                         logical_shape=logical)

    return (param((rank, in_size), (None, in_axes), (rank, in_dim)),
            param((out_size, rank), (out_axes, None), (out_dim, rank)))


def attach(layer: Linear, scaling: LoraScaling, lora_a: nnx.Param, lora_b: nnx.Param) -> None:
    """Gives a layer an adapter: `lora_a` `[rank, in]` and `lora_b` `[out, rank]`, whose product `scaling` is for. A
    stack's have a dimension of layers before these.
    """
    layer.lora_a, layer.lora_b, layer.lora_scaling = lora_a, lora_b, scaling


def _created(init: Callable[..., jax.Array], key: jax.Array, like: nnx.Param) -> nnx.Param:
    """The parameter of which `like` is the shape."""
    shape, logical = like.get_value(), like.get_metadata("logical_shape")
    lead = shape.shape[:-2]
    value = create_param(init, key, shape.shape, shape.dtype, shape.sharding, logical_shape=(*lead, *logical))
    return nnx.Param(value.get_value(), logical_shape=logical)


def _kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """He et al. 2015 (https://arxiv.org/abs/1502.01852) with a leaky slope of sqrt(5), as PEFT has it: the bound is
    `1 / sqrt(in)`. A stack takes a key for each of its slices."""
    bound = shape[-1] ** -0.5

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, shape[-2:], jnp.float32, -bound, bound)

    return (jax.vmap(draw)(key) if key.ndim else draw(key)).astype(dtype)


def is_lora(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")


def lora_parameters(model: DistributedTransformer) -> Iterator[tuple[list[str], bool, nnx.Param]]:
    """Of `named_parameters(model)`, the adapters'."""
    return (entry for entry in named_parameters(model) if is_lora(entry[0][0]))


def adapted_layers(model: DistributedTransformer) -> list[NamedLinear]:
    """The linear layers of a model that have an adapter."""
    return [linear for linear in linear_layers(model) if linear.layer.lora_a is not None]


def merge_lora(model: DistributedTransformer) -> None:
    """Adds the adapters into the weights, in float32 and rounded once, and takes them off.

    Raises:
        ValueError: there are none.
    """
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError("The model has no adapter to merge: add_lora or load_adapter puts one on.")
    for linear in adapted:
        layer = linear.layer
        assert layer.lora_a is not None and layer.lora_b is not None and layer.lora_scaling is not None
        a, b = layer.lora_a.get_value(), layer.lora_b.get_value()
        layer.weight.set_value(_merged(layer.weight.get_value(), a, b, layer.lora_scaling.factor(a.shape[-2])))
        _detach(layer)


def remove_lora(model: DistributedTransformer) -> None:
    """Takes the adapters off; what is left is the base."""
    for linear in adapted_layers(model):
        _detach(linear.layer)


def _detach(layer: Linear) -> None:
    # Deleted and not None, so that the layer is of the structure that it had: compiled programs go on fitting.
    del layer.lora_a, layer.lora_b, layer.lora_scaling


@jax.jit
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, factor: float) -> jax.Array:
    def one(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = parts
        change = jax.lax.dot_general(b.astype(jnp.float32), a.astype(jnp.float32), (((1,), (0,)), ((), ())),
                                     precision=jax.lax.Precision.HIGHEST, out_sharding=jax.typeof(weight).sharding)
        return (weight.astype(jnp.float32) + factor * change).astype(weight.dtype)

    # A stack layer by layer: all its changes at once would be as large as two of it in bfloat16.
    return one((weight, a, b)) if weight.ndim == 2 else jax.lax.map(one, (weight, a, b))
