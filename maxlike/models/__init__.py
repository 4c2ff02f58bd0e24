"""Models from Hugging Face folders: configs, key maps, weights, tokenizers."""

from maxlike.models.build import build_model
from maxlike.models.checkpoint import load, save_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.registry import parse_config

__all__ = ["LayerConfig", "TransformerConfig", "build_model", "load", "parse_config", "save_model"]
