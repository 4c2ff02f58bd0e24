"""What takes the time in a step: `python scripts/profile_step.py decode|prefill|train [--model FOLDER] [options]`.

Runs steps of a model under `jax.profiler`: decodes or a prefill through the programs that the engine runs, or training
steps. Weights are random, so `config.json` is all that is needed of a model. A trace is left in a folder, for Perfetto
and XProf, and the operations that took longest are printed: each with its own time, the share of all operations' time,
how often it ran in a step, and the line of the source that it comes from. On CPU operations run side by side, so their
times may add up to more than a step takes.

The profiler runs in a process of its own, so that where it crashes there is still something to say.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from top_operations import as_table, device_events, top_operations

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES = {"decode": 8, "prefill": 1, "train": 8}
WARM_UP = 2
Step = Callable[[], Any]
"""Runs a step; returns arrays that are there when it has ended."""


def engine_step(args: argparse.Namespace, config: Any) -> tuple[Step, dict[str, str]]:
    """A step of the engine, greedy, and the compiled text of its programs by name.

    A decode is of sequences that have `--length` tokens in the cache, a prefill of prompts of so many.
    """
    import jax

    from maxlike.engine.config import EngineConfig
    from maxlike.engine.flags import mesh_of_size
    from maxlike.engine.runner import ModelRunner
    from maxlike.kernels.paged_attention import implementation_named
    from maxlike.mesh import mesh_platform
    from maxlike.models.build import build_model, compute_dtype, default_kv_params

    n, mesh = args.sequences, mesh_of_size(config, args.tp)
    n_new, n_cached = (1, args.length) if args.phase == "decode" else (args.length, 0)
    sizes = EngineConfig(max_num_seqs=n, max_num_batched_tokens=n * n_new, max_model_len=args.length + 1).for_model(
        config, mesh_platform(mesh))
    kv = replace(default_kv_params(config, mesh, compute_dtype(config, args.dtype)), page_size=sizes.page_size)
    if args.kv_cache_dtype is not None:
        kv = replace(kv, dtype=args.kv_cache_dtype)
    if args.attention is not None:
        kv = replace(kv, implementation=implementation_named(args.attention))
    model = build_model(config, devices=mesh, dtype=args.dtype, use_subgraphs=args.scan, kv_params=kv)
    runner = ModelRunner(model, sizes)
    runner.allocate(n * runner.pages_per_sequence)

    layout = runner.layout(runner.token_bucket(n * n_new))
    packed = np.zeros(layout.size, np.int32)
    tokens, offsets, lengths, table = layout.parts(packed)
    tokens[:n * n_new] = np.random.default_rng(0).integers(config.vocab_size, size=n * n_new)
    offsets[1:] = np.minimum(np.arange(1, len(offsets)), n) * n_new
    lengths[:n] = n_cached
    table[:n] = np.arange(n * runner.pages_per_sequence).reshape(n, -1)
    where = np.full((2, runner.row_bucket(n)), runner.n_slots, np.int32)
    where[:, :n] = np.arange(n)
    where[0, n:] = 0
    programs = {"forward": runner.compile("forward", layout.n_tokens),
                "greedy": runner.compile("greedy", where.shape[1])}

    def step() -> jax.Array:
        last, _ = runner.forward(layout, packed)
        return runner.draw_greedily(last, where)

    return step, {name: program.as_text() for name, program in programs.items()}


def training_step(args: argparse.Namespace, config: Any) -> tuple[Step, dict[str, str]]:
    """A step with AdamW on sequences of `--length` tokens, over a mesh of `fsdp` x `--tp`, and its compiled text."""
    import jax
    from flax import nnx

    from maxlike.mesh import make_mesh
    from maxlike.models.build import build_model
    from maxlike.train.batch import Batch
    from maxlike.train.optimizer import OptimizerConfig, make_optimizer
    from maxlike.train.step import StepConfig, init_state, make_train_step, place_batch

    tp, devices = args.tp or 1, jax.devices()
    shards = len(devices) // tp
    if shards * tp != len(devices) or args.sequences % shards:
        raise ValueError(f"{len(devices)} devices by --tp {tp} is not a number that divides --sequences "
                         f"{args.sequences}: a batch is cut over the devices, whole sequences to each.")
    mesh = make_mesh(devices, fsdp=shards, n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
                     intermediate_size=config.intermediate_size)
    model = build_model(config, devices=mesh, dtype="float32", use_subgraphs=args.scan, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), model)
    state = init_state(model, optimizer)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(args.sequences, args.length)).astype(np.int32)
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0
    offsets = np.tile(np.arange(0, ids.size // shards + 1, args.length, dtype=np.int32), (shards, 1))
    batch = place_batch(Batch(ids.reshape(-1), np.roll(ids, -1, 1).reshape(-1), weights.reshape(-1), offsets), mesh)
    compiled = make_train_step(model, optimizer, StepConfig(args.dtype or "bfloat16", args.remat or "full")).lower(
        state, batch).compile()
    changed, frozen = (state.step, state.params, state.opt_state), state.frozen
    del model, state  # the first step takes their arrays

    def step() -> Any:
        nonlocal changed
        changed, metrics = compiled(changed, frozen, batch)
        return metrics

    return step, {"step": compiled.as_text()}


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps, leaves the trace, and tells the figures."""
    import jax

    from maxlike.models.hub import resolve_config
    from maxlike.models.registry import parse_config_file

    start = time.perf_counter()
    config, _ = parse_config_file(resolve_config(args.model))
    step, texts = (training_step if args.phase == "train" else engine_step)(args, config)
    print(f"compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    for _ in range(WARM_UP):
        jax.block_until_ready(step())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # each call of a Python function would be in it, and take its time
    before = set(args.output.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(args.output), profiler_options=options, create_perfetto_trace=True):
        start = time.perf_counter()
        for i in range(args.steps):
            with jax.profiler.StepTraceAnnotation(args.phase, step_num=i):
                jax.block_until_ready(step())
        seconds = time.perf_counter() - start
    (trace,) = set(args.output.rglob("*.xplane.pb")) - before
    events = device_events(jax.profiler.ProfileData.from_file(str(trace)))
    if not events:
        raise ValueError(f"The trace {trace} names no operations of {jax.devices()[0].device_kind}: this jax "
                         f"({jax.__version__}) writes it in a form that is not known here. Open it in Perfetto.")
    return {"model": str(args.model), "phase": args.phase, "sequences": args.sequences, "length": args.length,
            "steps": args.steps, "jax": jax.__version__, "device": jax.devices()[0].device_kind,
            "devices": len({event.device for event in events}), "step_ms": 1e3 * seconds / args.steps,
            "trace": str(trace.parent), "operations": top_operations(events, texts, ROOT / "maxlike")}


def report(figures: dict[str, Any], top: int) -> str:
    """The figures as text."""
    what = {"decode": "tokens in the cache of each", "prefill": "tokens each", "train": "tokens each"}
    total = sum(row.self_ms for row in figures["operations"]) / figures["steps"]
    return (f"{figures['phase']} of {figures['sequences']} sequences, {figures['length']} "
            f"{what[figures['phase']]}, on {figures['devices']} x {figures['device']}, jax {figures['jax']}: "
            f"{figures['step_ms']:.2f} ms a step while profiled, operations {total:.2f} ms\n\n"
            f"{as_table(figures['operations'], figures['steps'], top)}\n\n"
            f"trace: {figures['trace']}\n"
            "  Perfetto: open its perfetto_trace.json.gz at https://ui.perfetto.dev\n"
            f"  XProf:    pip install xprof && xprof --logdir {Path(figures['trace']).parents[2]}")


def crash_message(code: int) -> str:
    """What to say of a process that a signal ended."""
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code == signal.SIGKILL:
        return (f"The profiled process was ended by {name}, as the system does when memory runs out: profile a smaller "
                "model, fewer --sequences, or less --length.")
    return (f"The profiled process crashed ({name}) under jax {importlib.metadata.version('jax')}. If the same step "
            "runs without a profiler (maxlike generate, maxlike train), the fault is the profiler's: try "
            "JAX_PLATFORMS=cpu where the TPU's compiler is installed and no TPU is there, --steps 1, or a newer jax, "
            "which Python 3.12 and newer can have (pip install -U jax).")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
        return int(text)

    made = argparse.ArgumentParser(description="Profile steps of a model: a trace, and a table of the operations that "
                                   "took longest.")
    made.add_argument("phase", choices=SEQUENCES, help="steps of the engine, or of training")
    made.add_argument("--model", default=str(ROOT / "maxlike" / "embedded"), metavar="FOLDER|HUB_ID",
                      help="of which config.json is read; default: the embedded model")
    made.add_argument("--sequences", type=count, metavar="N", help="of a step; default 8, of a prefill 1")
    made.add_argument("--length", type=count, default=256, metavar="N",
                      help="tokens of each: in the cache, or new ones of a prefill or a training step; default 256")
    made.add_argument("--steps", type=count, default=5, metavar="N", help="profiled; default 5")
    made.add_argument("--top", type=count, default=15, metavar="N", help="rows of the table; default 15")
    made.add_argument("--output", type=Path, default=Path("build/profile"), metavar="FOLDER",
                      help="where the trace is left; default build/profile")
    made.add_argument("--json", action="store_true", help="print the figures, and all operations, as JSON")
    made.add_argument("--tp", type=count, metavar="N", help="tensor-parallel size; default: as many devices as the "
                      "model's heads allow, in training 1")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the model's, in training bfloat16")
    made.add_argument("--kv-cache-dtype", choices=["float32", "bfloat16", "float8_e4m3fn"], help="default: --dtype's, "
                      "float32 on CPU")
    made.add_argument("--attention", choices=["xla", "mosaic_tpu", "mosaic_gpu"], help="default: the devices' own")
    made.add_argument("--remat", choices=["none", "dots", "full"], help="in training; default full")
    made.add_argument("--scan", action=argparse.BooleanOptionalAction, help="layers of one structure as a loop; "
                      "default: yes, but on CPU")
    made.add_argument("--here", action="store_true", help="profile in this process, for a debugger")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles and prints; the exit code is 2 for bad input, 1 where the profiler crashed."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(given)
    foreign = ("attention", "kv_cache_dtype") if args.phase == "train" else ("remat",)
    if meaningless := [f"--{name.replace('_', '-')}" for name in foreign if getattr(args, name) is not None]:
        print(f"{args.phase} has no {' and no '.join(meaningless)}: leave it out.", file=sys.stderr)
        return 2
    if not args.here:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        code = subprocess.run([sys.executable, __file__, *given, "--here"], env=environment).returncode
        if code < 0:
            print(crash_message(code), file=sys.stderr)
        return 1 if code < 0 else code
    args.sequences = args.sequences or SEQUENCES[args.phase]
    try:
        figures = profile(args)
    except ValueError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(figures | {"operations": [asdict(row) for row in figures["operations"]]}))
    else:
        print(report(figures, args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
