"""A step's numbers as the compiled programs take them: one array of int32 a program, padded to a bucket."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.engine.sampling import Rows
from maxlike.engine.scheduler import Step


def bucket_for(n: int, buckets: list[int]) -> int:
    """The smallest bucket that holds `n`."""
    return buckets[bisect_left(buckets, n)]


@dataclass(frozen=True)
class ForwardLayout:
    """Where things lie in a forward program's input: tokens, row offsets, cache lengths, page table, end to end.

    One array is one transfer. A token below zero is the one last drawn in slot `-1 - token`, which only the device
    knows yet.

    Args:
        n_tokens, n_sequences, n_pages: T, S and M of the program.
    """

    n_tokens: int
    n_sequences: int
    n_pages: int

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return self.n_tokens + self.n_sequences * (2 + self.n_pages) + 1

    def parts(self, packed: np.ndarray | jax.Array) -> tuple[np.ndarray | jax.Array, ...]:
        """`tokens [T], row_offsets [S + 1], cache_lengths [S], page_table [S, M]`; of numpy arrays, views."""
        offsets = self.n_tokens
        lengths = offsets + self.n_sequences + 1
        table = lengths + self.n_sequences
        return (packed[:offsets], packed[offsets:lengths], packed[lengths:table],
                packed[table:].reshape(self.n_sequences, self.n_pages))

    def pack(self, step: Step, page_table: np.ndarray) -> np.ndarray:
        """The input for a step: `int32[size]`, a new array each time, since a device may read it later.

        Args:
            page_table: `int32[slots, M]`, the scheduler's.
        """
        packed = np.zeros(self.size, np.int32)
        tokens, offsets, lengths, table = self.parts(packed)
        n, n_decode = len(step.requests), step.n_decode
        offsets[1:n + 1] = np.cumsum(step.n_new)
        offsets[n + 1:] = offsets[n]
        lengths[:n] = step.starts
        table[:n] = page_table[step.slots]
        tokens[:n_decode] = -1 - step.slots[:n_decode]
        for row in range(n_decode, n):
            start = step.starts[row]
            tokens[offsets[row]:offsets[row + 1]] = step.requests[row].token_ids[start:start + step.n_new[row]]
        return packed


ROW_FIELDS = ("top_k", "seed_high", "seed_low", "edited", "masked", "logprobs", "temperature", "top_p", "min_p",
              "repetition", "frequency", "presence")
"""What a slot's request says of drawing, by the names of `sampling.Rows`, one int32 each; the last six hold the bits
of a float32."""
_N_INTEGERS = 6


class SlotParams:
    """What the requests in the slots say of drawing, kept as rows of int32 so that a batch takes them by slot."""

    def __init__(self, n_slots: int):
        self.rows = np.zeros((n_slots, len(ROW_FIELDS)), np.int32)
        self.n_prompt = np.zeros(n_slots, np.int32)
        self.full = np.zeros(n_slots, bool)
        """Whether the request in a slot asks for more than its likeliest tokens."""

    def set(self, slot: int, *, n_prompt: int, full: bool, integers: tuple[int, ...],
            floats: tuple[float, ...]) -> None:
        """A request has entered a slot; values in the order of `ROW_FIELDS`."""
        self.n_prompt[slot], self.full[slot] = n_prompt, full
        self.rows[slot, :_N_INTEGERS] = np.array(integers, np.int64).astype(np.uint32).view(np.int32)
        self.rows[slot, _N_INTEGERS:] = np.array(floats, np.float32).view(np.int32)


def pack_rows(rows: np.ndarray, slots: np.ndarray, bucket: int, n_slots: int) -> np.ndarray:
    """`int32[2, bucket]`: where the rows lie among the step's sequences, and their slots, `n_slots` for padding."""
    packed = np.zeros((2, bucket), np.int32)
    packed[0, :len(rows)] = rows
    packed[1, :len(rows)] = slots
    packed[1, len(rows):] = n_slots
    return packed


def pack_drawing(params: SlotParams, slots: np.ndarray, draws: np.ndarray, bucket: int) -> np.ndarray:
    """`int32[bucket, 1 + len(ROW_FIELDS)]`: each row's number of the draw, then what its request says.

    Args:
        params: of all slots.
        slots, draws: `int32[R]`, R at most `bucket`: each row's slot, and which of its output tokens is drawn.
        bucket: rows of the program.
    """
    packed = np.zeros((bucket, 1 + len(ROW_FIELDS)), np.int32)
    packed[:len(slots), 0] = draws
    packed[:len(slots), 1:] = params.rows[slots]
    return packed


def unpack_rows(packed: jax.Array, slots: jax.Array, n_slots: int) -> Rows:
    """What `pack_drawing` has packed.

    Args:
        packed: `int32[R, 1 + len(ROW_FIELDS)]`.
        slots: `int32[R]`, each row's slot; `n_slots` for padding.
        n_slots: as many as there are.
    """
    columns = dict(zip(("draw", *ROW_FIELDS), packed.T, strict=True))
    for name in ROW_FIELDS[_N_INTEGERS:]:
        columns[name] = jax.lax.bitcast_convert_type(columns[name], jnp.float32)
    flags = {name: columns.pop(name) != 0 for name in ("edited", "masked", "logprobs")}
    seed = jnp.stack([columns.pop("seed_high"), columns.pop("seed_low")], axis=-1).astype(jnp.uint32)
    return Rows(slots=slots, live=slots < n_slots, seed=seed, **flags, **columns)
