"""Sequences into batches of one size: which go together, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maxlike.train.batch import Batch


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: its tokens `int32[n]` and `weights float32[n]`, whether each is learned (as a target)."""

    tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


Group = tuple[Example, ...]
"""Sequences that stay together, in one shard and in this order: one, or what was chosen and what was rejected."""


def choose(lengths: Sequence[int], room: int, places: int) -> list[int]:
    """Which of the waiting sequences fill a shard next: indices into `lengths`, in their order.

    The first is always taken, so that none waits for ever; of the others the longest that still fits, again and again
    (first-fit-decreasing with one bin at a time; ties go to the earlier one).

    Args:
        lengths: tokens of each, in order of arrival; none is more than `room`.
        room: tokens of the shard.
        places: how many may be taken.
    """
    if not lengths or places < 1:
        return []
    assert lengths[0] <= room, (lengths[0], room)
    taken = [0]
    room -= lengths[0]
    for i in sorted(range(1, len(lengths)), key=lambda i: -lengths[i]):
        if len(taken) == places or room <= 0:
            break
        if lengths[i] <= room:
            taken.append(i)
            room -= lengths[i]
    return sorted(taken)


def pack(shards: Sequence[Sequence[Group]], tokens_per_shard: int, max_seqs: int) -> Batch:
    """A batch of these sequences: `int32[R * tokens_per_shard]` and `row_offsets int32[R, max_seqs + 1]`.

    `shards[r]` are the groups of shard r, whose sequences must fit: at most `max_seqs` of them, and `tokens_per_shard`
    tokens together.
    """
    shape = len(shards), tokens_per_shard
    tokens, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    offsets = np.zeros((len(shards), max_seqs + 1), np.int32)
    for r, groups in enumerate(shards):
        start = s = 0
        for example in (example for group in groups for example in group):
            end = start + len(example)
            assert end <= tokens_per_shard and s < max_seqs, (end, tokens_per_shard, s, max_seqs)
            tokens[r, start:end] = example.tokens
            targets[r, start : end - 1] = example.tokens[1:]
            weights[r, start : end - 1] = example.weights[1:]
            start, s = end, s + 1
            offsets[r, s] = start
        offsets[r, s:] = start
    return Batch(tokens.reshape(-1), targets.reshape(-1), weights.reshape(-1), offsets)
