"""How much memory loading takes beyond the weights: `python scripts/measure_load.py [--gigabytes 2] [--tp N]`.

A checkpoint of random weights is written to a temporary folder, in several files, and loaded by a process of its
own. Of that process's peak of resident memory is taken off what Python, JAX and a first computation had come to,
and what the weights take where they land. The rest is to be at most 256 MB; the exit code is 1 when it is more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
MAX_SHARD_BYTES = 500_000_000
MEGABYTE = 1_000_000


def shape_of(n_parameters: int) -> dict[str, Any]:
    """The `config.json` of a Llama of about `n_parameters`, in the proportions of Llama 3.2 1B.

    Width D, vocabulary 64 D, MLP 4 D, 32 heads, 8 KV heads: `64 D^2` parameters in the embedding, about a third
    of it all, and `14.5 D^2` in a layer.
    """
    width = 256
    while (64 + 14.5 * 8) * (2 * width) ** 2 <= n_parameters:
        width *= 2
    layers = max(1, round((n_parameters / width**2 - 64) / 14.5))
    return {"model_type": "llama", "vocab_size": 64 * width, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": width // 32,
            "max_position_embeddings": 4096, "tie_word_embeddings": True}


def write_random_checkpoint(folder: Path, gigabytes: float, dtype: str) -> int:
    """Writes about `gigabytes` of weights and their `config.json`, one tensor in memory at a time; returns bytes."""
    from maxlike.models.safetensors import write_checkpoint

    config = shape_of(round(gigabytes * 1e9 / DTYPES[dtype].itemsize)) | {"dtype": dtype}
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in dict(input_layernorm=(hidden,), post_attention_layernorm=(hidden,)).items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
        for name, shape in dict(q=(hidden, hidden), k=(kv, hidden), v=(kv, hidden), o=(hidden, hidden)).items():
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = shape
        for name, shape in dict(gate=(mlp, hidden), up=(mlp, hidden), down=(hidden, mlp)).items():
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    # Loading does not look at values: one block of them, over and over, is written faster than new ones are drawn.
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(DTYPES[dtype])
    tensors = [(name, shape, DTYPES[dtype], partial(np.resize, block, shape)) for name, shape in shapes.items()]
    write_checkpoint(folder, tensors, max_shard_bytes=MAX_SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def status_bytes(field: str) -> int:
    """A field of this process's `/proc/self/status`: `VmRSS`, resident memory, or `VmHWM`, the most it has been."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def load_and_measure(folder: Path, tp: int, dtype: str | None, use_subgraphs: bool | None) -> dict[str, Any]:
    """Loads the checkpoint in this process, a fresh one, and says what that took."""
    if tp > 1:  # on CPU, so many devices are made; elsewhere it changes nothing
        flag = f"--xla_force_host_platform_device_count={tp}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax

    import maxlike

    devices = jax.devices()[:tp]
    if len(devices) < tp:
        raise ValueError(f"--tp {tp} was asked for; there are {len(devices)} devices ({devices[0].platform}).")
    jax.block_until_ready([jax.jit(lambda x: x + 1)(jax.device_put(np.zeros(8), device)) for device in devices])
    baseline = status_bytes("VmRSS")
    start = time.perf_counter()
    model = maxlike.load(folder, devices=devices, dtype=dtype, use_subgraphs=use_subgraphs)
    jax.block_until_ready(jax.tree.leaves(model))
    seconds = time.perf_counter() - start
    # On CPU several devices' shards may be one piece of memory, which is counted once.
    landed = {(shard.device.platform == "cpu" or shard.device.id, shard.data.unsafe_buffer_pointer()):
              shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards}
    return {"platform": devices[0].platform, "landed": sum(landed.values()), "seconds": seconds,
            "over_baseline": status_bytes("VmHWM") - baseline, "baseline": baseline}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"measure_load: {message} (see --help)\n")


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code: 0, 1 when loading takes more than `--limit`, 2 for bad input."""
    parser = _Parser(description="How much memory loading a checkpoint takes beyond the weights.")
    parser.add_argument("--gigabytes", type=_positive(float), default=2.0, metavar="GB", help="to write; default 2")
    parser.add_argument("--checkpoint-dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--dtype", choices=DTYPES, help="to load in; default: the checkpoint's")
    parser.add_argument("--tp", type=_positive(int), default=1, metavar="N",
                        help="tensor-parallel size; on CPU, so many virtual devices are made; default 1")
    parser.add_argument("--use-subgraphs", action=argparse.BooleanOptionalAction, default=None,
                        help="load into stacked parameters or into one a layer; default: as the builder chooses")
    parser.add_argument("--limit", type=_positive(float), default=256.0, metavar="MB",
                        help="memory that loading may take beyond the weights; default 256")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # the process that loads
    args = parser.parse_args(argv)
    if args.load is not None:
        try:
            measured = load_and_measure(args.load, args.tp, args.dtype, args.use_subgraphs)
        except ValueError as error:
            parser.error(str(error))
        print(json.dumps(measured))
        return 0
    with tempfile.TemporaryDirectory(prefix="maxlike-load-") as folder:
        n_bytes = write_random_checkpoint(Path(folder), args.gigabytes, args.checkpoint_dtype)
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--load", folder]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        return run.returncode
    measured = json.loads(run.stdout)
    excess = measured["over_baseline"] - measured["landed"]
    print(f"checkpoint       {n_bytes / MEGABYTE:10.1f} MB, {args.checkpoint_dtype}")
    print(f"on the devices   {measured['landed'] / MEGABYTE:10.1f} MB, {args.dtype or args.checkpoint_dtype}, "
          f"{args.tp} x {measured['platform']}")
    print(f"peak             {measured['over_baseline'] / MEGABYTE:10.1f} MB over a baseline of "
          f"{measured['baseline'] / MEGABYTE:.1f} MB")
    print(f"difference       {excess / MEGABYTE:10.1f} MB, at most {args.limit:g} MB allowed")
    print(f"time             {measured['seconds']:10.2f} s, {n_bytes / 1e9 / measured['seconds']:.2f} GB/s")
    return int(excess > args.limit * MEGABYTE)


if __name__ == "__main__":
    sys.exit(main())
