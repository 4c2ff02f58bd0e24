"""Causal attention over a ragged batch without a cache: for training and scoring."""

from maxlike.kernels.ragged_attention.api import ragged_attention

__all__ = ["ragged_attention"]
