"""Attention of a ragged batch over a paged KV cache, the step's own K and V written on the way."""

from maxlike.kernels.paged_attention.api import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
