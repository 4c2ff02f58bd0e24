"""Training on this CPU: `python scripts/bench_train.py [--json]`, tokens/s of a step beside transformers and torch.

Both engines have the same shape of a Llama, random weights, the same sequences and AdamW, each in a process of its own
that lives through the whole run; they take turns, a step each, and the ratio is the median over rounds. Sequences are
of one length, so that neither engine has padding; here they are packed, there they are a batch. Losses are printed too:
both fall, from the logarithm of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A Llama, its head tied to the embedding as in small ones."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "10M": Shape(8192, 320, 896, 6, 5, 5),
    "100M": Shape(32000, 768, 2048, 11, 12, 4),
}
LEARNING_RATE, WARM_UP = 1e-3, 2
Step = Callable[[], float]
"""One training step; returns its loss."""


def batch(args: argparse.Namespace) -> np.ndarray:
    """`int32[sequences, length]`, the same for both; something in it can be learned."""
    return np.random.default_rng(0).integers(SHAPES[args.shape].vocab_size // 8, size=(args.sequences, args.length))


def maxlike_step(args: argparse.Namespace) -> Step:
    """A step of ours. What is cheap is worked out again: on CPU that is faster than writing it to fresh memory."""
    import jax
    from flax import nnx

    from maxlike.mesh import make_mesh
    from maxlike.models.build import build_model
    from maxlike.models.config import LayerConfig, TransformerConfig
    from maxlike.nn.rotary_embedding import RotaryEmbedding
    from maxlike.train.batch import Batch
    from maxlike.train.optimizer import OptimizerConfig, make_optimizer
    from maxlike.train.step import StepConfig, init_state, make_train_step, place_batch

    shape = SHAPES[args.shape]
    head_dim = shape.hidden_size // shape.heads
    config = TransformerConfig(
        "llama", shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.heads, shape.kv_heads, head_dim,
        (LayerConfig(RotaryEmbedding(head_dim)),) * shape.layers, args.length, tie_word_embeddings=True)
    model = build_model(config, devices=make_mesh(jax.devices()[:1]), dtype="float32", use_subgraphs=True,
                        rngs=nnx.Rngs(0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", weight_decay=0.01),
                               model)
    state = init_state(model, optimizer)
    step = make_train_step(model, optimizer, StepConfig(args.dtype, "dots"))
    ids = batch(args).astype(np.int32)
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0
    offsets = np.arange(0, ids.size + 1, args.length, dtype=np.int32)[None]
    placed = place_batch(Batch(ids.reshape(-1), np.roll(ids, -1, 1).reshape(-1), weights.reshape(-1), offsets),
                         model.mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        return float(metrics["loss"])

    return run


def torch_step(args: argparse.Namespace) -> Step:
    """A step of transformers' Llama: float32, or bfloat16 by autocast over float32 weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    shape = SHAPES[args.shape]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=args.length, tie_word_embeddings=True, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    ids = torch.tensor(batch(args), dtype=torch.long)

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


ENGINES = dict(maxlike=maxlike_step, torch=torch_step)


def serve_steps(run: Step, asks: TextIO, answers: TextIO) -> None:
    """Runs a step for each line that comes, and answers with its seconds and its loss."""
    for _ in range(WARM_UP):
        run()
    print("ready", file=answers, flush=True)
    for _ in asks:
        start = time.perf_counter()
        loss = run()
        print(json.dumps([time.perf_counter() - start, loss]), file=answers, flush=True)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of each engine, and ours over torch's, for one shape and dtype."""
    arguments = [f"--{name}={getattr(args, name)}" for name in ("shape", "dtype", "sequences", "length")]
    engines: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in ENGINES:  # one after the other, so that no warm-up disturbs another's
            engines[name] = subprocess.Popen([sys.executable, __file__, f"--engine={name}", *arguments], text=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if _pipe(engines[name].stdout).readline().strip() != "ready":
                raise SystemExit(f"The process of {name} ended; what it said stands above.")
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        losses: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(args.rounds):
            for name in list(engines)[::1 if turn % 2 else -1]:
                print("step", file=_pipe(engines[name].stdin), flush=True)
                took, loss = json.loads(_pipe(engines[name].stdout).readline())
                seconds[name].append(took)
                losses[name].append(loss)
    finally:
        for process in engines.values():
            process.kill()
            process.wait()
    tokens = args.sequences * args.length
    result: dict[str, Any] = dict(shape=args.shape, dtype=args.dtype, tokens=tokens, **asdict(SHAPES[args.shape]))
    for name, times in seconds.items():
        result[f"{name} tokens/s"] = tokens / statistics.median(times)
        result[f"{name} losses"] = [losses[name][0], losses[name][-1]]
    result["ratio"] = statistics.median(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
    return result


def _pipe(pipe: Any) -> TextIO:
    assert pipe is not None
    return pipe


def main() -> None:
    """Compares, or with `--engine` is one of the processes compared."""
    parser = argparse.ArgumentParser(description="Tokens/s of training on this CPU, beside transformers and torch.")
    parser.add_argument("--shape", choices=SHAPES, help="default: each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: each")
    parser.add_argument("--sequences", type=int, default=8, help="of a batch; default 8")
    parser.add_argument("--length", type=int, default=256, help="tokens of each; default 256")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each engine; default 7")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each comparison")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        answers = sys.stdout
        sys.stdout = sys.stderr  # what libraries print is no answer
        serve_steps(ENGINES[args.engine](args), sys.stdin, answers)
        return
    for shape in [args.shape] if args.shape else SHAPES:
        for dtype in [args.dtype] if args.dtype else ("float32", "bfloat16"):
            result = compare(argparse.Namespace(**vars(args) | dict(shape=shape, dtype=dtype)))
            if args.json:
                print(json.dumps(result), flush=True)
            else:
                print(f"{shape} {dtype}: maxlike {result['maxlike tokens/s']:,.0f} tokens/s, torch "
                      f"{result['torch tokens/s']:,.0f}, ratio {result['ratio']:.2f}; losses "
                      f"{result['maxlike losses'][-1]:.2f} and {result['torch losses'][-1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
