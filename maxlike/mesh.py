"""Devices, the mesh over them, and the one table that says which array dimension lies on which mesh axis.

Every mesh axis is `AxisType.Explicit`: an array's type carries its sharding from the moment it is created, so
nothing downstream has to state it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import numpy as np
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding


@dataclass(frozen=True)
class DeviceRef:
    """A device by kind and index, resolved only when it is needed: `DeviceRef.TPU(3)`.

    Args:
        kind: `"cpu"`, `"gpu"` or `"tpu"`.
        id: its place among JAX's devices of this kind, from 0.
    """

    kind: Literal["cpu", "gpu", "tpu"]
    id: int = 0

    @classmethod
    def CPU(cls, id: int = 0) -> DeviceRef:
        """The host's `id`-th CPU device (more than one only with `--xla_force_host_platform_device_count`)."""
        return cls("cpu", id)

    @classmethod
    def GPU(cls, id: int = 0) -> DeviceRef:
        """The `id`-th GPU."""
        return cls("gpu", id)

    @classmethod
    def TPU(cls, id: int = 0) -> DeviceRef:
        """The `id`-th TPU core."""
        return cls("tpu", id)

    def resolve(self) -> jax.Device:
        """The `jax.Device` meant.

        Raises:
            ValueError: JAX has no backend of this kind here, or fewer devices of it than `id + 1`.
        """
        try:
            present = jax.devices(self.kind)
        except RuntimeError as error:
            raise ValueError(
                f"{self} was asked for, but JAX finds no {self.kind} here ({error}). Devices present: "
                f"{', '.join(map(str, jax.devices()))}. Install jax[{'cuda' if self.kind == 'gpu' else self.kind}] "
                "or name one of those."
            ) from error
        if not 0 <= self.id < len(present):
            raise ValueError(f"{self} was asked for, but there are only {len(present)} {self.kind} devices, "
                             f"0 to {len(present) - 1}.")
        return present[self.id]

    def __str__(self) -> str:
        return f"DeviceRef.{self.kind.upper()}({self.id})"


Devices = Mesh | Sequence[DeviceRef | jax.Device]
"""What every `devices` parameter takes: a mesh, or devices from which `as_mesh` makes one."""


def tensor_parallel_sizes(n_heads: int, n_kv_heads: int, **dimensions: int) -> list[int]:
    """All legal tensor-parallel sizes, ascending.

    A size must divide `n_heads`, and divide `n_kv_heads` or be a multiple of it; then each device holds whole
    query heads together with the KV heads that they read. `dimensions` are further sizes to divide (MLP width).
    """
    return [
        n for n in range(1, n_heads + 1)
        if n_heads % n == 0 and (n_kv_heads % n == 0 or n % n_kv_heads == 0)
        and all(size % n == 0 for size in dimensions.values())
    ]


def check_tensor_parallel_size(n: int, n_heads: int, n_kv_heads: int, **dimensions: int) -> None:
    """Sees to it that `n` is one of `tensor_parallel_sizes`.

    Raises:
        ValueError: it is not; lists those that are.
    """
    legal = tensor_parallel_sizes(n_heads, n_kv_heads, **dimensions)
    if n not in legal:
        also = "".join(f", {name} = {size}" for name, size in dimensions.items())
        raise ValueError(
            f"Tensor-parallel size {n} does not fit a model with {n_heads} heads and {n_kv_heads} KV heads{also}. "
            f"A size must divide {n_heads}{''.join(f' and {size}' for size in dimensions.values())}, and divide "
            f"{n_kv_heads} or be a multiple of it. Legal sizes: {', '.join(map(str, legal))}.")


def make_mesh(devices: Sequence[DeviceRef | jax.Device] | None = None, *, data: int = 1, fsdp: int = 1,
              n_heads: int | None = None, n_kv_heads: int | None = None, **dimensions: int) -> Mesh:
    """A mesh over `devices` (default: all) with a tensor-parallel axis, `"model"`, and those to train on before it.

    With more tensor-parallel devices than KV heads the model axis is factored into `("kv", "rep")`, `kv = n_kv_heads`:
    query heads are sharded over both, keys and values over `"kv"` alone, and no KV head is split.

    Args:
        devices: in the order of the mesh; TPU devices may be reordered to follow the physical ring.
        data, fsdp: sizes of the axes `"data"` and `"fsdp"`, which a batch's tokens are cut over; the second one cuts
            the parameters too. An axis of size 1 is left out. What they leave is the tensor-parallel size.
        n_heads, n_kv_heads: of the model. Without `n_heads` no size is refused, without `n_kv_heads` the axis is
            not factored.
        dimensions: further sizes that the mesh must divide, by name, e.g. `intermediate_size=14336`.

    Raises:
        ValueError: the number of devices is not a legal size for these heads; lists those that are.
    """
    resolved = [d.resolve() if isinstance(d, DeviceRef) else d for d in (jax.devices() if devices is None else devices)]
    n = len(resolved)
    if n == 0:
        raise ValueError("make_mesh was given no devices; pass at least one, or None for all of them.")
    if min(data, fsdp) < 1 or n % (data * fsdp):
        raise ValueError(f"{n} devices cannot be cut into data={data} times fsdp={fsdp} equal parts; both must be at "
                         f"least 1, and their product divide {n}.")
    if len(set(resolved)) != n:
        raise ValueError(f"make_mesh was given a device twice: {', '.join(map(str, resolved))}.")
    tensor_parallel = n // (data * fsdp)
    if n_heads is not None:
        n_kv_heads = n_kv_heads or n_heads
        check_tensor_parallel_size(tensor_parallel, n_heads, n_kv_heads, **dimensions)
    outer = {name: size for name, size in (("data", data), ("fsdp", fsdp)) if size > 1}
    axes = outer | {"model": tensor_parallel}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes),
                         devices=resolved)
    if n_kv_heads is None or tensor_parallel <= n_kv_heads:
        return mesh
    if tensor_parallel % n_kv_heads:
        raise ValueError(f"{tensor_parallel} devices cannot be factored over {n_kv_heads} KV heads; use a multiple "
                         "of it.")
    return Mesh(mesh.devices.reshape(*outer.values(), n_kv_heads, -1), (*outer, "kv", "rep"),
                axis_types=(AxisType.Explicit,) * (len(outer) + 2))


def mesh_platform(mesh: Mesh) -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: what the mesh's devices are, whether or not they are here."""
    return mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What programs for the mesh's devices are compiled with, as `jax.jit` takes it."""
    # Left to itself LLVM uses half of a 512-bit register: it reads a weight a fifth slower, and a training step takes
    # 4 % longer. Where there are none it divides what it was asked for.
    return {"xla_cpu_prefer_vector_width": 512} if mesh_platform(mesh) == "cpu" else None


def as_mesh(devices: Devices, *, n_heads: int | None = None, n_kv_heads: int | None = None,
            **dimensions: int) -> Mesh:
    """`devices` itself when it is a mesh that fits, else what `make_mesh` makes of them; arguments as there.

    Raises:
        ValueError: a mesh has an axis that is not `AxisType.Explicit`, or its size does not fit the heads.
    """
    if not isinstance(devices, Mesh):
        return make_mesh(devices, n_heads=n_heads, n_kv_heads=n_kv_heads, **dimensions)
    if n_heads is not None:
        n_kv_heads = n_kv_heads or n_heads
        sizes = dict(devices.shape)
        parts, sharers = sizes.get("model", 1) * sizes.get("kv", 1), sizes.get("rep", 1)
        check_tensor_parallel_size(parts * sharers, n_heads, n_kv_heads, **dimensions)
        # Where devices share KV heads each must find just one, or it would not know which its queries read.
        if n_kv_heads % parts or (sharers > 1 and n_kv_heads != parts):
            raise ValueError(f"The mesh {sizes} cuts {n_kv_heads} KV heads into {parts}, for {sharers} devices each. "
                             f"Make it with make_mesh(devices, n_heads={n_heads}, n_kv_heads={n_kv_heads}), which "
                             "factors the model axis as they need it.")
    if any(kind != AxisType.Explicit for kind in devices.axis_types):
        raise ValueError(f"The mesh's axes {devices.axis_names} have types {devices.axis_types}; maxlike needs "
                         "AxisType.Explicit on each: jax.make_mesh(shape, names, axis_types=(AxisType.Explicit, ...)).")
    return devices


@dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axes. The only place in the package where the two meet.

    An axis that a mesh lacks is passed over, so one table serves the plain mesh (`"model"`), the factored one
    (`"kv", "rep"`) and a single device; and one with `"data"` and `"fsdp"` before them, to train on.

    `tokens` is the dimension T of a batch. `hidden` is the dimension D of weights alone, never of activations: a
    weight is gathered over its axes where it is used (ZeRO stage 3, https://arxiv.org/abs/1910.02054).
    """

    tokens: tuple[str, ...] = ("data", "fsdp")
    hidden: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("model", "kv", "rep")
    kv_heads: tuple[str, ...] = ("model", "kv")
    mlp: tuple[str, ...] = ("model", "kv", "rep")
    vocab: tuple[str, ...] = ("model", "kv", "rep")

    def mesh_axes(self, mesh: Mesh, logical_axis: str | None) -> tuple[str, ...]:
        """The axes of `mesh` that `logical_axis` lies on; `None` is replicated.

        Raises:
            ValueError: there is no such logical axis.
        """
        if logical_axis is None:
            return ()
        known = [f.name for f in fields(self)]
        if logical_axis not in known:
            raise ValueError(f"Unknown logical axis {logical_axis!r}; the rules know {', '.join(known)}.")
        return tuple(axis for axis in getattr(self, logical_axis) if axis in mesh.axis_names)

    def shards(self, mesh: Mesh, logical_axis: str | None) -> int:
        """Into how many parts `logical_axis` is cut on `mesh`."""
        return int(np.prod([mesh.shape[axis] for axis in self.mesh_axes(mesh, logical_axis)], dtype=int))

    def sharding(self, mesh: Mesh, shape: Sequence[int], *logical_axes: str | None) -> NamedSharding:
        """The sharding of an array of `shape` whose dimensions are `logical_axes`, one for each.

        Raises:
            ValueError: two dimensions fall on one mesh axis, or a dimension is not divisible by its axes.
        """
        if len(shape) != len(logical_axes):
            raise ValueError(f"Shape {tuple(shape)} has {len(shape)} dimensions; {len(logical_axes)} logical axes "
                             f"were given: {logical_axes}.")
        entries: list[Any] = []
        owner: dict[str, str] = {}
        for size, logical in zip(shape, logical_axes, strict=True):
            axes = self.mesh_axes(mesh, logical)
            for axis in axes:
                if axis in owner:
                    raise ValueError(f"Dimensions {owner[axis]!r} and {logical!r} of an array of shape {tuple(shape)} "
                                     f"both lie on mesh axis {axis!r} (size {mesh.shape[axis]}); change the rules.")
                owner[axis] = str(logical)
            shards = self.shards(mesh, logical)
            if size % shards:
                raise ValueError(f"Dimension {logical!r} of size {size} (array of shape {tuple(shape)}) is not "
                                 f"divisible by mesh axes {axes} of size {shards}.")
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return NamedSharding(mesh, P(*entries))


def distribute_value(v: Any, devices: Devices) -> list[Any]:
    """One copy of `v` (an array or a pytree of them) on each device, as a list in device order."""
    each = devices.devices.flat if isinstance(devices, Mesh) else devices
    return [jax.device_put(v, d.resolve() if isinstance(d, DeviceRef) else d) for d in each]
