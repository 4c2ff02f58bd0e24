"""An engine from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import jax
from jax.typing import DTypeLike

from maxlike.engine.config import EngineConfig
from maxlike.engine.engine import Engine
from maxlike.kernels.paged_attention import Implementation
from maxlike.mesh import Devices, mesh_platform
from maxlike.models.build import mesh_for
from maxlike.models.checkpoint import load_model
from maxlike.models.hub import resolve
from maxlike.models.peft import load_adapter
from maxlike.models.registry import parse_config
from maxlike.models.tokenizer import Tokenizer
from maxlike.nn.kv_cache import KVScales
from maxlike.nn.lora import merge_lora

AdapterMode = Literal["merged", "live"]
"""How an adapter is applied: added into the weights at the start, or worked out beside them at each step."""


def load_engine(model: str | os.PathLike[str], config: EngineConfig | None = None, *, devices: Devices | None = None,
                dtype: DTypeLike | None = None, kv_cache_dtype: DTypeLike | None = None,
                kv_scales: KVScales | None = None, implementation: Implementation | None = None,
                use_subgraphs: bool | None = None, chat_template: str | None = None,
                adapter: str | os.PathLike[str] | None = None, adapter_mode: AdapterMode = "merged") -> Engine:
    """An engine over a checkpoint, which may be one without a tokenizer.

    Args:
        model: a local folder, or a hub id such as `"Qwen/Qwen3-0.6B"`.
        config: how large the engine is.
        devices, dtype, kv_cache_dtype, kv_scales, implementation, use_subgraphs: as `maxlike.load` has them.
        chat_template: Jinja source that stands in for the checkpoint's own.
        adapter: a LoRA adapter in PEFT's format, a folder or hub id.
        adapter_mode: `"merged"` costs nothing afterwards; `"live"` leaves the weights as they are, and the adapter's
            own can be exchanged alone, by names such as `layers.0.attention.q_proj.lora_a`.

    Raises:
        ValueError: as `maxlike.load` or `load_adapter`, or the memory does not hold what was asked for.
    """
    if adapter_mode not in get_args(AdapterMode):
        raise ValueError(f"adapter_mode is one of {', '.join(get_args(AdapterMode))}; got {adapter_mode!r}.")
    if adapter is None and adapter_mode != "merged":
        raise ValueError(f"adapter_mode={adapter_mode!r} says how an adapter is applied, and none was given.")
    folder = resolve(model)
    adapter = None if adapter is None else resolve(adapter)  # before the weights, which take a while
    model_config, _ = parse_config(folder)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
    if chat_template is not None:
        if tokenizer is None:
            raise ValueError(f"A chat template was given, but {folder} has no tokenizer.json to use it with.")
        tokenizer = tokenizer.with_chat_template(chat_template)
    mesh = mesh_for(model_config, devices)
    config = config or EngineConfig()
    page_size = config.for_model(model_config, mesh_platform(mesh)).page_size
    loaded = load_model(model_config, folder, devices=mesh, dtype=dtype, kv_cache_dtype=kv_cache_dtype,
                        kv_scales=kv_scales, implementation=implementation, use_subgraphs=use_subgraphs,
                        page_size=page_size)
    if adapter is not None:
        kept = None if adapter_mode == "merged" else jax.typeof(loaded.norm.weight.get_value()).dtype
        load_adapter(loaded, model_config, adapter, dtype=kept)
        if adapter_mode == "merged":
            merge_lora(loaded)
    return Engine(loaded, model_config, config, tokenizer)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint says how text becomes ids."""
    return (folder / "tokenizer.json").is_file()

