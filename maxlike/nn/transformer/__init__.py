"""The decoder-only transformer and the scanned segments that its layers become.

`maxlike.nn.transformer.distributed_transformer` has the names here; `maxlike.nn.transformer.segments` says how groups
of like layers are scanned.
"""

from maxlike.nn.transformer.distributed_transformer import (
    DistributedTransformer,
    DistributedTransformerBlock,
    ReturnLogits,
    ShardableCallable,
    distribute_value,
    forward_sharded_layers,
    take,
)

__all__ = [
    "DistributedTransformer",
    "DistributedTransformerBlock",
    "ReturnLogits",
    "ShardableCallable",
    "distribute_value",
    "forward_sharded_layers",
    "take",
]
