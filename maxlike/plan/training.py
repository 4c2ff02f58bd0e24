"""A plan for training: the trainer's own step, compiled for devices that are not there; or reckoned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from maxlike.mesh import ShardingRules
from maxlike.models.build import build_model, default_kv_params
from maxlike.models.config import TransformerConfig
from maxlike.models.peft import add_adapter
from maxlike.nn.lora import LoraConfig, is_lora
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.plan.arithmetic import KnownShapes, Shapes, bytes_on_a_device, mesh_sizes, parameters_of, tensor_parallel
from maxlike.plan.chips import Topology
from maxlike.plan.collectives import Collective, collective, together
from maxlike.plan.compiling import DoesNotFitError, compile_all, devices_of, host_memory
from maxlike.plan.options import Training, check_heads
from maxlike.plan.result import Memory, Plan, StepPlan, missing
from maxlike.plan.serving import timed
from maxlike.train.batch import Batch
from maxlike.train.config import MeshConfig
from maxlike.train.optimizer import OptimizerConfig, make_optimizer
from maxlike.train.step import init_state, make_train_step
from maxlike.train.trainee import mesh_of

_TOKENS_A_SEQUENCE = 16
"""Tokens of a shard for which it has room for a sequence, as `DataConfig.max_seqs` has it."""
_MOMENTS = {"adamw": 2.0, "lion": 1.0, "muon": 1.0, "adafactor": 0.01, "sgd": 0.0}
"""Float32 numbers that an optimizer keeps of each that is trained, about."""
_LOGITS = 3 * 128 * 2**20
"""Bytes of logits, their gradient and what makes the one of the other; see `LossConfig.chunk`."""


@dataclass(frozen=True)
class AskedTraining:
    """A model, where it is to be trained, and how; `model` is what it is called."""

    model: str
    config: TransformerConfig
    topology: Topology
    options: Training

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.options.tp or 1

    @property
    def tokens(self) -> int:
        """Of a step."""
        _, parts = self.options.parts(self.topology.n_devices)
        return parts * self.options.accumulation * self.options.tokens_per_part(self.topology.n_devices)


def compile_training(asked: AskedTraining) -> Plan:
    """The plan by the compiler's reckoning.

    Raises:
        ValueError: the options do not fit the model or the topology.
    """
    options, topology = asked.options, asked.topology
    fsdp, _ = options.parts(topology.n_devices)
    check_heads(asked.config, asked.tp)
    mesh = mesh_of(MeshConfig(options.data, fsdp, asked.tp), asked.config, devices_of(topology))
    lora = None if options.lora_rank is None else LoraConfig(options.lora_rank)

    def build() -> DistributedTransformer:
        # As `load_trainee` has them: what is trained in float32, what is frozen in what it is multiplied in.
        model = build_model(asked.config, devices=mesh, dtype="float32" if lora is None else options.dtype)
        if lora is not None:
            add_adapter(model, asked.config, lora, nnx.Rngs(0))
        return model

    model = nnx.eval_shape(build)
    optimizer = make_optimizer(OptimizerConfig(options.optimizer, total_steps=100), model)
    state = init_state(model, optimizer, None if lora is None else is_lora)
    limit = topology.chip.memory if topology.chip else host_memory() // topology.n_devices
    memory = Memory(limit, bytes_on_a_device((state.params, state.frozen)), 0, bytes_on_a_device(state.opt_state), 0)
    shapes = Shapes(parameters_of(model), asked.config, model.kv_params, jnp.dtype(options.dtype).itemsize)
    trained = sum(parameter.elements(dict(mesh.shape)) for parameter in shapes.parameters
                  if lora is None or is_lora(parameter.name))
    lowered = make_train_step(model, optimizer, options.step).lower(state, _abstract_batch(asked, mesh))
    try:
        (program,) = compile_all([lowered], topology.platform)
    except DoesNotFitError as refused:
        temporaries = max(0, (refused.needed or 0) - memory.weights - memory.state)
        return _written(asked, dict(mesh.shape), shapes, replace(memory, temporaries=temporaries), trained, (),
                        refused.problem("the step, which"))
    memory = replace(memory, temporaries=program.temporaries)
    return _written(asked, dict(mesh.shape), shapes, memory, trained, program.collectives,
                    missing(memory.head_room))


def reckon_training(asked: AskedTraining, known: KnownShapes, temporaries: float = 1.0) -> Plan:
    """The plan by arithmetic alone.

    Args:
        known: shapes of the model.
        temporaries: what is reckoned for them is multiplied by.

    Raises:
        ValueError: as `compile_training`.
    """
    options, topology, config = asked.options, asked.topology, asked.config
    assert topology.chip is not None
    fsdp, _ = options.parts(topology.n_devices)
    check_heads(config, asked.tp)
    sizes = mesh_sizes(config, asked.tp, options.data, fsdp)
    cpu = jax.devices("cpu")[:1]
    kv_params = default_kv_params(config, Mesh(cpu, ("model",)), "bfloat16")
    frozen = options.lora_rank is not None
    shapes = known.of(sizes, options.dtype if frozen else "float32", kv_params)
    matrices = [p for p in shapes.parameters if p.is_matrix and p.name.startswith("layers.")]
    trained = sum(p.elements(sizes) for p in shapes.parameters)
    weights = shapes.weights(sizes)
    if options.lora_rank is not None:  # A is cut as the weight's columns are, B as its rows
        trained = sum(adapter.elements(sizes) for p in matrices for adapter in p.adapters(options.lora_rank))
        weights += 4 * trained
    T, itemsize = options.tokens_per_part(topology.n_devices), jnp.dtype(options.dtype).itemsize
    # Of each layer its input, or all that it computes; one layer's gathered weights, twice; the gradients.
    layer = itemsize * T * (8 * config.hidden_size + 4 * config.intermediate_size // asked.tp)
    kept = itemsize * T * config.hidden_size if options.remat == "full" else layer
    gathered = 2 * itemsize * sum(p.elements(mesh_sizes(config, asked.tp)) for p in matrices) // len(config.layers)
    head = 2 * itemsize * config.vocab_size * config.hidden_size // asked.tp
    needed = len(config.layers) * kept + 2 * layer + gathered + head + 4 * trained + _LOGITS
    memory = Memory(topology.chip.memory, weights, 0, int(4 * trained * _MOMENTS[options.optimizer]),
                    int(needed * temporaries))
    return replace(_written(asked, sizes, replace(shapes, itemsize=itemsize), memory, trained,
                            _reckoned_collectives(asked, shapes, sizes, trained), missing(memory.head_room)),
                   method="arithmetic")


def _written(asked: AskedTraining, mesh: Mapping[str, int], shapes: Shapes, memory: Memory, trained: int,
             collectives: tuple[Collective, ...], problem: str) -> Plan:
    options, config = asked.options, asked.config
    each = options.tokens_per_part(asked.topology.n_devices)
    longest = min(each, config.max_position_embeddings)
    # Forward once, again with remat, and twice as much on the way back: for the input, and for each weight that is
    # trained (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
    passes = 1 + (options.remat == "full") + (2 if options.lora_rank is None else 1)
    tokens = each * options.accumulation
    own = {axis: size for axis, size in mesh.items() if axis in ("model", "kv", "rep")}  # weights are gathered first
    flops = passes * shapes.flops(own, tokens, tokens, shapes.attended_by(tokens, longest, prompt=True))
    # What is trained and the optimizer's are read and written, and every pass reads the weights it multiplies by.
    read = sum(parameter.elements(own) for parameter in shapes.parameters) * shapes.itemsize * options.accumulation
    moved = 2 * (4 * trained + memory.state) + (passes - (options.lora_rank is None)) * read
    step: tuple[StepPlan, ...] = (timed(asked.topology, "train", asked.tokens, -(-asked.tokens // longest), longest,
                                        moved, flops, collectives),)
    return Plan(
        model=asked.model, topology=asked.topology.name, use="train", method="compiled", mesh=mesh, replicas=1,
        parameters=sum(p.elements({}) for p in shapes.parameters if not is_lora(p.name)),
        devices=asked.topology.n_devices, dtype=options.dtype, fits=not problem, memory=memory, cache=None,
        steps=() if problem else step, problem=problem, suggestions=(), notes=tuple(_notes(asked)),
        chip=asked.topology.chip)


def _notes(asked: AskedTraining) -> list[str]:
    options = asked.options
    each = options.tokens_per_part(asked.topology.n_devices)
    notes = [f"a step of {asked.tokens:,} tokens, {each:,} on a device at a time, with {options.optimizer}, remat "
             f"{options.remat}"
             + (f", adapters of rank {options.lora_rank}" if options.lora_rank is not None else "")]
    if asked.topology.chip is not None and asked.topology.chip.platform == "gpu":
        notes.append("of a GPU's memory JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; what the "
                     "step needs there is reckoned, not measured")
    return notes


def _abstract_batch(asked: AskedTraining, mesh: Mesh) -> Batch:
    """What `Feed` gives the step, as shapes."""
    options = asked.options
    _, parts = options.parts(asked.topology.n_devices)
    each = options.tokens_per_part(asked.topology.n_devices)
    leading = (options.accumulation,) if options.accumulation > 1 else ()
    sharding = NamedSharding(mesh, P(*[None] * len(leading), ShardingRules().mesh_axes(mesh, "tokens") or None))

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=sharding)

    tokens, targets, weights = (array(dtype, parts * each) for dtype in (jnp.int32, jnp.int32, jnp.float32))
    return Batch(tokens, targets, weights, array(jnp.int32, parts, max(1, each // _TOKENS_A_SEQUENCE) + 1))


def _reckoned_collectives(asked: AskedTraining, shapes: Shapes, mesh: Mapping[str, int],
                          trained: int) -> tuple[Collective, ...]:
    options = asked.options
    n, fsdp, data = tensor_parallel(mesh), mesh.get("fsdp", 1), mesh.get("data", 1)
    itemsize = jnp.dtype(options.dtype).itemsize
    passes, L = 2 + (options.remat == "full"), len(asked.config.layers)
    tokens = options.tokens_per_part(asked.topology.n_devices) * itemsize * asked.config.hidden_size
    own = sum(p.elements(mesh) for p in shapes.parameters) * itemsize
    found = []
    if n > 1:
        found.append(collective("all-reduce", tokens, n, 2 * L * passes * options.accumulation))
    if fsdp > 1:
        found.append(collective("all-gather", own, fsdp, passes * options.accumulation))
        # Gradients travel in the step's dtype, at least: the embedding's, which is summed in float32, in that.
        found.append(collective("reduce-scatter", itemsize * trained * fsdp, fsdp, options.accumulation))
    if data > 1:
        found.append(collective("all-reduce", itemsize * trained, data, options.accumulation))
    return together([(one,) for one in found])
