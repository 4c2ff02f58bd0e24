"""Gemma 3: the text models, and the text part of those that see. What is saved is a text model.

Windows alternate, five layers with one, then one without, and each kind has its own positions; norms stand on both
sides of attention and MLP, their weights stored around zero; embeddings are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maxlike.models.config import TransformerConfig
from maxlike.models.family import Family
from maxlike.models.hf_config import (
    COMMON_DEFAULTS,
    FULL,
    SLIDING,
    ConfigReader,
    layer_types,
    read_common,
    read_layers,
    read_rope_section,
    rope_defaults,
    sliding_window,
    write_common,
    write_rope_section,
)
from maxlike.nn.rotary_embedding import RotaryEmbedding

DEFAULTS = COMMON_DEFAULTS | dict(
    vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh", max_position_embeddings=131072,
    bos_token_id=2, eos_token_id=1, tie_word_embeddings=True, attention_bias=False, query_pre_attn_scalar=256,
    sliding_window=4096, sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=10000.0)
LAYER_KEYS = {
    "attention_norm": "input_layernorm",
    "attention.layer": "self_attn",
    "attention.norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp.layer": "mlp",
    "mlp.norm": "post_feedforward_layernorm",
}
_OF_THE_WHOLE = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config")


def parse(fields: Mapping[str, Any]) -> TransformerConfig:
    """`config.json` of a Gemma 3; of one that sees, its `text_config` and what stands around it."""
    reader = ConfigReader(fields, DEFAULTS)
    if fields.get("model_type") == "gemma3":
        text = reader.section("text_config", {}).fields
        whole = {name: fields[name] for name in _OF_THE_WHOLE if fields.get(name) is not None}
        reader = ConfigReader({**text, **whole}, DEFAULTS, reader.problems)
    reader.refuse("use_bidirectional_attention", "attention is causal here")
    common, window = read_common(reader, activation="hidden_activation"), reader.optional_integer("sliding_window")
    pattern, bias = reader.integer("sliding_window_pattern"), reader.flag("attention_bias")
    types = [SLIDING if i % pattern else FULL for i in range(1, reader.integer("num_hidden_layers") + 1)]
    return reader.checked(TransformerConfig(
        model_type="gemma3_text", layers=read_layers(reader, types, _read_ropes(reader, common), window),
        query_pre_attn_scalar=reader.number("query_pre_attn_scalar"), attention_bias=bias, attention_output_bias=bias,
        qk_norm=True, norm_weight_offset=1.0, sandwich_norm=True, embedding_scale=math.sqrt(common["hidden_size"]),
        attn_logit_softcapping=reader.optional_number("attn_logit_softcapping"),
        final_logit_softcapping=reader.optional_number("final_logit_softcapping"), **common))


def _read_ropes(reader: ConfigReader, common: Mapping[str, Any]) -> dict[str, RotaryEmbedding]:
    """`rope_parameters` by layer type; before transformers 5 two thetas, and a `rope_scaling` for full layers."""
    thetas = {FULL: reader.number("rope_theta", above=1), SLIDING: reader.number("rope_local_base_freq", above=1)}
    by_type = reader.section("rope_parameters", {})
    for name in by_type.fields:
        if name not in thetas:
            by_type.problem(name, f"only {FULL} and {SLIDING} here")
    sections = {kind: by_type.section(kind, rope_defaults(common, theta)) for kind, theta in thetas.items()}
    if reader.fields.get("rope_scaling"):
        full = sections[FULL]
        scaling = reader.section("rope_scaling", full.defaults)
        sections[FULL] = ConfigReader({**full.fields, **scaling.fields}, full.defaults, full.problems, scaling.path)
    return {kind: read_rope_section(section, common) for kind, section in sections.items()}


def unparse(config: TransformerConfig) -> dict[str, Any]:
    """What `parse` reads, of a text model."""
    types = layer_types(config)
    ropes = {kind: layer.rope for kind, layer in zip(types, config.layers, strict=True)}
    sections = {kind: write_rope_section(rope) for kind, rope in ropes.items()}
    full = dict(sections.get(FULL, {"rope_theta": DEFAULTS["rope_theta"]}))
    theta = full.pop("rope_theta")
    local = sections.get(SLIDING, {"rope_theta": DEFAULTS["rope_local_base_freq"]})["rope_theta"]
    return {
        **write_common(config, "Gemma3ForCausalLM", activation="hidden_activation"),
        "rope_theta": theta,
        "rope_local_base_freq": local,
        "rope_scaling": full if FULL in ropes and ropes[FULL].scaling is not None else None,
        "rope_parameters": sections,
        "layer_types": types,
        "sliding_window_pattern": types.index(FULL) + 1 if FULL in types else len(types) + 1,
        "sliding_window": sliding_window(config) or DEFAULTS["sliding_window"],
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


FAMILY = Family(
    ("gemma3_text", "gemma3"), parse, unparse, LAYER_KEYS,
    prefixes=("language_model.model.", "model.language_model.", "language_model.", "model.", ""),
    heads=("lm_head.", "language_model.lm_head."),
    ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."))
