"""The chips that a plan may be for, by their makers' figures, and how a slice or a host of them is named."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product
from typing import Literal

GB, GIB, TERA = 10**9, 2**30, 10**12
GPU_SHARE = 0.75
"""Of a GPU's memory, which JAX takes unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them, in the maker's figures; of a TPU7x two devices make a chip, and share its links.

    Args:
        name: as in the names of topologies.
        platform: whether programs are compiled for it, or reckoned.
        memory: bytes of HBM that programs may use. Of a TPU it is what its compiler says (a little less than what is
            printed on it), of a GPU `GPU_SHARE` of the whole.
        bandwidth: bytes a second between it and its memory.
        peak: FLOP/s in bfloat16, dense.
        link: bytes a second one way over one link to another chip; of a GPU over all of NVLink.
        dimensions: of the torus that slices are cut from, two links to each; 0 for GPUs, all of whose links reach all.
        devices_per_chip: see above.
        source: where the figures stand. An ICI bandwidth that is stated for both ways and all links is divided here.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    memory: int
    bandwidth: float
    peak: float
    link: float
    dimensions: int
    source: str
    devices_per_chip: int = 1


_GOOGLE, _NVIDIA = "https://docs.cloud.google.com/tpu/docs/", "https://www.nvidia.com/en-us/data-center/"
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    # "HBM2 32 GiB, 1200 GBps"; of its ICI Jouppi et al., https://arxiv.org/abs/2304.01433, table 4: 6 links of 50 GB/s.
    Chip("v4", "tpu", int(30.75 * GIB), 1200 * GB, 275 * TERA, 50 * GB, 3, _GOOGLE + "v4"),
    # "Bidirectional inter-chip interconnect (ICI) bandwidth (per chip)" over 4 or 6 links.
    Chip("v5e", "tpu", int(15.75 * GIB), 819 * GB, 197 * TERA, 400 / 8 * GB, 2, _GOOGLE + "v5e"),
    Chip("v5p", "tpu", int(95.73 * GIB), 2765 * GB, 459 * TERA, 1200 / 12 * GB, 3, _GOOGLE + "v5p"),
    Chip("v6e", "tpu", int(31.24 * GIB), 1638 * GB, 918 * TERA, 800 / 8 * GB, 2, _GOOGLE + "v6e"),
    Chip("tpu7x", "tpu", int(94.74 * GIB), 7380 / 2 * GB, 2307 / 2 * TERA, 1200 / 12 * GB, 3, _GOOGLE + "tpu7x", 2),
    # Dense figures, the half of those "with sparsity"; NVLink's are for both ways.
    Chip("a100", "gpu", int(80 * GB * GPU_SHARE), 2039 * GB, 312 * TERA, 600 / 2 * GB, 0, _NVIDIA + "a100/"),
    Chip("h100", "gpu", int(80 * GB * GPU_SHARE), 3350 * GB, 989 * TERA, 900 / 2 * GB, 0, _NVIDIA + "h100/"),
    Chip("h200", "gpu", int(141 * GB * GPU_SHARE), 4800 * GB, 989 * TERA, 900 / 2 * GB, 0, _NVIDIA + "h200/"),
    Chip("b200", "gpu", int(180 * GB * GPU_SHARE), 8000 * GB, 2250 * TERA, 1800 / 2 * GB, 0, _NVIDIA + "hgx/"),
)}
_SLICES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16),
        (8, 16, 16)),
    0: ((1,), (2,), (4,), (8,)),
}
"""The slices that are sold, by `Chip.dimensions`, ascending; of GPUs what one host has."""
_LARGEST_3D = 9216
"""Chips of the largest pod, that of TPU7x; those of v4 and v5p are smaller."""


@dataclass(frozen=True)
class Topology:
    """A number of chips in a given order: `v5e:4x8`, `h200:8`; or `cpu:4`, devices of the machine at hand.

    Args:
        chip: `None` is the CPU, of which nothing is published.
        shape: chips along each dimension.
    """

    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As `parse_topology` reads it."""
        return f"{'cpu' if self.chip is None else self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def n_chips(self) -> int:
        """Chips in it."""
        return math.prod(self.shape)

    @property
    def n_devices(self) -> int:
        """Devices in it, as JAX counts them."""
        return self.n_chips * (1 if self.chip is None else self.chip.devices_per_chip)

    @property
    def platform(self) -> Literal["cpu", "tpu", "gpu"]:
        """What programs are compiled for."""
        return "cpu" if self.chip is None else self.chip.platform

    @property
    def several_hosts(self) -> bool:
        """Whether it takes more than one host: of eight chips, of those in a 3D torus four."""
        return self.chip is not None and self.n_chips > (4 if self.chip.dimensions == 3 else 8)

    @property
    def bytes_out_per_s(self) -> float:
        """Bytes a second that a device can send: over two links a dimension, one where that is two chips wide, none
        where it is one. Slices without wrap-around links have less at their edges."""
        if self.chip is None:
            return math.inf
        links = sum(min(size - 1, 2) for size in self.shape) if self.chip.dimensions else 1
        return self.chip.link * links / self.chip.devices_per_chip

    def parts(self, n: int) -> list[Topology]:
        """The topologies of which `n` make this one, the most compact first."""
        shapes = product(*([d for d in range(1, size + 1) if size % d == 0] for size in self.shape))
        fitting = [shape for shape in shapes if math.prod(shape) * n == self.n_chips]
        return [Topology(self.chip, shape) for shape in sorted(fitting, key=lambda shape: (max(shape), sum(shape)))]

    def larger(self) -> list[Topology]:
        """The slices of the same chip that are sold and have more chips, ascending."""
        return [] if self.chip is None else [
            larger for larger in slices_of(self.chip) if larger.n_chips > self.n_chips]


def chip_named(name: str) -> Chip | None:
    """The chip of a name, `v7x` being another for `tpu7x`; `None` where there is none."""
    return CHIPS.get("tpu7x" if name == "v7x" else name)


def slices_of(chip: Chip) -> list[Topology]:
    """The slices of a chip that are sold, ascending; of GPUs what one host has."""
    return [Topology(chip, shape) for shape in _SLICES[chip.dimensions]]


def parse_topology(name: str) -> Topology:
    """The topology of a name such as `v5e:4x8`, `v5p:2x2x4`, `h200:8`, `cpu` or `cpu:4`.

    Raises:
        ValueError: it is no such name; says what there is.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)*))?", name.strip().lower())
    kind, shape = (match[1], tuple(map(int, (match[2] or "1").split("x")))) if match else ("", ())
    chip = chip_named(kind)
    if (chip is None and kind != "cpu") or not all(shape):
        raise ValueError(f"A topology is a chip and how many there are, as v5e:4x8, v5p:2x2x4, h200:8 or cpu:1; got "
                         f"{name!r}. The chips are {', '.join(CHIPS)} and cpu.")
    dimensions = chip.dimensions or 1 if chip is not None else 1
    assert match is not None
    if len(shape) != dimensions or (match[2] is None and chip is not None):
        some = Topology(chip, _SLICES[chip.dimensions if chip else 0][-4]).name
        raise ValueError(f"{name!r} must say how many chips there are along {dimensions} dimension"
                         f"{'s' * (dimensions > 1)}, as {some}.")
    topology = Topology(chip, shape)
    if chip is not None and chip.platform == "tpu":
        _check_slice(topology)
    return topology


def _check_slice(topology: Topology) -> None:
    chip = topology.chip
    assert chip is not None
    # Other shapes, sides exchanged among them, make the compiler abort.
    exists = topology.shape in _SLICES[chip.dimensions]
    there_are = ", ".join("x".join(map(str, shape)) for shape in _SLICES[chip.dimensions])
    if chip.dimensions == 3:
        exists = exists or (all(size % 4 == 0 for size in topology.shape) and topology.n_chips <= _LARGEST_3D)
        there_are += f" and others of multiples of 4, up to {_LARGEST_3D:,} chips"
    if not exists:
        raise ValueError(f"There is no topology {topology.name}. Of {chip.name} there are {there_are}.")
