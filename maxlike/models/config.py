"""One description of a decoder-only transformer, which every model family's `config.json` is parsed into.

A family is data: layers never ask for a model's name. What families differ in is a field here.
"""

from __future__ import annotations

from dataclasses import dataclass

from maxlike.nn.rotary_embedding import RotaryEmbedding


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer.

    Args:
        rope: this layer's positions.
        sliding_window: tokens that a token sees, itself included; `None`: all.
    """

    rope: RotaryEmbedding
    sliding_window: int | None = None


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer, by the names of Hugging Face configs where they have one.

    Args:
        model_type: of the text model (`gemma3_text` for a `gemma3`); chooses the family when saving.
        vocab_size, hidden_size, intermediate_size: V, D and F.
        num_attention_heads, num_key_value_heads, head_dim: N, K and H.
        layers: one entry a layer.
        dtype: as the checkpoint states it: `"float32"`, `"bfloat16"`, `"float16"`.
        hidden_act: a name in `maxlike.nn.mlp.ACTIVATIONS`.
        rms_norm_eps: of all norms.
        tie_word_embeddings: the head's weight is the embedding's.
        query_pre_attn_scalar: scores are scaled by its `-0.5`th power; `None`: by `head_dim`'s.
        attention_bias, attention_output_bias, mlp_bias: whether those products have one.
        qk_norm: an RMS norm over each query and key head.
        norm_weight_offset: 1 where norm weights are stored around zero (Gemma).
        sandwich_norm: norms also behind attention and MLP (Gemma).
        embedding_scale: what embedding rows are multiplied by; `None`: nothing.
        attn_logit_softcapping, final_logit_softcapping: `cap * tanh(x / cap)` on scores and logits; `None`: none.
        max_position_embeddings: longest sequence, in tokens.
        bos_token_id: begins a text; `None`: there is none.
        eos_token_ids: any of these ends a text.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position_embeddings: int
    dtype: str = "float32"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_weight_offset: float = 0.0
    sandwich_norm: bool = False
    embedding_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
