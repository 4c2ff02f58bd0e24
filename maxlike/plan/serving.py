"""A plan for serving: the engine's own programs, compiled for devices that are not there; or reckoned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from maxlike.engine.batch import bucket_for
from maxlike.engine.config import ACCELERATOR_MEMORY_SHARE, CPU_MEMORY_SHARE, EngineConfig
from maxlike.engine.memory import pages_of_use, room_on_accelerator, room_on_cpu
from maxlike.engine.runner import ModelRunner
from maxlike.engine.sampling import empty_state
from maxlike.models.build import abstract_model, build_model, compute_dtype, mesh_for
from maxlike.models.config import TransformerConfig
from maxlike.nn.kv_cache import KVCacheParams, KVScales, as_cache_dtype
from maxlike.plan.arithmetic import KnownShapes, Shapes, bytes_on_a_device, mesh_sizes, parameters_of
from maxlike.plan.chips import Topology
from maxlike.plan.collectives import Collective, together
from maxlike.plan.compiling import (
    Compiled,
    DoesNotFitError,
    NoSuchTopologyError,
    compile_all,
    devices_of,
    host_memory,
)
from maxlike.plan.options import LONGEST_CONTEXT, Serving, replica_topologies, tensor_parallel_size
from maxlike.plan.result import Cache, Memory, Plan, StepPlan, missing


@dataclass(frozen=True)
class Asked:
    """A model, where it is to be served, and how.

    Args:
        model: what it is called.
        whole: the topology of all replicas.

    Raises:
        ValueError: the engine cannot be of this size for the model, or its sequences are shorter than the context.
    """

    model: str
    config: TransformerConfig
    whole: Topology
    options: Serving

    def __post_init__(self) -> None:
        context, longest = self.options.context, self.engine.max_model_len
        assert longest is not None
        if context is not None and context > longest:
            raise ValueError(f"A context of {context:,} tokens was asked for, and max_model_len allows sequences of "
                             f"{longest:,}: give a smaller context, or a larger max_model_len where the model takes "
                             f"it ({self.config.max_position_embeddings:,}).")

    @property
    def platform(self) -> str:
        """What programs are compiled for."""
        return self.whole.platform

    @property
    def engine(self) -> EngineConfig:
        """The engine's configuration, with what follows from model and platform."""
        return self.options.engine.for_model(self.config, self.platform)

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and activations."""
        return compute_dtype(self.config, self.options.dtype)

    def kv_params(self) -> KVCacheParams:
        """The cache's measures. Its dtype is float32 on CPU unless another is asked for, as the engine's is."""
        config, asked = self.config, self.options.cache_dtype
        dtype = as_cache_dtype(asked or (jnp.float32 if self.platform == "cpu" else self.dtype))
        # An int8 cache has scales, whose values change nothing here.
        ones = ((1.0,) * config.num_key_value_heads,) * len(config.layers)
        page_size = self.engine.page_size
        assert page_size is not None
        return KVCacheParams(dtype, config.num_key_value_heads, config.head_dim, len(config.layers), page_size,
                             scales=KVScales(ones, ones) if dtype == jnp.int8 else None)


@dataclass(frozen=True)
class Sized:
    """What is known of a replica before its plan is written down; bytes are each device's.

    Args:
        topology: its own.
        mesh: axes and sizes.
        state: of the slots; `masks` of what they may draw.
        pages: of the cache.
        problem: why it does not fit.
    """

    topology: Topology
    mesh: Mapping[str, int]
    shapes: Shapes
    weights: int
    state: int
    masks: int
    limit: int
    temporaries: int
    pages: int = 0
    problem: str = ""

    @property
    def cache(self) -> int:
        """Of all pages."""
        return self.pages * self.shapes.bytes_per_page(self.mesh, self.topology.platform)

    @property
    def memory(self) -> Memory:
        """What fills a device."""
        return Memory(self.limit, self.weights, self.cache, self.state + self.masks, self.temporaries)

    @property
    def missing(self) -> str:
        """Why the memory does not do; empty where it does. When the engine decides on the pages it has no masks yet:
        for want of room for these alone it refuses nothing."""
        head_room = self.memory.head_room
        return missing(head_room) if head_room + self.masks < 0 else ""


def compile_serving(asked: Asked) -> Plan:
    """The plan by the compiler's reckoning.

    Raises:
        ValueError: the options do not fit the model or the topology.
    """
    topology, mesh = _replica(asked)
    engine, kv_params = asked.engine, asked.kv_params()
    model = abstract_model(partial(build_model, asked.config, devices=mesh, dtype=asked.dtype, kv_params=kv_params))
    runner = ModelRunner(model, engine)
    weights = bytes_on_a_device(nnx.state(model))
    limit = topology.chip.memory if topology.chip else host_memory() // topology.n_devices
    sized = Sized(topology, dict(mesh.shape), Shapes(parameters_of(model), asked.config, kv_params,
                                                     asked.dtype.itemsize), weights, runner.state_bytes,
                  _mask_bytes(engine, asked), limit, 0)
    try:
        tail: list[Compiled] = []
        if topology.chip is None:
            room = room_on_cpu(engine, host_memory() - weights * topology.n_devices, topology.n_devices)
        else:
            # As the engine does it: what programs need is asked of those that have a cache of one page.
            # Where weights alone are too much, the first of them is enough to be refused.
            largest = runner.largest_programs[:1 if weights > limit else None]
            first = compile_all([runner.lower(kind, n, n_pages=1) for kind, n in largest], asked.platform)
            tail = first[1:]
            sized = replace(sized, temporaries=max(program.temporaries for program in first))
            room = room_on_accelerator(engine, limit, weights + sized.state + sized.temporaries)
        sized = _with_pages(asked, sized, pages_of_use(runner, _room(engine, room)), room)
        if sized.problem:
            return write_down(asked, sized, {})
        runner.n_pages = sized.pages
        sequences, _ = decoded(asked, sized)
        keys = [("forward", runner.token_buckets[-1]), ("forward", runner.token_bucket(sequences)),
                ("greedy", runner.row_bucket(sequences)), *([] if tail else runner.largest_programs[1:])]
        unique = list(dict.fromkeys(keys))
        programs = dict(zip(unique, compile_all([runner.lower(*key) for key in unique], asked.platform), strict=True))
    except DoesNotFitError as refused:
        given = sized.weights + sized.cache + sized.state
        temporaries = max(sized.temporaries, (refused.needed or 0) - given)
        return write_down(asked, replace(sized, temporaries=temporaries, problem=refused.problem("a program that")), {})
    sized = replace(sized, temporaries=max(program.temporaries for program in (*programs.values(), *tail)))
    sized = replace(sized, problem=sized.missing)
    collectives = {"decode": together(programs[key].collectives for key in keys[1:3]),
                   "prefill": programs[keys[0]].collectives}
    return write_down(asked, sized, collectives, method="compiled")


def reckon_serving(asked: Asked, shapes: KnownShapes, temporaries: int = 0) -> Plan:
    """The plan by arithmetic alone.

    Args:
        shapes: of the model.
        temporaries: at least so many bytes are set aside for them.

    Raises:
        ValueError: as `compile_serving`.
    """
    topology = replica_topologies(asked.whole, asked.options)[0]
    tp = tensor_parallel_size(asked.config, asked.options, topology)
    mesh, engine, kv_params = mesh_sizes(asked.config, tp), asked.engine, asked.kv_params()
    known = shapes.of(mesh, asked.dtype, kv_params)
    assert topology.chip is not None and engine.max_num_batched_tokens and engine.max_num_seqs and engine.max_model_len
    needed = max(known.temporaries(mesh, engine.max_num_batched_tokens, engine.max_num_seqs), temporaries)
    sized = Sized(topology, mesh, known, known.weights(mesh), _state_bytes(engine, asked), _mask_bytes(engine, asked),
                  topology.chip.memory, needed)
    room = room_on_accelerator(engine, sized.limit, sized.weights + sized.state + needed)
    most = engine.max_num_seqs * kv_params.pages_for(engine.max_model_len)
    of_a_page = known.bytes_per_page(mesh, asked.platform)
    sized = _with_pages(asked, sized, min(max(_room(engine, room), 0) // of_a_page, most), room)
    if sized.problem:
        return write_down(asked, sized, {}, method="arithmetic")
    sequences, _ = decoded(asked, sized)
    rows = bucket_for(sequences, engine.row_buckets(asked.platform))
    return write_down(asked, sized, {
        "decode": known.step_collectives(mesh, bucket_for(sequences, engine.token_buckets(asked.platform)), rows),
        "prefill": known.step_collectives(mesh, engine.max_num_batched_tokens, 0)}, method="arithmetic")


def decoded(asked: Asked, sized: Sized) -> tuple[int, int]:
    """`(sequences, context)` of the decode step that the plan tells of: as many as the cache holds at that length."""
    engine = asked.engine
    assert engine.max_num_seqs is not None and engine.max_model_len is not None and engine.page_size is not None
    context = min(asked.options.context or LONGEST_CONTEXT, engine.max_model_len, sized.pages * engine.page_size)
    return min(engine.max_num_seqs, sized.pages // sized.shapes.kv_params.pages_for(context)), context


def write_down(asked: Asked, sized: Sized, collectives: Mapping[str, tuple[Collective, ...]], *,
               method: str = "compiled") -> Plan:
    """The plan of what was found out."""
    engine, shapes, mesh = asked.engine, sized.shapes, sized.mesh
    assert engine.max_num_seqs is not None and engine.max_model_len is not None and engine.page_size is not None
    of_a_page = shapes.bytes_per_page(mesh, asked.platform)
    cache = Cache(jnp.dtype(shapes.kv_params.dtype).name, engine.page_size, sized.pages, of_a_page / engine.page_size,
                  engine.max_num_seqs, min(engine.max_model_len, max(sized.pages, 1) * engine.page_size))
    return Plan(
        model=asked.model, parameters=sum(parameter.elements({}) for parameter in shapes.parameters),
        topology=asked.whole.name, use="serve", method="arithmetic" if method == "arithmetic" else "compiled",
        mesh=mesh, replicas=asked.options.data, devices=asked.whole.n_devices, dtype=asked.dtype.name,
        fits=not sized.problem, memory=sized.memory, cache=cache, steps=tuple(_steps(asked, sized, collectives)),
        problem=sized.problem, suggestions=(), notes=tuple(_notes(asked, sized)), chip=asked.whole.chip)


def _steps(asked: Asked, sized: Sized, collectives: Mapping[str, tuple[Collective, ...]]) -> list[StepPlan]:
    if sized.problem:
        return []
    shapes, mesh, engine = sized.shapes, sized.mesh, asked.engine
    assert engine.max_num_batched_tokens is not None and engine.max_model_len is not None
    sequences, context = decoded(asked, sized)
    tokens = engine.max_num_batched_tokens
    longest = min(tokens, engine.max_model_len)
    decode, prompt = (shapes.attended_by(sequences, context, prompt=False),
                      shapes.attended_by(tokens, longest, prompt=True))
    written = shapes.cache_read(mesh, asked.platform, tokens * len(asked.config.layers))
    return [
        timed(sized.topology, "decode", sequences, sequences, context,
              shapes.read(mesh, head=True) + shapes.cache_read(mesh, asked.platform, decode),
              shapes.flops(mesh, sequences, sequences, decode), collectives["decode"]),
        timed(sized.topology, "prefill", tokens, -(-tokens // longest), longest,
              shapes.read(mesh, head=False) + written, shapes.flops(mesh, tokens, 0, prompt), collectives["prefill"])]


def timed(topology: Topology, name: str, tokens: int, sequences: int, context: int, nbytes: float, flops: float,
          collectives: tuple[Collective, ...]) -> StepPlan:
    """A step with the seconds that its parts take at least."""
    chip = topology.chip
    seconds: tuple[float | None, float | None, float | None] = (None, None, None)
    if chip is not None:
        sent, rate = sum(c.sent for c in collectives), topology.bytes_out_per_s
        # Of the way between the two devices of one TPU7x nothing is published.
        seconds = nbytes / chip.bandwidth, flops / chip.peak, sent / rate if rate else 0.0
    return StepPlan(name, tokens, sequences, context, nbytes, flops, collectives, *seconds)


def _replica(asked: Asked) -> tuple[Topology, Mesh]:
    problem: NoSuchTopologyError | None = None
    for topology in replica_topologies(asked.whole, asked.options):
        tp = tensor_parallel_size(asked.config, asked.options, topology)
        try:
            devices = devices_of(topology)
        except NoSuchTopologyError as error:  # not every part of a slice is one that can be had
            problem = problem or error
            continue
        return topology, mesh_for(asked.config, devices[:tp])
    assert problem is not None
    raise problem


def _room(engine: EngineConfig, room: int) -> int:
    return room if engine.kv_cache_memory is None else engine.kv_cache_memory


def _with_pages(asked: Asked, sized: Sized, pages: int, room: int) -> Sized:
    """With the cache that there is room for, or why it will not do: where the engine would raise an error, or the
    device have no memory left."""
    engine = asked.engine
    assert engine.page_size is not None
    sized = replace(sized, pages=pages if engine.num_pages is None else engine.num_pages)
    if sized.pages < 1:
        return replace(sized, problem=_no_page(asked, sized, room))
    if sized.missing:
        return replace(sized, problem=sized.missing)
    asked_for, tokens = asked.options.engine.max_model_len, sized.pages * engine.page_size
    if asked_for is not None and tokens < asked_for:
        return replace(sized, problem=f"the KV cache has room for {tokens:,} tokens, and sequences of {asked_for:,} "
                                      "were asked for.")
    return sized


def _no_page(asked: Asked, sized: Sized, room: int) -> str:
    """Why there is not even room for a page."""
    engine, of_a_page = asked.engine, sized.shapes.bytes_per_page(sized.mesh, asked.platform)
    if engine.kv_cache_memory is not None:
        return (f"kv_cache_memory is {engine.kv_cache_memory:,} bytes, and a page of the KV cache takes {of_a_page:,} "
                "on each device.")
    if asked.platform == "cpu":
        where = (f"a page of the KV cache has no room in {engine.memory_share or CPU_MEMORY_SHARE:.0%} of what the "
                 "host has free beside the weights")
    else:
        where = ("weights, slots and temporaries leave no room for a page of the KV cache within "
                 f"{engine.memory_share or ACCELERATOR_MEMORY_SHARE:.0%} of a device's memory")
    return f"{where}; {missing(room - of_a_page)}"


def _state_bytes(engine: EngineConfig, asked: Asked) -> int:
    assert engine.max_num_seqs is not None
    state = jax.eval_shape(partial(empty_state, engine.max_num_seqs, asked.config.vocab_size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _mask_bytes(engine: EngineConfig, asked: Asked) -> int:
    """Of the masks that allow everything, one for each number of rows, and of the tokens drawn last."""
    assert engine.max_num_seqs is not None
    words = -(-asked.config.vocab_size // 32)
    return 4 * (words * sum(engine.row_buckets(asked.platform)) + engine.max_num_seqs)


def _notes(asked: Asked, sized: Sized) -> list[str]:
    notes = []
    dtype = jnp.dtype(sized.shapes.kv_params.dtype).name
    if dtype == "int8":
        notes.append("an int8 cache needs scales, in the checkpoint or from maxlike.calibrate")
    if sized.topology.several_hosts:
        notes.append("a replica is spread over several hosts, which `maxlike serve` does not do yet")
    used = math.prod(sized.mesh.values())
    if used < sized.topology.n_devices:
        notes.append(f"the mesh uses {used} of the {sized.topology.n_devices} devices of a replica: the model's heads "
                     "allow no more, or --tp asks for no more")
    if asked.whole.chip is not None and asked.whole.chip.platform == "gpu":
        notes.append("of a GPU's memory JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; what "
                     "programs need there is reckoned generously, not measured")
    return notes
