"""`maxlike plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from maxlike.engine.config import EngineConfig
from maxlike.engine.flags import add_size_flags
from maxlike.plan.options import Options, Serving, Training

_SERVING = {"cache_dtype": "--cache-dtype", "context": "--context", "max_num_seqs": "--max-seqs",
            "max_model_len": "--max-len", "max_num_batched_tokens": "--max-batched-tokens",
            "page_size": "--page-size", "num_pages": "--num-pages", "kv_cache_memory": "--kv-cache-memory",
            "memory_share": "--memory-share"}
_TRAINING = {"fsdp": "--fsdp", "tokens_per_batch": "--tokens-per-batch", "remat": "--remat",
             "accumulation": "--accumulation", "optimizer": "--optimizer", "lora_rank": "--lora-rank"}
_ENGINE = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "page_size", "num_pages", "kv_cache_memory",
           "memory_share")


def add_command(commands: Any, embedded_model: str) -> None:
    """Adds `plan` to the subparsers `commands` of the command line.

    `embedded_model` is planned for where none is named.
    """
    parser = commands.add_parser("plan", help="what a model takes on devices that are not here", description=(
        "Whether a model fits a TPU slice, and how fast it can be at most, from its config.json alone: the TPU's "
        "compiler makes the real programs and says what they need. For GPUs it is arithmetic. Exit code 1: it does "
        "not fit."))
    parser.add_argument("--model", metavar="FOLDER|FILE|HUB_ID", default=embedded_model, help="a folder, a config.json "
                        "or a hub id, of which only that file is fetched; default: the embedded model")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="NAME", help="v4:2x2x2, v5e:2x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x1, a100:8, "
                       "h100:8, h200:8, b200:8, or cpu:N, this machine")
    where.add_argument("--sweep", nargs="+", metavar="NAME", help="rank all meshes of these topologies, or of all "
                       "slices of a chip up to 64 (v6e), by what a chip yields")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel size; default: as many devices as the "
                        "heads allow, with --train 1, with --sweep every size")
    parser.add_argument("--data", type=int, metavar="N", help="replicas; with --train the data axis of the mesh "
                        "(default 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's; with --train "
                        "bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object, or with --sweep a list, instead of "
                        "the table")
    parser.add_argument("--compile", action="store_true", help="with --sweep: ask the compiler, a minute or so for "
                        "each mesh")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --sweep: a picture, .png, .svg or .pdf")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--cache-dtype", "--kv-cache-dtype", choices=["float32", "bfloat16", "int8", "float8_e4m3fn"],
                         help="of the KV cache; default: --dtype's, float32 on CPU")
    add_size_flags(serving, {"--max-num-seqs": "--max-seqs", "--max-model-len": "--max-len",
                             "--max-num-batched-tokens": "--max-batched-tokens"})
    serving.add_argument("--context", type=int, metavar="N", help="tokens that each sequence has behind it in the "
                         "decode step that is told of; default 4096, or what the model takes")
    training = parser.add_argument_group("training")
    training.add_argument("--train", action="store_true", help="plan a training step rather than serving")
    training.add_argument("--fsdp", type=int, metavar="N", help="parts of weights, optimizer and batch; default: what "
                          "--data and --tp leave")
    training.add_argument("--tokens-per-batch", type=int, metavar="N", help="over all devices; default: 4096 for each "
                          "part that a batch is cut into")
    training.add_argument("--remat", choices=["none", "full", "dots"], help="default full")
    training.add_argument("--accumulation", type=int, metavar="N", help="batches of a step; default 1")
    training.add_argument("--optimizer", choices=["adamw", "adafactor", "lion", "muon", "sgd"], help="default adamw")
    training.add_argument("--lora-rank", type=int, metavar="N", help="train adapters of this rank rather than all "
                          "weights")
    parser.set_defaults(run=_run)


def options_of(args: argparse.Namespace) -> Options:
    """What the flags ask for.

    Raises:
        ValueError: a flag is for the other use, or a value is out of range.
    """
    wrong, use = (_SERVING, "serving") if args.train else (_TRAINING, "--train")
    for name, flag in wrong.items():
        if getattr(args, name) is not None:
            raise ValueError(f"{flag} is for {use}: " + ("leave it, or --train, out." if args.train else
                                                         "give that too, or leave it out."))
    given = {name: getattr(args, name) for name in ("tp", "data", "dtype", *(_TRAINING if args.train else _SERVING))
             if getattr(args, name) is not None}
    if args.train:
        return Training(**given)
    engine = EngineConfig(**{name: given.pop(name) for name in _ENGINE if name in given})
    return Serving(engine=engine, **given)


def _run(args: argparse.Namespace) -> int:
    # Imported here: it takes a second, which other commands need not cost.
    from maxlike.bench.plot import check_plot
    from maxlike.plan.planner import plan
    from maxlike.plan.plot import plot
    from maxlike.plan.sweep import sweep, sweep_table

    options = options_of(args)
    if args.sweep is None:
        for flag, value in (("--plot", args.plot), ("--compile", args.compile)):
            if value:
                raise ValueError(f"{flag} is about many plans: give --sweep, or leave it out.")
        found = plan(args.model, args.topology, options)
        print(json.dumps(found.to_json()) if args.json else found.table())
        return 0 if found.fits else 1
    if args.data is not None and not args.train:
        raise ValueError("--sweep tries every number of replicas: leave --data out.")
    if args.plot is not None:
        check_plot(args.plot)
    plans = sweep(args.model, args.sweep, options, compile=args.compile)
    if args.plot is not None:
        plot(plans, args.plot)
    print(json.dumps([one.to_json() for one in plans]) if args.json else sweep_table(plans))
    return 0 if plans[0].fits else 1
