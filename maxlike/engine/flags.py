"""An engine's options on the command line: flags for `EngineConfig` and for what `load_engine` takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import jax

from maxlike.engine.config import EngineConfig
from maxlike.engine.loading import AdapterMode
from maxlike.kernels.paged_attention import IMPLEMENTATIONS, implementation_named
from maxlike.mesh import check_tensor_parallel_size
from maxlike.models.build import mesh_for
from maxlike.models.config import TransformerConfig
from maxlike.models.hub import resolve
from maxlike.models.registry import parse_config

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def add_load_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds what says how a checkpoint is loaded: `--tp`, `--dtype`, `--attention`."""
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel size; default: as many devices as the "
                        "model's heads allow")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help="implementation of attention over the KV cache; "
                        "default: the devices' own, as `maxlike info` tells")


def add_cache_dtype_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--kv-cache-dtype`."""
    parser.add_argument("--kv-cache-dtype", choices=["float32", "bfloat16", "int8", "float8_e4m3fn"],
                        help="default: --dtype's, float32 on CPU. int8 needs scales in the checkpoint, "
                        "float8_e4m3fn takes them where they are")


def add_adapter_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--adapter` and `--adapter-mode`."""
    parser.add_argument("--adapter", metavar="FOLDER|HUB_ID", help="a LoRA adapter in PEFT's format")
    parser.add_argument("--adapter-mode", choices=get_args(AdapterMode), default="merged", help="add the adapter into "
                        "the weights at the start (merged, the default), or work it out beside them at each step")


def add_compilation_cache_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--compilation-cache`, which the command line heeds: it belongs to the process."""
    parser.add_argument("--compilation-cache", metavar="FOLDER", help="keep compiled programs there for the next "
                        "start; none: do not; default: JAX's own setting, else ~/.cache/maxlike/programs")


def add_size_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup,
                   short: Mapping[str, str] = MappingProxyType({})) -> None:
    """Adds the flags that say how large an engine is; `short` gives some of them a second name, shown first."""
    def names(flag: str) -> list[str]:
        return [short[flag], flag] if flag in short else [flag]

    parser.add_argument(*names("--max-num-seqs"), dest="max_num_seqs", type=int, metavar="N",
                        help="sequences that run at once; default 64 on CPU, 256 elsewhere")
    parser.add_argument(*names("--max-num-batched-tokens"), dest="max_num_batched_tokens", type=int,
                        metavar="N", help="tokens of a step; default 512 on CPU, 2048 elsewhere")
    parser.add_argument(*names("--max-model-len"), dest="max_model_len", type=int, metavar="N",
                        help="longest sequence; default: the model's own, or what the cache holds")
    parser.add_argument("--page-size", type=int, metavar="N", help="tokens of a page of the KV cache; default 64")
    parser.add_argument("--num-pages", type=int, metavar="N", help="pages of the KV cache; default: what the memory "
                        "holds and the sequences can fill")
    parser.add_argument("--kv-cache-memory", type=memory_size, metavar="SIZE", help="rather the bytes of it on each "
                        "device, as 4G")
    parser.add_argument("--memory-share", type=float, metavar="X", help="share of each accelerator's memory that is "
                        "used (0.9); on CPU of what is free, for the KV cache alone (0.25)")


def add_engine_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds all flags that `engine_options` reads: those above, and those of an engine's size."""
    add_load_flags(parser)
    add_cache_dtype_flag(parser)
    add_adapter_flags(parser)
    add_compilation_cache_flag(parser)
    add_size_flags(parser)
    parser.add_argument("--no-prefix-caching", action="store_true", help="do not keep pages for prompts that begin "
                        "the same")


def engine_options(args: argparse.Namespace, model: str) -> tuple[EngineConfig, dict[str, Any]]:
    """The configuration, and the further arguments of `load_engine`, that the flags ask for.

    Raises:
        ValueError: a value is out of range, or the devices are too few.
    """
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len, page_size=args.page_size, num_pages=args.num_pages,
        kv_cache_memory=args.kv_cache_memory, memory_share=args.memory_share,
        enable_prefix_caching=not args.no_prefix_caching)
    mesh = mesh_of_size(parse_config(resolve(model))[0], args.tp)
    return config, {"devices": mesh, "dtype": args.dtype, "kv_cache_dtype": args.kv_cache_dtype,
                    "implementation": args.attention and implementation_named(args.attention), "adapter": args.adapter,
                    "adapter_mode": args.adapter_mode}


def mesh_of_size(config: TransformerConfig, tp: int | None) -> jax.sharding.Mesh:
    """A mesh of the first `tp` devices; of as many as the model's heads allow where `tp` is `None`.

    Raises:
        ValueError: the model cannot be cut so, or there are not so many devices.
    """
    present = devices_present()
    if tp is None:
        return mesh_for(config)
    check_tensor_parallel_size(tp, config.num_attention_heads, config.num_key_value_heads,
                               intermediate_size=config.intermediate_size)
    if tp > len(present):
        raise ValueError(f"--tp {tp} was asked for; there are {len(present)} devices ({present[0].platform}).")
    return mesh_for(config, present[:tp])


def devices_present() -> list[jax.Device]:
    """JAX's devices. Raises `ValueError` where there is none."""
    try:
        return jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device to run on: {error}") from error


def memory_size(text: str) -> int:
    """Bytes, from a number with K, M or G (of 1024) behind it or nothing: the `type` of an argument.

    Raises:
        ArgumentTypeError: it is no such number; `argparse` makes a message of it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is expected, in bytes or as 512M or 4G; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def read_text(file: Path, what: str) -> str:
    """A file's text. Raises `ValueError` where it cannot be read, or is not UTF-8; `what` it is."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The {what} {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} {file} is not UTF-8: {error}.") from error
