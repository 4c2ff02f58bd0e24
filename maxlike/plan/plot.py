"""A sweep as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxlike.bench.plot import check_plot, save_plot
from maxlike.plan.chips import parse_topology
from maxlike.plan.result import Plan, described
from maxlike.plan.sweep import method_of, per_chip

_BARS = 16
_PARTS = {"weights": "weights", "cache": "KV cache", "state": "slots, or optimizer", "temporaries": "temporaries"}


def plot(plans: Sequence[Plan], file: Path) -> None:
    """Draws, of plans in order of rank, what a chip yields against the number of chips, and the memory of the best
    mesh of each topology.

    Plans that do not fit have no point.

    Raises:
        ValueError: the file cannot be written, or is of a kind that cannot be made; matplotlib is missing.
    """
    check_plot(file)
    # The object interface alone: pyplot would keep state and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    verb = "served" if plans[0].use == "serve" else "trained"
    figure.suptitle(f"{plans[0].model}, {verb}: what a topology can do at most, {method_of(plans)}", wrap=True)
    left, right = figure.subplots(1, 2)
    _draw_yield(left, [plan for plan in plans if plan.fits])
    best: dict[str, Plan] = {}
    for plan in plans:
        best.setdefault(plan.topology, plan)
    _draw_memory(right, list(best.values())[:_BARS])
    save_plot(figure, file)


def _draw_yield(ax: Any, plans: Sequence[Plan]) -> None:
    chips = list(dict.fromkeys(parse_topology(plan.topology).name.partition(":")[0] for plan in plans))
    for name in chips:
        own = [plan for plan in plans if plan.topology.startswith(name + ":")]
        sizes = [parse_topology(plan.topology).n_chips for plan in own]
        points = ax.plot(sizes, [per_chip(plan) for plan in own], "o", label=name, alpha=0.6)
        best = {size: max(per_chip(plan) for plan, its in zip(own, sizes, strict=True) if its == size)
                for size in sorted(set(sizes))}
        ax.plot(list(best), list(best.values()), "-", color=points[0].get_color(), alpha=0.6)
    ax.set_xscale("log", base=2)
    sizes = sorted({parse_topology(plan.topology).n_chips for plan in plans})
    ax.set_xticks(sizes, list(map(str, sizes)))
    ax.set_xlabel("chips")
    ax.set_ylabel("tokens a second and chip, at most")
    ax.set_title("each mesh that fits; the best of each size joined")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    if chips:
        ax.legend()


def _draw_memory(ax: Any, plans: Sequence[Plan]) -> None:
    labels = [f"{plan.topology}, {plan.replicas} x ({described(plan.mesh)})" if plan.use == "serve"
              else f"{plan.topology}, {described(plan.mesh)}" for plan in plans]
    rows = range(len(plans))
    before = [0.0] * len(plans)
    for part, label in _PARTS.items():
        sizes = [getattr(plan.memory, part) / 1e9 for plan in plans]
        if any(sizes):
            ax.barh(rows, sizes, left=before, label=label)
        before = [a + b for a, b in zip(before, sizes, strict=True)]
    ax.plot([plan.memory.limit / 1e9 for plan in plans], rows, "k|", markersize=14, label="there is")
    ax.set_yticks(list(rows), labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("GB on each device")
    ax.set_title("the best mesh of each topology")
    ax.legend(fontsize=8)
