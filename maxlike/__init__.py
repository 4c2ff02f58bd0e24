"""maxlike: a sharded decoder-only transformer for JAX, from a laptop to a TPU slice."""

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
