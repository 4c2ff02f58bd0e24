"""Other weights for a model that is there, in the places where its own lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters


def exchange_weights(model: DistributedTransformer, params: DistributedTransformer | nnx.State | Mapping[str, Any],
                     aliases: Mapping[str, str] | None = None) -> None:
    """Gives the parameters of `model` the values of `params`, copied, in the dtypes and shardings they have.

    One parameter at a time, so that the old ones make room for the new.

    Args:
        params: a model of the same structure, its `nnx.state`, or arrays by the names of `named_parameters`, all or
            some, each of the shape in the model or in checkpoints (vocabulary padding is filled with zeros).
        aliases: other names of parameters -> those.

    Raises:
        ValueError: parameters are missing, unknown or of other shapes; names all of them, and changes nothing.
    """
    if isinstance(params, nnx.Module | nnx.State):
        _exchange_all(model, nnx.state(params, nnx.Param) if isinstance(params, nnx.Module)
                      else params.filter(nnx.Param))
    elif isinstance(params, Mapping):
        _exchange_named(model, {(aliases or {}).get(name, name): value for name, value in params.items()})
    else:
        raise ValueError("Weights are a DistributedTransformer, an nnx.State or a mapping of names to arrays; got "
                         f"{type(params).__name__}.")


def _exchange_all(model: DistributedTransformer, state: nnx.State) -> None:
    given = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
    own = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    problems = [f"{name} is missing" for name in own if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in own]
    for name in own.keys() & given.keys():
        its, wanted = np.shape(given[name].get_value()), own[name].get_value().shape
        problems += [f"{name} has shape {its}, the model's {wanted}"] * (its != wanted)
    _raise(problems)
    for name, param in own.items():
        param.set_value(_placed(given[name].get_value(), param.get_value()))


def _exchange_named(model: DistributedTransformer, params: Mapping[str, Any]) -> None:
    problems: list[str] = []
    known = set()
    for names, stacked, param in named_parameters(model):
        known.update(names)
        wanted = param.get_value().shape[stacked:]
        for name in names:
            its = np.shape(params[name]) if name in params else wanted
            if its not in (wanted, tuple(param.get_metadata("logical_shape"))):
                problems.append(f"{name} has shape {its}, the model's {wanted}")
    problems += [f"{name} is unknown" for name in params if name not in known]
    _raise(problems)
    for names, stacked, param in named_parameters(model):
        if any(name in params for name in names):
            own = param.get_value()
            rows = [_padded(params[name], own.shape[stacked:], own.dtype) if name in params else own[i]
                    for i, name in enumerate(names)]
            param.set_value(_placed(jnp.stack(rows) if stacked else rows[0], own))


def _padded(value: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    value = jnp.asarray(value, dtype)
    return jnp.pad(value, [(0, full - part) for full, part in zip(shape, value.shape, strict=True)])


def _placed(value: Any, own: jax.Array) -> jax.Array:
    # A copy, since a trainer may give away its own arrays to its next step.
    return jax.device_put(jnp.asarray(value, own.dtype), own.sharding, may_alias=False)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("These weights are not this model's: " + "; ".join(problems) + ".")
