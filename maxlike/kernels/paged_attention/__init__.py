"""Attention of a ragged batch over a paged KV cache, the step's own K and V written on the way."""

from maxlike.kernels.paged_attention.api import (
    FLOATS,
    Implementation,
    choose_implementation,
    ragged_paged_attention,
)
from maxlike.kernels.paged_attention.mosaic_tpu import MosaicTpu
from maxlike.kernels.paged_attention.xla import LARGEST, Xla

__all__ = [
    "FLOATS",
    "LARGEST",
    "Implementation",
    "MosaicTpu",
    "Xla",
    "choose_implementation",
    "ragged_paged_attention",
]
