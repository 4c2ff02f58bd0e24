"""The cases that every implementation of ragged paged attention must pass, and their inputs.

Tests and benchmarks share this list. Whatever an implementation must not look at is poisoned: padding tokens, unused
pages, unused slots and unused lanes hold NaN (int8 has none: -128, which no cache stores), unused entries of the page
table are out of range or point at pages of NaN or of another sequence.

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
    sinks: bool = False
    dtype: str = "float32"
    cache_dtype: str = "float32"
    scales: bool | None = None  # None: where the cache is quantised

    def options(self) -> dict[str, Any]:
        """The static keyword arguments of the call."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return dict(scale=scale, sliding_window=self.sliding_window, soft_cap=self.soft_cap)


DECODE = ((37, 1), (5, 1), (150, 1), (0, 1))
BF16: dict[str, Any] = dict(dtype="bfloat16", cache_dtype="bfloat16")
INT8: dict[str, Any] = dict(cache_dtype="int8")
FP8: dict[str, Any] = dict(cache_dtype="float8_e4m3fn")
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
    Case("head_width_96", MIXED, head_dim=96),
    Case("head_width_256_group_of_4", MIXED, head_dim=256, n_heads=4, kv_heads=1),
    Case("page_48_group_of_6", MIXED, page_size=48, n_heads=12, kv_heads=2),
    Case("group_of_16", DECODE, n_heads=16, kv_heads=1),
    Case("group_of_64", MIXED, n_heads=64, kv_heads=1),
    Case("bfloat16_decode", DECODE, **BF16),
    Case("bfloat16_head_width_128", MIXED, **BF16, head_dim=128, page_size=64, n_heads=16),
    Case("bfloat16_head_width_80", MIXED, **BF16, head_dim=80, lanes=256),
    Case("bfloat16_head_width_96", MIXED, **BF16, head_dim=96, lanes=256, page_size=48),
    Case("bfloat16_head_width_256_page_256", MIXED, **BF16, head_dim=256, page_size=256, soft_cap=5.0),
    Case("bfloat16_group_of_64", MIXED, **BF16, n_heads=64, kv_heads=1, page_size=128),
    Case("bfloat16_page_32_group_of_6", ((0, 70), (333, 1), (45, 3)), **BF16, page_size=32, n_heads=6, kv_heads=1),
    Case("sinks", MIXED, sinks=True),
    Case("sinks_decode", DECODE, sinks=True, layers=3, layer=2),
    Case("sinks_window_and_cap", MIXED, sinks=True, sliding_window=33, soft_cap=5.0, scale=0.5),
    Case("sinks_bfloat16_window_group_of_8", MIXED, **BF16, sinks=True, sliding_window=128, n_heads=16),
    Case("int8", MIXED, **INT8),
    Case("int8_decode", DECODE, **INT8, layers=3, layer=1),
    Case("int8_lane_padding", MIXED, **INT8, head_dim=80, lanes=256, page_size=32),
    Case("int8_lane_padding_decode", DECODE, **INT8, head_dim=96, lanes=256, page_size=48),
    Case("int8_sinks_window_and_cap", MIXED, **INT8, sinks=True, sliding_window=33, soft_cap=5.0, scale=0.5),
    Case("int8_bfloat16", MIXED, **INT8, dtype="bfloat16", head_dim=128, page_size=64, n_heads=16),
    Case("int8_bfloat16_decode", DECODE, **INT8, dtype="bfloat16", page_size=128),
    Case("float8", MIXED, **FP8),
    Case("float8_decode", DECODE, **FP8, layers=3, layer=1),
    Case("float8_no_scales", MIXED, **FP8, scales=False),
    Case("float8_lane_padding", MIXED, **FP8, head_dim=80, lanes=256, page_size=32),
    Case("float8_lane_padding_decode", DECODE, **FP8, head_dim=96, lanes=256, page_size=48),
    Case("float8_sinks_window_and_cap", MIXED, **FP8, sinks=True, sliding_window=33, soft_cap=5.0, scale=0.5),
    Case("float8_bfloat16", MIXED, **FP8, dtype="bfloat16", head_dim=128, page_size=64, n_heads=16),
    Case("float8_bfloat16_decode", DECODE, **FP8, dtype="bfloat16", page_size=128),
)


# Batches to time, as `Case.rows`: a few for a CPU; on an accelerator single tokens and whole prompts of many sizes.
BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "1 decode at 2000": ((2000, 1),),
    "8 decodes at 50": ((50, 1),) * 8,
    "8 decodes at 2000": ((2000, 1),) * 8,
    "prefill of 512": ((0, 512),),
    "mixed: 7 decodes at 2000, a chunk of 128 at 512": ((2000, 1),) * 7 + ((512, 128),),
}
ACCELERATOR_BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    f"{n} decodes at {length - 1}": ((length - 1, 1),) * n
    for n in (1, 4, 16, 64, 256)
    for length in (1024, 4096, 8192, 32768)
    if n * length <= 2**21  # 8 GiB of bfloat16 with 8 KV heads of 128
} | {f"prefill of {n}": ((0, n),) for n in (512, 1024, 2048, 4096, 8192)}


def make_inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """The array arguments of a case, by name. Pass `**case.options()` beside them.

    A quantised case has one right answer for each slot, whatever the last bits of a division are: the first KV head's
    scales are powers of two, and its quotients often ties and beyond the range; no other head has a near tie.
    """
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

    dtype, cache_dtype = jnp.dtype(case.dtype), jnp.dtype(case.cache_dtype)
    quantised = cache_dtype.name in reference.LARGEST
    k_scale = v_scale = None
    if quantised if case.scales is None else case.scales:
        k_scale, v_scale = _scales(rng, case.kv_heads, cache_dtype), _scales(rng, case.kv_heads, cache_dtype)

    poison = -128 if cache_dtype == np.int8 else np.nan
    pages = np.full((n_rows, case.kv_heads, size, lanes), poison, cache_dtype)
    pool = rng.permutation(pages_per_layer)
    # Entries past a sequence's pages: wild numbers, and pages that hold NaN or belong to another sequence.
    garbage = np.concatenate([pool, [-1, -1000, n_rows, 2**30]])
    page_table = rng.choice(garbage, (len(rows), table_width))
    taken = 0
    for s in range(len(rows)):
        own = pool[taken : taken + used[s]]
        taken += used[s]
        first = 0  # pages that a window has left behind are garbage too, and slots of the oldest page poisoned
        if case.sliding_window is not None:
            first = max(0, cached[s] - case.sliding_window + 1)
        page_table[s, first // size : used[s]] = own[first // size :]
        for position in range(first, cached[s]):
            row = case.layer * pages_per_layer + own[position // size]
            slot = pages[row, :, position % size]
            for x, scale in ((slot[:, :head_dim], k_scale), (slot[:, head_dim : 2 * head_dim], v_scale)):
                x[:] = reference.quantise(rng.standard_normal(x.shape), scale, cache_dtype)

    q, k, v = (rng.standard_normal((T, n, head_dim)).astype(dtype) for n in (case.n_heads, *2 * [case.kv_heads]))
    if quantised:
        k, v = _off_ties(k, k_scale, cache_dtype), _off_ties(v, v_scale, cache_dtype)
    for x in (q, k, v):
        x[n_tokens:] = np.nan
    return dict(
        q=q,
        k=k,
        v=v,
        pages=pages,
        cache_lengths=cached.astype(np.int32),
        page_table=page_table.astype(np.int32),
        row_offsets=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        first_page=np.int32(case.layer * pages_per_layer),
        sinks=(2 * rng.standard_normal(case.n_heads)).astype(np.float32) if case.sinks else None,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _scales(rng: np.random.Generator, kv_heads: int, cache_dtype: np.dtype) -> np.ndarray:
    """float32[K] with which values of order 1 fill the range, the first a power of two."""
    full = 4 / reference.LARGEST[cache_dtype.name]
    scales = full * rng.uniform(0.5, 2.0, kv_heads)
    scales[0] = 2.0 ** np.round(np.log2(full))
    return scales.astype(np.float32)


def _off_ties(x: np.ndarray, scale: np.ndarray | None, cache_dtype: np.dtype) -> np.ndarray:
    """x [T, K, H] with zeros for near ties, and ties and values beyond the range in the first token's first head."""
    x = x.copy()
    if scale is None:
        scale = np.ones(x.shape[1], np.float32)
    for token in x[:, 1:]:
        less, more = (reference.quantise(token, np.float32(f) * scale[1:], cache_dtype) for f in (1 - 1e-5, 1 + 1e-5))
        token[less.astype(np.float32) != more.astype(np.float32)] = 0
    i = np.arange(len(x[0, 0, ::2]))
    # Between 16 and 32 float8_e4m3fn has the even numbers.
    ties = i // 2 - 5.5 if cache_dtype == np.int8 else 17.0 + 2 * (i // 2 % 8)
    x[0, 0, ::2] = scale[0] * np.where(i % 2, ties, 1000.0 * (-1.0) ** (i // 2))
    return x


def check(case: Case, inputs: dict[str, Any], out: Any, pages: Any) -> None:
    """Raises `AssertionError` unless `out` and `pages` are what the reference makes of the inputs.

    Largest error allowed: 2e-5 where q is float32, whatever the cache is (products are of the common dtype; the
    reference reads the same quantised slots); where q is bfloat16, 2e-2 of the largest |output| of the case (one
    rounding of the weights and one of the output). Written slots hold exactly the step's K and V, quantised ones to
    the bit (unused lanes may hold anything); all others exactly what they held.
    """
    want, want_pages = reference.ragged_paged_attention(**inputs, **case.options())
    assert out.shape == inputs["q"].shape and out.dtype == inputs["q"].dtype, (out.shape, out.dtype)
    out, pages = np.asarray(out, np.float32), np.asarray(pages, np.float32)
    tolerance = 2e-5 if case.dtype == "float32" else 2e-2 * np.abs(want).max()
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerance)

    want_pages, before = want_pages.astype(np.float32), inputs["pages"].astype(np.float32)
    used = 2 * case.head_dim
    np.testing.assert_array_equal(pages[..., :used], want_pages[..., :used])
    written = np.any((want_pages != before) & ~(np.isnan(want_pages) & np.isnan(before)), axis=-1)
    np.testing.assert_array_equal(pages[~written], before[~written])
