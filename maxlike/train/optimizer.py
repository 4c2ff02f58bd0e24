"""Optimizers and learning-rate schedules by name, from optax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters

OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd"]


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, by the names that optax has for it and its constants.

    A constant that is `None` is the optimizer's own; one that the optimizer does not have must be `None`.

    Args:
        name: `adamw` (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), `adafactor`
            (https://arxiv.org/abs/1804.04235), `lion` (https://arxiv.org/abs/2302.06675), `muon` for matrices with
            Nesterov's `adamw` for embedding, head and vectors (https://arxiv.org/abs/2502.16982), or `sgd`.
        learning_rate: the highest.
        schedule: of the learning rate, behind the warm-up: `constant`, `linear` or `cosine` down to the end, or `wsd`,
            constant until `decay_steps` before the end and linear from there (https://arxiv.org/abs/2404.06395).
        warmup_steps: over which it rises in a straight line; step `i`, from 0, has `(i + 1) / warmup_steps` of it.
        total_steps: the end; all but `constant` need it. Behind it the rate stays what it was.
        final_fraction: of the learning rate, at the end.
        decay_steps: of `wsd`.
        weight_decay: of matrices: times the learning rate, subtracted from each. Vectors (norms, biases) have none.
        max_grad_norm: gradients whose norm, over all parameters, is above are scaled down to it; `None`: never.
        skip_nonfinite: a step whose gradients hold a NaN or an infinity changes nothing, up to so many steps in a row;
            the next is taken as it is, so that its NaN is seen. 0: none is skipped.
        b1, b2, eps: of adamw, and of muon's adamw; lion has `b1` and `b2`.
        momentum: of sgd and muon.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.0
    decay_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    skip_nonfinite: int = 0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None


@dataclass(frozen=True)
class Optimizer:
    """Updates for a learning rate of 1, and the rate that a step multiplies them by.

    Args:
        transform: its updates are to be added to the parameters.
        schedule: `int32 step, from 0 -> float32 learning rate`.
    """

    transform: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]

    def update(self, gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        """`(updates, opt_state)`, to be called inside `jax.jit`.

        Args:
            gradients, params: trees of one structure, float32, sharded alike; so are the updates, which `schedule`'s
                rate is still to multiply.
            opt_state: `transform.init(params)`, or what the step before returned.
        """
        # optax knows nothing of Explicit axes: what sharding its intermediate values have is left to XLA (muon
        # multiplies matrices along axes that are cut), that of its results is said here.
        results = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, opt_state))
        with jax.sharding.use_abstract_mesh(jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh):
            return jax.sharding.auto_axes(self.transform.update, out_sharding=results)(gradients, opt_state, params)


def make_optimizer(config: OptimizerConfig, model: DistributedTransformer) -> Optimizer:
    """The optimizer that `config` names, for parameters of `model`, all or some.

    Raises:
        ValueError: a name is unknown, a number is out of range, or a constant is not one of this optimizer's; lists
            all that is wrong.
    """
    check_optimizer(config)
    constants = {field: value for field in _CONSTANTS[config.name] if (value := getattr(config, field)) is not None}
    transform = _BUILDERS[config.name](config.weight_decay, _Matrices.of(model), constants)
    if config.max_grad_norm is not None:
        transform = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), transform)
    if config.skip_nonfinite:
        transform = optax.apply_if_finite(transform, config.skip_nonfinite)
    return Optimizer(transform, make_schedule(config))


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises the `ValueError` of `make_optimizer`, if there is one."""
    problems = _problems(config)
    if problems:
        raise ValueError("OptimizerConfig: " + "; ".join(problems) + ".")


def make_schedule(config: OptimizerConfig) -> Callable[[Any], jax.Array]:
    """The learning rate of a step: `int32 -> float32`. Fields as in `OptimizerConfig`, which must be in order."""
    warmup, total = config.warmup_steps, config.total_steps or 0
    begin = total - (config.decay_steps or 0) if config.schedule == "wsd" else warmup
    shape = _SCHEDULES[config.schedule]

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - begin) / max(1, total - begin), 0, 1)
        fraction = config.final_fraction + (1 - config.final_fraction) * shape(progress)
        if warmup:
            fraction = jnp.where(step < warmup, (step + 1) / warmup, fraction)
        return jnp.asarray(config.learning_rate * fraction, jnp.float32)

    return rate


_SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda progress: jnp.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
    "wsd": lambda progress: 1 - progress,
}


@dataclass(frozen=True)
class _Matrices:
    """Which parameters are matrices: a path in the model -> whether it is one, and is embedding or head."""

    kinds: dict[tuple[str, ...], tuple[bool, bool]]

    @classmethod
    def of(cls, model: DistributedTransformer) -> _Matrices:
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        outer = "embedding.", "output."
        return cls({
            tuple(map(str, path)): (param.get_value().ndim - stacked >= 2, names[0].startswith(outer))
            for path, (names, stacked, param) in zip(paths, named_parameters(model), strict=True)})

    def _kind(self, path: Any) -> tuple[bool, bool]:
        return self.kinds[tuple(str(getattr(key, "key", getattr(key, "idx", None))) for key in path
                                if not hasattr(key, "name"))]

    def decayed(self, params: Any) -> Any:
        """A mask: all matrices."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self._kind(path)[0], params)

    def dimensions(self, params: Any) -> Any:
        """For muon: of the matrices inside, which are `[out, in]` behind a stack's first axis; `None` for others."""
        def of(path: Any, _: Any) -> MuonDimensionNumbers | None:
            matrix, outer = self._kind(path)
            return MuonDimensionNumbers(reduction_axis=-1, output_axis=-2) if matrix and not outer else None

        return jax.tree_util.tree_map_with_path(of, params)


Builder = Callable[[float, _Matrices, dict[str, float]], optax.GradientTransformation]


def _adamw(weight_decay: float, matrices: _Matrices, constants: dict[str, float]) -> optax.GradientTransformation:
    return optax.adamw(1.0, weight_decay=weight_decay, mask=matrices.decayed, **constants)


def _adafactor(weight_decay: float, matrices: _Matrices, constants: dict[str, float]) -> optax.GradientTransformation:
    return optax.adafactor(1.0, weight_decay_rate=weight_decay or None, weight_decay_mask=matrices.decayed)


def _lion(weight_decay: float, matrices: _Matrices, constants: dict[str, float]) -> optax.GradientTransformation:
    return optax.lion(1.0, weight_decay=weight_decay, mask=matrices.decayed, **constants)


def _muon(weight_decay: float, matrices: _Matrices, constants: dict[str, float]) -> optax.GradientTransformation:
    names = dict(b1="adam_b1", b2="adam_b2", eps="eps", momentum="beta")
    # Updates as large as adamw's usually are, so that one learning rate does for both (0.2: the paper's). The decay is
    # put behind it, since optax has no mask for the part that is adamw's.
    matrix = muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=matrices.dimensions,
                  **{names[name]: value for name, value in constants.items()})
    return optax.chain(matrix, optax.add_decayed_weights(-weight_decay, matrices.decayed))


def _sgd(weight_decay: float, matrices: _Matrices, constants: dict[str, float]) -> optax.GradientTransformation:
    momentum = constants.get("momentum", 0.0)
    return optax.chain(optax.trace(momentum) if momentum else optax.identity(),
                       optax.add_decayed_weights(weight_decay, matrices.decayed), optax.scale(-1.0))


_BUILDERS: dict[str, Builder] = dict(adamw=_adamw, adafactor=_adafactor, lion=_lion, muon=_muon, sgd=_sgd)
_CONSTANTS = dict(adamw=("b1", "b2", "eps"), adafactor=(), lion=("b1", "b2"), muon=("b1", "b2", "eps", "momentum"),
                  sgd=("momentum",))


def _problems(config: OptimizerConfig) -> list[str]:
    problems = []
    if config.name not in _BUILDERS:
        problems.append(f"name is {config.name!r}; expected one of {', '.join(_BUILDERS)}")
    else:
        constants = {constant for of_it in _CONSTANTS.values() for constant in of_it}
        for field in fields(config):
            if field.name in constants.difference(_CONSTANTS[config.name]) and getattr(config, field.name) is not None:
                problems.append(f"{field.name} is {getattr(config, field.name)}, which {config.name} has not; it takes "
                                f"{', '.join(_CONSTANTS[config.name]) or 'none'}")
    if config.schedule not in _SCHEDULES:
        problems.append(f"schedule is {config.schedule!r}; expected one of {', '.join(_SCHEDULES)}")
    elif config.schedule != "constant" and (config.total_steps or 0) <= config.warmup_steps:
        problems.append(f"total_steps is {config.total_steps}; schedule {config.schedule!r} needs more than the "
                        f"{config.warmup_steps} of warm-up")
    if config.schedule == "wsd":
        longest = (config.total_steps or 0) - config.warmup_steps
        if not 0 < (config.decay_steps or 0) <= longest:
            problems.append(f"decay_steps is {config.decay_steps}; wsd needs 1 to {longest}, those behind the warm-up")
    elif config.decay_steps is not None:
        problems.append(f"decay_steps is {config.decay_steps}; only the schedule wsd has them")
    if not config.learning_rate > 0:
        problems.append(f"learning_rate is {config.learning_rate}; expected a number above 0")
    if not 0 <= config.final_fraction <= 1:
        problems.append(f"final_fraction is {config.final_fraction}; expected 0 to 1")
    if config.max_grad_norm is not None and not config.max_grad_norm > 0:
        problems.append(f"max_grad_norm is {config.max_grad_norm}; expected a number above 0, or none")
    for name in ("warmup_steps", "weight_decay", "skip_nonfinite"):
        if not getattr(config, name) >= 0:
            problems.append(f"{name} is {getattr(config, name)}; expected at least 0")
    for name, constant in ((name, getattr(config, name)) for name in ("b1", "b2", "momentum")):
        if constant is not None and not 0 <= constant < 1:
            problems.append(f"{name} is {constant}; expected 0 to below 1")
    if config.eps is not None and not config.eps > 0:
        problems.append(f"eps is {config.eps}; expected a number above 0")
    return problems
