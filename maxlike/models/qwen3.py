"""Qwen 3 (dense): no biases, and a norm over each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlike.models import qwen2
from maxlike.models.config import TransformerConfig
from maxlike.models.family import LAYER_KEYS, Family
from maxlike.models.hf_config import ConfigReader, read_common, write_common

DEFAULTS = qwen2.DEFAULTS | dict(head_dim=128, attention_bias=False)


def parse(fields: Mapping[str, Any]) -> TransformerConfig:
    """`config.json` of a Qwen 3."""
    reader = ConfigReader(fields, DEFAULTS)
    common, bias = read_common(reader), reader.flag("attention_bias")
    return reader.checked(TransformerConfig(
        model_type="qwen3", layers=qwen2.read_qwen_layers(reader, common), attention_bias=bias,
        attention_output_bias=bias, qk_norm=True, **common))


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """What `parse` reads."""
    return {**write_common(config, "Qwen3ForCausalLM"), **qwen2.write_qwen_layers(config),
            "attention_bias": config.attention_bias}


FAMILY = Family(("qwen3",), parse, unparse, LAYER_KEYS)
