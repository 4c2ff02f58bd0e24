"""Devices by name, the mesh over them, and the rules that put dimensions on its axes."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from maxlike.mesh import DeviceRef, ShardingRules, as_mesh, make_mesh, tensor_parallel_sizes


def explicit(devices: list[jax.Device], **axes: int) -> Mesh:
    n = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Explicit,) * len(axes), devices=devices[:n])


# --- DeviceRef --------------------------------------------------------------------------------------------------


def test_device_refs_are_resolved_only_when_asked(devices: list[jax.Device]) -> None:
    assert (DeviceRef.CPU(), DeviceRef.GPU(1), DeviceRef.TPU(3)) == (
        DeviceRef("cpu", 0), DeviceRef("gpu", 1), DeviceRef("tpu", 3))  # fmt: skip
    assert [DeviceRef.CPU(i).resolve() for i in range(8)] == devices
    assert str(DeviceRef.TPU(3)) == "DeviceRef.TPU(3)"
    assert len({DeviceRef.CPU(1), DeviceRef.CPU(1), DeviceRef.TPU(1)}) == 2


@pytest.mark.parametrize("id", [8, -1])
def test_a_device_beyond_those_present(id: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"DeviceRef.CPU({id})") + r".*only 8 cpu devices, 0 to 7"):
        DeviceRef.CPU(id).resolve()


@pytest.mark.parametrize(
    ("ref", "extra"), [(DeviceRef.TPU(0), "jax[tpu]"), (DeviceRef.GPU(2), "jax[cuda]")], ids=str
)
def test_a_kind_of_device_that_is_not_here(ref: DeviceRef, extra: str) -> None:
    if ref.kind in {device.platform for device in jax.devices()}:
        pytest.skip(f"there is a {ref.kind} here")
    with pytest.raises(ValueError) as error:
        ref.resolve()
    for part in (str(ref), f"no {ref.kind} here", str(jax.devices()[0]), extra):
        assert part in str(error.value)


# --- Tensor-parallel sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "dimensions", "legal"),
    [
        (8, 8, {}, [1, 2, 4, 8]),
        (8, 2, {}, [1, 2, 4, 8]),
        (8, 1, {}, [1, 2, 4, 8]),
        (6, 3, {}, [1, 3, 6]),
        (3, 3, {}, [1, 3]),
        (32, 8, {}, [1, 2, 4, 8, 16, 32]),
        (14, 2, {}, [1, 2, 14]),
        (12, 6, {}, [1, 2, 3, 6, 12]),  # four shards of six KV heads would cut one in two
        (8, 2, dict(intermediate_size=12), [1, 2, 4]),
        (8, 2, dict(intermediate_size=12, other=6), [1, 2]),
    ],
)
def test_tensor_parallel_sizes(n_heads: int, n_kv_heads: int, dimensions: dict[str, int], legal: list[int]) -> None:
    assert tensor_parallel_sizes(n_heads, n_kv_heads, **dimensions) == legal


@given(st.integers(1, 8), st.integers(1, 8))
def test_at_a_legal_size_a_device_has_the_kv_heads_that_its_queries_read(n_kv_heads: int, group: int) -> None:
    n_heads = n_kv_heads * group
    for size in range(1, n_heads + 1):
        whole = False
        if n_heads % size == 0:
            per_device = n_heads // size
            read = [{head // group for head in range(i * per_device, (i + 1) * per_device)} for i in range(size)]
            kv_shards = min(size, n_kv_heads)
            owned = n_kv_heads // kv_shards
            whole = n_kv_heads % kv_shards == 0 and size % kv_shards == 0 and all(
                heads <= set(range(owner * owned, (owner + 1) * owned))
                for heads, owner in zip(read, (i * kv_shards // size for i in range(size)), strict=True))
        assert (size in tensor_parallel_sizes(n_heads, n_kv_heads)) == whole


# --- make_mesh --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "heads", "shape"),
    [
        (8, {}, {"model": 8}),
        (1, dict(n_heads=8, n_kv_heads=1), {"model": 1}),
        (2, dict(n_heads=8, n_kv_heads=2), {"model": 2}),
        (4, dict(n_heads=8, n_kv_heads=2), {"kv": 2, "rep": 2}),
        (8, dict(n_heads=8, n_kv_heads=2), {"kv": 2, "rep": 4}),
        (8, dict(n_heads=8, n_kv_heads=1), {"kv": 1, "rep": 8}),
        (8, dict(n_heads=8, n_kv_heads=8), {"model": 8}),
        (8, dict(n_heads=8), {"model": 8}),
        (6, dict(n_heads=6, n_kv_heads=3), {"kv": 3, "rep": 2}),
    ],
)
def test_the_model_axis_is_factored_beyond_the_kv_heads(devices: list[jax.Device], n: int, heads: dict[str, int],
                                                        shape: dict[str, int]) -> None:
    mesh = make_mesh(devices[:n], **heads)
    assert dict(mesh.shape) == shape
    assert list(mesh.devices.flat) == devices[:n]
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert make_mesh([DeviceRef.CPU(i) for i in range(n)], **heads) == mesh
    assert as_mesh(devices[:n], **heads) == as_mesh(mesh, **heads) == mesh


def test_all_devices_by_default(devices: list[jax.Device]) -> None:
    assert list(make_mesh().devices.flat) == devices


@pytest.mark.parametrize(
    ("n", "heads", "message"),
    [
        (2, dict(n_heads=6, n_kv_heads=3), r"size 2 .*6 heads and 3 KV heads\. .*Legal sizes: 1, 3, 6\.$"),
        (4, dict(n_heads=3, n_kv_heads=3), r"size 4 .*Legal sizes: 1, 3\.$"),
        (3, dict(n_heads=8), r"size 3 .*8 heads and 8 KV heads.*Legal sizes: 1, 2, 4, 8\.$"),
        (8, dict(n_heads=8, n_kv_heads=2, intermediate_size=12),
         r"size 8 .*intermediate_size = 12\. A size must divide 8 and 12.*Legal sizes: 1, 2, 4\.$"),
        (3, dict(n_kv_heads=2), "3 devices cannot be factored over 2 KV heads"),
        (0, {}, "no devices"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(devices: list[jax.Device], n: int, heads: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(devices[:n], **heads)


def test_a_device_twice(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=f"twice.*{devices[1]}.*{devices[1]}"):
        make_mesh([devices[1], DeviceRef.CPU(1)])


@pytest.mark.parametrize("types", [(AxisType.Auto,), (AxisType.Manual,)], ids=str)
def test_meshes_must_be_explicit(devices: list[jax.Device], types: tuple[AxisType, ...]) -> None:
    with pytest.raises(ValueError, match=r"\('model',\) have types .*AxisType.Explicit"):
        as_mesh(Mesh(np.array(devices[:2]), ("model",), axis_types=types))


def test_meshes_that_do_not_fit_the_heads(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=r"size 2 .*Legal sizes: 1, 3, 6\.$"):
        as_mesh(explicit(devices, model=2), n_heads=6, n_kv_heads=3)
    with pytest.raises(ValueError, match=r"'model': 4\} cuts 2 KV heads into 4, .*n_heads=8, n_kv_heads=2"):
        as_mesh(explicit(devices, model=4), n_heads=8, n_kv_heads=2)
    with pytest.raises(ValueError, match=r"cuts 8 KV heads into 4, for 2 devices each\. .*make_mesh"):
        as_mesh(explicit(devices, kv=4, rep=2), n_heads=8, n_kv_heads=8)  # a device would lack a KV head of its own
    mesh = explicit(devices, data=2, model=4)
    assert as_mesh(mesh, n_heads=8, n_kv_heads=4) is mesh  # a data axis cuts no head


# --- ShardingRules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "heads", "kv_heads"),
    [
        (dict(model=4), "model", "model"),
        (dict(kv=2, rep=4), ("kv", "rep"), "kv"),
        (dict(model=1), "model", "model"),
        (dict(data=2), None, None),
        (dict(data=2, model=2), "model", "model"),
    ],
    ids=str,
)
def test_logical_axes_lie_on_mesh_axes(devices: list[jax.Device], axes: dict[str, int], heads: Any,
                                       kv_heads: Any) -> None:
    rules, mesh = ShardingRules(), explicit(devices, **axes)
    assert rules.sharding(mesh, (16, 8), "heads", None) == NamedSharding(mesh, P(heads, None))
    assert rules.sharding(mesh, (8,), "kv_heads") == NamedSharding(mesh, P(kv_heads))
    for axis in ("mlp", "vocab"):
        assert rules.sharding(mesh, (3, 16), None, axis) == NamedSharding(mesh, P(None, heads))
    sizes = {name: size for name, size in axes.items() if name != "data"}
    assert rules.shards(mesh, "heads") == np.prod([*sizes.values(), 1])
    assert rules.shards(mesh, "kv_heads") == sizes.get("kv", sizes.get("model", 1))
    assert rules.shards(mesh, None) == 1
    assert rules.sharding(mesh, (), *()) == NamedSharding(mesh, P())


def test_rules_of_ones_own(devices: list[jax.Device]) -> None:
    mesh = explicit(devices, x=2, y=4)
    rules = ShardingRules(heads=("y",), mlp=("x", "y"), vocab=())
    assert rules.sharding(mesh, (8, 3), "heads", None).spec == P("y", None)
    assert rules.sharding(mesh, (3, 8), None, "mlp").spec == P(None, ("x", "y"))
    assert rules.sharding(mesh, (5,), "vocab").spec == P(None)


def test_two_dimensions_on_one_axis(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' of an array of shape \(8, 16\).*'model' \(size 4\)"):
        ShardingRules().sharding(explicit(devices, model=4), (8, 16), "heads", "mlp")
    with pytest.raises(ValueError, match=r"'kv_heads' and 'vocab'.*'kv' \(size 2\)"):
        ShardingRules().sharding(explicit(devices, kv=2, rep=4), (8, 16), "kv_heads", "vocab")


def test_dimensions_that_are_not_divisible(devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=r"'mlp' of size 12 \(array of shape \(3, 12\)\).*\('kv', 'rep'\) of size 8"):
        ShardingRules().sharding(explicit(devices, kv=2, rep=4), (3, 12), None, "mlp")
    with pytest.raises(ValueError, match=r"'kv_heads' of size 3 .*\('model',\) of size 2"):
        ShardingRules().sharding(explicit(devices, model=2), (3,), "kv_heads")


def test_a_mesh_to_train_on(devices: list[jax.Device]) -> None:
    assert dict(make_mesh(devices, fsdp=4).shape) == {"fsdp": 4, "model": 2}
    assert dict(make_mesh(devices, data=2, fsdp=2, n_heads=8).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert dict(make_mesh(devices, data=2, n_heads=8, n_kv_heads=2).shape) == {"data": 2, "kv": 2, "rep": 2}
    assert dict(make_mesh(devices, data=8).shape) == {"data": 8, "model": 1}
    with pytest.raises(ValueError, match="8 devices cannot be cut into data=3 times fsdp=1"):
        make_mesh(devices, data=3)
    with pytest.raises(ValueError, match="Tensor-parallel size 4 does not fit a model with 6 heads"):
        make_mesh(devices, fsdp=2, n_heads=6, n_kv_heads=2)
    sharding = ShardingRules().sharding(make_mesh(devices, data=2, fsdp=2), (8, 4, 8), "tokens", "heads", None)
    assert sharding.spec == P(("data", "fsdp"), "model", None)
    with pytest.raises(ValueError, match="both lie on mesh axis 'fsdp'"):
        ShardingRules().sharding(make_mesh(devices, fsdp=2), (8, 4), "tokens", "hidden")


def test_logical_axes_that_are_not_there(devices: list[jax.Device]) -> None:
    mesh = explicit(devices, model=2)
    with pytest.raises(ValueError, match=r"'head'; the rules know tokens, hidden, heads, kv_heads, mlp, vocab"):
        ShardingRules().sharding(mesh, (4,), "head")
    with pytest.raises(ValueError, match=r"Shape \(4, 4\) has 2 dimensions; 1 logical"):
        ShardingRules().sharding(mesh, (4, 4), "heads")
