"""Adapters in PEFT's format (https://huggingface.co/docs/peft): a folder with `adapter_config.json` and
`adapter_model.safetensors`.

Its tensors are called `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`: what wraps the model, and the
layer as `transformers` calls it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from maxlike.models.checkpoint import fetch_tensor, read_array
from maxlike.models.config import TransformerConfig
from maxlike.models.family import EMBEDDING, HEAD, Family, canonical_names, hf_name
from maxlike.models.hub import resolve
from maxlike.models.registry import family_of, read_object
from maxlike.models.safetensors import Checkpoint, CheckpointError, TensorSource, write_file
from maxlike.nn.lora import (
    LoraConfig,
    adapted_layers,
    adapter_shapes,
    add_lora,
    attach,
    choose_layers,
    linear_layers,
)
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_WRAPPER = "base_model.model."
_PARTS = ("lora_A", "lora_B")
# What says how the adapter was begun, trained or packed up, and nothing of what it computes.
_WITHOUT_EFFECT = frozenset((
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "layers_pattern", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "ensure_weight_tying"))
_READ = frozenset((
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "bias", "init_lora_weights"))
# Other ways to begin change the base, which the adapter then belongs to.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def add_adapter(model: DistributedTransformer, config: TransformerConfig, lora: LoraConfig,
                rngs: nnx.Rngs) -> list[str]:
    """`add_lora`, where `lora` may also use the names of `transformers`, as `r".*\\.self_attn\\..*"` does.

    Args:
        model: changed in place.
        config: the one that it was built from.
        lora: ranks, and which layers.
        rngs: for the initial values.

    Returns:
        The names of the layers that have an adapter now.

    Raises:
        ValueError: as `add_lora`.
    """
    return add_lora(model, lora, rngs, naming=_naming(_family(config)))


def load_adapter(model: DistributedTransformer, config: TransformerConfig, adapter: str | os.PathLike[str], *,
                 dtype: DTypeLike | None = None) -> LoraConfig:
    """Puts an adapter in PEFT's format on a model; `nn.lora.merge_lora` then adds it into the weights.

    Args:
        config: the one that the model was built from.
        adapter: a local folder, or a hub id.
        dtype: of its parameters; `None`: float32, bfloat16 where they are stored so.

    Returns:
        What `adapter_config.json` says.

    Raises:
        ValueError: there is no such folder or repository. A `CheckpointError`, which is one, lists all that the model
            cannot do, and every tensor that is missing, unexpected, misshapen or damaged; the model is as it was.
    """
    folder, family = resolve(adapter), _family(config)
    lora, problems = _parse(read_object(folder / CONFIG_FILE))
    if not (folder / WEIGHTS_FILE).exists():
        others = ", ".join(sorted(path.name for path in folder.glob("adapter_model.*")))
        problems.append(f"{folder / WEIGHTS_FILE} is missing" + (f"; there is only {others}: load it in PEFT and save "
                        "it with safe_serialization=True" if others else ""))
        raise _error(problems, folder)
    with Checkpoint.open(folder, WEIGHTS_FILE) as checkpoint:
        problems += checkpoint.problems
        if lora is None:
            raise _error(problems, folder)
        try:
            chosen = choose_layers(model, lora, naming=_naming(family), lenient=True)
        except ValueError as error:
            raise _error([*problems, str(error)], folder) from None
        files, lost = _stored(family, checkpoint, problems)
        wanted = []
        for linear, (rank, scaling) in chosen:
            tensors = {part: [_tensor_name(family, name, part) for name in linear.names] for part in _PARTS}
            dtypes = {checkpoint.tensors[files[name]].dtype for names in tensors.values() for name in names
                      if name in files}
            kept = dtype or (jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.float32)
            params = dict(zip(_PARTS, adapter_shapes(linear, rank, kept, model.mesh), strict=True))
            wanted.append((linear, scaling, [(tensors[part], params[part]) for part in _PARTS]))
        problems += _other_bases(checkpoint, files, model)
        problems += _disagreements(checkpoint, files, lost, [part for _, _, parts in wanted for part in parts])
        if problems:
            raise _error(problems, folder)
        for linear, _, its in wanted:
            for names, param in its:
                param.set_value(read_array(checkpoint, [files[name] for name in names], linear.stacked, param,
                                           model.mesh))
    for linear, scaling, ((_, a), (_, b)) in wanted:
        attach(linear.layer, scaling, a, b)
    return lora


def save_adapter(model: DistributedTransformer, config: TransformerConfig, folder: str | os.PathLike[str], *,
                 base_model_name: str | None = None) -> None:
    """Writes a model's adapter as PEFT does, for PEFT and all that read its format.

    Args:
        config: the one that the model was built from.
        base_model_name: where the base is to be found, a hub id or folder, for those who load the adapter.

    Raises:
        ValueError: the model has no adapter.
    """
    folder, family = Path(folder), _family(config)
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError("The model has no adapter to save: add_lora or load_adapter puts one on.")
    tensors: list[TensorSource] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for linear in adapted:
        layer = linear.layer
        assert layer.lora_a is not None and layer.lora_b is not None and layer.lora_scaling is not None
        for part, param in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b)):
            value, logical = param.get_value(), tuple(param.get_metadata("logical_shape"))
            tensors += [(_WRAPPER + _tensor_name(family, name, part), logical, np.dtype(value.dtype),
                         partial(fetch_tensor, value, i if linear.stacked else None, logical))
                        for i, name in enumerate(linear.names)]
        for name in linear.names:
            ranks[_module(family, name)] = layer.lora_a.get_value().shape[-2]
            alphas[_module(family, name)] = layer.lora_scaling.alpha
    scalings = {linear.layer.lora_scaling.use_rslora for linear in adapted if linear.layer.lora_scaling is not None}
    if len(scalings) > 1:
        raise ValueError("Some adapters of the model are scaled as rsLoRA has it and some are not, which no "
                         "adapter_config.json can say.")
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common({name: int(alpha) if alpha == int(alpha) else alpha
                                    for name, alpha in alphas.items()})
    everywhere = {_module(family, name) for linear in linear_layers(model) for name in linear.names}
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model_name,
        "inference_mode": True, "r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern, "target_modules": _targets(set(ranks), everywhere),
        "use_rslora": scalings.pop(), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
        "use_dora": False, "lora_bias": False}
    folder.mkdir(parents=True, exist_ok=True)
    pending = [(folder / f".{name}.{os.getpid()}.tmp", folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    try:
        write_file(pending[0][0], sorted(tensors, key=lambda tensor: tensor[0]), {"format": "pt"})
        pending[1][0].write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        for temporary, final in pending:
            os.replace(temporary, final)
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)


# -- names


def _family(config: TransformerConfig) -> Family:
    return family_of({"model_type": config.model_type})


def _module(family: Family, name: str) -> str:
    """`layers.3.attention.q_proj` as `transformers` has it."""
    return hf_name(family, f"{name}.weight").removesuffix(".weight")


def _naming(family: Family) -> Any:
    """What a layer of ours may be called by `transformers`, in all the models that hold it."""
    def names(name: str) -> list[str]:
        module = _module(family, name)
        if module.startswith("model."):
            return [prefix + module.removeprefix("model.") for prefix in family.prefixes]
        return [head.removesuffix(".") for head in family.heads]
    return names


def _tensor_name(family: Family, name: str, part: str) -> str:
    return f"{_module(family, name)}.{part}.weight"


def _stored(family: Family, checkpoint: Checkpoint, problems: list[str]) -> tuple[dict[str, str], set[str]]:
    """Canonical name -> the tensor so meant, and the canonical names of those that a damaged file lost."""
    files: dict[str, str] = {}
    inner = {name.removeprefix(_WRAPPER): name for name in checkpoint.tensors}
    for name, canonical in canonical_names(family, inner).items():
        if canonical in files:
            problems.append(f"tensors {files[canonical]!r} and {inner[name]!r} both mean {canonical!r}; expected one "
                            "of them")
        files.setdefault(canonical, inner[name])
    lost = canonical_names(family, (name.removeprefix(_WRAPPER) for name in checkpoint.lost))
    return files, set(lost.values())


def _other_bases(checkpoint: Checkpoint, files: dict[str, str], model: DistributedTransformer) -> Iterator[str]:
    """Of embedding and head, which PEFT saves once more with some adapters, those that are not the model's own.

    They are taken out of `files`.
    """
    (head,) = (linear.layer for linear in linear_layers(model) if linear.is_head)
    own = {EMBEDDING: model.embedding.weight, HEAD: head.weight}
    for name, param in own.items():
        copies = (files.pop(copy, None) for copy in (name, name.replace(".weight", ".base_layer.weight")))
        for file in filter(None, copies):
            info, shape = checkpoint.tensors[file], tuple(param.get_metadata("logical_shape"))
            if info.shape != shape:
                yield (f"tensor {file!r} has shape {list(info.shape)}, the model's own {list(shape)}: adapters that "
                       "change the vocabulary are not supported")
            elif not jnp.array_equal(read_array(checkpoint, [file], False, param, model.mesh), param.get_value()):
                yield (f"tensor {file!r} differs from the model's own: the adapter belongs to another base, or was "
                       "trained together with the embeddings, which is not supported")


def _disagreements(checkpoint: Checkpoint, files: Mapping[str, str], lost: set[str],
                   parts: Iterable[tuple[list[str], nnx.Param]]) -> Iterator[str]:
    """What the configuration and the model mean and the file has not, or the other way round."""
    known = set()
    for names, param in parts:
        shape = tuple(param.get_metadata("logical_shape"))
        for name in names:
            known.add(name)
            if name in files:
                info = checkpoint.tensors[files[name]]
                if info.shape != shape:
                    yield (f"tensor {files[name]!r} has shape {list(info.shape)}; the model and {CONFIG_FILE} mean "
                           f"{list(shape)}")
                elif not jnp.issubdtype(info.dtype, jnp.floating):
                    yield f"tensor {files[name]!r} is {info.dtype}; expected floating point"
            elif name not in lost:
                yield f"tensor {_WRAPPER + name!r} is missing"
    for name, file in files.items():
        if name not in known:
            what = ("neither A nor B of a LoRA" if not re.search(r"\.lora_[AB]\.weight$", name) else
                    f"there is no such linear layer, or {CONFIG_FILE} does not target it")
            yield f"tensor {file!r} is unexpected: {what}"


# -- adapter_config.json


def _parse(fields: Mapping[str, Any]) -> tuple[LoraConfig | None, list[str]]:
    """The configuration, where there is one, and all that cannot be done."""
    problems = []
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        return None, [f"peft_type is {json.dumps(kind)}; only LORA adapters are supported"]
    if fields.get("bias", "none") != "none":
        problems.append(f"bias is {json.dumps(fields['bias'])}; only adapters without biases of their own, \"none\", "
                        "are supported")
    beginning = fields.get("init_lora_weights", True)
    if beginning not in _BEGINNINGS:
        problems.append(f"init_lora_weights is {json.dumps(beginning)}, which changes the base: convert the adapter "
                        "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)")
    problems += [f"{name} is {json.dumps(value)}, which is not supported" for name, value in fields.items()
                 if value and name not in _READ and name not in _WITHOUT_EFFECT]
    try:
        return LoraConfig(
            rank=fields.get("r", 8), alpha=fields.get("lora_alpha", 8),
            target_modules=fields.get("target_modules") or (), exclude_modules=fields.get("exclude_modules") or (),
            rank_pattern=fields.get("rank_pattern") or {}, alpha_pattern=fields.get("alpha_pattern") or {},
            use_rslora=bool(fields.get("use_rslora"))), problems
    except ValueError as error:
        return None, [*problems, str(error)]


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern for the modules that have others."""
    (common, _), = Counter(values.values()).most_common(1)
    by_end: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_end.setdefault(name.rsplit(".", 1)[-1], set()).add(value)
    pattern = {}
    for name, value in values.items():
        end = name.rsplit(".", 1)[-1]
        if by_end[end] != {common} and (len(by_end[end]) == 1 or value != common):
            pattern[end if len(by_end[end]) == 1 else name] = value
    return common, pattern


def _targets(adapted: set[str], all_modules: set[str]) -> list[str]:
    """The ends of names where all modules of that end are adapted, else whole names."""
    unadapted = {name.rsplit(".", 1)[-1] for name in all_modules - adapted}
    return sorted({name if (end := name.rsplit(".", 1)[-1]) in unadapted else end for name in adapted})


def _error(problems: list[str], folder: Path) -> CheckpointError:
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return CheckpointError(problems, summary=f"{count} with the adapter in {folder}:")
