"""Models from Hugging Face folders: configs, key maps, weights, tokenizers.

- `maxlike.models.config`: what a model is, apart from any file; `maxlike.models.build` makes one of it.
- `maxlike.models.registry`: `config.json` to a `TransformerConfig`, by `model_type`. A family is a file:
  `maxlike.models.llama`, `maxlike.models.mistral`, `maxlike.models.qwen2`, `maxlike.models.qwen3`,
  `maxlike.models.gemma3`; `maxlike.models.family` and `maxlike.models.hf_config` are what they are written with.
- `maxlike.models.checkpoint`: weights in and out, through `maxlike.models.safetensors`; `maxlike.models.kv_scales`:
  the scales of narrow KV caches; `maxlike.models.peft`: LoRA adapters.
- `maxlike.models.hub`: from a hub id to a folder.
- `maxlike.models.tokenizer`: text, chats and tokens; `maxlike.models.text_stream`: text while tokens come in.
"""

from maxlike.models.build import build_model
from maxlike.models.checkpoint import load, save_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.peft import add_adapter, load_adapter, save_adapter
from maxlike.models.registry import parse_config

__all__ = ["LayerConfig", "TransformerConfig", "add_adapter", "build_model", "load", "load_adapter", "parse_config",
           "save_adapter", "save_model"]
