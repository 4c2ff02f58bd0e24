"""Figures for people, as a table, and for programs, as JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from maxlike.bench.figures import Distribution, LevelFigures

SCHEMA_VERSION = 1
"""Of the JSON report; raised when a field changes its meaning or goes."""
BUSY = 0.8
"""A share of the time in which the load generator computes, above which it is taken to hold up what it measures."""
_COLUMNS = ("mean", "median", "p90", "p95", "p99", "max")


def level_text(figures: LevelFigures) -> str:
    """All figures of one load, a block of lines."""
    lines = [
        f"{figures.load.label}: {figures.completed} of {figures.sent} requests in {figures.duration_s:.2f} s",
        f"  requests       {figures.requests_per_s:.2f}/s",
        f"  prompt tokens  {figures.prompt_tokens_per_s:.1f}/s ({figures.prompt_tokens}, of which "
        f"{figures.cached_prompt_tokens} came from the prefix cache)",
        f"  output tokens  {figures.output_tokens_per_s:.1f}/s ({figures.output_tokens}"
        f"{f'; {figures.tokens_per_piece:.2f} a piece of text' if figures.tokens_per_piece is not None else ''})",
    ]
    if figures.goodput_requests_per_s is not None and figures.good_share is not None:
        lines.append(f"  goodput        {figures.goodput_requests_per_s:.2f}/s ({figures.good_share:.1%} of the "
                     "requests)")
    lines.append(f"  {'ms':<26}" + "".join(f"{name:>10}" for name in _COLUMNS))
    for name, distribution in (
            ("time to first token", figures.ttft_ms), ("time a token after it", figures.tpot_ms),
            ("between pieces of text", figures.itl_ms), ("whole request", figures.e2e_ms),
            ("sent late by", figures.send_delay_ms)):
        lines.append(f"  {name:<26}{_row(distribution)}")
    lines += caveats(figures)
    return "\n".join(lines)


def summary_text(levels: Sequence[LevelFigures]) -> str:
    """One line a load."""
    header = ["load", "ok", "failed", "req/s", "prompt tok/s", "output tok/s", "TTFT median", "TTFT p99", "TPOT median",
              "TPOT p99"]
    rows = [[figures.load.label, str(figures.completed), str(figures.failed), f"{figures.requests_per_s:.2f}",
             f"{figures.prompt_tokens_per_s:.1f}", f"{figures.output_tokens_per_s:.1f}",
             *(_number(getattr(distribution, name, None))
               for distribution in (figures.ttft_ms, figures.tpot_ms) for name in ("median", "p99"))]
            for figures in levels]
    if any(figures.goodput_requests_per_s is not None for figures in levels):
        header.append("goodput/s")
        for row, figures in zip(rows, levels, strict=True):
            row.append(_number(figures.goodput_requests_per_s))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
                     for row in [header, *rows])


def caveats(figures: LevelFigures) -> list[str]:
    """What a reader of the figures must know: failures, tokens that nobody counted, a generator that was late."""
    found = []
    if figures.failed:
        found.append(f"  {figures.failed} of {figures.sent} requests FAILED"
                     f"{f', {figures.rejected} of them turned away (429)' if figures.rejected else ''}; the figures "
                     "are of the others:")
        found += [f"    {error.count} x {error.kind}: {error.example}" for error in figures.errors]
    if figures.without_usage:
        found.append(f"  The server gave no usage for {figures.without_usage} requests: their pieces of text are "
                     "counted as tokens.")
    late = figures.send_delay_ms
    if figures.load.concurrency is None and late is not None and late.p99 > max(10.0, figures.ttft_ms.median / 10
                                                                                if figures.ttft_ms else 0.0):
        found.append(f"  Requests were sent late, 1 in 100 by more than {late.p99:.0f} ms: this process or its machine "
                     "is too busy, and sees answers late too.")
    if figures.client_cpu_share > BUSY:
        found.append(f"  This process computed {figures.client_cpu_share:.0%} of the time: the figures are its own in "
                     "part, not the server's.")
    return found


def document(benchmark: Literal["online", "offline"], version: str, config: dict[str, Any],
             **results: Any) -> dict[str, Any]:
    """A report for JSON: which benchmark, when, of which version of maxlike, with what, and its results."""
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "maxlike": version,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "config": config,
        **results,
    }


def write_json(report: dict[str, Any], where: str) -> None:
    """Writes a report to the file `where`, or to stdout where that is `-`.

    Raises:
        ValueError: the file cannot be written.
    """
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if where == "-":
        sys.stdout.write(text)
        return
    try:
        Path(where).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The report cannot be written to {where}: {error.strerror}.") from error


def check_writable(where: str | Path) -> None:
    """Raises `ValueError` where a file can hardly be written, so that it is known before the work."""
    path = Path(where)
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "that is a folder" if path.is_dir() else f"there is no folder {path.absolute().parent}"
        raise ValueError(f"Nothing can be written to {where}: {why}.")


def _row(distribution: Distribution | None) -> str:
    return "".join(f"{_number(getattr(distribution, name, None)):>10}" for name in _COLUMNS)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
