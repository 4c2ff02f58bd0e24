"""The scales of a quantised KV cache, as checkpoints hold them.

What a checkpoint states is the largest key and value of each layer, divided by 448: the scale of a float8_e4m3fn cache,
one number a layer or one a KV head, beside the attention's weights. For an int8 cache, which ends at 127, it is
multiplied by 448 / 127. Names as vLLM reads them: `self_attn.k_scale`, `self_attn.attn.k_scale` and
`self_attn.k_proj.k_scale`, and so for v. Written is the first, a scale a KV head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from maxlike.kernels.paged_attention import LARGEST
from maxlike.models.config import TransformerConfig
from maxlike.models.family import Family, canonical_names
from maxlike.models.safetensors import Checkpoint, CheckpointError, TensorSource
from maxlike.nn.kv_cache import KVScales

_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:attn\.|([kv])_proj\.)?([kv])_scale")
_STATED_FOR = LARGEST["float8_e4m3fn"]


def scale_of(name: str) -> tuple[int, str] | None:
    """The layer, and `"k"` or `"v"`, that the tensor of this canonical name is the scale of; `None`: it is none."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), match[3]) if match and match[2] in (None, match[3]) else None


def read_scales(config: TransformerConfig, family: Family, folder: Path, dtype: DTypeLike) -> KVScales | None:
    """The scales in the safetensors files of `folder` for a cache of `dtype`; `None`: there are none.

    Raises:
        CheckpointError: some layers have scales and others have none or two, or a scale is no positive number or has
            another shape; names all that is wrong.
    """
    n_layers, n_heads = len(config.layers), config.num_key_value_heads
    with Checkpoint.open(folder) as checkpoint:
        found: dict[tuple[int, str], str] = {}
        problems = list(checkpoint.problems)
        for file, name in canonical_names(family, checkpoint.tensors).items():
            place = scale_of(name)
            if place is None:
                continue
            if place in found:
                problems.append(f"tensors {found[place]!r} and {file!r} are both the scale of layer {place[0]}'s "
                                f"{place[1]}; expected one of them")
            found.setdefault(place, file)
        lost = {scale_of(name) for name in canonical_names(family, checkpoint.lost).values()} - {None}
        if not found and not lost:
            return None
        factor = _STATED_FOR / LARGEST[jnp.dtype(dtype).name]
        rows: dict[tuple[int, str], list[float]] = {}
        for place, file in found.items():
            info = checkpoint.tensors[file]
            if place[0] >= n_layers:
                problems.append(f"tensor {file!r} is of layer {place[0]}; the model has layers 0 to {n_layers - 1}")
            elif not jnp.issubdtype(info.dtype, jnp.floating) or math.prod(info.shape) not in (1, n_heads):
                problems.append(f"tensor {file!r} is {info.dtype}{list(info.shape)}; a scale is one floating-point "
                                f"number, or one for each of {n_heads} KV heads")
            else:
                values = np.empty(info.shape, np.float32)
                checkpoint.read_into(file, values)
                if not (np.isfinite(values).all() and (values > 0).all()):
                    problems.append(f"tensor {file!r} has a scale that is not positive and finite")
                rows[place] = (factor * np.broadcast_to(values.reshape(-1).astype(np.float64), n_heads)).tolist()
        there = next(iter(found.values()), "another scale, in a damaged file,")
        problems += [f"tensor 'model.layers.{i}.self_attn.{x}_scale' is missing, and {there!r} is there"
                     for i in range(n_layers) for x in "kv" if (i, x) not in found and (i, x) not in lost]
        if problems:
            raise CheckpointError(problems, summary=f"The checkpoint in {folder} has scales for a quantised KV cache "
                                  "that cannot be used:")
    k, v = (tuple(tuple(rows[i, x]) for i in range(n_layers)) for x in "kv")
    return KVScales(k, v, jnp.dtype(dtype).name)


def scale_tensors(scales: KVScales, dtype: DTypeLike) -> Iterator[TensorSource]:
    """What `write_checkpoint` takes to write the scales of a cache of `dtype`."""
    factor = LARGEST[jnp.dtype(dtype).name] / _STATED_FOR
    parts: Mapping[str, tuple[tuple[float, ...], ...]] = {"k": scales.k, "v": scales.v}
    for x, rows in parts.items():
        for i, row in enumerate(rows):
            values = np.float32(factor * np.array(row))
            yield f"model.layers.{i}.self_attn.{x}_scale", values.shape, values.dtype, partial(np.asarray, values)
