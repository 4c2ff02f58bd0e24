"""Ragged paged attention in plain numpy: slow, and simple enough to be believed by reading it."""

import numpy as np

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # what a quantised cache stores at most, by its dtype


def quantise(x: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """What a cache of `dtype` stores of x [K, H], float32[K] scales: the nearest to x / scale, of two the even one."""
    if dtype.name not in LARGEST:
        return x.astype(dtype)
    x = x.astype(np.float32)
    if scale is not None:
        x = x / scale[:, None]
    x = np.clip(x, -LARGEST[dtype.name], LARGEST[dtype.name])
    return (np.round(x) if dtype == np.int8 else x).astype(dtype)


def ragged_paged_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pages: np.ndarray,
    cache_lengths: np.ndarray,
    page_table: np.ndarray,
    row_offsets: np.ndarray,
    *,
    first_page: int = 0,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `maxlike.kernels.paged_attention.ragged_paged_attention`, as numpy arrays.

    Returns the output as float32[T, N, H], not rounded to `q.dtype`, and a copy of `pages` with the step written.
    """
    n_heads, head_dim = q.shape[1:]
    group = n_heads // k.shape[1]
    page_size = pages.shape[2]
    pages = pages.copy()
    out = np.zeros(q.shape, np.float32)

    for s in range(len(cache_lengths)):
        begin, end = row_offsets[s], row_offsets[s + 1]

        def place(position: int, s: int = s) -> tuple[int, int]:
            return first_page + page_table[s, position // page_size], position % page_size

        for token in range(begin, end):
            row, slot = place(cache_lengths[s] + token - begin)
            pages[row, :, slot, :head_dim] = quantise(k[token], k_scale, pages.dtype)
            pages[row, :, slot, head_dim : 2 * head_dim] = quantise(v[token], v_scale, pages.dtype)

        for token in range(begin, end):
            position = cache_lengths[s] + token - begin
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            slots = [pages[row, :, slot] for row, slot in map(place, range(first, position + 1))]
            seen = np.stack(slots, axis=1).astype(np.float32)  # [K, positions, W]
            for n in range(n_heads):
                head = n // group
                keys, values = seen[head, :, :head_dim], seen[head, :, head_dim : 2 * head_dim]
                if k_scale is not None and v_scale is not None:
                    keys, values = keys * k_scale[head], values * v_scale[head]
                scores = scale * keys @ q[token, n].astype(np.float32)
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = -np.inf if sinks is None else sinks[n]  # a score with nothing behind it
                largest = max(scores.max(), sink)
                weights = np.exp(scores - largest)
                out[token, n] = weights / (weights.sum() + np.exp(sink - largest)) @ values

    return out, pages
