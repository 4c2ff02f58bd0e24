"""Between a state that trains and the arrays of a checkpoint: one for each layer's parameter, in its logical shape.

A checkpoint does not know how the model ran that wrote it. Stacks of scanned layers are taken apart, a vocabulary's
padding is cut off, and both for the optimizer's moments as for the parameters, since their trees follow the
parameters' tree. So one mesh may go on where another one left off, and unrolled layers where scanned ones did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from maxlike.models.safetensors import CheckpointError
from maxlike.nn.transformer.segments import named_parameters

Path = tuple[str, ...]


@dataclass(frozen=True)
class StoredParameter:
    """How one parameter of a model is stored: under `names`, each slice of a stack under its own, as `shape`."""

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]


def parameter_layout(model: nnx.Module) -> dict[Path, StoredParameter]:
    """Each parameter's path in `nnx.split(model)`'s state, and how it is stored. The model may be abstract."""
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return {path: StoredParameter(tuple(names), stacked, tuple(param.get_metadata("logical_shape")))
            for path, (names, stacked, param) in zip(paths, named_parameters(model), strict=True)}


@dataclass(frozen=True)
class _Leaf:
    """One leaf of a state: under which names, whether each is a slice of it, and what is cut from each."""

    value: Any
    names: tuple[str, ...]
    sliced: bool
    shape: tuple[int, ...]
    """Logical, of what one name stands for."""

    @property
    def sharding(self) -> NamedSharding | None:
        """On a mesh, be it an abstract one; `None` for what lies on none, a counter."""
        sharding = getattr(self.value, "sharding", None)
        return sharding if isinstance(sharding, NamedSharding) else None

    @property
    def spec(self) -> P:
        return P() if self.sharding is None else self.sharding.spec


def _leaves(state: Any, layout: Mapping[Path, StoredParameter]) -> Iterator[_Leaf]:
    for key_path, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)
        path = path[:-1] if path[-1] == "value" else path  # an `nnx.Variable`'s
        tails = [path[i:] for i in range(len(path)) if path[i:] in layout]
        if not tails:
            yield _Leaf(value, (".".join(path),), False, value.shape)
            continue
        parameter, before = layout[tails[0]], path[:len(path) - len(tails[0])]
        names = tuple(".".join((*before, name)) for name in parameter.names)
        # Adafactor has one number where a moment of the other kind is kept: that is no stack of anything.
        sliced = parameter.stacked and value.ndim > 0 and value.shape != (1,) and value.shape[0] == len(names)
        full = value.shape[1:] if sliced else value.shape
        logical = parameter.shape if len(full) == len(parameter.shape) else full
        yield _Leaf(value, names, sliced, tuple(map(min, full, logical)))


def stored_arrays(state: Any, layout: Mapping[Path, StoredParameter]) -> dict[str, jax.Array | np.ndarray]:
    """The arrays of a checkpoint of `state`, by name, in the shapes that `layout` gives: per layer, without padding.
    Those that are not simply the state's own are in host memory.
    """
    arrays: dict[str, jax.Array | np.ndarray] = {}
    for leaf in _leaves(state, layout):
        for i, name in enumerate(leaf.names):
            assert name not in arrays, f"two arrays of a state are called {name}"
            if isinstance(leaf.value, jax.Array) and leaf.sharding is not None:
                part = leaf.value[i] if leaf.sliced else leaf.value
                part = _cropped(part, leaf.shape)
                arrays[name] = part if part is leaf.value else _in_host_memory(part)
            else:  # each process has its own, and they are the same
                arrays[name] = np.asarray(leaf.value)
    return arrays


def stored_shapes(state: Any, layout: Mapping[Path, StoredParameter]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of each of `stored_arrays`; the state may be abstract."""
    return {name: (leaf.shape, str(leaf.value.dtype)) for leaf in _leaves(state, layout) for name in leaf.names}


def restored_state(state: Any, layout: Mapping[Path, StoredParameter], mesh: Mesh,
                   read: Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]) -> Any:
    """A state like `state` (which may be abstract, and is not read) on `mesh`, its numbers from a checkpoint.

    Args:
        read: from the names, padded shapes, dtypes and shardings of arrays to them, zeros where they are padded.
    """
    leaves = list(_leaves(state, layout))
    wanted = {}
    for leaf in leaves:
        spec, shape = leaf.spec, leaf.value.shape
        if leaf.sliced:
            spec, shape = P(*spec[1:]), shape[1:]
        for name in leaf.names:
            wanted[name] = jax.ShapeDtypeStruct(shape, leaf.value.dtype, sharding=NamedSharding(mesh, spec))
    arrays = read(wanted)
    values = []
    for leaf in leaves:  # a stack's slices go as it is made: no more than one parameter is held twice
        parts = [arrays.pop(name) for name in leaf.names]
        if leaf.sliced:
            values.append(_stacked(parts, NamedSharding(mesh, leaf.spec)))
        else:
            values.append(parts[0] if leaf.sharding is not None else jnp.asarray(np.asarray(parts[0])))
    return jax.tree.unflatten(jax.tree.structure(state), values)


def check_stored(wanted: Mapping[str, tuple[Sequence[int], str]], stored: Mapping[str, tuple[Sequence[int], str]],
                 what: str) -> None:
    """Sees to it that a checkpoint holds just what a state needs.

    Raises:
        CheckpointError: it does not; names what is missing, left over, or of another shape.
    """
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} has no place in this state" for name in stored if name not in wanted]
    problems += [f"{name} is {stored[name][1]}{list(stored[name][0])}; this state's is {dtype}{list(shape)}"
                 for name, (shape, dtype) in wanted.items()
                 if name in stored and (list(stored[name][0]) != list(shape) or stored[name][1] != dtype)]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise CheckpointError([*problems[:5], *more], summary=f"{what} is of another model or optimizer:")


def _stacked(parts: list[jax.Array], sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda *parts: jnp.stack(parts), out_shardings=sharding)(*parts)


def _cropped(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`array` without its padding. What lies on several devices is not cut at a place that is not a multiple of them:
    such a dimension's mesh axes go to another one for the purpose."""
    if array.shape == shape:
        return array
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    entries = [*sharding.spec, *(None,) * (array.ndim - len(sharding.spec))]
    axes = [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in entries]
    for i, (full, part) in enumerate(zip(array.shape, shape, strict=True)):
        if full == part:
            continue
        moved, axes[i] = axes[i], ()
        for j, other in enumerate(axes):
            if array.shape[j] == shape[j] and shape[j] % int(np.prod([sharding.mesh.shape[a] for a in other + moved])
                                                              ) == 0:
                axes[j] = other + moved
                break
    spec = P(*(entry or None for entry in axes))
    return jax.device_put(array, NamedSharding(sharding.mesh, spec))[tuple(slice(size) for size in shape)]


def _in_host_memory(array: jax.Array) -> jax.Array:
    """`array`, which is a copy already, off the accelerator: all of a state's at once would double it there."""
    device: Any = next(iter(array.sharding.addressable_devices))
    if device.platform == "cpu" or not any(memory.kind == "pinned_host" for memory in device.addressable_memories()):
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))
