"""Many plans of one model side by side: which slice, cut how."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from maxlike.models.config import TransformerConfig
from maxlike.plan.arithmetic import KnownShapes
from maxlike.plan.chips import Chip, Topology, chip_named, parse_topology, slices_of
from maxlike.plan.compiling import NoSuchTopologyError
from maxlike.plan.options import Options, Serving, Training, changed, check_heads, legal_sizes
from maxlike.plan.planner import compiled, described, reckoned
from maxlike.plan.result import Plan
from maxlike.plan.result import described as words_of

_LARGEST = 64
"""Chips of the largest slice that the name of a chip stands for: beyond, replicas repeat what smaller ones tell."""
_ROWS = 24


def sweep(model: str | os.PathLike[str] | TransformerConfig, topologies: Sequence[str],
          options: Options | None = None, *, compile: bool = False, **changes: Any) -> list[Plan]:
    """Plans of every mesh of some topologies, the best first: those that fit, by tokens a second and chip.

    Each topology is cut by every tensor-parallel size that there is, or by `tp` alone: in serving into replicas of
    that size, in training with `data` as it is given and `fsdp` as it is, or what the others leave.

    Args:
        model, options, changes: as `plan` has them; `data` of serving is not looked at.
        topologies: names of them, but not CPUs; or of chips: the slices of those that are sold, up to 64 chips.
        compile: have TPU programs compiled, a minute or so for each mesh, in place of arithmetic.

    Raises:
        ValueError: as `plan`; no mesh of these topologies suits the model.
    """
    options = changed(options or Serving(), **changes)
    name, config = described(model)
    if options.tp is not None:
        check_heads(config, options.tp)
    shapes = KnownShapes(config)
    plans: list[Plan] = []
    problem: object = "their devices cannot be shared out so"
    left_out: set[int] = set()
    for topology in _expanded(topologies):
        for candidate in _meshes(config, topology, options):
            if parts := _uneven(candidate, topology):
                left_out.add(parts)
                continue
            try:
                if compile and topology.platform == "tpu":
                    plans.append(compiled(name, config, topology, candidate))
                else:
                    plans.append(reckoned(name, config, topology, candidate, shapes))
            except NoSuchTopologyError as error:  # not every part of a slice is one that can be had
                problem = error
    note = ""
    if left_out and isinstance(options, Training):
        problem = note = (f"meshes that cut a batch into {', '.join(map(str, sorted(left_out)))} parts are left out: "
                          f"tokens_per_batch, {options.tokens_per_batch:,}, is no multiple of these")
    if not plans:
        raise ValueError(f"No mesh of {', '.join(topologies)} suits {name}: {problem}")
    return sorted((replace(one, notes=(*one.notes, note)) if note else one for one in plans), key=_rank)


def per_chip(plan: Plan) -> float:
    """Tokens a second and chip, at most; 0 where it does not fit, or nothing is known of the chip."""
    return (plan.tokens_per_s or 0.0) / parse_topology(plan.topology).n_chips


def sweep_table(plans: Sequence[Plan]) -> str:
    """A line for each of the first plans, in their order, and the notes that all plans have."""
    use = plans[0].use
    what = "decode" if use == "serve" else "train"
    load = ""
    if decode := next((step for plan in plans for step in plan.steps if step.name == "decode"), None):
        load = f", as many sequences as fit, each with {decode.context:,} tokens behind it"
    lines = [f"{plans[0].model}: {'served' if use == 'serve' else 'trained'} in {plans[0].dtype}{load}, "
             f"{method_of(plans)}, at most:",
             f"{'topology':<14}{'mesh':<22}{'replicas':>9}{'head-room GB':>13}{'cache tokens':>14}"
             f"{what + ' ms':>11}{'binds':>9}{'tok/s':>13}{'a chip':>12}"]
    for plan in plans[:_ROWS]:
        step = next((step for step in plan.steps if step.name == what), None)
        cache = plan.cache.tokens * plan.replicas if plan.cache is not None else 0
        if step is None or step.floor_s is None:
            told = "  does not fit" if not plan.fits else ""
        else:
            told = (f"{1000 * step.floor_s:>11.2f}{step.binds:>9}{plan.tokens_per_s or 0:>13,.0f}"
                    f"{per_chip(plan):>12,.0f}")
        lines.append(f"{plan.topology:<14}{words_of(plan.mesh):<22}{plan.replicas:>9}"
                     f"{plan.memory.head_room / 1e9:>13.2f}{cache:>14,}{told}")
    if len(plans) > _ROWS:
        misfits = sum(not plan.fits for plan in plans[_ROWS:])
        lines.append(f"and {len(plans) - _ROWS} more, {misfits} of which do not fit: --json has them all")
    lines += [f"note: {note}" for note in plans[0].notes if all(note in plan.notes for plan in plans)]
    return "\n".join(lines)


def method_of(plans: Sequence[Plan]) -> str:
    """How they were made, in words."""
    methods = {plan.method for plan in plans}
    if len(methods) > 1:
        return "TPUs as the compiler has them, GPUs by arithmetic alone"
    return "as the compiler has it" if "compiled" in methods else "by arithmetic alone"


def _rank(plan: Plan) -> tuple[bool, float, int]:
    return not plan.fits, -per_chip(plan), plan.devices


def _expanded(names: Sequence[str]) -> list[Topology]:
    found: dict[Topology, None] = {}
    for name in names:
        chip = chip_named(name.strip().lower())
        for topology in [parse_topology(name)] if chip is None else _slices(chip):
            if topology.chip is None:
                raise ValueError(f"A sweep compares chips by their makers' figures, and of a CPU there are none; got "
                                 f"{name!r}. This machine is planned for by --topology cpu:N, or plan(model, 'cpu:N').")
            found[topology] = None
    return list(found)


def _slices(chip: Chip) -> list[Topology]:
    return [topology for topology in slices_of(chip) if topology.n_chips <= _LARGEST]


def _meshes(config: TransformerConfig, topology: Topology, options: Options) -> Iterator[Options]:
    n_devices = topology.n_devices
    for tp in legal_sizes(config, n_devices) if options.tp is None else [options.tp]:
        if n_devices % tp:
            continue
        if isinstance(options, Training):
            fsdp = options.fsdp or n_devices // (tp * options.data)
            if options.data * fsdp * tp == n_devices:
                yield replace(options, tp=tp)
        elif topology.parts(n_devices // tp):
            yield replace(options, tp=tp, data=n_devices // tp)


def _uneven(options: Options, topology: Topology) -> int:
    """Parts that a mesh would cut a batch into where they would not be equal; else 0."""
    if not isinstance(options, Training) or options.tokens_per_batch is None:
        return 0
    parts = topology.n_devices // (options.tp or 1)
    return parts if options.tokens_per_batch % parts else 0
