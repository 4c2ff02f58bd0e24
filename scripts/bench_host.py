"""The host's work in a step of many running sequences: `python scripts/bench_host.py [--json]`.

The engine is the real one, and so are its requests; only the model costs nothing: what stands in for the compiled
programs returns random tokens at once. So a step's time is the host's: *schedule*, *batch* (the numbers of a step, as
arrays), and *detokenise* (tokens to text, and what ends a request). *Dispatch*, the time that calls of the compiled
programs take to return, is measured apart, on a model of the given number of layers and devices whose arrays are tiny:
it depends on how many arrays a model has, and on how many devices.

Figures are medians over steps, in milliseconds. With more devices than one, CPU devices are made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np


class DrawnTokens:
    """What a tail program returns, as far as the engine looks at it."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def copy_to_host_async(self) -> None:
        """They are there."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._tokens


class FreeRunner:
    """In the place of an engine's `ModelRunner`: shapes as there, random tokens, no work."""

    def __init__(self, runner: Any, n_ids: int):
        self._runner, self._rng, self._n_ids = runner, np.random.default_rng(0), n_ids
        self.drawn = [DrawnTokens(self._rng.integers(0, n_ids, runner.n_slots, np.int32)) for _ in range(64)]
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, layout: Any, packed: np.ndarray) -> tuple[None, None]:
        """Nothing."""
        return None, None

    def draw_greedily(self, last: Any, where: np.ndarray) -> DrawnTokens:
        """Tokens made beforehand."""
        self._next = (self._next + 1) % len(self.drawn)
        return self.drawn[self._next]


class Clock:
    """Sums the time spent in functions, by name, step by step."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Counts the calls of a method of `owner` under `name`."""
        function: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now[name] += time.perf_counter() - start

        setattr(owner, method, timed)


def engine_of(args: argparse.Namespace, n_layers: int, n_devices: int) -> Any:
    """An engine of tiny arrays, with the embedded model's tokenizer."""
    import jax

    from maxlike.cli import EMBEDDED_MODEL
    from maxlike.engine.config import EngineConfig
    from maxlike.engine.engine import Engine
    from maxlike.models.build import build_model
    from maxlike.models.registry import family_of
    from maxlike.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
    config = family_of({"model_type": "llama"}).parse(dict(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=8 * n_devices, intermediate_size=8 * n_devices,
        num_attention_heads=n_devices, num_key_value_heads=n_devices, head_dim=8, num_hidden_layers=n_layers,
        max_position_embeddings=args.prompt + args.output, rms_norm_eps=1e-5, tie_word_embeddings=True))
    model = build_model(config, devices=jax.devices()[:n_devices], dtype="float32")
    engine_config = EngineConfig(max_num_seqs=args.sequences, max_num_batched_tokens=max(512, args.sequences))
    return Engine(model, config, engine_config, tokenizer)


def fill(engine: Any, args: argparse.Namespace) -> None:
    """All sequences run, their prompts read."""
    from maxlike.engine.sampling_params import SamplingParams

    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    for i in range(args.sequences):
        engine.add(str(i), rng.integers(0, engine.runner.vocab_size, args.prompt).tolist(), params)
    while engine.scheduler.n_waiting or not engine.scheduler.decoding.all():
        engine.step()


def host_work(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of schedule, batch and detokenise."""
    engine = engine_of(args, 1, 1)
    engine.runner = FreeRunner(engine.runner, engine.tokenizer.vocab_size)
    fill(engine, args)
    clock = Clock()
    clock.watch(engine.scheduler, "schedule", "schedule")
    clock.watch(engine, "_collect", "detokenise")
    parts: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.steps):
        clock.now.clear()
        start = time.perf_counter()
        engine.step()
        total = time.perf_counter() - start
        parts["schedule"].append(clock.now["schedule"])
        parts["detokenise"].append(clock.now["detokenise"])
        parts["batch"].append(total - clock.now["schedule"] - clock.now["detokenise"])
        parts["host"].append(total)
    assert engine.scheduler.decoding.all(), "some sequence has ended: give more --output"
    return {name: 1e3 * statistics.median(times) for name, times in parts.items()}


def dispatch(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step that calling the compiled programs takes, the devices being idle."""
    engine = engine_of(args, args.layers, args.devices)
    fill(engine, args)
    clock = Clock()
    for method in ("forward", "draw_greedily"):
        clock.watch(engine.runner, method, "dispatch")
    times = []
    for _ in range(min(args.steps, 200)):
        clock.now.clear()
        engine.step()
        times.append(clock.now["dispatch"])
        engine._pending.tokens.block_until_ready()
    return {"dispatch": 1e3 * statistics.median(times), "leaves": len(engine.runner._leaves)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="The host's work in a step of many running sequences.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--output", type=int, default=1024, help="tokens, at most; more than there are steps")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--layers", type=int, default=16, help="of the model that is dispatched")
    parser.add_argument("--devices", type=int, default=1, help="of the model that is dispatched")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.output < args.steps + 100:
        parser.error(f"--output {args.output} is too few for --steps {args.steps}: give {args.steps + 100} or more")
    if args.devices > 1:
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                                   + f" --xla_force_host_platform_device_count={args.devices}")
    figures = {"sequences": args.sequences, **host_work(args), **dispatch(args), "layers": args.layers,
               "devices": args.devices}
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
        return
    for name in ("schedule", "batch", "detokenise", "host", "dispatch"):
        print(f"{name:<12}{figures[name]:8.3f} ms a step")
    print(f"{args.sequences} sequences; dispatch of {figures['leaves']} arrays to {args.devices} "
          f"device{'s' * (args.devices > 1)}", file=sys.stderr)


if __name__ == "__main__":
    main()
