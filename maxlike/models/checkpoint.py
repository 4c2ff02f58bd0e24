"""Weights between Hugging Face folders and sharded models, tensor by tensor.

A model is never held twice. Its shapes and shardings come from evaluating the constructor abstractly; each
device's shard is then read straight from the files into the memory that becomes the array (on CPU without a copy).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from tqdm import tqdm

from maxlike.kernels.paged_attention import LARGEST, Implementation
from maxlike.mesh import Devices, ShardingRules
from maxlike.models.build import build_model, compute_dtype, default_kv_params, mesh_for
from maxlike.models.config import TransformerConfig
from maxlike.models.family import Family, canonical_names, hf_name
from maxlike.models.hub import resolve
from maxlike.models.kv_scales import read_scales, scale_of, scale_tensors
from maxlike.models.registry import family_of, parse_config, unparse_config
from maxlike.models.safetensors import Checkpoint, CheckpointError, TensorSource, write_checkpoint
from maxlike.nn.kv_cache import KVScales, as_cache_dtype
from maxlike.nn.lora import adapted_layers
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer, ReturnLogits
from maxlike.nn.transformer.segments import named_parameters

_CPU_ALIGNMENT = 64  # bytes; XLA:CPU adopts a host buffer so aligned instead of copying it


def load(model: str | os.PathLike[str], *, devices: Devices | None = None, dtype: DTypeLike | None = None,
         use_subgraphs: bool | None = None, return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
         kv_cache_dtype: DTypeLike | None = None, kv_scales: KVScales | None = None,
         implementation: Implementation | None = None) -> DistributedTransformer:
    """A ready model from a Hugging Face checkpoint.

    Args:
        model: a local folder, or a hub id such as `"Qwen/Qwen3-0.6B"`.
        devices: a mesh, or devices to make one from; `None`: as many of all devices as the heads allow.
        dtype: of parameters and activations, float32 or bfloat16; `None`: the checkpoint's.
        use_subgraphs: scan groups of like layers; `None`: yes, but on CPU.
        return_logits: which rows of logits a call returns.
        kv_cache_dtype: float32, bfloat16, float16, int8 or float8_e4m3fn; `None`: as `dtype`, float32 on CPU.
        kv_scales: of an int8 or float8_e4m3fn cache; `None`: the checkpoint's. int8 needs the one or the other.
        implementation: of attention over the cache, such as `Xla()`; `None`: the devices'.

    Raises:
        ValueError: no such folder or repository, an unsupported config, devices or a cache that do not fit; a
            `CheckpointError`, which is one, lists every tensor that is missing, unexpected, misshapen or damaged.
    """
    folder = resolve(model)
    config, _ = parse_config(folder)
    return load_model(config, folder, devices=devices, dtype=dtype, use_subgraphs=use_subgraphs,
                      return_logits=return_logits, kv_cache_dtype=kv_cache_dtype, kv_scales=kv_scales,
                      implementation=implementation)


def load_model(config: TransformerConfig, folder: Path, *, devices: Devices | None = None,
               dtype: DTypeLike | None = None, kv_cache_dtype: DTypeLike | None = None,
               kv_scales: KVScales | None = None, implementation: Implementation | None = None,
               page_size: int | None = None, **options: Any) -> DistributedTransformer:
    """As `load`, for a folder whose config is parsed already.

    Args:
        config: what `parse_config` made of the folder's `config.json`.
        folder: with the safetensors files.
        devices, dtype, kv_cache_dtype, kv_scales, implementation: as `load` has them.
        page_size: tokens a page of the cache; `None`: 64.
        options: those of `build_model` but `kv_params`.

    Raises:
        ValueError: as `load`.
    """
    mesh, family = mesh_for(config, devices), family_of({"model_type": config.model_type})
    kv_params = default_kv_params(config, mesh, compute_dtype(config, dtype), options.get("rules", ShardingRules()))
    if kv_cache_dtype is not None:
        kv_params = replace(kv_params, **_cache_options(config, family, folder, kv_cache_dtype, kv_scales))
    elif kv_scales is not None:
        raise ValueError("kv_scales belong to a quantised cache: give kv_cache_dtype as well, int8 or float8_e4m3fn.")
    kv_params = replace(kv_params, implementation=implementation, page_size=page_size or kv_params.page_size)
    model = nnx.eval_shape(partial(build_model, config, devices=mesh, dtype=dtype, kv_params=kv_params, **options))
    read_weights(model, family, folder)
    return model


def _cache_options(config: TransformerConfig, family: Family, folder: Path, dtype: DTypeLike,
                   scales: KVScales | None) -> dict[str, Any]:
    """`KVCacheParams`' dtype and scales, these from the checkpoint where none are given."""
    dtype = as_cache_dtype(dtype)
    if dtype.name in LARGEST and scales is None:
        scales = read_scales(config, family, folder, dtype)
    if dtype == jnp.int8 and scales is None:
        raise ValueError(f"An int8 cache needs scales, and the checkpoint in {folder} has none. Measure them: "
                         "kv_scales=maxlike.calibrate(maxlike.load(...), tokens, input_row_offsets).")
    return dict(dtype=dtype, scales=scales)


def read_weights(model: DistributedTransformer, family: Family, folder: Path) -> None:
    """Fills every parameter of `model` (abstract or not) from the safetensors files in `folder`.

    Scales of a quantised KV cache are none of them, and left alone.

    Raises:
        CheckpointError: with all that is missing, unexpected, misshapen, unreadable or cut short.
    """
    with Checkpoint.open(folder) as checkpoint:
        wanted = {tuple(hf_name(family, name) for name in names): (stacked, param)
                  for names, stacked, param in named_parameters(model)}
        tied = ("lm_head.weight",) not in wanted
        problems = list(checkpoint.problems)
        stored: dict[str, str] = {}
        for file, name in canonical_names(family, checkpoint.tensors, tied=tied).items():
            if name in stored:
                problems.append(f"tensors {stored[name]!r} and {file!r} both mean {name!r}; expected one of them")
            if scale_of(name) is None:
                stored.setdefault(name, file)
        lost = set(canonical_names(family, checkpoint.lost, tied=tied).values())
        problems += _disagreements(checkpoint, stored, lost, wanted)
        if problems:
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
            raise CheckpointError(problems, summary=f"{count} with the checkpoint in {folder}:")
        total = sum(checkpoint.tensors[stored[name]].nbytes for names in wanted for name in names)
        with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for names, (stacked, param) in wanted.items():
                files = [stored[name] for name in names]
                param.set_value(read_array(checkpoint, files, stacked, param, model.mesh))
                bar.update(sum(checkpoint.tensors[name].nbytes for name in files))


def _disagreements(checkpoint: Checkpoint, stored: dict[str, str], lost: set[str],
                   wanted: dict[tuple[str, ...], tuple[bool, nnx.Param]]) -> Iterator[str]:
    """What the model needs and the checkpoint has not, or the other way round."""
    for names, (_, param) in wanted.items():
        shape = tuple(param.get_metadata("logical_shape"))
        for name in names:
            if name in stored:
                info = checkpoint.tensors[stored[name]]
                if info.shape != shape:
                    yield f"tensor {stored[name]!r} has shape {list(info.shape)}; the config means {list(shape)}"
                elif not jax.numpy.issubdtype(info.dtype, np.floating):
                    yield (f"tensor {stored[name]!r} is {info.dtype}; expected floating point (quantised checkpoints "
                           "are not supported)")
            elif name not in lost:  # what a damaged file lost is named there
                yield f"tensor {name!r} is missing"
    known = {name for names in wanted for name in names}
    yield from (f"tensor {file!r} is unexpected: this model has no such parameter"
                for name, file in stored.items() if name not in known)


def read_array(checkpoint: Checkpoint, files: list[str], stacked: bool, param: nnx.Param,
                mesh: jax.sharding.Mesh) -> jax.Array:
    """The value of a parameter, read shard by shard, in its own shape, dtype and sharding.

    Args:
        checkpoint: the open files.
        files: names of its tensors there: one, or with `stacked` one for each slice of the first dimension.
        param: may be abstract.
        mesh: that it is to lie on.
    """
    abstract = param.get_value()
    logical = tuple(param.get_metadata("logical_shape"))
    sharding = NamedSharding(mesh, jax.typeof(abstract).sharding.spec)
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(abstract.shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, abstract.shape, strict=True))
        if bounds not in shards:
            shards.clear()  # devices come shard by shard at best; never hold two on the host for an accelerator
            shards[bounds] = _read_shard(checkpoint, files, stacked, bounds, logical, abstract.dtype)
        arrays.append(jax.device_put(shards[bounds], device))
    return jax.make_array_from_single_device_arrays(abstract.shape, sharding, arrays)


def _read_shard(checkpoint: Checkpoint, files: list[str], stacked: bool, bounds: tuple[tuple[int, int], ...],
                logical: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The part `bounds` of a parameter; rows outside the `logical` shape are padding, and zero."""
    shard = _aligned_empty(tuple(end - start for start, end in bounds), dtype)
    if stacked:
        (first, end), *bounds_rest = bounds
        parts = list(zip(files[first:end], shard, strict=True))
        bounds = tuple(bounds_rest)
    else:
        parts = [(files[0], shard)]
    inside = tuple(slice(start, min(end, size)) for (start, end), size in zip(bounds, logical, strict=True))
    filled = tuple(slice(0, max(part.stop - part.start, 0)) for part in inside)
    for file, out in parts:
        if out[filled].shape != out.shape:
            out[...] = 0
        if out[filled].size:
            checkpoint.read_into(file, out[filled], inside)
    return shard


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + _CPU_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _CPU_ALIGNMENT
    return buffer[start:start + nbytes].view(dtype).reshape(shape)


def save_model(model: DistributedTransformer, config: TransformerConfig, folder: str | os.PathLike[str], *,
               max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes `config.json`, `generation_config.json` and safetensors that `transformers` reads.

    Parameters are written in the dtype that the model has them in, one tensor in host memory at a time; padding
    is cut off, stacks are taken apart. The scales of a quantised cache are written too. Tokenizer files are the
    caller's to copy.

    Args:
        config: the one that the model was built from.
        folder: made where it is not there; files of these names in it are replaced.
        max_shard_bytes: of each safetensors file, at most.

    Raises:
        ValueError: the model does not fit `config`, or has an adapter that is not merged.
    """
    folder = Path(folder)
    if adapted := adapted_layers(model):
        raise ValueError(f"The model has an adapter ({adapted[0].names[0]} and others): merge_lora(model) adds it into "
                         "the weights, save_adapter writes it by itself.")
    family = family_of({"model_type": config.model_type})
    shapes, meant = _shapes(model), _shapes(nnx.eval_shape(partial(build_model, config, devices=model.mesh)))
    if differing := [name for name in {**meant, **shapes} if shapes.get(name) != meant.get(name)]:
        name = differing[0]
        raise ValueError(
            f"The model is not the config's: {name} has shape {shapes.get(name, 'none')} in the model and "
            f"{meant.get(name, 'none')} by the config ({len(differing)} parameter{'s' * (len(differing) > 1)} differ). "
            "Save a model with the config that it was built from.")
    tensors: list[TensorSource] = []
    for names, stacked, param in named_parameters(model):
        value = param.get_value()
        for i, name in enumerate(names):
            tensors.append((hf_name(family, name), shapes[name], np.dtype(value.dtype),
                            partial(fetch_tensor, value, i if stacked else None, shapes[name])))
    config_json = unparse_config(replace(config, dtype=tensors[0][2].name))
    if model.kv_params.scales is not None:
        tensors += scale_tensors(model.kv_params.scales, model.kv_params.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, tensors, max_shard_bytes=max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    generation = {key: value for key, value in generation.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _shapes(model: DistributedTransformer) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape in checkpoints."""
    return {name: tuple(param.get_metadata("logical_shape"))
            for names, _, param in named_parameters(model) for name in names}


def fetch_tensor(value: jax.Array, layer: int | None, logical: tuple[int, ...]) -> np.ndarray:
    """A parameter's value, or that of the slice `layer` of a stack, in host memory and of the shape `logical`."""
    array = np.asarray(value if layer is None else value[layer])
    return array[tuple(slice(size) for size in logical)]
