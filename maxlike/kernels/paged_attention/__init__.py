"""Attention of a ragged batch over a paged KV cache, the step's own K and V written on the way.

`maxlike.kernels.paged_attention.api` has the contract and the choice; behind it stand
`maxlike.kernels.paged_attention.xla`, `maxlike.kernels.paged_attention.mosaic_tpu` and
`maxlike.kernels.paged_attention.mosaic_gpu`. `maxlike.kernels.paged_attention.cases` and
`maxlike.kernels.paged_attention.reference` test them all.
"""

from typing import Any

from maxlike.kernels.paged_attention.api import (
    FLOATS,
    IMPLEMENTATIONS,
    Implementation,
    check_implementation,
    choose_implementation,
    implementation_named,
    ragged_paged_attention,
)
from maxlike.kernels.paged_attention.mosaic_tpu import MosaicTpu
from maxlike.kernels.paged_attention.xla import LARGEST, Xla

__all__ = [
    "FLOATS",
    "IMPLEMENTATIONS",
    "LARGEST",
    "Implementation",
    "MosaicGpu",
    "MosaicTpu",
    "Xla",
    "check_implementation",
    "choose_implementation",
    "implementation_named",
    "ragged_paged_attention",
]


def __getattr__(name: str) -> Any:
    # jax's Mosaic GPU sets environment variables when it is imported: only for those who ask for it.
    if name == "MosaicGpu":
        from maxlike.kernels.paged_attention.mosaic_gpu import MosaicGpu

        return MosaicGpu
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
