"""Causal attention over a ragged batch without a cache: for training and scoring.

`maxlike.kernels.ragged_attention.api` has the contract, `maxlike.kernels.ragged_attention.xla` the blocks.
"""

from maxlike.kernels.ragged_attention.api import ragged_attention
from maxlike.kernels.ragged_attention.xla import SAVED

__all__ = ["SAVED", "ragged_attention"]
