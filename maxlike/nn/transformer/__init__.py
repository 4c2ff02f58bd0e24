"""The decoder-only transformer and the scanned segments that its layers become."""

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
