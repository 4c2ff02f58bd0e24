"""Other weights for a model that is there, in the places where its own lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters


def exchange_weights(model: DistributedTransformer, params: DistributedTransformer | nnx.State | Mapping[str, Any],
                     ) -> None:
    """Gives the parameters of `model` the values of `params`, copied, in the dtypes and shardings they have.

    Args:
        params: a model of the same structure, its `nnx.state`, or arrays by the names of `named_parameters`, all or
            some, each of the shape in the model or in checkpoints (vocabulary padding is filled with zeros).

    Raises:
        ValueError: parameters are missing, unknown or of other shapes; names all of them, and changes nothing.
    """
    named = isinstance(params, Mapping) and not isinstance(params, nnx.State)
    new = _by_name(model, cast(Mapping[str, Any], params)) if named else _by_path(model, params)
    old = [param for _, _, param in named_parameters(model)]
    for param, value in zip(old, new, strict=True):
        param.set_value(value)


def _by_path(model: DistributedTransformer, params: Any) -> list[jax.Array]:
    if not isinstance(params, nnx.Module | nnx.State):
        raise ValueError("Weights are a DistributedTransformer, an nnx.State or a mapping of names to arrays; got "
                         f"{type(params).__name__}.")
    state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params.filter(nnx.Param)
    given = {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}
    own = {".".join(map(str, path)): param.get_value()
           for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    problems = [f"{name} is missing" for name in own if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in own]
    problems += [f"{name} has shape {given[name].shape}, the model's {own[name].shape}" for name in own
                 if name in given and given[name].shape != own[name].shape]
    _raise(problems)
    return [_placed(given[name], own[name]) for name in own]


def _by_name(model: DistributedTransformer, params: Mapping[str, Any]) -> list[jax.Array]:
    problems, known = [], set()
    for names, stacked, param in named_parameters(model):
        known.update(names)
        own = param.get_value().shape[stacked:]
        shapes = own, tuple(param.get_metadata("logical_shape"))
        problems += [f"{name} has shape {np.shape(params[name])}, the model's {shapes[0]}" for name in names
                     if name in params and np.shape(params[name]) not in shapes]
    problems += [f"{name} is unknown" for name in params if name not in known]
    _raise(problems)
    return [_renewed(params, names, stacked, param.get_value()) for names, stacked, param in named_parameters(model)]


def _renewed(params: Mapping[str, Any], names: list[str], stacked: bool, own: jax.Array) -> jax.Array:
    if not any(name in params for name in names):
        return own
    shape = own.shape[stacked:]
    rows = []
    for i, name in enumerate(names):
        if name in params:
            row = jnp.asarray(params[name], own.dtype)
            rows.append(jnp.pad(row, [(0, full - part) for full, part in zip(shape, row.shape, strict=True)]))
        else:
            rows.append(own[i])
    return _placed(jnp.stack(rows) if stacked else rows[0], own)


def _placed(value: Any, own: jax.Array) -> jax.Array:
    # A copy, since a trainer may give away its own arrays to its next step.
    return jax.device_put(jnp.asarray(value, own.dtype), own.sharding, may_alias=False)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("These weights are not this model's: " + "; ".join(problems) + ".")
