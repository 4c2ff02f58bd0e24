"""Sampling as it is compiled: the slots' state in place, for a mesh, for a TPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import Mesh, NamedSharding

from maxlike.engine.sampling import CHUNK, clear_slot, empty_state, fill_slot, greedy, sample
from maxlike.engine.sampling_params import MAX_EDITS
from maxlike.mesh import make_mesh
from tests.engine.drawing import Asked, draw_all, rows_of
from tests.tpu_compile import requires_libtpu, topology_mesh

SLOTS, R, V = 256, 8, 50_003


def within(mesh: Mesh, function: Callable[..., Any], donate: int | None = None) -> Any:
    def within_mesh(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return jax.jit(within_mesh, donate_argnums=() if donate is None else donate)


def compiled(program: str, mesh: Mesh) -> jax.stages.Compiled:
    """For arrays on every device of the mesh, whole."""
    def given(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    state = jax.tree.map(lambda x: given(*x.shape, dtype=x.dtype), jax.eval_shape(lambda: empty_state(SLOTS, V)))
    if program == "sample":
        rows = jax.tree.map(lambda x: given(*x.shape, dtype=x.dtype), rows_of(R))
        mask = given(R, -(-V // 32), dtype=jnp.uint32)
        lowered = within(mesh, sample, donate=2).lower(given(R, V, dtype=jnp.float32), rows, state, mask)
    elif program == "clear_slot":
        edits = given(MAX_EDITS), given(MAX_EDITS, dtype=jnp.float32), given(MAX_EDITS)
        lowered = within(mesh, clear_slot, donate=0).lower(state, given(), *edits)
    else:
        lowered = within(mesh, fill_slot, donate=0).lower(state, given(), given(CHUNK), given(), given())
    return lowered.compile()


def assert_in_place(program: jax.stages.Compiled) -> None:
    state = jax.eval_shape(lambda: empty_state(SLOTS, V))
    memory: Any = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # There is no room for a second table of the slots: the rows' own values come to less.
    assert memory.temp_size_in_bytes < state.in_prompt.size


@pytest.mark.parametrize("program", ["sample", "clear_slot", "fill_slot"])
def test_the_slots_state_is_changed_in_place(program: str, devices: list[jax.Device]) -> None:
    on_cpu = compiled(program, make_mesh(devices[:1]))
    assert_in_place(on_cpu)
    table = rf"(s32|pred)\[{SLOTS},{V}\]\S*"
    assert re.search(rf" = {table} parameter\(", on_cpu.as_text())
    assert not re.search(rf" = {table} (copy|select|convert)\(", on_cpu.as_text())


@requires_libtpu
@pytest.mark.parametrize("program", [pytest.param("sample", marks=pytest.mark.slow), "clear_slot", "fill_slot"])
def test_the_slots_state_is_changed_in_place_on_tpu(program: str) -> None:
    assert_in_place(compiled(program, topology_mesh("v6e:2x2", {"model": 4})))


@pytest.mark.parametrize("n_kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_on_a_mesh_each_device_draws_the_same(n_kv_heads: int, devices: list[jax.Device]) -> None:
    mesh = make_mesh(devices[:4], n_heads=4, n_kv_heads=n_kv_heads)
    whole = NamedSharding(mesh, P())
    rng = np.random.default_rng(0)
    asked = [Asked(rng.normal(size=203).astype(np.float32), top_k=50, top_p=0.9, min_p=0.01, frequency=0.5, seed=i,
                   prompt=[1, 2], output=[3, 3, 4], edits=[(i, 2.0, 9)], allowed=rng.random(203) < 0.7)
             for i in range(R)]

    def on_mesh(*args: Any) -> Any:
        return within(mesh, sample)(*jax.device_put(args, whole))

    sampled, state = draw_all(asked, logprobs=True, program=on_mesh)
    expected, expected_state = draw_all(asked, logprobs=True)
    for got, alone in zip((*sampled, *state), (*expected, *expected_state), strict=True):
        assert got.sharding.is_equivalent_to(whole, got.ndim)
        for shard in got.addressable_shards:
            np.testing.assert_array_equal(shard.data, alone)
    logits = np.stack([one.logits for one in asked])
    np.testing.assert_array_equal(within(mesh, greedy)(jax.device_put(logits, whole)), logits.argmax(-1))
