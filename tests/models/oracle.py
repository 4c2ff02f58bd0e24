"""Random checkpoints written by `transformers`, and what it computes from them: the oracle of the parity tests.

Importing this module imports torch and transformers: tests do so inside `pytest.importorskip`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

torch.set_num_threads(1)  # on matrices as small as these, threads only wait for each other


def random_model(model_type: str, seed: int = 0, **config: Any) -> transformers.PreTrainedModel:
    """A float32 model with eager attention, every parameter drawn anew.

    `transformers` begins with biases of zero, norm weights of one and products so small that attention is all but
    uniform: a loader that forgot any of these, or a rope that was off, would pass. Logits stay below about 20.
    """
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model(model_type, **config)
    auto = transformers.AutoModelForImageTextToText if model_type == "gemma3" else transformers.AutoModelForCausalLM
    model = auto.from_config(settings, attn_implementation="eager", dtype=torch.float32).eval()
    norm_center = 0.0 if model_type.startswith("gemma3") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "multi_modal_projector" in name:
                continue
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 1:
                parameter.uniform_(norm_center - 0.5, norm_center + 0.5)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    return model


def save_as_llama(phi: transformers.PreTrainedModel, folder: Path) -> None:
    """Writes a Phi-3 as a Llama: the same network but for two products that Phi-3 has fused."""
    settings = phi.config
    head_dim = settings.hidden_size // settings.num_attention_heads
    heads = dict(q=settings.num_attention_heads, k=settings.num_key_value_heads, v=settings.num_key_value_heads)
    tensors = {}
    for name, tensor in phi.state_dict().items():
        if name.endswith("qkv_proj.weight"):
            parts = tensor.split([n * head_dim for n in heads.values()])
            tensors |= {name.replace("qkv", part): rows.clone() for part, rows in zip(heads, parts, strict=True)}
        elif name.endswith("gate_up_proj.weight"):
            parts = tensor.chunk(2)
            tensors |= {name.replace("gate_up", part): rows.clone()
                        for part, rows in zip(("gate", "up"), parts, strict=True)}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**settings.to_dict(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def greedy(model: transformers.PreTrainedModel, prompt: Sequence[int], n: int) -> list[int]:
    """The `n` tokens that `transformers` continues `prompt` with, through its own cache, never stopping."""
    ids = torch.tensor([list(prompt)])
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=n, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    tokens = out[0, len(prompt):].tolist()
    assert len(tokens) == n, f"transformers stopped after {len(tokens)} of {n} tokens"
    return tokens


def all_logits(model: transformers.PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """`float32[len(tokens), V]`, by one forward pass without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()


def load(folder: Path) -> transformers.PreTrainedModel:
    """What `transformers` makes of a checkpoint folder, in float32 with eager attention. It must miss nothing there."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()
