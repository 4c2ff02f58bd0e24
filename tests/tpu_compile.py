"""Compile for a TPU that is not there, and read what the compiler made of it.

The libtpu wheel holds the whole TPU compiler, and a description of a topology is all it asks for: sharded
programs come out as the scheduled HLO that the real machine would run. The functions here make meshes of
such topologies, and say of that text which collectives a scanned layer runs and what work hides them.

    mesh = topology_mesh("v5e:2x4", {"model": 8})
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(*abstract_arguments).compile().as_text()
    count_collectives(loop_body(text))["all-reduce"]  # 2
"""

import importlib.util
import math
import re
from collections import Counter
from dataclasses import dataclass

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

requires_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, libtpu, whose wheels are for Linux on x86-64",
)

_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \([^\n]*\{\n.*?^\}", re.MULTILINE | re.DOTALL)
# `%name = type opcode(operands), attributes`: the opcode is the first word between a space and a parenthesis.
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%(\S+) = .*? ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:branch|called)_computations)=\{?(%[^\s,}]+(?:, %[^\s,}]+)*)"
)


def topology_mesh(name: str, axes: dict[str, int]) -> Mesh:
    """A mesh of Explicit axes over all devices of a TPU topology.

    Args:
      name: the topology, such as `"v5e:2x4"` or `"v6e:2x2"`.
      axes: size of each mesh axis, outermost first; the sizes must multiply to the number of devices.
    """
    devices = topologies.get_topology_desc(name, platform="tpu").devices
    if math.prod(axes.values()) != len(devices):
        raise ValueError(f"{name} has {len(devices)} devices, not the {math.prod(axes.values())} of {axes}")
    types = (AxisType.Explicit,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def one_device_mesh(name: str) -> Mesh:
    """A mesh of one Explicit axis, `"model"`, over the first device of a TPU topology."""
    devices = topologies.get_topology_desc(name, platform="tpu").devices[:1]
    return jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,), devices=devices)


def loop_bodies(text: str) -> list[str]:
    """The bodies of the program's scans that run a collective, each in schedule order with all that it calls.

    Outermost loops only: the loops inside are part of their bodies.

    Args:
      text: a compiled program, `compiled.as_text()`.
    """
    computations = {match[2]: match[0] for match in _COMPUTATION.finditer(text)}
    bodies = []

    def find(name):  # does not look into the loops that it finds
        for _, opcode, rest in _INSTRUCTION.findall(computations[name]):
            if opcode == "while":
                body = re.search(r"body=%([^\s,]+)", rest)[1]
                bodies.append("\n\n".join(computations[part] for part in _reachable(computations, body)))
            else:
                for callee in _callees(rest):
                    find(callee)

    find(next(match[2] for match in _COMPUTATION.finditer(text) if match[1]))
    return [body for body in bodies if count_collectives(body)]


def loop_body(text: str) -> str:
    """The body of the program's one scan that runs a collective.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = loop_bodies(text)
    if len(found) != 1:
        raise ValueError(f"{len(found)} of the program's outermost loops run collectives; expected one")
    return found[0]


def count_collectives(text: str) -> Counter[str]:
    """How many instructions of each kind of collective the text holds, as `{"all-reduce": 2}`.

    An asynchronous pair of start and done counts once, under the plain name. `text` is a whole compiled
    program or a `loop_body`: the compiler puts some collectives into computations that the body only calls.
    """
    opcodes = (opcode.removesuffix("-start") for _, opcode, _ in _INSTRUCTION.findall(text))
    return Counter(opcode for opcode in opcodes if opcode in _COLLECTIVES)


@dataclass(frozen=True)
class Permute:
    """A collective permute and the work that the schedule puts while its data travels."""

    name: str
    work: tuple[str, ...]  # names of the instructions between start and done


def overlapped_permutes(text: str) -> list[Permute]:
    """Every collective permute of the text, in the order in which they end, each with the work that hides it.

    Work is what keeps the chip busy for as long as a transfer takes: matrix products (on TPU a `convolution`
    or `dot`, mostly inside a fusion) and Pallas kernels. Copies and elementwise fusions do not count, and
    nothing hides a synchronous permute.

    Args:
      text: a whole compiled program, or a `loop_body`.
    """
    computations = {match[2]: match[0] for match in _COMPUTATION.finditer(text)}

    def is_work(opcode, rest):
        if opcode in ("dot", "convolution"):
            return True
        if opcode == "custom-call":
            return 'custom_call_target="tpu_custom_call"' in rest
        return opcode in ("fusion", "call", "while", "conditional") and any(
            is_work(*instruction[1:])
            for callee in _callees(rest)
            for instruction in _INSTRUCTION.findall(computations[callee])
        )

    permutes = []
    for computation in computations.values():
        under_way: dict[str, list[str]] = {}  # started and not yet done -> work since
        for name, opcode, rest in _INSTRUCTION.findall(computation):
            if opcode == "collective-permute":
                permutes.append(Permute(name, ()))
            elif opcode == "collective-permute-start":
                under_way[name] = []
            elif opcode == "collective-permute-done":
                start = re.search(r"%([^\s,)]+)", rest)[1]
                permutes.append(Permute(start, tuple(under_way.pop(start))))
            elif under_way and is_work(opcode, rest):
                for work in under_way.values():
                    work.append(name)
        assert not under_way, f"no done for {sorted(under_way)}"
    return permutes


def _callees(rest: str) -> list[str]:
    """Names of the computations that an instruction calls, given what follows its opcode."""
    return [name.removeprefix("%") for group in _CALLED.findall(rest) for name in group.split(", ")]


def _reachable(computations: dict[str, str], root: str) -> list[str]:
    """`root` and the computations that it calls, directly or not, each once."""
    names = [root]
    for name in names:  # grows while it is walked
        for _, _, rest in _INSTRUCTION.findall(computations[name]):
            names.extend(callee for callee in _callees(rest) if callee not in names)
    return names
