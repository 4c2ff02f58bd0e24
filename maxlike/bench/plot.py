"""Latency against load, as a picture."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxlike.bench.figures import LevelFigures

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Raises `ValueError` where `plot` could not make such a file: another kind of file, or matplotlib is missing."""
    if file.suffix.lower() not in _FORMATS:
        raise ValueError(f"A plot is a file that ends in {', '.join(_FORMATS)}; got {file}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("A plot needs matplotlib, which is not installed: pip install 'maxlike[bench]'.")


def save_plot(figure: Any, file: Path) -> None:
    """Writes a matplotlib figure. Raises `ValueError` where it cannot."""
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise ValueError(f"The plot cannot be written to {file}: {error.strerror}.") from error


def plot(levels: Sequence[LevelFigures], file: Path, title: str) -> None:
    """Draws time to first token and time a token, median and 99th percentile, against load and output throughput.

    Loads of which no request succeeded have no point.

    Raises:
        ValueError: the file cannot be written, or is of a kind that cannot be made.
    """
    check_plot(file)
    # The object interface alone: pyplot would keep state and look for a display.
    from matplotlib.figure import Figure

    shown = [figures for figures in levels if figures.ttft_ms is not None]
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title, wrap=True)
    axes = figure.subplots(2, 2, sharey="row")
    for row, (name, field) in zip(axes, (("time to first token", "ttft_ms"), ("time a token", "tpot_ms")), strict=True):
        row[0].set_ylabel(f"{name}, ms")
        _draw_against_load(row[0], shown, field)
        _draw(row[1], [figures.output_tokens_per_s for figures in shown], shown, field)
        row[1].set_xlabel("output tokens a second")
        for ax in row:
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
    axes[0, 0].legend()
    save_plot(figure, file)


def _draw_against_load(ax: Any, levels: Sequence[LevelFigures], field: str) -> None:
    values = [figures.load.value for figures in levels]
    finite = [value for value in values if math.isfinite(value)]
    beyond = 1.2 * max(finite, default=1.0)  # where a load without bound is drawn
    _draw(ax, [value if math.isfinite(value) else beyond for value in values], levels, field)
    ax.set_xlabel("requests under way" if levels and levels[0].load.concurrency is not None else "requests a second")
    if len(finite) < len(values):
        ax.set_xticks([*finite, beyond], [*(f"{value:g}" for value in finite), "all at once"])


def _draw(ax: Any, xs: Sequence[float], levels: Sequence[LevelFigures], field: str) -> None:
    """Median and 99th percentile at `xs`, joined in the order of the levels' load."""
    order = sorted((i for i in range(len(levels)) if getattr(levels[i], field) is not None),
                   key=lambda i: levels[i].load.value)
    for name, label, style in (("median", "median", "o-"), ("p99", "99th percentile", "s--")):
        ax.plot([xs[i] for i in order], [getattr(getattr(levels[i], field), name) for i in order], style, label=label)
