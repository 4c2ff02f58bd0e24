"""Which collectives a compiled program runs, how often, and what they move: read from its text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32,
         "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
# `%name = type opcode(operands), attributes`: the opcode is the first word between a space and a parenthesis.
_INSTRUCTION = re.compile(r"^ +(ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?(%[^\s,}]+(?:, %[^\s,}]+)*)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=([^\s,]+))")
_ARRAY = re.compile(r"\b(f8\w*|[a-z]+\d*)\[([\d,]*)\]")

_Key = tuple[str, int, int, int]
"""Kind, bytes of operands and of result, devices that take part together."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    Args:
        kind: one of `KINDS`.
        count: how often one runs.
        bytes: what a device gives to them altogether; of all-gathers what it has in the end.
        sent: bytes that each device must send at least. Where n take part, an all-gather, reduce-scatter or all-to-all
            makes each send (n - 1) / n of the larger side, and an all-reduce, which is a reduce-scatter and an
            all-gather, that of what goes in and of what comes out (Patarasu and Yuan, 2009); a permute sends all.
    """

    kind: str
    count: int
    bytes: int
    sent: int


@dataclass(frozen=True)
class _Instruction:
    root: bool
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,()]+)", self.rest.partition(")")[0])


def collectives_of(text: str) -> tuple[Collective, ...]:
    """Those of a compiled program, `compiled.as_text()`; what is in a loop counts as often as the loop goes round.

    Of branches that are alternatives the one counts that moves most. A loop whose end is not told counts as one round.
    """
    computations = {match[2]: [_Instruction(bool(root), *parts) for root, *parts in _INSTRUCTION.findall(match[3])]
                    for match in _COMPUTATION.finditer(text)}
    entry = next(match[2] for match in _COMPUTATION.finditer(text) if match[1])
    devices = _number_of_devices(text)
    known: dict[str, Counter[_Key]] = {}

    def found_in(name: str) -> Counter[_Key]:
        if name not in known:
            known[name] = total = Counter[_Key]()
            types = {instruction.name: instruction.type for instruction in computations[name]}
            for instruction in computations[name]:
                for (kind, operands, result, n), times in _of(instruction, types).items():
                    # So the TPU's compiler calls an all-reduce of which each device keeps a part.
                    scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                    total["reduce-scatter" if scattered else kind, operands, result, n] += times
        return known[name]

    def _of(instruction: _Instruction, types: dict[str, str]) -> Counter[_Key]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            operands = sum(_operand_bytes(operand, types) for operand in instruction.operands)
            # An all-reduce may sum in float32 and hand on bfloat16.
            result = _bytes_of(instruction.type) if kind == "all-reduce" else operands
            return Counter({(kind, operands, result, _group_size(instruction.rest, devices)): 1})
        if instruction.opcode.endswith(("-done", "-update")):  # the other end of what was counted at its start
            return Counter()
        if instruction.opcode == "while":
            condition, body = (_attribute(instruction.rest, part) for part in ("condition", "body"))
            rounds = _rounds(instruction.rest, computations[condition])
            return Counter({key: times * rounds for key, times in found_in(body).items()})
        if instruction.opcode == "conditional" and (branches := _BRANCHES.search(instruction.rest)):
            names = [name.strip().removeprefix("%") for part in branches.groups() if part for name in part.split(",")]
            return max((found_in(name) for name in names), key=lambda found: sum(c.sent for c in _summed(found)))
        callees = [name.removeprefix("%") for group in _CALLED.findall(instruction.rest) for name in group.split(", ")]
        total = Counter[_Key]()
        for callee in callees:
            total.update(found_in(callee))
        return total

    return tuple(_summed(found_in(entry)))


def together(parts: Iterable[tuple[Collective, ...]]) -> tuple[Collective, ...]:
    """The collectives of several programs that run one after the other."""
    every = [collective for part in parts for collective in part]
    return tuple(Collective(kind, *(sum(getattr(c, field) for c in every if c.kind == kind)
                                    for field in ("count", "bytes", "sent")))
                 for kind in KINDS if any(c.kind == kind for c in every))


def collective(kind: str, operand: int, n: int, count: int = 1, result: int | None = None) -> Collective:
    """`count` of a kind over `n` devices, each giving `operand` bytes; of an all-reduce, getting `result` bytes."""
    size = operand * n if kind == "all-gather" else operand
    moved = size + (operand if result is None else result) if kind == "all-reduce" else size
    share = 1.0 if kind in ("collective-permute", "collective-broadcast") else (n - 1) / n
    return Collective(kind, count, size * count, round(moved * share) * count)


def _summed(found: Counter[_Key]) -> tuple[Collective, ...]:
    return together([(collective(kind, operand, n, times, result),)
                     for (kind, operand, result, n), times in found.items()])


def _attribute(rest: str, name: str) -> str:
    match = re.search(rf"\b{name}=%([^\s,]+)", rest)
    assert match is not None, f"no {name} in {rest}"
    return match[1]


def _operand_bytes(operand: str, types: dict[str, str]) -> int:
    name, _, index = operand.partition("#")  # from jax 0.12 on `%tuple#1` is a tuple's element 1
    return _bytes_of(types[name], int(index) if index.isdigit() else None)


def _bytes_of(type_: str, element: int | None = None) -> int:
    total = 0
    arrays = _ARRAY.findall(type_)
    for dtype, shape in arrays if element is None else arrays[element:element + 1]:
        bits = 8 if dtype.startswith("f8") else _BITS.get(dtype, 0)
        total += -(-bits * math.prod(int(size) for size in shape.split(",") if size) // 8)
    return total


def _number_of_devices(text: str) -> int:
    header = text.partition("\n")[0]
    partitions, replicas = (re.search(rf"{what}=(\d+)", header) for what in ("num_partitions", "replica_count"))
    return (int(partitions[1]) if partitions else 1) * (int(replicas[1]) if replicas else 1)


def _group_size(rest: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):  # the groups one by one
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):  # so many groups of so many
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):  # axes of a mesh
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])  # 'axis', or a part of one: 'axis':(before)size
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _rounds(rest: str, condition: list[_Instruction]) -> int:
    """How often a loop goes round. A scan counts from 0 in steps of 1 to a constant of its condition."""
    if match := re.search(r'known_trip_count[^\d}]*"?(\d+)', rest):
        return int(match[1])
    constants = {instruction.name: int(match[1]) for instruction in condition
                 if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.rest))}
    for instruction in condition:
        if instruction.root and instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            limits = [constants[operand] for operand in instruction.operands if operand in constants]
            return limits[0] if limits else 1
    return 1
