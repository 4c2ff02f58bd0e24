"""One step of training: gradients of an objective, over one or several micro-batches, and the optimizer's update.

Parameters are kept in float32 and computed with in the step's dtype; the cast comes before a weight is gathered over
the mesh, so that the narrow one travels. Under Explicit sharding gradients are sharded as their parameters are, and
the optimizer's state follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from maxlike.kernels import ragged_attention
from maxlike.mesh import ShardingRules, compiler_options
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import CheckpointPolicy, named_parameters
from maxlike.train.batch import Batch
from maxlike.train.objective import Objective, SupervisedObjective, sequence_logprobs
from maxlike.train.optimizer import Optimizer

ComputeDtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots"]
Metrics = dict[str, jax.Array]
"""float32 scalars, on the device."""

REMAT_POLICIES: dict[str, CheckpointPolicy | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ragged_attention.SAVED)),
}
"""By the names of `StepConfig.remat`."""


_SUPERVISED = SupervisedObjective()


@dataclass(frozen=True)
class StepConfig:
    """How a step computes.

    Args:
        dtype: of activations, and of parameters where they are multiplied.
        remat: what of each block is kept for the backward pass, the rest being worked out again: all ("none" is),
            its input alone ("full"), or its matrix products and what attention gives ("dots").
        accumulation: A, the micro-batches of a step; above 1 a batch's arrays have A as their first dimension. Their
            losses and gradients are divided by the weight of all of them together.

    Raises:
        ValueError: a field is none of these.
    """

    dtype: ComputeDtype = "bfloat16"
    remat: Remat = "full"
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"StepConfig.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"StepConfig.remat is {self.remat!r}; expected one of {', '.join(REMAT_POLICIES)}.")
        if self.accumulation < 1:
            raise ValueError(f"StepConfig.accumulation is {self.accumulation}; expected at least 1.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes, and `frozen`, which it only reads.

    Args:
        step: `int32`, steps taken.
        params: those that are trained, float32.
        frozen: all others, in whatever dtype they have.
        opt_state: the optimizer's; arrays like a parameter are sharded as it is.
    """

    step: jax.Array
    params: nnx.State
    frozen: nnx.State
    opt_state: Any


def init_state(model: DistributedTransformer, optimizer: Optimizer,
               trainable: Callable[[str], bool] | None = None) -> TrainState:
    """The state before the first step.

    It takes the model's arrays over, and a step donates those in `params`: go on with `model_of(model, state)`. Of an
    abstract model (`nnx.eval_shape`) the state is abstract, shapes and shardings alone.

    Args:
        model: on the mesh that is trained on.
        optimizer: see `make_optimizer`.
        trainable: whether a parameter, by its name (`layers.3.attention.q_proj.weight`), is trained; `None`: all are.

    Raises:
        ValueError: none is, or some layers of one stack are and others not.
    """
    _, params, frozen = _split(model, trainable)
    params = jax.tree.map(lambda x: _placed(x, model.mesh, jnp.float32), params)
    frozen = jax.tree.map(lambda x: _placed(x, model.mesh, x.dtype), frozen)

    def start(params: nnx.State) -> tuple[jax.Array, Any]:
        with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
            return jnp.int32(0), optimizer.transform.init(params)

    shapes = jax.tree.map(lambda x: _placed(x, model.mesh, x.dtype), jax.eval_shape(start, params))
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        step, opt_state = shapes
    else:
        step, opt_state = jax.jit(start, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)
    return TrainState(step, params, frozen, opt_state)


def model_of(model: DistributedTransformer, state: TrainState) -> DistributedTransformer:
    """A model such as `model`, with the state's parameters (their arrays, not copies)."""
    return nnx.merge(nnx.graphdef(model), state.params, state.frozen)


def place_batch(batch: Any, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> Any:
    """A batch's host arrays on the mesh, its tokens cut over the data axes.

    With several processes each gives its own shards, and they are put together in the order of the mesh's devices.

    Args:
        batch: a `Batch`, or another pytree whose arrays' first dimension is T or R; behind a first dimension of A
            micro-batches where `batch.tokens` has one.
    """
    axes = rules.mesh_axes(mesh, "tokens") or None
    leading = [None] * (_tokens(batch).ndim - 1)
    sharding = NamedSharding(mesh, P(*leading, axes))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _tokens(batch: Any) -> Any:
    return jax.tree.leaves(batch)[0]


class TrainStep:
    """`step(state, batch) -> (state, metrics)`, compiled for each shape of batch that it meets.

    `params`, `opt_state` and `step` of the state that goes in are donated. The metrics are `loss` and whatever else
    the objective has, as means over the weight of the whole step; `weight`; `grad_norm`, before clipping, which is NaN
    or infinite where a gradient is; `learning_rate`.
    """

    def __init__(self, model: DistributedTransformer, optimizer: Optimizer, config: StepConfig,
                 objective: Objective) -> None:
        self._jitted = jax.jit(_make_step(model, optimizer, config, objective), donate_argnums=0,
                               compiler_options=compiler_options(model.mesh))

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """One step; `batch` as `place_batch` returns it."""
        changed, metrics = self._jitted((state.step, state.params, state.opt_state), state.frozen, batch)
        step, params, opt_state = changed
        return replace(state, step=step, params=params, opt_state=opt_state), metrics

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The step lowered for arguments, as a call has them, that may be abstract: `.compile()` tells memory and
        schedule.
        """
        return self._jitted.lower((state.step, state.params, state.opt_state), state.frozen, batch)


def make_train_step(model: DistributedTransformer, optimizer: Optimizer, config: StepConfig = StepConfig(),
                    objective: Objective = _SUPERVISED) -> TrainStep:
    """The step for a model whose state `init_state` made.

    Args:
        model: may be abstract, or its arrays gone: its structure alone is used.
        optimizer: the one that the state was made with.
        config: dtype, rematerialisation and accumulation.
        objective: what is minimised: `SupervisedObjective`, `PreferenceObjective` or one of yours.
    """
    return TrainStep(model, optimizer, config, objective)


def make_eval_step(model: DistributedTransformer, config: StepConfig = StepConfig(),
                   objective: Objective = _SUPERVISED) -> Callable[[TrainState, Any], Metrics]:
    """`(state, batch) -> the objective's sums`, jitted: add them up over batches, then divide by `weight`.

    A batch is one micro-batch, whatever `config.accumulation` is.
    """
    graphdef = nnx.graphdef(model)

    @jax.jit
    def evaluate(params: nnx.State, frozen: nnx.State, batch: Any) -> Metrics:
        with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
            return objective(nnx.merge(graphdef, *_cast((params, frozen), config.dtype)), batch, None)

    return lambda state, batch: evaluate(state.params, state.frozen, batch)


def make_scoring_step(model: DistributedTransformer, config: StepConfig = StepConfig(),
                      chunk: int | None = None) -> Callable[[TrainState, Batch], jax.Array]:
    """`(state, batch) -> sequence_logprobs`, jitted: a reference model's part in preference training.

    Where `config.accumulation` is above 1 there are that many micro-batches, and results `[A, R, S]`.
    """
    graphdef = nnx.graphdef(model)

    @jax.jit
    def score(params: nnx.State, frozen: nnx.State, batch: Batch) -> jax.Array:
        with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
            scored = nnx.merge(graphdef, *_cast((params, frozen), config.dtype))
            if config.accumulation == 1:
                return sequence_logprobs(scored, batch, chunk=chunk)
            return jax.lax.map(lambda batch: sequence_logprobs(scored, batch, chunk=chunk), batch)

    return lambda state, batch: score(state.params, state.frozen, batch)


def reference_state(state: TrainState, dtype: str) -> TrainState:
    """The state as it is now, to be the reference while `state` itself is trained.

    What is trained is copied, in `dtype`; what is frozen is shared. So under LoRA, whose `lora_b` begin as zeros, a
    reference taken before the first step costs no more than the adapters.
    """
    return replace(state, params=jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), state.params), opt_state=())


def _make_step(model: DistributedTransformer, optimizer: Optimizer, config: StepConfig,
               objective: Objective) -> Callable[..., Any]:
    graphdef, mesh = nnx.graphdef(model), model.mesh.abstract_mesh

    def gradients_of(params: nnx.State, frozen: nnx.State, batch: Any) -> tuple[nnx.State, Metrics]:
        def loss(params: nnx.State) -> tuple[jax.Array, Metrics]:
            sums = objective(nnx.merge(graphdef, params, frozen), batch, REMAT_POLICIES[config.remat])
            return sums["loss"], sums

        gradients, sums = jax.grad(loss, has_aux=True)(params)
        return _cast(gradients, "float32"), sums

    def step(changed: tuple[jax.Array, nnx.State, Any], frozen: nnx.State, batch: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            number, params, opt_state = changed
            narrow, frozen = _cast((params, frozen), config.dtype)
            if config.accumulation > 1:
                gradients, sums = _accumulated(lambda batch: gradients_of(narrow, frozen, batch), batch,
                                               config.accumulation)
            else:
                gradients, sums = gradients_of(narrow, frozen, batch)
            weight = sums.pop("weight")
            per_weight = jnp.where(weight > 0, 1 / weight, 0)
            gradients = jax.tree.map(lambda g: g * per_weight, gradients)
            rate = optimizer.schedule(number)
            metrics = {name: total * per_weight for name, total in sums.items()} | dict(
                weight=weight, grad_norm=optax.tree.norm(gradients), learning_rate=rate)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
            return (number + 1, params, opt_state), metrics

    return step


def _accumulated(gradients_of: Callable[[Any], tuple[nnx.State, Metrics]], batch: Any,
                 accumulation: int) -> tuple[nnx.State, Metrics]:
    """Gradients and sums, added up over the micro-batches."""
    if (found := {x.shape[0] for x in jax.tree.leaves(batch)}) != {accumulation}:
        raise ValueError(f"With accumulation={accumulation} each array of a batch has that many micro-batches along "
                         f"its first dimension; these have {', '.join(map(str, sorted(found)))}.")

    def body(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients_of(batch)), None

    first = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=_spec(x)), first)
    return jax.lax.scan(body, zeros, batch)[0]


def _split(model: DistributedTransformer,
           trainable: Callable[[str], bool] | None) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    trained = set()
    for path, (names, _, _) in zip(paths, named_parameters(model), strict=True):
        answers = [trainable is None or trainable(name) for name in names]
        if any(answers) and not all(answers):
            raise ValueError(f"{names[answers.index(True)]} is to be trained and {names[answers.index(False)]} not, "
                             "but these layers are scanned, and lie in one array. Build the model with "
                             "use_subgraphs=False, or train both.")
        if all(answers):
            trained.add(path)
    if not trained:
        raise ValueError("No parameter is to be trained. Names are such as "
                         f"{', '.join(names[0] for names, _, _ in [*named_parameters(model)][:3])}.")
    parts: Any = nnx.split(model, lambda path, _: path in trained, ...)
    return parts


def _placed(x: Any, mesh: Mesh, dtype: Any) -> Any:
    """An array in `dtype`; an abstract one with its sharding on `mesh`."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return x.astype(dtype)
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, _spec(x)))


def _spec(x: Any) -> P:
    return jax.typeof(x).sharding.spec


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
