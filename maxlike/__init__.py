"""maxlike: a sharded decoder-only transformer for JAX, from a laptop to a TPU slice."""

from maxlike.mesh import DeviceRef, ShardingRules, make_mesh
from maxlike.models.checkpoint import load
from maxlike.nn.kv_cache import calibrate
from maxlike.nn.transformer.distributed_transformer import ReturnLogits

__version__ = "0.1.0"
__all__ = ["DeviceRef", "ReturnLogits", "ShardingRules", "calibrate", "load", "make_mesh"]
