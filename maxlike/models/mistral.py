"""Mistral: a Llama without biases, with a sliding window in its first versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlike.models.config import TransformerConfig
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
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, sliding_window=4096)


def parse(fields: Mapping[str, Any]) -> TransformerConfig:
    """`config.json` of a Mistral."""
    reader = ConfigReader(fields, DEFAULTS)
    common, window = read_common(reader), reader.optional_integer("sliding_window")
    rope = read_rope(reader, common)
    types = [FULL if window is None else SLIDING] * reader.integer("num_hidden_layers")
    return reader.checked(TransformerConfig(
        model_type="mistral", layers=read_layers(reader, types, {FULL: rope, SLIDING: rope}, window), **common))


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """What `parse` reads."""
    types = layer_types(config)
    # A list makes transformers take the model for a Ministral, and versions before 5 know of none.
    alternating = {"layer_types": types} if len({*types}) > 1 else {}
    return {**write_common(config, "MistralForCausalLM"), **write_rope(config.layers[0].rope),
            "sliding_window": sliding_window(config), **alternating}


FAMILY = Family(("mistral",), parse, unparse, LAYER_KEYS)
