"""Llama 2 and 3, and the many models that use their `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.family import LAYER_KEYS, Family
from maxlike.models.hf_config import COMMON_DEFAULTS, ConfigReader, read_common, read_rope, write_common, write_rope

DEFAULTS = COMMON_DEFAULTS | dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, attention_bias=False,
    mlp_bias=False)


def parse(fields: Mapping[str, Any]) -> TransformerConfig:
    """`config.json` of a Llama."""
    reader = ConfigReader(fields, DEFAULTS)
    common = read_common(reader)
    bias = reader.flag("attention_bias")
    return reader.checked(TransformerConfig(
        model_type="llama", layers=(LayerConfig(read_rope(reader, common)),) * reader.integer("num_hidden_layers"),
        attention_bias=bias, attention_output_bias=bias, mlp_bias=reader.flag("mlp_bias"), **common))


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """What `parse` reads."""
    return {**write_common(config, "LlamaForCausalLM"), **write_rope(config.layers[0].rope),
            "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(("llama",), parse, unparse, LAYER_KEYS)
