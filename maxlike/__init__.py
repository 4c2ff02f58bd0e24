"""maxlike: a sharded decoder-only transformer for JAX, from a laptop to a TPU slice.

What most programs need is on this page. Where the rest is:

- `maxlike.nn`: the layers; `maxlike.nn.transformer`: `DistributedTransformer` and its companions.
- `maxlike.models`: checkpoints, configurations, tokenizers, adapters.
- `maxlike.engine`: continuous batching, and its configuration (`maxlike.engine.config`).
- `maxlike.train`: fine-tuning; `maxlike.serve`: the HTTP server; `maxlike.bench`: the benchmarks.
- `maxlike.kernels`: attention over pages and without, and collective matmul.
- `maxlike.mesh`: devices, meshes, and which logical axis lies on which mesh axis.
- `maxlike.cli`: the command line.

Shapes are written with one letter a dimension: T tokens, S sequences, D model width, N query heads, K KV heads, H head
width, F MLP width, V vocabulary, P pages, L layers, R shards of a batch.
"""

from maxlike.engine.async_engine import AsyncEngine
from maxlike.engine.llm import LLM
from maxlike.engine.sampling_params import SamplingParams, StructuredOutput
from maxlike.mesh import DeviceRef, ShardingRules, make_mesh
from maxlike.models.checkpoint import load
from maxlike.nn.kv_cache import calibrate
from maxlike.nn.transformer.distributed_transformer import ReturnLogits

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "DeviceRef",
    "ReturnLogits",
    "SamplingParams",
    "ShardingRules",
    "StructuredOutput",
    "calibrate",
    "load",
    "make_mesh",
]
