"""Programs compiled to be read, not run: their memory, their text, or that they do not fit."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from maxlike.engine.runner import temporaries_of
from maxlike.plan.chips import GB, GIB, Topology
from maxlike.plan.collectives import Collective, collectives_of


@dataclass(frozen=True)
class Compiled:
    """What is known of a compiled program, on each device.

    Args:
        temporaries: bytes beside what it is given, results that take no argument's place included.
        collectives: see `collectives_of`.
    """

    temporaries: int
    collectives: tuple[Collective, ...]


class DoesNotFitError(Exception):
    """The compiler refused a program for want of memory.

    Args:
        needed, limit: bytes on each device, where it told them.
        message: the compiler's own, in one line.
    """

    def __init__(self, needed: int | None, limit: int | None, message: str):
        super().__init__(message)
        self.needed, self.limit, self.message = needed, limit, message

    def problem(self, what: str) -> str:
        """In words, where `what` is the program."""
        if self.needed is None or self.limit is None:
            return f"the compiler says: {self.message}."
        return (f"the compiler refuses {what} needs {self.needed / GB:.2f} GB on each device, of {self.limit / GB:.2f} "
                "GB that there are.")


class NoSuchTopologyError(ValueError):
    """The compiler knows no slice of this shape."""


def compile_all(programs: Sequence[jax.stages.Lowered], platform: str) -> list[Compiled]:
    """Compiles programs side by side.

    Raises:
        DoesNotFitError: one needs more memory than there is.
    """
    # Two at a time: the compiler takes up to a gigabyte for each.
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda lowered: _compile(lowered, platform), programs))


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of a TPU topology that is not there, or of this machine's CPU.

    Raises:
        NoSuchTopologyError: the shape is none that the chip has.
        ValueError: libtpu is not installed or in use, or there are too few CPU devices.
    """
    if topology.chip is None:
        present = jax.devices("cpu")
        if topology.n_devices > len(present):
            raise ValueError(f"{topology.name} was asked for; JAX has {len(present)} CPU device"
                             f"{'s' * (len(present) > 1)}: XLA_FLAGS=--xla_force_host_platform_device_count="
                             f"{topology.n_devices} makes more.")
        return present[:topology.n_devices]
    assert topology.chip.platform == "tpu"
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("A plan for TPUs is made by their compiler, which is not installed: pip install "
                         "'maxlike[plan]' (for Linux on x86-64; it needs no TPU).")
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}  # as on Cloud: a chip, a device
    try:
        described = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except JaxRuntimeError as error:
        if "libtpu_lockfile" in str(error) or "already in use" in str(error):
            raise ValueError("The TPU's compiler is in use by another process, and lets in others only where the "
                             "environment has ALLOW_MULTIPLE_LIBTPU_LOAD=1 (`maxlike plan` sets it).") from error
        raise NoSuchTopologyError(f"There is no topology {topology.name}: {_line(error)}") from error
    return list(described.devices)


def host_memory() -> int:
    """Bytes that the host has free."""
    return psutil.virtual_memory().available


def _compile(lowered: jax.stages.Lowered, platform: str) -> Compiled:
    with tempfile.TemporaryDirectory(prefix="maxlike-plan-") as folder:
        # `as_text` cannot read what newer TPU compilers write of some asynchronous operations; the compiler itself can.
        options: Any = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if platform == "tpu" else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except JaxRuntimeError as error:
            raise _refusal(error) from error
        files = sorted(Path(folder).glob("*after_optimizations.txt"))
        text = files[0].read_text() if files else compiled.as_text()
    return Compiled(temporaries_of(compiled), collectives_of(text or ""))


def _refusal(error: JaxRuntimeError) -> Exception:
    said = str(error)
    if not said.startswith("RESOURCE_EXHAUSTED") or re.search(r"memory space (vmem|smem)|vmem|smem", said[:400], re.I):
        return error
    match = (re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", said)
             or re.search(r"[Uu]sed ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", said))
    units = {"K": GIB >> 20, "M": GIB >> 10, "G": GIB}
    needed, limit = (int(float(match[i]) * units[match[i + 1]]) for i in (1, 3)) if match else (None, None)
    return DoesNotFitError(needed, limit, _line(error))


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
