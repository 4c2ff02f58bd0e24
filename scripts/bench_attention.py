"""Time of ragged paged attention on this device: `python scripts/bench_attention.py [--json]`.

A figure is the median over rounds; beside it stands the rate at which K and V of the cache were read.

On CPU all batches have the same page table, wide enough for the longest, and take turns, round by round: they show
whether the cost follows the lengths that are there.

On an accelerator a round is many steps in one program, so that starting it does not count. The rate of decoding stands
beside that of a large copy, and that of prefill beside a large matrix product, both measured in the same run. On an
NVIDIA GPU torch's scaled_dot_product_attention, on K and V gathered beforehand, and FlashInfer, on the same pages, take
turns with each batch where they can be imported.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too; before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlike.kernels.paged_attention import IMPLEMENTATIONS, implementation_named, ragged_paged_attention
from maxlike.kernels.paged_attention.cases import ACCELERATOR_BATCHES, BATCHES
from maxlike.nn.kv_cache import KVCacheParams

Rows = Sequence[tuple[int, int]]  # (tokens in the cache, new tokens) of each sequence


def prepare(rows: Rows, table_width: int, n_heads: int, steps: int, args: argparse.Namespace) -> Callable[[], float]:
    """A batch compiled: each call runs it `steps` times and returns the seconds of one."""
    rng = np.random.default_rng(0)
    cached, new = np.array(rows, np.int32).T
    n_pages = len(rows) * table_width
    table = rng.permutation(n_pages).astype(np.int32).reshape(len(rows), table_width)
    n_tokens = int(new.sum())
    q, k, v = (jnp.asarray(rng.standard_normal((n_tokens, n, args.head_dim), np.float32), args.dtype)
               for n in (n_heads, args.kv_heads, args.kv_heads))
    # Numbers as they come, and not zeros: a GPU's clock falls with the bits that change. Some pages, again and again.
    params = KVCacheParams(jnp.float32, args.kv_heads, args.head_dim, 1, page_size=args.page_size)
    shape = params.shape(min(n_pages, 64), jax.default_backend())
    some = rng.standard_normal(shape, np.float32)
    pages = jnp.asarray(some, args.cache_dtype)[np.arange(n_pages) % len(some)]
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    batch = jax.device_put((q, k, v, cached, table, offsets))
    quantised = pages.dtype.itemsize == 1
    scales = dict.fromkeys(("k_scale", "v_scale"), jnp.ones(args.kv_heads, jnp.float32)) if quantised else {}

    def attend(pages, q, k, v, cached, table, offsets):
        def step(_, carry):
            return ragged_paged_attention(
                carry[0], k, v, carry[1], cached, table, offsets, scale=args.head_dim**-0.5, **scales,
                implementation=args.implementation and implementation_named(args.implementation),
            )  # fmt: skip

        return lax.fori_loop(0, steps, step, (q, pages))

    compiled = jax.jit(attend, donate_argnums=0).lower(pages, *batch).compile()

    def run() -> float:
        nonlocal pages
        start = time.perf_counter()
        out, pages = compiled(pages, *batch)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / steps

    return run


def peers(rows: Rows, n_heads: int, steps: int, args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """The same work by torch and FlashInfer, as far as they are there and do it: sequences of one length each."""
    if len(set(rows)) > 1 or args.dtype != args.cache_dtype or not importlib.util.find_spec("torch"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    (cached, new), S, K, H = rows[0], len(rows), args.kv_heads, args.head_dim
    length, size = cached + new, args.page_size
    random = functools.partial(torch.randn, device="cuda", dtype=getattr(torch, args.dtype))
    q, k, v = random(S, n_heads, new, H), random(S, K, length, H), random(S, K, length, H)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    runs: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: sdpa(q, k, v, is_causal=new > 1 and cached == 0, enable_gqa=True)
    }
    if new > 1 and cached:
        runs.clear()  # is_causal would count from the first position
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        n_pages = -(-length // size)
        pages = random(S * n_pages, 2, K, size, H)
        int32 = functools.partial(torch.tensor, dtype=torch.int32, device="cuda")
        table, ends = torch.randperm(S * n_pages, device="cuda").int(), int32([s * n_pages for s in range(S + 1)])
        last, workspace = int32(S * [(length - 1) % size + 1]), torch.empty(2**28, dtype=torch.uint8, device="cuda")
        heads = n_heads, K, H, size
        if new == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            wrapper.plan(ends, table, last, *heads, q_data_type=q.dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            starts = int32([s * new for s in range(S + 1)])
            wrapper.plan(starts, ends, table, last, *heads, causal=True, q_data_type=q.dtype)
        flat = q.transpose(1, 2).reshape(S * new, n_heads, H)
        runs["flashinfer"] = lambda: wrapper.run(flat, pages)

    def timed(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / steps

    return {name: functools.partial(timed, run) for name, run in runs.items()}


def measure_peaks() -> dict[str, float]:
    """What this device reaches: bytes per second of a copy of 1 GiB, read and written, and bfloat16 operations."""

    def best(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        steps = 20
        many = jax.jit(lambda x: lax.fori_loop(0, steps, lambda _, x: f(x), x)).lower(x).compile()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(many(x))
            times.append((time.perf_counter() - start) / steps)
        return min(times)

    n = 8192
    copy = best(lambda x: x + 1, jnp.zeros(2**29, jnp.bfloat16))
    square = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) / n**0.5  # and so are its powers
    product = best(lambda x: x @ x, square)
    return {"copy_gb_s": 2 * 2**30 / copy / 1e9, "matmul_tflop_s": 2 * n**3 / product / 1e12}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench_attention: {message} (see --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1; got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Time of ragged paged attention, batch by batch. Defaults are for CPU / accelerators.")
    parser.add_argument("--heads", type=_count, nargs="+", metavar="N", help="query heads; default 32 / 32 and 64")
    parser.add_argument("--kv-heads", type=_count, default=8, metavar="N", help="default 8")
    parser.add_argument("--head-dim", type=_count, metavar="N", help="default 64 / 128")
    parser.add_argument("--page-size", type=_count, metavar="N", help="tokens; default 32 / 64")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, help="of q, k and v; default float32 / bfloat16")
    parser.add_argument("--cache-dtype", choices=[*dtypes, "int8", "float8_e4m3fn"], help="default: --dtype")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: the platform's")
    parser.add_argument("--rounds", type=_count, default=30, metavar="N", help="default 30")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code: 0, or 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    args.heads = args.heads or ([32] if on_cpu else [32, 64])
    args.head_dim = args.head_dim or (64 if on_cpu else 128)
    args.page_size = args.page_size or (32 if on_cpu else 64)
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    args.cache_dtype = args.cache_dtype or args.dtype
    batches, steps = (BATCHES, 1) if on_cpu else (ACCELERATOR_BATCHES, 20)
    peaks = {} if on_cpu else measure_peaks()

    cases = [(name, rows, n_heads) for n_heads in args.heads for name, rows in batches.items()]
    longest = max(cached + new for rows in batches.values() for cached, new in rows)
    results = []
    for turn in [cases] if on_cpu else [[case] for case in cases]:  # an accelerator cannot hold them all
        contestants: list[dict[str, Callable[[], float]]] = []
        for _, rows, n_heads in turn:
            length = longest if on_cpu else max(map(sum, rows))
            try:
                ours = prepare(rows, -(-length // args.page_size), n_heads, steps, args)
            except ValueError as error:
                parser.error(str(error))
            contestants.append({"maxlike": ours} | ({} if on_cpu else peers(rows, n_heads, steps, args)))
        seconds: list[dict[str, list[float]]] = [{name: [] for name in runs} for runs in contestants]
        for r in range(-2, args.rounds):  # the first two warm up
            for runs, times in zip(contestants, seconds, strict=True):
                for name, run in runs.items():
                    took = run()
                    if r >= 0:
                        times[name].append(took)
        results += [_result(case, times, peaks, args) for case, times in zip(turn, seconds, strict=True)]

    report = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__, **peaks,
              **{name: value for name, value in vars(args).items() if name != "json"}, "results": results}
    if on_cpu:
        report["table_width"] = -(-longest // args.page_size)
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{args.kv_heads} KV heads of {args.head_dim}, pages of {args.page_size}, {args.dtype}, cache "
          f"{args.cache_dtype}; {device.device_kind} ({device.platform}), jax {jax.__version__}"
          + "".join(f", {name} {value:.0f}" for name, value in peaks.items()))
    print(f"{'':<50}{'heads':>6}{'ms':>10}{'least':>10}{'GB/s':>10}")
    for result in results:
        more = "".join(f"  {name} {result[name]:.3g}" for name in result if name.startswith(("of_", "tflop", "ms_by")))
        print(f"{result['case']:<50}{result['heads']:>6}{result['ms']:>10.3f}{result['ms_min']:>10.3f}"
              f"{result['gb_s']:>10.2f}{more}")
    return 0


def _result(case: tuple[str, Rows, int], times: dict[str, list[float]], peaks: dict[str, float],
            args: argparse.Namespace) -> dict[str, Any]:
    name, rows, n_heads = case
    median = statistics.median(times["maxlike"])
    token_bytes = args.kv_heads * 2 * args.head_dim * jnp.dtype(args.cache_dtype).itemsize
    # Of position p there are p + 1 scores, and as many weighted values.
    scores = sum(new * cached + new * (new + 1) // 2 for cached, new in rows)
    result = {"case": name, "heads": n_heads, "ms": median * 1e3, "ms_min": min(times["maxlike"]) * 1e3,
              "gb_s": sum(map(sum, rows)) * token_bytes / median / 1e9,
              "tflop_s": 4 * scores * n_heads * args.head_dim / median / 1e12}
    if peaks and all(new == 1 for _, new in rows):
        result["of_copy"] = result["gb_s"] / peaks["copy_gb_s"]
    elif peaks:
        result["of_matmul"] = result["tflop_s"] / peaks["matmul_tflop_s"]
    return result | {f"ms_by_{peer}": statistics.median(t) * 1e3 for peer, t in times.items() if peer != "maxlike"}


if __name__ == "__main__":
    sys.exit(main())
