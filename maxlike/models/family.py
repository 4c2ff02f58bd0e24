"""What a model family is: how its config is read and written, and what its parameters are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maxlike.models.config import TransformerConfig

MODEL_KEYS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "output.layer": "lm_head",  # under a soft cap
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LAYER_KEYS = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
}
_ROPE_BUFFER = re.compile(r"(^|\.)rotary_emb\w*\.\w*inv_freq$")  # older checkpoints hold it; it follows from the config


@dataclass(frozen=True)
class Family:
    """A model family, as data.

    Args:
        model_types: of the `config.json` files that it reads.
        parse: `config.json` to `TransformerConfig`; raises `CheckpointError` with all that is wrong with it.
        unparse: and back.
        layer_keys: module inside a layer, here to Hugging Face; the longest that fits counts.
        prefixes: what may stand before `layers.0...` in a checkpoint, longer ones first.
        heads: what the head may be called there.
        ignored: beginnings of names that are not ours to load.
    """

    model_types: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], TransformerConfig]
    unparse: Callable[[TransformerConfig], dict[str, Any]]
    layer_keys: Mapping[str, str]
    prefixes: tuple[str, ...] = ("model.", "")
    heads: tuple[str, ...] = ("lm_head.",)
    ignored: tuple[str, ...] = ()


def hf_name(family: Family, name: str) -> str:
    """The Hugging Face name of parameter `name`.

    `layers.3.attention.q_proj.weight` is `model.layers.3.self_attn.q_proj.weight`; `output.weight` is
    `lm_head.weight`.
    """
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    prefix, rest, keys = ((f"model.layers.{layer[1]}.", layer[2], family.layer_keys) if layer
                          else ("", name, MODEL_KEYS))
    fitting = [module for module in keys if rest.startswith(module + ".")]
    assert fitting, f"no family has a parameter {name}"
    module = max(fitting, key=len)
    return prefix + keys[module] + rest[len(module):]


def canonical_names(family: Family, names: Iterable[str], *, tied: bool = False) -> dict[str, str]:
    """Names in a checkpoint to those that `hf_name` gives: `{stored: canonical}`.

    Checkpoints differ in prefix: of the model with its head (`model.layers.0...`), of the model without
    (`layers.0...`), of a larger model around it (`language_model.model.layers.0...`). Left out are what the family
    ignores, buffers that follow from the config, and, with `tied` embeddings, the head (which stands in for the
    embedding where only the head is stored). Names that no model has stay as they are, for the loader to complain
    about, as it does about two that mean the same.
    """
    canonical = {name: _canonical_name(family, name) for name in names
                 if not (name.startswith(family.ignored) or _ROPE_BUFFER.search(name))}
    if not tied:
        return canonical
    stands_in = EMBEDDING not in canonical.values()
    return {name: EMBEDDING if target == HEAD else target for name, target in canonical.items()
            if target != HEAD or stands_in}


def _canonical_name(family: Family, name: str) -> str:
    for prefix in family.prefixes:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest.startswith(("layers.", "embed_tokens.", "norm.")):
            return "model." + rest
    for head in family.heads:
        if name.startswith(head):
            return "lm_head." + name.removeprefix(head)
    return name
