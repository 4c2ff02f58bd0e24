"""What a plan says, and its table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from maxlike.plan.chips import GB, Chip
from maxlike.plan.collectives import Collective


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Args:
        limit: of memory that programs may use; on CPU each device's part of what the host has free.
        weights: parameters.
        cache: pages of the KV cache.
        state: what is kept from step to step beside them: the slots of sampling, or the optimizer's state.
        temporaries: what the program that needs most needs while it runs.
    """

    limit: int
    weights: int
    cache: int
    state: int
    temporaries: int

    @property
    def head_room(self) -> int:
        """What is left; negative where it does not fit."""
        return self.limit - self.weights - self.cache - self.state - self.temporaries


@dataclass(frozen=True)
class Cache:
    """The KV cache of a replica.

    Args:
        dtype, page_size: of a page, in tokens.
        pages: of each layer.
        bytes_per_token: on each device, all layers together.
        max_num_seqs: sequences that run at once.
        max_model_len: longest sequence that is taken.
    """

    dtype: str
    page_size: int
    pages: int
    bytes_per_token: float
    max_num_seqs: int
    max_model_len: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together that it holds."""
        return self.pages * self.page_size


@dataclass(frozen=True)
class StepPlan:
    """A step: what it must move and compute at least on each device, and how long that takes at the least.

    Args:
        name: "decode", "prefill" or "train".
        tokens: that go in, of a replica; in training of all devices.
        sequences: they belong to.
        context: tokens that each token attends to; of prompts the longest.
        bytes: read from memory, and written to it.
        flops: operations.
        collectives: a step's.
        memory_s, compute_s, links_s: seconds that these take at the chip's published figures; `None` for CPUs.
    """

    name: str
    tokens: int
    sequences: int
    context: int
    bytes: float
    flops: float
    collectives: tuple[Collective, ...]
    memory_s: float | None
    compute_s: float | None
    links_s: float | None

    @property
    def floor_s(self) -> float | None:
        """Seconds that the step takes at least: the longest of the three, could they all run beside each other."""
        times = [s for s in (self.memory_s, self.compute_s, self.links_s) if s is not None]
        return max(times, default=None)

    @property
    def binds(self) -> str | None:
        """What that is: "memory", "compute" or "links"."""
        times = {"memory": self.memory_s, "compute": self.compute_s, "links": self.links_s}
        known = {name: s for name, s in times.items() if s is not None}
        return max(known, key=lambda name: known[name]) if known else None


@dataclass(frozen=True)
class Plan:
    """A model on a topology.

    Args:
        model: as it was asked for.
        parameters: their number.
        topology: its name.
        use: "serve" or "train".
        method: "compiled" where the compiler said what programs need, "arithmetic" where it is reckoned.
        mesh: axes and sizes, of one replica.
        replicas: each on its own part of the topology.
        devices: of the topology.
        dtype: that is computed in.
        fits: whether it can be run.
        memory: see `Memory`. Where it does not fit, what it would take, as far as that is known.
        cache: see `Cache`; `None` in training.
        steps: see `StepPlan`; none where it does not fit.
        problem: why it does not fit; empty where it does.
        suggestions: flags of `maxlike plan`, or pairs of them, each of which alone makes it fit.
        notes: what else is to be known.
        chip: whose figures were taken; `None` for CPUs.
    """

    model: str
    parameters: int
    topology: str
    use: Literal["serve", "train"]
    method: Literal["compiled", "arithmetic"]
    mesh: Mapping[str, int]
    replicas: int
    devices: int
    dtype: str
    fits: bool
    memory: Memory
    cache: Cache | None
    steps: tuple[StepPlan, ...]
    problem: str
    suggestions: tuple[str, ...]
    notes: tuple[str, ...]
    chip: Chip | None

    def step(self, name: str) -> StepPlan:
        """The step of this name."""
        return next(step for step in self.steps if step.name == name)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second that all devices together decode, or train on, at most; `None` where that is not known."""
        step = next((step for step in self.steps if step.name in ("decode", "train")), None)
        if step is None or not step.floor_s:
            return None
        return step.tokens * self.replicas / step.floor_s

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it: what is derived too."""
        found = dataclasses.asdict(self)
        found["mesh"] = dict(self.mesh)
        found["memory"]["head_room"] = self.memory.head_room
        if self.cache is not None:
            found["cache"]["tokens"] = self.cache.tokens
        for step, shown in zip(self.steps, found["steps"], strict=True):
            shown |= {"floor_s": step.floor_s, "binds": step.binds}
        found["tokens_per_s"] = self.tokens_per_s
        return json.loads(json.dumps(found))

    def table(self) -> str:
        """As a user reads it."""
        return "\n".join(_lines(self))


def missing(head_room: int) -> str:
    """Why it does not fit, where so many bytes are left on each device; empty where it does."""
    if head_room >= 0:
        return ""
    size = f"{-head_room / GB:,.2f} GB" if -head_room >= GB / 100 else f"{-head_room / 1e6:.3f} MB"
    return f"{size} are missing on each device."


def described(mesh: Mapping[str, int]) -> str:
    """A mesh in words."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def _lines(plan: Plan) -> Iterator[str]:
    how = "as the compiler has it" if plan.method == "compiled" else "by arithmetic alone, nothing compiled"
    what = "served" if plan.use == "serve" else "trained"
    count = plan.parameters
    size = f"{count / GB:.2f} billion" if count >= GB else f"{count / 1e6:.1f} million"
    yield f"{plan.model} ({size} parameters, {plan.dtype}) {what} on {plan.topology}, {how}"
    replicas = "" if plan.use == "train" else f", {plan.replicas} replica{'s' * (plan.replicas > 1)} of"
    yield f"{plan.devices} device{'s' * (plan.devices > 1)}{replicas} mesh {described(plan.mesh)}"
    yield ""
    yield from _memory_lines(plan)
    if plan.cache is not None and plan.cache.pages > 0:
        yield from _cache_lines(plan.cache)
    if plan.steps:
        yield ""
        yield from _step_lines(plan)
    if plan.chip is not None:
        chip = plan.chip
        yield ""
        yield (f"{chip.name}, a device: {chip.peak / 1e12:.0f} TFLOP/s in bfloat16, {chip.bandwidth / GB:.0f} GB/s of "
               f"memory, {chip.link / GB:.0f} GB/s a link and way ({chip.source})")
    for note in plan.notes:
        yield f"note: {note}"
    yield ""
    yield "It fits." if plan.fits else f"It does not fit: {plan.problem}"
    if plan.suggestions:
        yield "With one of these instead it does: " + "; ".join(plan.suggestions)
    elif not plan.fits:
        yield "No single option that was looked at makes it fit."


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    state = "slots for sampling" if plan.use == "serve" else "optimizer"
    rows = [("memory", memory.limit), ("weights", memory.weights), ("KV cache", memory.cache), (state, memory.state),
            ("temporaries", memory.temporaries), ("head-room", memory.head_room)]
    yield f"{'a device':<20}{'GB':>10}{'share':>8}"
    for name, size in rows:
        # Of a program that was refused they may not be known.
        if size or name not in ("KV cache", "temporaries"):
            yield f"{name:<20}{size / GB:>10.3f}{size / memory.limit:>8.1%}"


def _cache_lines(cache: Cache) -> Iterator[str]:
    yield ""
    # A sequence takes whole pages.
    sequences, longest = min(cache.max_num_seqs, cache.pages), -(-cache.max_model_len // cache.page_size)
    each = min(cache.pages // sequences * cache.page_size, cache.max_model_len)
    yield (f"The cache of a replica holds {cache.tokens:,} tokens ({cache.pages:,} pages of {cache.page_size}, "
           f"{cache.dtype}, {cache.bytes_per_token:,.0f} bytes a token and device):")
    yield (f"{sequences} sequences of {each:,}, or {min(cache.pages // longest, cache.max_num_seqs):,} of the longest, "
           f"{cache.max_model_len:,}.")


def _step_lines(plan: Plan) -> Iterator[str]:
    if plan.steps[0].floor_s is not None:
        yield (f"{'at the least':<10}{'tokens':>8}{'sequences':>11}{'context':>9}{'memory ms':>11}{'compute ms':>12}"
               f"{'links ms':>10}  binds")
        for step in plan.steps:
            times = [0.0 if s is None else 1000 * s for s in (step.memory_s, step.compute_s, step.links_s)]
            yield (f"{step.name:<12}{step.tokens:>8,}{step.sequences:>11,}{step.context:>9,}{times[0]:>11.3f}"
                   f"{times[1]:>12.3f}{times[2]:>10.3f}  {step.binds}")
        if plan.tokens_per_s is not None:
            what = "decoded" if plan.use == "serve" else "trained on"
            yield f"So at most {plan.tokens_per_s:,.0f} tokens a second are {what}, by all devices together."
        yield ""
    yield f"{'collectives':<12}{'kind':<20}{'times':>7}{'MB':>12}{'MB sent':>12}   a step and device"
    for step in plan.steps:
        for c in step.collectives:
            yield f"{step.name:<12}{c.kind:<20}{c.count:>7,}{c.bytes / 1e6:>12.3f}{c.sent / 1e6:>12.3f}"
        if not step.collectives:
            yield f"{step.name:<12}none"
