"""The model that a run trains: from a checkpoint, or from nothing but its description; with adapters or whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from maxlike.mesh import make_mesh
from maxlike.models.build import build_model
from maxlike.models.checkpoint import load_model
from maxlike.models.config import TransformerConfig
from maxlike.models.hub import resolve
from maxlike.models.peft import add_adapter
from maxlike.models.registry import parse_config
from maxlike.nn.lora import is_lora
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.train.config import MeshConfig, TrainConfig


@dataclass(frozen=True)
class Trainee:
    """A model and where it comes from.

    Args:
        folder: with `config.json` and tokenizer.
        model: its trained parameters in float32, frozen ones in the dtype that the step computes in. They may be
            shapes alone.
        lora: its adapters alone are trained.
    """

    folder: Path
    config: TransformerConfig
    model: DistributedTransformer
    lora: bool

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return not self.lora or is_lora(name)


def mesh_of(config: MeshConfig, model: TransformerConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`; by default over all of all processes.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or do not fit the model.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp
    if fsdp is None:
        fsdp = max(1, len(devices) // max(1, config.data * config.model))
    if min(config.data, fsdp, config.model) < 1 or config.data * fsdp * config.model != len(devices):
        raise ValueError(f"A mesh of data {config.data} x fsdp {fsdp} x model {config.model} does not use the "
                         f"{len(devices)} devices ({devices[0].platform}) that there are; the product must be their "
                         "number.")
    return make_mesh(devices, data=config.data, fsdp=fsdp, n_heads=model.num_attention_heads,
                     n_kv_heads=model.num_key_value_heads, intermediate_size=model.intermediate_size)


def load_trainee(config: TrainConfig, mesh: Mesh, *, restored: bool) -> Trainee:
    """The model of a run, on `mesh`.

    Args:
        restored: what is trained will come from a checkpoint of the run, so that shapes alone will do here.

    Raises:
        ValueError: the checkpoint is not there or not whole, or does not fit the mesh or the adapters.
    """
    folder = resolve(config.model.path)
    described, _ = parse_config(folder)
    # Frozen weights are never added to, so they need no more precision than they are multiplied in.
    dtype = "float32" if config.lora is None else config.step.dtype

    def build() -> DistributedTransformer:
        return build_model(described, devices=mesh, dtype=dtype, use_subgraphs=config.model.scan_layers,
                           rngs=nnx.Rngs(config.seed))

    if restored and config.lora is None:
        model = nnx.eval_shape(build)
    elif config.model.from_scratch:
        model = build()
    else:
        model = load_model(described, folder, devices=mesh, dtype=dtype, use_subgraphs=config.model.scan_layers)
    if config.lora is not None:
        add_adapter(model, described, config.lora, nnx.Rngs(config.seed))
    return Trainee(folder, described, model, config.lora is not None)
