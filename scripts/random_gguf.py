"""A model's shape as a GGUF file, for llama.cpp; needs the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxlike.models.config import TransformerConfig
from maxlike.nn.rotary_embedding import RotaryEmbedding

WEIGHT_TYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""GGUF's names of dtypes."""
_PRIME = 4194301


def why_not(config: TransformerConfig) -> str | None:
    """Why this cannot be written as llama.cpp's architecture `llama`, if it cannot."""
    ropes, windows = {layer.rope for layer in config.layers}, {layer.sliding_window for layer in config.layers}
    unlike = [
        ("a bias", config.attention_bias or config.attention_output_bias or config.mlp_bias),
        ("norms of queries and keys", config.qk_norm),
        ("norms behind the layers' parts", config.sandwich_norm),
        ("a sliding window", windows != {None}),
        ("several rotary embeddings", len(ropes) > 1),
        ("partial rotation", any(rope.rotary_dim not in (None, rope.head_dim) for rope in ropes)),
        ("scaled attention", any(rope.scaling and rope.scaling.attention_factor != 1 for rope in ropes)
         or config.query_pre_attn_scalar not in (None, config.head_dim)),
        ("scaled embeddings", config.embedding_scale is not None),
        ("capped logits", bool(config.attn_logit_softcapping or config.final_logit_softcapping)),
        (f"the activation {config.hidden_act}", config.hidden_act != "silu"),
    ]
    found = [what for what, is_there in unlike if is_there]
    return f"it is written for Llama's shape, and this one has {', '.join(found)}" if found else None


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """`[out, in]` of every weight and `[D]` of every norm, by GGUF's names."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (V, D)
    for i in range(len(config.layers)):
        layer = {"attn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D),
                 "attn_output": (D, N * H), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def draw_randomly(seed: int = 0) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Weights around zero, of a spread that keeps activations finite; norms of one.

    Large tensors repeat one run of numbers, of a length that no width divides: drawing each takes minutes.
    """
    run = np.random.default_rng(seed).standard_normal(_PRIME, np.float32) * np.float32(0.02)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape, np.float32) if len(shape) == 1 else np.resize(run, shape)

    return draw


def write_gguf(path: Path, config: TransformerConfig, weight_type: str,
               draw: Callable[[str, tuple[int, ...]], np.ndarray]) -> int:
    """Writes a file that holds one tensor at a time in memory.

    Args:
        path: of the file.
        config: a shape of which `why_not` has nothing to say.
        weight_type: of `WEIGHT_TYPES`. Norms are float32, as llama.cpp wants them.
        draw: the values of a tensor, `float32` of the shape that is asked for, by its GGUF name. Rows of queries and
            keys are paired `(2i, 2i + 1)` within a head, and not as `(i, i + H / 2)`.

    Returns:
        The bytes of all tensors.
    """
    import gguf

    rope = config.layers[0].rope
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # tokens are numbers here

    shapes, type_of = tensor_shapes(config), {}
    if rope.scaling is not None:
        shapes["rope_freqs.weight"] = (config.head_dim // 2,)
    for name, shape in shapes.items():
        type_of[name] = np.dtype(WEIGHT_TYPES[weight_type] if len(shape) > 1 else np.float32)
        writer.add_tensor_info(name, shape, type_of[name], int(np.prod(shape)) * type_of[name].itemsize,
                               gguf.GGMLQuantizationType[weight_type if len(shape) > 1 else "F32"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        values = divisors_of(rope) if name == "rope_freqs.weight" else draw(name, shape)
        writer.write_tensor_data(values.astype(type_of[name]).view(np.uint8))
    writer.close()
    return sum(int(np.prod(shape)) * type_of[name].itemsize for name, shape in shapes.items())


def divisors_of(rope: RotaryEmbedding) -> np.ndarray:
    """`float32[H / 2]`: what a scaling divides each frequency by."""
    plain = RotaryEmbedding(rope.head_dim, rope.theta)
    return (plain.inv_freq / rope.inv_freq).astype(np.float32)
