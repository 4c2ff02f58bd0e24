"""What a run tells of itself while it goes: a bar, lines of JSON, TensorBoard, and in the end a plot."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from maxlike.models.config import TransformerConfig

METRICS, PLOT = "metrics.jsonl", "loss.png"
_LINE_EVERY = 10.0  # seconds, where there is no bar

_PEAK_FLOPS = {
    "h100": 989e12, "h200": 989e12, "gh200": 989e12, "b200": 2250e12, "a100": 312e12, "a10g": 70e12, "a10": 125e12,
    "l40s": 362e12, "l4": 121e12, "v100": 125e12, "t4": 65e12,
    "tpu v2": 22.5e12, "tpu v3": 61.5e12, "tpu v4": 275e12, "tpu v5 lite": 197e12, "tpu v5e": 197e12,
    "tpu v5p": 459e12, "tpu v5": 459e12, "tpu v6 lite": 918e12, "tpu v6e": 918e12, "tpu7x": 1153.5e12,
}  # fmt: skip
"""Beginnings or words of `device_kind`, lower case -> dense bfloat16 FLOP/s of one JAX device, as its maker states
them. v2, v3 and 7x have two devices a chip."""


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in bfloat16; `None` where it is not known."""
    kind = device_kind.lower().replace("-", " ")
    if kind.startswith("tpu"):
        fitting = [name for name in _PEAK_FLOPS if kind.startswith(name)]
    else:
        fitting = [name for name in _PEAK_FLOPS if name in kind.split()]
    return _PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def flops_per_token(config: TransformerConfig, sequence_length: float, *, base_is_trained: bool = True) -> float:
    """Floating-point operations that a token costs in a training step, recomputation not counted.

    Two for each weight that multiplies, and four on the way back (PaLM, https://arxiv.org/abs/2204.02311, appendix B),
    of which the two of a weight's own gradient fall away where it is frozen; attention sees half of its sequence.

    Args:
        config: the model.
        sequence_length: tokens of a sequence, on average.
        base_is_trained: no adapter alone.
    """
    head_dim, D = config.head_dim, config.hidden_size
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = D * (2 * q + 2 * kv) + 3 * D * config.intermediate_size
    weights = len(config.layers) * layer + D * config.vocab_size
    attended = sum(min(sequence_length / 2, layer.sliding_window or math.inf) for layer in config.layers)
    return (6.0 if base_is_trained else 4.0) * weights + 12.0 * q * attended


class Meter:
    """Tokens a second, and what share of the devices' peak that is, since the last time it was asked."""

    def __init__(self, config: TransformerConfig, *, base_is_trained: bool):
        self._config, self._base_is_trained = config, base_is_trained
        devices = jax.devices()
        peak = peak_flops(devices[0].device_kind)
        self._peak = None if peak is None else peak * len(devices)
        self._since, self._tokens, self._sequences = time.perf_counter(), 0, 0

    def add(self, tokens: int, sequences: int) -> None:
        """Counts a step's tokens, all processes' together and without padding, and in how many sequences they lay."""
        self._tokens, self._sequences = self._tokens + tokens, self._sequences + sequences

    def take(self) -> dict[str, float]:
        """`tokens_per_s` and, on devices whose peak is known, `mfu`; starts counting anew."""
        now = time.perf_counter()
        speed = self._tokens / max(now - self._since, 1e-9)
        found = {"tokens_per_s": speed}
        if self._peak is not None and self._sequences:
            each = flops_per_token(self._config, self._tokens / self._sequences,
                                   base_is_trained=self._base_is_trained)
            found["mfu"] = speed * each / self._peak
        self._since, self._tokens, self._sequences = now, 0, 0
        return found


class MetricsLog:
    """Where a run's numbers go: on process 0 alone, nothing is written by the others.

    Args:
        folder: of the run.
        first_step: steps that were taken before; what was written of later ones is taken out of the file.
        steps: of the whole run, for the bar.
        tensorboard: event files too, in `tensorboard/`; `None`: where `tensorboardX` is installed.
        quiet: neither bar nor lines.

    Raises:
        ValueError: `tensorboard` is asked for, and `tensorboardX` is not installed.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int, tensorboard: bool | None = None,
                 quiet: bool = False):
        self._active = jax.process_index() == 0
        self._folder, self._quiet, self._told = folder, quiet, -math.inf
        self._board: Any = None
        board = _tensorboard() if tensorboard is not False else None
        if tensorboard and board is None:
            raise ValueError("TensorBoard's files were asked for, but tensorboardX is not installed: "
                             "pip install tensorboardX, or leave it out.")
        if not self._active:
            return
        kept = [line for line in _records(folder / METRICS) if line["step"] <= first_step]
        beside = folder / f"{METRICS}.new"  # and then in its place, so that a kill in this moment loses nothing
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        beside.replace(folder / METRICS)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if board is not None:
            self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=True if quiet else None,
                         dynamic_ncols=True)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line: `{"step", "kind", ...}`; kind is "train" or "validation"."""
        if not self._active:
            return
        found = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, "kind": kind, **found}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if math.isfinite(value):  # it has no place for others, and complains
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar to `step`; where there is none, a line to stderr every ten seconds."""
        if not self._active or self._quiet:
            return
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and time.perf_counter() - self._told > _LINE_EVERY:
            self._told = time.perf_counter()
            print(f"step {step}: " + ", ".join(f"{name} {value}" for name, value in shown.items()), file=sys.stderr,
                  flush=True)

    def tell(self, line: str) -> None:
        """A line to stderr, above the bar."""
        if self._active:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._bar.close()
            self._file.close()
            if self._board is not None:
                self._board.close()


def plot_losses(folder: Path) -> Path | None:
    """Draws a run's losses into its `loss.png`; `None`, and nothing, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = _records(folder / METRICS)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("train", dict(linewidth=0.8)), ("validation", dict(marker="o"))):
        points = [(line["step"], line["loss"]) for line in records
                  if line["kind"] == kind and line.get("loss") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(folder / PLOT, dpi=120)
    return folder / PLOT


def _records(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's file so far; one that was cut off in the middle is left out."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _tensorboard() -> Any:
    try:
        return importlib.import_module("tensorboardX")
    except ImportError:
        return None
