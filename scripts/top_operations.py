"""What took the time in a profile: its operations, by program, kind and place in the source.

A profile names compiled instructions (`fusion.12`), which say little. The program's compiled text says what each of
them computes and which line of Python asked for it; instructions alike in both are one row, so that layers which are
not scanned add up.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL_FLOW = frozenset({"while", "call", "conditional"})
"""Their time is that of the operations in them, on CPU perhaps on another thread; what is left is their own."""
TELLING = ("convolution", "dot", "scatter", "gather", "sort", "custom-call", "reduce-window", "reduce",
           "dynamic-update-slice", "dynamic-slice", "transpose", "concatenate")
"""What a fusion is called after: the first of these that it holds."""
UNTOLD_LAYERS = frozenset({"DistributedTransformer", "DistributedTransformerBlock", "DirectSegment", "ScannedSegment"})
"""They are around everything."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?-> .*\{$|^(?:ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?(?:^|\s)([a-z][\w\-]*)\(")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_METADATA = re.compile(r"\bmetadata=\{(.*?)\}")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
_NAME = re.compile(r'^(\d+) "(.*)"$')


@dataclass(frozen=True)
class Event:
    """An operation that ran: nanoseconds by its device's clock."""

    device: str
    program: str
    instruction: str
    start: float
    end: float


@dataclass
class Operation:
    """A row of the table: time and number over all steps, on one device (the mean of several)."""

    program: str
    kind: str
    where: str
    self_ms: float = 0.0
    calls: float = 0.0


def device_events(profile: Any) -> list[Event]:
    """The operations in a `jax.profiler.ProfileData`: those of accelerators, or where there are none of the CPU.

    TPUs have a line of operations and one of the programs around them; GPUs, and CPU threads, say with each event to
    which instruction of which program it belongs.
    """
    accelerators, host = [], []
    for plane in profile.planes:
        if plane.name.startswith("/device:TPU"):
            lines = {line.name: list(line.events) for line in plane.lines}
            programs = sorted((e.start_ns, e.end_ns, _program(e.name)) for e in lines.get("XLA Modules", ()))
            starts = [start for start, _, _ in programs]
            for event in lines.get("XLA Ops", ()):
                at = bisect_right(starts, event.start_ns) - 1
                program = programs[at][2] if at >= 0 and event.start_ns < programs[at][1] else ""
                name = event.name.split(" = ")[0].lstrip("%")
                accelerators.append(Event(plane.name, program, name, event.start_ns, event.end_ns))
        elif plane.name.startswith(("/device:GPU", "/host:CPU")):
            on_host = plane.name.startswith("/host")
            for line in plane.lines:
                if not on_host and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    if on_host and "hlo_op" not in stats:
                        continue
                    device = f"cpu {stats.get('device_ordinal', 0)}" if on_host else plane.name
                    found = Event(device, _program(str(stats.get("hlo_module", ""))),
                                  str(stats.get("hlo_op", event.name)), event.start_ns, event.end_ns)
                    (host if on_host else accelerators).append(found)
    return accelerators or host


def _program(module: str) -> str:
    return re.sub(r"\(\d+\)$", "", module).removeprefix("jit_")


def self_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event with its own nanoseconds: an operation of control flow without what ran inside it."""
    by_device: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    result = []
    for of_device in by_device.values():
        of_device.sort(key=lambda e: (e.start, -e.end))
        starts = [e.start for e in of_device]
        for event in of_device:
            own = event.end - event.start
            if event.instruction.split(".")[0] in CONTROL_FLOW:
                inner = of_device[bisect_left(starts, event.start):bisect_left(starts, event.end)]
                own -= _covered([(e.start, min(e.end, event.end)) for e in inner if e.end - e.start < own])
            result.append((event, own))
    return result


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for start, end in spans:  # ascending
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def describe(text: str, package: Path) -> dict[str, tuple[str, str]]:
    """For each instruction of a compiled program its kind, and where in `package` it comes from.

    Args:
        text: `jax.stages.Compiled.as_text()`.
    """
    sections: dict[str, dict[int, tuple[Any, ...]]] = defaultdict(dict)
    opcodes: dict[str, list[str]] = defaultdict(list)
    instructions: dict[str, tuple[str, str | None, str]] = {}
    operands: dict[str, list[str]] = {}
    origins: dict[str, list[str]] = defaultdict(list)
    section, computation = "", ""
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif match := _NAME.match(line):
            sections[section][int(match[1])] = (match[2],)
        elif match := _LOCATION.match(line) or _FRAME.match(line):
            number, *others = map(int, match.groups())
            sections[section][number] = tuple(others)
        elif match := _INSTRUCTION.match(line):
            name, opcode = match.groups()
            called, metadata = _CALLS.search(line), _METADATA.search(line)
            origin = metadata[1] if metadata else ""
            opcodes[computation].append(opcode)
            origins[computation].append(origin)
            instructions[name] = opcode, called and called[1], origin
            operands[name] = _OPERAND.findall(line.split(" = ", 1)[1])
        elif match := _COMPUTATION.match(line):
            computation = match[1] or match[2]
    found = {}
    for name, (opcode, called, origin) in instructions.items():
        inside = opcodes.get(called or "", [])
        kind, told = opcode, origin
        if opcode == "fusion":
            telling = next((known for known in TELLING if known in inside), None)
            kind = f"fusion ({telling})" if telling else "fusion"
            if telling:
                told = origins[called or ""][inside.index(telling)] or origin
        found[name] = kind, _where(told, sections, package)
    users: dict[str, list[str]] = defaultdict(list)
    for name, given in operands.items():
        for operand in given:
            users[operand].append(name)
    for name, (kind, where) in list(found.items()):
        # XLA loses the origin of some that it rewrites; what takes their result, or what they take, is close by.
        close = [found[other] for other in (*users[name], *operands[name]) if other in found]
        near = next((there for its_kind, there in close if ".py:" in there and its_kind != "constant"), "")
        if not where and near and not near.startswith("near "):
            found[name] = kind, f"near {near}"
    return found


def _where(origin: str, sections: Mapping[str, Mapping[int, tuple[Any, ...]]], package: Path) -> str:
    """The layers around the line that asked for an operation, and that line: `MLP > matmul  nn/linear.py:193`."""
    path = re.search(r'op_name="([^"]*)"', origin)
    frame = re.search(r"stack_frame_id=(\d+)", origin)
    frames = sections["StackFrames"]
    # XLA numbers a frame's parent one too high, so that the first seems its own.
    shift = 1 if frames.get(1, (0, 0))[1] == 1 else 0
    stack, at = [], int(frame[1]) if frame else 0
    while at in frames and len(stack) <= len(frames):
        location, parent = frames[at]
        file, function, line = sections["FileLocations"][location]
        stack.append((sections["FileNames"][file][0], sections["FunctionNames"][function][0], line))
        at = parent - shift
    ours = [(Path(file), function, line) for file, function, line in stack if Path(file).is_relative_to(package)]
    if not ours:
        place = path[1].split("/", 1)[-1] if path else ""
    else:
        file, function, line = ours[0]
        called = [(file, f.removesuffix(".__call__")) for file, f, _ in reversed(ours)
                  if re.fullmatch(r"[A-Z]\w*\.__call__", f)]
        layers = [name for file, name in called if file.parent.name != "train" and name not in UNTOLD_LAYERS]
        layers = layers or list(dict.fromkeys(name for _, name in called if name not in UNTOLD_LAYERS))
        inner = function.split(".<locals>")[0]
        if not inner.endswith(".__call__"):
            layers.append(inner)
        place = f"{' > '.join(layers)}  {file.relative_to(package)}:{line}".lstrip()
    if path and "transpose(" in path[1]:
        place += ", backward"
    elif path and "rematted_computation" in path[1]:
        place += ", recomputed"
    return place


def top_operations(events: Sequence[Event], texts: Mapping[str, str], package: Path) -> list[Operation]:
    """The rows, those first that took the longest.

    Args:
        texts: compiled text of the programs, by name.
    """
    described = {program: describe(text, package) for program, text in texts.items()}
    rows: dict[tuple[str, str, str], Operation] = {}
    n_devices = len({event.device for event in events})
    for event, own in self_times(events):
        unknown = event.instruction.split(".")[0], ""
        key = event.program, *described.get(event.program, {}).get(event.instruction, unknown)
        row = rows.setdefault(key, Operation(*key))
        row.self_ms += own / 1e6 / n_devices
        row.calls += 1 / n_devices
    return sorted(rows.values(), key=lambda row: -row.self_ms)


def as_table(rows: Sequence[Operation], n_steps: int, top: int) -> str:
    """The first `top` rows and the sum of the others, as text: times are milliseconds a step."""
    total = sum(row.self_ms for row in rows)
    shown = [*rows[:top]]
    if rest := rows[top:]:
        shown.append(Operation("", f"{len(rest)} others", "", sum(row.self_ms for row in rest),
                               sum(row.calls for row in rest)))
    programs, kinds = (max(map(len, ["program", *column])) for column in (
        [row.program for row in shown], [row.kind for row in shown]))
    lines = [f"{'self ms':>9} {'share':>7} {'calls':>7}  {'program':<{programs}}  {'kind':<{kinds}}  where"]
    for row in shown:
        lines.append(f"{row.self_ms / n_steps:9.3f} {row.self_ms / total:7.1%} {row.calls / n_steps:7.0f}  "
                     f"{row.program:<{programs}}  {row.kind:<{kinds}}  {row.where}".rstrip())
    return "\n".join(lines)
