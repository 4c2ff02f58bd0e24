"""Attention of a ragged batch over a paged KV cache, the step's own K and V written on the way."""

from maxlike.kernels.paged_attention.api import Implementation, default_implementation, ragged_paged_attention
from maxlike.kernels.paged_attention.xla import Xla

__all__ = ["Implementation", "Xla", "default_implementation", "ragged_paged_attention"]
