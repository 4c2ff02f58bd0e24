"""What a training step is given."""

from dataclasses import dataclass

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed sequences, cut into R shards of the same number of tokens (T is a multiple of R); a pytree.

    Args:
        tokens: `int32[T]`, always full size; padding is 0, behind each shard's last offset.
        targets: `int32[T]`, the next token of the same sequence; 0 where there is none.
        weights: `float32[T]`, of each target in the loss; 0 for padding, prompts and the last token of a sequence.
        row_offsets: `int32[R, S + 1]`: tokens `[o[s], o[s + 1])` of a shard are its sequence s, counted from the
            shard's first token. Sequences that are not there are empty, and stand last.
    """

    tokens: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array
    row_offsets: np.ndarray | jax.Array
