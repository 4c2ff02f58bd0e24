"""What a model family is: how its config is read and written, and what its parameters are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maxlike.models.config import TransformerConfig
from maxlike.models.safetensors import CheckpointError

MODEL_KEYS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "output.layer": "lm_head",  # under a soft cap
}
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
        prefixes: what may stand before `layers.0...` in a checkpoint. Longer ones first.
        ignored: names that start so are not ours to load.
    """

    model_types: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], TransformerConfig]
    unparse: Callable[[TransformerConfig], dict[str, Any]]
    layer_keys: Mapping[str, str]
    prefixes: tuple[str, ...] = ("model.", "")
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


def canonical_names(family: Family, names: Iterable[str], *, tied: bool) -> dict[str, str]:
    """Names in a checkpoint to those that `hf_name` gives, without what is not to be loaded.

    Checkpoints differ in prefix: of the model with its head (`model.layers.0...`), of the model without
    (`layers.0...`), of a larger model around it (`language_model.model.layers.0...`). Left out are what the family
    ignores, buffers that follow from the config, and the head of a model with `tied` embeddings. Names that no
    model has stay as they are, for the loader to complain about.

    Raises:
        CheckpointError: two names for one parameter.
    """
    canonical: dict[str, str] = {}
    for name in names:
        if name.startswith(family.ignored) or _ROPE_BUFFER.search(name):
            continue
        target = _canonical_name(family, name)
        if not (tied and target == "lm_head.weight"):
            canonical[name] = target
    sources: dict[str, list[str]] = {}
    for name, target in canonical.items():
        sources.setdefault(target, []).append(name)
    doubled = [f"{' and '.join(sorted(given))} are both {target}." for target, given in sources.items() if given[1:]]
    if doubled:
        raise CheckpointError(doubled)
    return canonical


def _canonical_name(family: Family, name: str) -> str:
    for prefix in family.prefixes:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest.startswith(("layers.", "embed_tokens.", "norm.")):
            return "model." + rest
    heads = [prefix.removesuffix("model.") + "lm_head." for prefix in family.prefixes]
    fitting = next((head for head in heads if name.startswith(head)), None)
    return name if fitting is None else "lm_head." + name.removeprefix(fitting)
