"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.family import LAYER_KEYS, Family
from maxlike.models.hf_config import (
    COMMON_DEFAULTS,
    FULL,
    SLIDING,
    ConfigReader,
    layer_types,
    read_common,
    read_layers,
    read_rope,
    sliding_window,
    write_common,
    write_rope,
)

DEFAULTS = COMMON_DEFAULTS | dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096,
    max_window_layers=28)


def parse(fields: Mapping[str, Any]) -> TransformerConfig:
    """`config.json` of a Qwen 2."""
    reader = ConfigReader(fields, DEFAULTS)
    common = read_common(reader)
    return reader.checked(TransformerConfig(
        model_type="qwen2", layers=read_qwen_layers(reader, common), attention_bias=True, **common))


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """What `parse` reads."""
    return {**write_common(config, "Qwen2ForCausalLM"), **write_qwen_layers(config)}


def read_qwen_layers(reader: ConfigReader, common: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """One rope for all; without `layer_types`, a window from layer `max_window_layers` on, if it is in use."""
    n, rope = reader.integer("num_hidden_layers"), read_rope(reader, common)
    window = reader.optional_integer("sliding_window") if reader.flag("use_sliding_window") else None
    first = n if window is None else reader.count("max_window_layers")
    types = [SLIDING if i >= first else FULL for i in range(n)]
    return read_layers(reader, types, {FULL: rope, SLIDING: rope}, window)


def write_qwen_layers(config: TransformerConfig) -> dict[str, Any]:
    """What `read_qwen_layers` reads; `max_window_layers` is for versions of transformers before `layer_types`."""
    types, window = layer_types(config), sliding_window(config)
    return {**write_rope(config.layers[0].rope), "use_sliding_window": window is not None, "sliding_window": window,
            "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types), "layer_types": types}


FAMILY = Family(("qwen2",), parse, unparse, LAYER_KEYS)
