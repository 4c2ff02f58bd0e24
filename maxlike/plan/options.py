"""What a plan is asked about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args

from maxlike.engine.config import EngineConfig
from maxlike.mesh import check_tensor_parallel_size, tensor_parallel_sizes
from maxlike.models.config import TransformerConfig
from maxlike.nn.kv_cache import as_cache_dtype
from maxlike.plan.chips import Topology
from maxlike.train.optimizer import OptimizerName
from maxlike.train.step import ComputeDtype, Remat, StepConfig

LONGEST_CONTEXT = 4096
"""Tokens that sequences are taken to have while they are decoded, where nothing is said and the model takes so many."""


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Args:
        tp: tensor-parallel size of a replica; as many of its devices as the model's heads allow.
        data: replicas, each on an equal part of the topology.
        dtype: of weights and activations, "float32" or "bfloat16"; the checkpoint's.
        cache_dtype: of the KV cache; `dtype`, float32 on CPU.
        context: tokens that each sequence has behind it in the decode step whose floor is worked out; 4,096, or what
            the model takes if that is less.
        engine: how large the engine is.

    Raises:
        ValueError: a number is below 1.
    """

    tp: int | None = None
    data: int = 1
    dtype: str | None = None
    cache_dtype: str | None = None
    context: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        _check_positive(self, "tp", "data", "context")
        if self.cache_dtype is not None:
            as_cache_dtype(self.cache_dtype)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        tp: tensor-parallel size; 1, and in a sweep each that there is.
        data: copies of everything, each with its part of a batch.
        fsdp: parts into which weights, optimizer and batch are cut; what the others leave.
        tokens_per_batch: over all devices; 4,096 for each part that a batch is cut into. A step takes `accumulation`
            batches.
        dtype: that is computed in; weights that are trained, and the optimizer, are float32.
        remat, accumulation: as `StepConfig` has them.
        optimizer: as `OptimizerConfig.name`.
        lora_rank: train adapters of this rank on all linear layers but the head, and nothing else.

    Raises:
        ValueError: a number is below 1, or a name is not known.
    """

    tp: int | None = None
    data: int = 1
    fsdp: int | None = None
    tokens_per_batch: int | None = None
    dtype: ComputeDtype = "bfloat16"
    remat: Remat = "full"
    accumulation: int = 1
    optimizer: OptimizerName = "adamw"
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "tp", "data", "fsdp", "tokens_per_batch", "lora_rank")
        self.step  # noqa: B018  refuses what is wrong with it
        if self.optimizer not in get_args(OptimizerName):
            raise ValueError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}; got {self.optimizer!r}.")

    @property
    def step(self) -> StepConfig:
        """The configuration of the step."""
        return StepConfig(self.dtype, self.remat, self.accumulation)

    def parts(self, n_devices: int) -> tuple[int, int]:
        """`(fsdp, parts that a batch is cut into)` on so many devices.

        Raises:
            ValueError: the sizes do not multiply to the devices, or the batch cannot be cut so.
        """
        tp = self.tp or 1
        fsdp = self.fsdp or max(1, n_devices // (self.data * tp))
        if self.data * fsdp * tp != n_devices:
            raise ValueError(f"data {self.data} x fsdp {fsdp} x tp {tp} does not use the {n_devices} devices; the "
                             "product must be their number.")
        parts = self.data * fsdp
        if self.tokens_per_batch is not None and self.tokens_per_batch % parts:
            raise ValueError(f"tokens_per_batch must be a multiple of the {parts} equal parts that data and fsdp make "
                             f"of it; got {self.tokens_per_batch}.")
        return fsdp, parts

    def tokens_per_part(self, n_devices: int) -> int:
        """Tokens of a part of a batch: those that a device works on at a time."""
        _, parts = self.parts(n_devices)
        return 4096 if self.tokens_per_batch is None else self.tokens_per_batch // parts


Options = Serving | Training


def replica_topologies(topology: Topology, options: Serving) -> list[Topology]:
    """The parts of a topology that a replica may have, the likeliest first.

    Raises:
        ValueError: it cannot be cut so.
    """
    if options.data == 1:
        return [topology]
    parts = topology.parts(options.data)
    if not parts:
        possible = [n for n in range(1, topology.n_chips + 1) if topology.parts(n)]
        raise ValueError(f"{topology.name} cannot be cut into {options.data} equal parts, one for each replica: --data "
                         f"may be {', '.join(map(str, possible))}.")
    return parts


def tensor_parallel_size(config: TransformerConfig, options: Serving, topology: Topology) -> int:
    """That of a replica on `topology`.

    Raises:
        ValueError: the model cannot be cut so, there are too few devices, or devices on several hosts would be idle.
    """
    heads, n_devices = _heads(config), topology.n_devices
    if options.tp is not None:
        check_heads(config, options.tp)
        if options.tp > n_devices:
            raise ValueError(f"tp {options.tp} was asked for; a replica has {n_devices} device{'s' * (n_devices > 1)}.")
    tp = options.tp or max(n for n in tensor_parallel_sizes(**heads) if n <= n_devices)
    if tp < n_devices and topology.several_hosts:
        why = "was asked for" if options.tp is not None else "is the most that the model's heads allow"
        raise ValueError(f"Over several hosts a mesh uses all of a slice's devices, here {n_devices}; tp {tp} {why}. "
                         "Give --data, so that replicas fill the slice, or a smaller slice.")
    return tp


def check_heads(config: TransformerConfig, tp: int) -> None:
    """Refuses a tensor-parallel size that a model cannot be cut into.

    Raises:
        ValueError: it is one; lists those that are not.
    """
    check_tensor_parallel_size(tp, **_heads(config))


def legal_sizes(config: TransformerConfig, most: int) -> list[int]:
    """Tensor-parallel sizes of a model, up to `most`, ascending."""
    return [n for n in tensor_parallel_sizes(**_heads(config)) if n <= most]


def _heads(config: TransformerConfig) -> dict[str, Any]:
    return dict(n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
                intermediate_size=config.intermediate_size)


def _check_positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")


def changed(options: Options, **changes: Any) -> Options:
    """`options` with other values; those of the engine's configuration are given beside its own.

    Raises:
        ValueError: there is no such option, or it is out of range.
    """
    own = {f.name for f in dataclasses.fields(options)}
    if isinstance(options, Serving):
        engine, changes = EngineConfig.from_options(options.engine, changes)
        changes = {"engine": engine, **changes}
    if unknown := [name for name in changes if name not in own]:
        raise ValueError(f"{type(options).__name__} has no option {unknown[0]}; it has {', '.join(sorted(own))}.")
    return dataclasses.replace(options, **changes)
