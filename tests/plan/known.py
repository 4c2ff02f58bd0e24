"""Published models, and their bytes worked out by hand from `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = {file.stem: file for folder in (HERE.parent / "models" / "configs", HERE / "configs")
           for file in folder.glob("*.json")}
PLANS = [("llama-3.1-8b", "v5e:2x4"), ("llama-3.1-70b", "v6e:4x4"), ("llama-3.1-70b", "v5p:2x2x4"),
         ("llama-3.1-405b", "v5p:4x4x8"), ("qwen3-32b", "v6e:2x4"), ("gemma-3-27b-it", "v6e:2x4")]
"""Models and the slices that each is planned for."""
PUBLISHED = {"llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.55e9, "llama-3.1-405b": 405.85e9, "qwen3-32b": 32.76e9,
             "gemma-3-27b-it": 27.01e9}
"""Parameters, as the models' pages count them; of Gemma those of its text part."""


@dataclass(frozen=True)
class ByHand:
    """Bytes on each of `tp` devices, in bfloat16."""

    weights: float
    cache_of_a_token: float


def by_hand(name: str, tp: int) -> ByHand:
    """Counted from the file: attention, MLP, embedding and head, cut in `tp`, KV heads as far as there are."""
    fields: dict[str, Any] = json.loads(CONFIGS[name].read_text())
    fields = fields.get("text_config", fields)
    # What the file of Gemma leaves out, by the model's report.
    defaults = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208,
                "num_hidden_layers": 62, "tie_word_embeddings": name.startswith("gemma")}
    D, F, V, L, N, K = (fields.get(key, defaults.get(key)) for key in (
        "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads"))
    H = fields.get("head_dim", defaults["head_dim"] if name.startswith("gemma") else D // N)
    tied = fields.get("tie_word_embeddings", defaults["tie_word_embeddings"])
    each = min(tp, K)
    layer = 2 * D * N * H / tp + 2 * D * K * H / each + 3 * D * F / tp
    return ByHand(2 * (L * layer + V * D * (1 if tied else 2) / tp), L * K / each * 2 * H * 2)
