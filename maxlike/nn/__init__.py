"""Layers: Flax NNX modules whose parameters carry their partition specs.

The modules behind the names here, each with more in it: `maxlike.nn.linear`, `maxlike.nn.embedding`,
`maxlike.nn.norm`, `maxlike.nn.rotary_embedding`, `maxlike.nn.attention`, `maxlike.nn.mlp`, `maxlike.nn.kv_cache`,
`maxlike.nn.lora`, and `maxlike.nn.module`, what they have in common. `maxlike.nn.transformer` puts them together.
"""

from maxlike.mesh import DeviceRef
from maxlike.nn.attention import AttentionMetadata, AttentionWithRope
from maxlike.nn.embedding import VocabParallelEmbedding
from maxlike.nn.kv_cache import KVCacheParams, KVCacheStrategy, KVScales
from maxlike.nn.linear import ColumnParallelLinear, DistributedGemmConfig, RowParallelLinear
from maxlike.nn.lora import LoraConfig, add_lora, merge_lora
from maxlike.nn.mlp import MLP
from maxlike.nn.norm import OutputNorm, RMSNorm
from maxlike.nn.rotary_embedding import LinearScaling, Llama3Scaling, RotaryEmbedding, YarnScaling
from maxlike.nn.transformer import ReturnLogits

__all__ = [
    "MLP",
    "AttentionMetadata",
    "AttentionWithRope",
    "ColumnParallelLinear",
    "DeviceRef",
    "DistributedGemmConfig",
    "KVCacheParams",
    "KVCacheStrategy",
    "KVScales",
    "LinearScaling",
    "Llama3Scaling",
    "LoraConfig",
    "OutputNorm",
    "RMSNorm",
    "ReturnLogits",
    "RotaryEmbedding",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "YarnScaling",
    "add_lora",
    "merge_lora",
]
