"""The cases that every implementation of ragged paged attention must pass, and their inputs.

Tests and benchmarks share this list. Whatever an implementation must not look at is poisoned: padding tokens, unused
pages, unused slots and unused lanes hold NaN, unused entries of the page table are out of range or point at pages
of NaN or of another sequence.

Shapes are padded to a few sizes, as an engine does, so that many cases share one compiled program.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxlike.kernels.paged_attention import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One ragged batch. `rows` holds, for each sequence, (tokens in the cache, new tokens of this step)."""

    name: str
    rows: tuple[tuple[int, int], ...]
    exact: bool = False  # no padding: T, S and M are just what the rows need
    n_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    lanes: int | None = None  # width of a slot; None: 2 * head_dim
    layers: int = 1
    layer: int = 0
    scale: float | None = None  # None: head_dim ** -0.5
    sliding_window: int | None = None
    soft_cap: float | None = None
    dtype: str = "float32"
    cache_dtype: str = "float32"

    def options(self) -> dict[str, Any]:
        """The static keyword arguments of the call."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return dict(scale=scale, sliding_window=self.sliding_window, soft_cap=self.soft_cap)


DECODE = ((37, 1), (5, 1), (150, 1), (0, 1))
PREFILL = ((0, 70), (0, 13), (0, 2))
TOKEN_BUCKETS = (8, 128, 512)
MIXED = ((40, 1), (0, 33), (64, 20), (15, 1), (300, 5))

CASES = (
    Case("decode", DECODE),
    Case("decode_exact", DECODE, exact=True),
    Case("decode_one_sequence", ((50, 1),)),
    Case("decode_one_token", ((50, 1),), exact=True),
    Case("decode_one_long_many_short", ((900, 1), *7 * ((9, 1),))),
    Case("decode_at_page_boundaries", ((15, 1), (16, 1), (17, 1), (31, 1), (255, 1), (256, 1), (257, 1))),
    Case("decode_empty_rows", ((9, 0), (40, 1), (0, 0), (0, 0), (150, 1), (77, 0))),
    Case("prefill", PREFILL),
    Case("prefill_long", ((0, 300),)),
    Case("prefill_tile_boundaries", ((0, 63), (0, 64), (0, 65), (0, 128))),
    Case("prefill_few_tokens", ((0, 5), (30, 2), (90, 1))),
    Case("chunk", ((130, 70), (16, 16), (7, 9))),
    Case("chunk_after_long_cache", ((900, 100), (448, 20))),
    Case("mixed", MIXED),
    Case("mixed_empty_rows", ((8, 0), (40, 1), (0, 33), (12, 0), (3, 1), (70, 3), (0, 0))),
    Case("nothing", ((4, 0), (0, 0))),
    Case("no_tokens_at_all", ((0, 0),)),
    Case("last_layer", MIXED, layers=3, layer=2),
    Case("middle_layer_decode", DECODE, layers=3, layer=1),
    Case("window_mixed", MIXED, sliding_window=33),
    Case("window_shorter_than_chunk", ((20, 60), (0, 40)), sliding_window=33),
    Case("window_longer_than_chunk", ((400, 20), (90, 20)), sliding_window=33),
    Case("window_decode", ((700, 1), (32, 1), (33, 1), (34, 1)), sliding_window=33),
    Case("window_over_blocks", ((900, 20), (600, 1), (0, 80)), sliding_window=400),
    Case("window_of_one", MIXED, sliding_window=1),
    Case("soft_cap_one_head", MIXED, soft_cap=2.0, scale=1.0, n_heads=1, kv_heads=1),
    Case("soft_cap_and_window", MIXED, soft_cap=5.0, scale=0.5, sliding_window=40),
    Case("page_8", MIXED, page_size=8),
    Case("page_32_three_kv_heads_exact", MIXED, page_size=32, n_heads=9, kv_heads=3, exact=True),
    Case("page_64_heads_equal", MIXED, page_size=64, n_heads=3, kv_heads=3),
    Case("page_128_head_width_128", MIXED, page_size=128, head_dim=128),
    Case("page_256_multi_query", MIXED, page_size=256, n_heads=8, kv_heads=1),
    Case("group_of_8", MIXED, n_heads=16, kv_heads=2),
    Case("head_width_80", MIXED, head_dim=80, n_heads=6),
    Case("head_width_256", DECODE, head_dim=256, kv_heads=1),
    Case("lane_padding", MIXED, head_dim=80, lanes=256),
    Case("bfloat16", MIXED, dtype="bfloat16", cache_dtype="bfloat16"),
    Case("bfloat16_lane_padding", MIXED, dtype="bfloat16", cache_dtype="bfloat16", head_dim=16, lanes=128),
    Case("bfloat16_float32_cache", MIXED, dtype="bfloat16"),
    Case("float32_bfloat16_cache", MIXED, cache_dtype="bfloat16"),
)


def make_inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """The array arguments of a case, by name. Pass `**case.options()` beside them."""
    rng = np.random.default_rng(seed)
    size, head_dim = case.page_size, case.head_dim
    lanes = 2 * head_dim if case.lanes is None else case.lanes
    rows = case.rows if case.exact else case.rows + (-len(case.rows) % 8) * ((0, 0),)
    cached, new = (np.array(column) for column in zip(*rows, strict=True))
    used = -(-(cached + new) // size)  # pages
    n_tokens, table_width = int(new.sum()), max(1, int(used.max()))
    T = n_tokens
    if not case.exact:
        T = next(bucket for bucket in TOKEN_BUCKETS if bucket >= n_tokens)
        table_width = -(-table_width // 64) * 64
    slots = (int(used.sum()) + 1) * size * case.layers
    n_rows = -(-slots // 4096) * 4096 // size
    pages_per_layer = n_rows // case.layers

    pages = np.full((n_rows, case.kv_heads, size, lanes), np.nan, np.float32)
    pool = rng.permutation(pages_per_layer)
    # Entries past a sequence's pages: wild numbers, and pages that hold NaN or belong to another sequence.
    garbage = np.concatenate([pool, [-1, -1000, n_rows, 2**30]])
    page_table = rng.choice(garbage, (len(rows), table_width))
    taken = 0
    for s in range(len(rows)):
        own = pool[taken : taken + used[s]]
        taken += used[s]
        oldest = 0  # pages that a window has left behind are garbage too
        if case.sliding_window is not None:
            oldest = max(0, cached[s] - case.sliding_window + 1) // size
        page_table[s, oldest : used[s]] = own[oldest:]
        for position in range(oldest * size, cached[s]):
            row = case.layer * pages_per_layer + own[position // size]
            pages[row, :, position % size, : 2 * head_dim] = rng.standard_normal((case.kv_heads, 2 * head_dim))

    q, k, v = (rng.standard_normal((T, n, head_dim)) for n in (case.n_heads, case.kv_heads, case.kv_heads))
    for x in (q, k, v):
        x[n_tokens:] = np.nan
    dtype, cache_dtype = jnp.dtype(case.dtype), jnp.dtype(case.cache_dtype)
    return dict(
        q=q.astype(dtype),
        k=k.astype(dtype),
        v=v.astype(dtype),
        pages=pages.astype(cache_dtype),
        cache_lengths=cached.astype(np.int32),
        page_table=page_table.astype(np.int32),
        row_offsets=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        first_page=np.int32(case.layer * pages_per_layer),
    )


def check(case: Case, inputs: dict[str, Any], out: Any, pages: Any) -> None:
    """Raises `AssertionError` unless `out` and `pages` are what the reference makes of the inputs.

    Largest error allowed: 2e-5 in float32; 2e-2 where anything is bfloat16 (values are of order 1: one rounding of
    the weights and one of the output). Written slots hold exactly the step's K and V (unused lanes may hold
    anything), all others exactly what they held.
    """
    want, want_pages = reference.ragged_paged_attention(**inputs, **case.options())
    assert out.shape == inputs["q"].shape and out.dtype == inputs["q"].dtype, (out.shape, out.dtype)
    out, pages = np.asarray(out, np.float32), np.asarray(pages, np.float32)
    tolerance = 2e-5 if case.dtype == case.cache_dtype == "float32" else 2e-2
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerance)

    want_pages, before = want_pages.astype(np.float32), inputs["pages"].astype(np.float32)
    used = 2 * case.head_dim
    np.testing.assert_array_equal(pages[..., :used], want_pages[..., :used])
    written = np.any((want_pages != before) & ~(np.isnan(want_pages) & np.isnan(before)), axis=-1)
    np.testing.assert_array_equal(pages[~written], before[~written])
