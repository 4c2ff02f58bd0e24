"""Collectives counted: in programs whose collectives are known by how they were written, and in texts by eye."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from maxlike.plan.collectives import Collective, collective, collectives_of, together
from tests.tpu_compile import requires_libtpu, topology_mesh

ROUNDS, ROWS, WIDTH = 5, 16, 256


def compiled_text(mesh: Mesh) -> str:
    """Five rounds of a sum over all eight devices and two of an inner loop's permutes, then a gathering over four."""
    @partial(jax.shard_map, mesh=mesh, in_specs=P(None, ("a", "b")), out_specs=P(None, "a"), check_vma=False)
    def program(x: jax.Array) -> jax.Array:
        def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.ppermute(x + 1, "b", [(i, (i + 1) % 4) for i in range(4)]), None

        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            x = jnp.tanh(jax.lax.psum(x, ("a", "b")))
            return jax.lax.scan(inner, x, length=2)[0], None

        x, _ = jax.lax.scan(body, x, length=ROUNDS)
        return jax.lax.all_gather(x, "b", axis=1, tiled=True)

    x = jax.ShapeDtypeStruct((ROWS, 8 * WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(None, ("a", "b"))))
    return jax.jit(program).lower(x).compile().as_text()


@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=requires_libtpu)])
def test_loops_and_groups_are_counted(platform: str, devices: list[jax.Device]) -> None:
    if platform == "tpu":
        mesh = topology_mesh("v5e:2x4", {"a": 2, "b": 4})
    else:
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    own = 4 * ROWS * WIDTH
    assert collectives_of(compiled_text(mesh)) == (
        Collective("all-reduce", ROUNDS, ROUNDS * own, ROUNDS * 2 * own * 7 // 8),
        Collective("all-gather", 1, 4 * own, 3 * own),
        Collective("collective-permute", 2 * ROUNDS, 2 * ROUNDS * own, 2 * ROUNDS * own))


TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.3 (x: f32[8,64]) -> f32[2,64] {
  %x = f32[8,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[8,64]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %where = s32[] constant(0)
  ROOT %part = f32[2,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.3, %where, %where), dynamic_slice_sizes={2,64}
}

%quiet (q: f32[8,64]) -> f32[8,64] {
  ROOT %q = f32[8,64]{1,0} parameter(0)
}

%loud (l: f32[8,64]) -> f32[8,64] {
  %l = f32[8,64]{1,0} parameter(0)
  ROOT %swapped = f32[8,64]{1,0} collective-permute(%l), source_target_pairs={{0,1},{1,0}}
}

%wrapped (w: bf16[8,64]) -> bf16[8,512] {
  %w = bf16[8,64]{1,0} parameter(0)
  ROOT %gathered = bf16[8,512]{1,0} all-gather(%w), replica_groups=[1,8]<=[8], dimensions={1}
}

ENTRY %main (p: f32[8,64], n: bf16[8,64], i: s32[]) -> f32[8,64] {
  %p = f32[8,64]{1,0:T(8,128)} parameter(0)
  %n = bf16[8,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %narrowed = bf16[8,64]{1,0} all-reduce(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  %scattered = f32[2,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %started = ((bf16[8,64]), bf16[8,512], u32[]) async-start(%n), calls=%wrapped
  %either = f32[8,64]{1,0} conditional(%i, %p, %p), branch_computations={%quiet, %loud}
  %done = bf16[8,512]{1,0} async-done(%started), calls=%wrapped
  %pair = (s32[], f32[8,64]{1,0:T(8,128)}) tuple(%i, %p)
  %both = f32[8,64]{1,0} all-to-all(%pair#1), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  ROOT %out = f32[8,64]{1,0} copy(%either)
}
"""


def test_what_the_tpu_compiler_writes_besides() -> None:
    """An all-reduce that narrows, one that is a reduce-scatter, an asynchronous gathering, and alternatives."""
    assert collectives_of(TEXT) == (
        Collective("all-reduce", 1, 2048, (2048 + 1024) * 3 // 4),
        Collective("all-gather", 1, 8192, 8192 * 7 // 8),
        Collective("reduce-scatter", 1, 2048, 2048 * 3 // 4),
        Collective("all-to-all", 1, 2048, 1024),
        Collective("collective-permute", 1, 2048, 2048))


def test_several_programs_add_up() -> None:
    parts = [(collective("all-reduce", 100, 2),), (collective("all-gather", 10, 4), collective("all-reduce", 60, 2, 3))]
    assert together(parts) == (Collective("all-reduce", 4, 280, 280), Collective("all-gather", 1, 40, 30))
