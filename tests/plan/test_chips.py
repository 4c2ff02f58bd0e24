"""The chips' table against what others know of them: the compiler of its memory, the trainer of its peak."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from maxlike.plan.chips import CHIPS, Topology, parse_topology, slices_of
from maxlike.plan.compiling import DoesNotFitError, compile_all, devices_of
from maxlike.train.metrics import peak_flops
from tests.tpu_compile import requires_libtpu

TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]


@requires_libtpu
@pytest.mark.parametrize("name", TPUS)
def test_memory_and_devices_are_the_compilers(name: str) -> None:
    chip = CHIPS[name]
    topology = slices_of(chip)[2 if chip.dimensions == 2 else 1]
    devices = devices_of(topology)
    assert len(devices) == topology.n_devices == 8 * chip.devices_per_chip
    assert chip.peak == peak_flops(devices[0].device_kind)
    mesh = Mesh(devices[:1], ("x",), axis_types=(AxisType.Explicit,))
    square = jax.ShapeDtypeStruct((250_000, 250_000), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with pytest.raises(DoesNotFitError) as refused:
        compile_all([jax.jit(lambda x: (x @ x.T).sum()).lower(square)], "tpu")
    assert refused.value.limit == pytest.approx(chip.memory, rel=1e-3)
    assert refused.value.needed == pytest.approx(2 * 250_000**2, rel=0.01)


@pytest.mark.parametrize("name", [name for name in CHIPS if name not in TPUS])
def test_peaks_of_gpus_are_the_trainers(name: str) -> None:
    assert CHIPS[name].peak == peak_flops(f"NVIDIA {name.upper()}")


def test_names() -> None:
    assert parse_topology("v5e:4x8") == Topology(CHIPS["v5e"], (4, 8))
    assert parse_topology(" TPU7x:2x2x4 ").n_devices == 32 and parse_topology("v7x:2x2x1").name == "tpu7x:2x2x1"
    assert parse_topology("cpu") == Topology(None, (1,)) and parse_topology("cpu:4").n_devices == 4
    assert parse_topology("h200:8").name == "h200:8"
    assert parse_topology("v5p:4x8x12").n_chips == 384
    for wrong, says in (("v5e", "2 dimensions, as v5e:4x8"), ("v5p:4x4", "3 dimensions"), ("h200:2x4", "1 dimension,"),
                        ("v9:2x2", "v5e, v5p"), ("v5e:0x4", "A topology is"), ("4x8", "A topology is"),
                        ("v5e:3x3", "Of v5e there are 1x1, 2x2, 2x4"), ("v6e:64x64", "no topology v6e:64x64"),
                        ("v5p:2x3x4", "2x2x4, 2x4x4, .* and others of multiples of 4"), ("v4:64x64x64", "up to 9,216"),
                        ("v6e:4x2", "no topology v6e:4x2"), ("v4:1x4x4", "no topology v4:1x4x4")):
        with pytest.raises(ValueError, match=says):
            parse_topology(wrong)


def test_parts_and_links() -> None:
    assert [part.shape for part in parse_topology("v5e:4x8").parts(4)] == [(2, 4), (4, 2), (1, 8)]
    assert parse_topology("v5e:2x2").parts(3) == []
    # A ring of two has one link, a longer one two: Google states v5e's four links as 400 GB/s for both ways.
    assert parse_topology("v5e:4x8").bytes_out_per_s == 200e9
    assert parse_topology("v5e:2x4").bytes_out_per_s == 150e9
    assert parse_topology("v5p:4x4x8").bytes_out_per_s == 600e9
    assert parse_topology("tpu7x:2x2x1").bytes_out_per_s == 100e9  # two links, which two devices share
    assert parse_topology("h100:8").bytes_out_per_s == 450e9
    assert [larger.name for larger in parse_topology("v6e:4x8").larger()] == ["v6e:8x8", "v6e:8x16", "v6e:16x16"]
