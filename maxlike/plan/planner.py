"""From a model's name to its plan."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from maxlike.models.config import TransformerConfig
from maxlike.models.hub import resolve_config
from maxlike.models.registry import parse_config_file
from maxlike.plan.arithmetic import KnownShapes
from maxlike.plan.chips import Topology, parse_topology
from maxlike.plan.options import Options, Serving, changed
from maxlike.plan.result import Plan
from maxlike.plan.serving import Asked, compile_serving, reckon_serving
from maxlike.plan.suggestions import suggestions
from maxlike.plan.training import AskedTraining, compile_training, reckon_training


def plan(model: str | os.PathLike[str] | TransformerConfig, topology: str, options: Options | None = None,
         **changes: Any) -> Plan:
    """What `model` takes on `topology`, and how fast it can be at most, from its `config.json` alone.

    For TPUs and CPUs the programs that the engine or the trainer would run are compiled; for GPUs it is arithmetic.
    The TPU's compiler is quiet on a machine without TPUs, and several processes may use it, where the environment has
    `TPU_SKIP_MDS_QUERY=1`, `TPU_WORKER_HOSTNAMES=localhost`, `TPU_ACCELERATOR_TYPE=v6e-4` and
    `ALLOW_MULTIPLE_LIBTPU_LOAD=1` before it is first used, as `maxlike plan` has it.

    Args:
        model: a folder, a `config.json`, a hub id, of which nothing else is downloaded; or what was read from one.
        topology: such as `"v5e:2x4"`, `"v5p:2x2x4"`, `"tpu7x:2x2x1"`, `"h200:8"` or `"cpu"`.
        options: `Serving()` or `Training()`; `None` is the first.
        changes: fields of `options` by name, and of `EngineConfig` where it is about serving, as `tp=8`,
            `cache_dtype="int8"`, `max_num_seqs=64`.

    Raises:
        ValueError: there is no such model or topology, an option is out of range or does not fit, or for a TPU libtpu
            is not installed. That it does not fit into memory is no error.
    """
    options = changed(options or Serving(), **changes)
    where = parse_topology(topology)
    name, config = described(model)
    if where.chip is None or where.chip.platform == "tpu":
        found = compiled(name, config, where, options)
    else:
        found = reckoned(name, config, where, options, KnownShapes(config))
    if found.fits:
        return found
    return replace(found, suggestions=tuple(suggestions(name, config, where, options, found)))


def described(model: str | os.PathLike[str] | TransformerConfig) -> tuple[str, TransformerConfig]:
    """What a model is called, and what it is."""
    if isinstance(model, TransformerConfig):
        return model.model_type, model
    return os.fspath(model), parse_config_file(resolve_config(model))[0]


def compiled(name: str, config: TransformerConfig, where: Topology, options: Options) -> Plan:
    """The plan by the compiler's reckoning, without suggestions."""
    if isinstance(options, Serving):
        return compile_serving(Asked(name, config, where, options))
    return compile_training(AskedTraining(name, config, where, options))


def reckoned(name: str, config: TransformerConfig, where: Topology, options: Options, shapes: KnownShapes) -> Plan:
    """The plan by arithmetic, without suggestions."""
    if isinstance(options, Serving):
        return reckon_serving(Asked(name, config, where, options), shapes)
    return reckon_training(AskedTraining(name, config, where, options), shapes)
