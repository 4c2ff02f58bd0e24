"""Time of ragged paged attention on this device: `python scripts/bench_attention.py [--json]`.

Every case has the same page table, wide enough for the longest, so that cases show whether the cost follows the
lengths that are there. The cases take turns, round by round; a figure is the median over rounds. Beside each stands
the rate at which it read K and V of the cache, in GB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.kernels.paged_attention.api import ragged_paged_attention

# Name -> (tokens in the cache, new tokens) of each sequence.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "1 decode at 2000": ((2000, 1),),
    "8 decodes at 50": ((50, 1),) * 8,
    "8 decodes at 2000": ((2000, 1),) * 8,
    "prefill of 512": ((0, 512),),
    "mixed: 7 decodes at 2000, a chunk of 128 at 512": ((2000, 1),) * 7 + ((512, 128),),
}


def prepare(rows: Sequence[tuple[int, int]], table_width: int, args: argparse.Namespace) -> Callable[[], float]:
    """A case compiled: each call runs it once and returns its seconds."""
    rng = np.random.default_rng(0)
    cached, new = np.array(rows, np.int32).T
    n_pages = len(rows) * table_width
    table = rng.permutation(n_pages).astype(np.int32).reshape(len(rows), table_width)
    n_tokens = int(new.sum())
    q, k, v = (jnp.asarray(rng.standard_normal((n_tokens, n, args.head_dim)), args.dtype)
               for n in (args.heads, args.kv_heads, args.kv_heads))
    pages = jnp.zeros((n_pages, args.kv_heads, args.page_size, 2 * args.head_dim), args.cache_dtype)
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)

    def attend(pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        return ragged_paged_attention(q, k, v, pages, jnp.asarray(cached), jnp.asarray(table), jnp.asarray(offsets),
                                      scale=args.head_dim**-0.5)

    compiled = jax.jit(attend, donate_argnums=0).lower(pages).compile()

    def run() -> float:
        nonlocal pages
        start = time.perf_counter()
        out, pages = compiled(pages)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench_attention: {message} (see --help)\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1; got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Time of ragged paged attention, case by case.")
    parser.add_argument("--heads", type=_count, default=32, metavar="N", help="query heads; default 32")
    parser.add_argument("--kv-heads", type=_count, default=8, metavar="N", help="default 8")
    parser.add_argument("--head-dim", type=_count, default=64, metavar="N", help="default 64")
    parser.add_argument("--page-size", type=_count, default=32, metavar="N", help="tokens; default 32")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of q, k and v; default float32")
    parser.add_argument("--cache-dtype", choices=dtypes, default="float32", help="default float32")
    parser.add_argument("--rounds", type=_count, default=30, metavar="N", help="default 30")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code: 0, or 2 for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    longest = max(cached + new for rows in SHAPES.values() for cached, new in rows)
    table_width = -(-longest // args.page_size)
    try:
        cases = {name: prepare(rows, table_width, args) for name, rows in SHAPES.items()}
    except ValueError as error:
        parser.error(str(error))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for r in range(-2, args.rounds):  # the first two warm up
        for name, run in cases.items():
            took = run()
            if r >= 0:
                seconds[name].append(took)
    token_bytes = args.kv_heads * 2 * args.head_dim * jnp.dtype(args.cache_dtype).itemsize
    results = []
    for name, times in seconds.items():
        median, n_read = statistics.median(times), sum(cached + new for cached, new in SHAPES[name])
        results.append({"case": name, "ms": median * 1e3, "ms_min": min(times) * 1e3,
                        "gb_s": n_read * token_bytes / median / 1e9})
    device = jax.devices()[0]
    report = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
              "table_width": table_width, **{name: value for name, value in vars(args).items() if name != "json"},
              "results": results}
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{args.heads} heads, {args.kv_heads} KV heads of {args.head_dim}, pages of {args.page_size}, {args.dtype}, "
          f"cache {args.cache_dtype}; {device.device_kind} ({device.platform}), jax {jax.__version__}")
    print(f"{'':<50}{'ms':>10}{'least':>10}{'GB/s':>10}")
    for result in results:
        print(f"{result['case']:<50}{result['ms']:>10.3f}{result['ms_min']:>10.3f}{result['gb_s']:>10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
