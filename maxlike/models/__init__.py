"""Models from Hugging Face folders: configs, key maps, weights, tokenizers."""

from maxlike.models.build import build_model
from maxlike.models.checkpoint import load, save_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.peft import add_adapter, load_adapter, save_adapter
from maxlike.models.registry import parse_config

__all__ = ["LayerConfig", "TransformerConfig", "add_adapter", "build_model", "load", "load_adapter", "parse_config",
           "save_adapter", "save_model"]
