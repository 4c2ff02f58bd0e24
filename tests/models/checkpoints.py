"""Small checkpoints written with numpy and the safetensors library: the names and shapes that `transformers` gives
its tensors, stated once more and independently of the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=8),
    "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=3, num_hidden_layers=5),
    "qwen3": dict(attention_bias=True, tie_word_embeddings=True),
    "gemma3_text": dict(layer_types=[SLIDING, SLIDING, FULL] * 2 + [SLIDING], sliding_window=8, num_hidden_layers=7,
                        query_pre_attn_scalar=16, tie_word_embeddings=True),
}
"""What each family's configs add to those of `config_of`."""


def config_of(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A `config.json`: 8 heads, 2 KV heads, and a vocabulary that no number of devices divides."""
    return dict(
        model_type=model_type, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=3, intermediate_size=72, vocab_size=1003, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_theta=1e4, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, torch_dtype="float32",
    ) | FAMILIES[model_type] | changes


def tensors_of(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Every tensor of the model, float32, drawn so that each of them matters to the logits."""
    rng = np.random.default_rng(seed)
    D, F, V, H = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q_size, kv_size = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    family = config["model_type"]
    qkv_bias = config.get("attention_bias", family == "qwen2")
    output_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    tensors: Tensors = {}

    def linear(name: str, out_size: int, in_size: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, 1.5 * in_size ** -0.5, (out_size, in_size)).astype(np.float32)
        if bias:
            tensors[f"{name}.bias"] = rng.normal(0, 0.5, out_size).astype(np.float32)

    def norm(name: str, size: int) -> None:
        center = 0.0 if family == "gemma3_text" else 1.0
        tensors[f"{name}.weight"] = rng.uniform(center - 0.5, center + 0.5, size).astype(np.float32)

    tensors["model.embed_tokens.weight"] = rng.normal(0, 0.3, (V, D)).astype(np.float32)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        linear(f"{layer}.self_attn.q_proj", q_size, D, qkv_bias)
        linear(f"{layer}.self_attn.k_proj", kv_size, D, qkv_bias)
        linear(f"{layer}.self_attn.v_proj", kv_size, D, qkv_bias)
        linear(f"{layer}.self_attn.o_proj", D, q_size, output_bias)
        linear(f"{layer}.mlp.gate_proj", F, D, mlp_bias)
        linear(f"{layer}.mlp.up_proj", F, D, mlp_bias)
        linear(f"{layer}.mlp.down_proj", D, F, mlp_bias)
        norm(f"{layer}.input_layernorm", D)
        norm(f"{layer}.post_attention_layernorm", D)
        if family in ("qwen3", "gemma3_text"):
            norm(f"{layer}.self_attn.q_norm", H)
            norm(f"{layer}.self_attn.k_norm", H)
        if family == "gemma3_text":
            norm(f"{layer}.pre_feedforward_layernorm", D)
            norm(f"{layer}.post_feedforward_layernorm", D)
    norm("model.norm", D)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = rng.normal(0, 0.3, (V, D)).astype(np.float32)
    return tensors


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> Tensors:
    """Writes `config.json` and `model.safetensors`; returns the tensors."""
    tensors = tensors_of(config) if tensors is None else dict(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors
