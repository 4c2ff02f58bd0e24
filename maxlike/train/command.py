"""`maxlike train` and `maxlike export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maxlike.train.config import TrainConfig
from maxlike.train.settings import add_flags, build, merged, read_yaml

_PLAIN = ("model", "data", "optimizer", "step")
"""Sections whose settings are known by their name alone."""
_NAMES = {"model.path": "--model", "data.train_files": "--data", "data.seed": "--data-seed", "loss.z_loss": "--z-loss",
          "optimizer.name": "--optimizer", "checkpoint.resume": "--resume", "log.tensorboard": "--tensorboard",
          "log.plot": "--plot", "log.quiet": "--quiet"}
"""Flags that are called otherwise."""


def add_commands(commands: Any, version: str) -> argparse.ArgumentParser:
    """Adds `train` and `export` to the subparsers `commands` of the command line; returns the parser of `train`."""
    parser = commands.add_parser("train", allow_abbrev=False, help="train or fine-tune a model", description=(
        "Train a model, or go on with a run that was stopped: by a YAML file, by flags, or both, flags before the "
        "file. SIGTERM or SIGINT end it after the step under way and a checkpoint."))
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="settings by section, as the flags "
                        "below: --learning-rate is {optimizer: {learning_rate: ...}}")
    add_flags(parser, TrainConfig, _PLAIN, _NAMES)
    processes = parser.add_argument_group("several processes", "The same command in each of them.")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others")
    processes.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    processes.add_argument("--process-id", type=int, metavar="I", help="which this one is, from 0")
    processes.add_argument("--distributed", action="store_true", help="let JAX find all that out: on TPU pods, under "
                           "SLURM or Open MPI")
    parser.set_defaults(run=lambda args: _train(args, version))

    exported = commands.add_parser("export", help="write what was trained as a Hugging Face folder", description=(
        "Write a checkpoint of `maxlike train` as a Hugging Face folder, adapters merged into the weights."))
    exported.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder (its newest checkpoint is taken), "
                          "or one checkpoint in it")
    exported.add_argument("out", type=Path, metavar="OUT", help="a folder to be made")
    exported.add_argument("--adapter", action="store_true", help="the adapter alone, as PEFT has it")
    exported.add_argument("--best", action="store_true", help="of a run rather the checkpoint with the lowest "
                          "validation loss")
    exported.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; default: as the model that "
                          "was trained has them")
    exported.add_argument("--model", metavar="FOLDER|HUB_ID", help="the model that was trained, should it no longer be "
                          "where it was")
    exported.set_defaults(run=_export)
    return parser


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The configuration that a file and flags state.

    Raises:
        ValueError: the file cannot be read, a setting is unknown, missing or wrong.
    """
    values: dict[str, Any] = {}
    if args.config is not None:
        try:
            values = read_yaml(args.config.read_text(encoding="utf-8"), str(args.config))
        except OSError as error:
            raise ValueError(f"The configuration {args.config} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"The configuration {args.config} is not UTF-8: {error}.") from error
    values = merged(values, args, TrainConfig)
    for key, flag in (("output", "--output"), ("model", "--model"), ("data", "--data")):
        if key not in values:
            raise ValueError(f"{flag} is missing: say what is trained (--model), on what (--data), and where it is "
                             "kept (--output), or give a file that does.")
    return build(TrainConfig, values)


def start_processes(args: argparse.Namespace, initialize: Callable[..., None]) -> None:
    """Joins this process with the others that the flags speak of; before anything asks JAX for devices.

    Raises:
        ValueError: flags are missing or contradict each other, or the others cannot be reached.
    """
    given = {"--coordinator": args.coordinator, "--num-processes": args.num_processes, "--process-id": args.process_id}
    named = [flag for flag, value in given.items() if value is not None]
    if args.distributed and named:
        raise ValueError(f"--distributed finds out what {named[0]} says: give one or the other.")
    if named and len(named) < len(given):
        raise ValueError(f"{', '.join(flag for flag in given if flag not in named)} is missing: several processes need "
                         f"{', '.join(given)}, or --distributed.")
    if named and not 0 <= args.process_id < args.num_processes:
        raise ValueError(f"--process-id must be 0 to {args.num_processes - 1}; got {args.process_id}.")
    if not named and not args.distributed:
        return
    try:
        initialize(args.coordinator, args.num_processes, args.process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The processes do not come together: {error}") from error


def _train(args: argparse.Namespace, version: str) -> int:
    config = config_of(args)
    # Imported here: it takes a second, which other commands need not cost.
    from maxlike.train.loop import train

    summary = train(config, version=version)
    speed = f"{summary.tokens:,} tokens in {summary.seconds:.1f} s"
    losses = "".join(f", {name} {value:.4f}" for name, value in (
        ("loss", summary.loss), ("validation loss", summary.validation_loss)) if value is not None)
    steps = f"{summary.steps} steps"
    if summary.resumed_at:
        steps += f", {summary.steps - summary.resumed_at} of them since it was resumed"
    lines = [f"{steps}, {speed}{losses}", *summary.left_out.splitlines()]
    if summary.stopped_by is not None:
        lines.append(f"stopped by {summary.stopped_by} after step {summary.steps} of {summary.of_steps}, which is "
                     f"saved in {config.output}: the same command goes on from there")
    else:
        lines.append(f"maxlike export {config.output} FOLDER writes the model for serving")
        best, last = summary.best_loss, summary.validation_loss
        if best is not None and last is not None and best < last:
            lines.append(f"with --best it writes the one whose validation loss was lowest, {best:.4f}")
    if summary.leader:
        for line in lines:
            print(f"maxlike: {line}", file=sys.stderr)
    return 0


def _export(args: argparse.Namespace) -> int:
    from maxlike.train.export import export

    step = export(args.checkpoint, args.out, adapter=args.adapter, best=args.best, dtype=args.dtype, model=args.model,
                  tell=lambda line: print(f"maxlike: {line}", file=sys.stderr))
    print(f"maxlike: step {step} of {args.checkpoint} is in {args.out}", file=sys.stderr)
    return 0
