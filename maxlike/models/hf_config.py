"""Reading and writing the fields of a Hugging Face `config.json`: what the families share.

Three dialects are read: files on the Hub, those of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`)
and those of transformers 5 (`rope_parameters`, `dtype`). Written is one file that both versions read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.safetensors import CheckpointError
from maxlike.nn.mlp import ACTIVATIONS
from maxlike.nn.rotary_embedding import LinearScaling, Llama3Scaling, RopeScaling, RotaryEmbedding, YarnScaling

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"
COMMON_DEFAULTS: dict[str, Any] = dict(
    head_dim=None, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0,
    bos_token_id=None, eos_token_id=None)
"""What a config without the field means, in most families."""


class ConfigReader:
    """The fields of one JSON object, checked as they are read.

    A field that is wrong is noted in `problems`, and its default is read instead, so that all that is wrong
    with a config can be said at once: `checked` raises it.

    Args:
        fields: the object.
        defaults: what missing fields mean. A field that is `null` is not missing.
        problems: where to note; of the object around this one.
        path: what stands before field names there, such as `"text_config."`.
    """

    def __init__(self, fields: Mapping[str, Any], defaults: Mapping[str, Any], problems: list[str] | None = None,
                 path: str = ""):
        self.fields, self.defaults, self.path = fields, defaults, path
        self.problems: list[str] = [] if problems is None else problems

    def problem(self, name: str, expected: str) -> None:
        """Notes that field `name` does not hold what is `expected`."""
        given = json.dumps(self.fields[name]) if name in self.fields else "missing"
        given = given if len(given) <= 120 else given[:117] + "..."
        problem = f"{self.path}{name} is {given}; expected {expected}."
        if problem not in self.problems:
            self.problems.append(problem)

    def checked(self, config: TransformerConfig) -> TransformerConfig:
        """`config`, read from here, if nothing was wrong.

        Raises:
            CheckpointError: everything that was.
        """
        if self.problems:
            raise CheckpointError(self.problems)
        return config

    def _read(self, name: str, accepts: Callable[[Any], bool], expected: str) -> Any:
        if name not in self.fields:
            return self.defaults.get(name)
        if accepts(self.fields[name]):
            return self.fields[name]
        self.problem(name, expected)
        return self.defaults.get(name)

    def integer(self, name: str) -> int:
        """A positive integer."""
        return self._read(name, lambda x: _is_integer(x) and x > 0, "a positive integer")

    def optional_integer(self, name: str) -> int | None:
        """A positive integer or null."""
        return self._read(name, lambda x: x is None or _is_integer(x) and x > 0, "a positive integer or null")

    def number(self, name: str) -> float:
        """A positive number."""
        return self._read(name, lambda x: _is_number(x) and x > 0, "a positive number")

    def optional_number(self, name: str) -> float | None:
        """A positive number or null."""
        return self._read(name, lambda x: x is None or _is_number(x) and x > 0, "a positive number or null")

    def flag(self, name: str) -> bool:
        """True or false."""
        return self._read(name, lambda x: isinstance(x, bool), "true or false")

    def choice(self, name: str, choices: Iterable[str]) -> str:
        """One of `choices`."""
        choices = tuple(choices)
        return self._read(name, lambda x: x in choices, f"one of {', '.join(choices)}")

    def section(self, name: str, defaults: Mapping[str, Any]) -> ConfigReader:
        """The object in field `name`; an empty one where it is missing or null."""
        fields = self._read(name, lambda x: x is None or isinstance(x, Mapping), "an object")
        return ConfigReader(fields or {}, defaults, self.problems, f"{self.path}{name}.")

    def refuse(self, name: str, accepted: tuple[Any, ...], why: str) -> None:
        """Notes a problem if field `name` is there and holds something else than what is `accepted`."""
        if name in self.fields and self.fields[name] not in accepted:
            self.problem(name, f"{' or '.join(map(json.dumps, accepted))} ({why})")

    def token_id(self, name: str) -> int | None:
        """A token id or null."""
        return self._read(name, lambda x: x is None or _is_integer(x), "a token id or null")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        ids = self._read(name, lambda x: x is None or _is_integer(x) or isinstance(x, list) and all(map(_is_integer, x)),
                         "a token id, a list of them, or null")
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return (_is_integer(x) or isinstance(x, float)) and math.isfinite(x)


def read_common(reader: ConfigReader, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of a `TransformerConfig` that every family states in the same way."""
    reader.refuse("quantization_config", (None,), "quantised checkpoints are not supported yet")
    hidden_size, n_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    n_kv_heads = reader.optional_integer("num_key_value_heads") or n_heads
    if n_heads % n_kv_heads:
        reader.problem("num_key_value_heads", f"a divisor of num_attention_heads, {n_heads}")
    head_dim = reader.optional_integer("head_dim")
    if head_dim is None and hidden_size % n_heads:
        reader.problem("hidden_size", f"a multiple of num_attention_heads, {n_heads}, where head_dim is not given")
    dtype_name = "torch_dtype" if reader.fields.get("dtype") is None else "dtype"
    dtypes = ("float32", "bfloat16", "float16")
    dtype = reader.fields.get(dtype_name) or "float32"
    if dtype not in dtypes:
        reader.problem(dtype_name, f"one of {', '.join(dtypes)}")
    return dict(
        vocab_size=reader.integer("vocab_size"), hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"), num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads, head_dim=head_dim or hidden_size // n_heads,
        max_position_embeddings=reader.integer("max_position_embeddings"), dtype=dtype,
        hidden_act=reader.choice(activation, ACTIVATIONS), rms_norm_eps=reader.number("rms_norm_eps"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"), bos_token_id=reader.token_id("bos_token_id"),
        eos_token_ids=reader.token_ids("eos_token_id"))


def read_rope(reader: ConfigReader, common: Mapping[str, Any]) -> RotaryEmbedding:
    """The positions of a model that has one kind of them: `rope_parameters`, or `rope_theta` and `rope_scaling`.

    Where a file has both, the older form is read, as transformers 5 does.
    """
    name = "rope_scaling" if reader.fields.get("rope_scaling") else "rope_parameters"
    outer = {field: reader.fields[field] for field in ("rope_theta", "partial_rotary_factor")
             if reader.fields.get(field) is not None}
    rope = reader.section(name, {"rope_theta": reader.defaults["rope_theta"]})
    if reader.fields.get("original_max_position_embeddings") is not None:
        rope.fields = {**rope.fields, "original_max_position_embeddings":
                       reader.fields["original_max_position_embeddings"]}
    return read_rope_section(ConfigReader({**outer, **rope.fields}, rope.defaults, rope.problems, rope.path), common)


def read_rope_section(rope: ConfigReader, common: Mapping[str, Any]) -> RotaryEmbedding:
    """A rotary embedding from one object with `rope_type`, `rope_theta` and what belongs to the type."""
    head_dim, max_positions = common["head_dim"], common["max_position_embeddings"]
    for name, value in rope.fields.items():
        if isinstance(value, Mapping):
            rope.problem(name, "no object (positions by layer type are supported in gemma3 alone)")
    rope.defaults = dict(rope_type="default", type="default", partial_rotary_factor=1.0, factor=1.0,
                         low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=max_positions,
                         truncate=True) | dict(rope.defaults)
    theta = rope.number("rope_theta")
    if theta <= 1:
        rope.problem("rope_theta", "a number above 1")
        theta = 2.0
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor"))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        rope.problem("partial_rotary_factor", "a share of head_dim that is even and at most head_dim; of "
                     f"{head_dim} this makes {rotary_dim}")
        head_dim = rotary_dim = 2
    return RotaryEmbedding(head_dim, float(theta), None if rotary_dim == head_dim else rotary_dim,
                           _read_scaling(rope, max_positions))


def _read_scaling(rope: ConfigReader, max_positions: int) -> RopeScaling | None:
    kind = rope.choice("rope_type" if "rope_type" in rope.fields else "type", ROPE_TYPES)
    if kind == "default":
        return None
    if kind == "yarn" and "factor" in rope.fields and rope.fields["factor"] is None:
        original = rope.integer("original_max_position_embeddings")
        rope.fields = {**rope.fields, "factor": max_positions / original}
    if "factor" not in rope.fields:
        rope.problem("factor", f"a positive number, which rope type {kind} needs")
    factor = float(rope.number("factor"))
    if kind == "linear":
        return LinearScaling(factor)
    original = rope.integer("original_max_position_embeddings")
    if kind == "yarn":
        return YarnScaling(
            factor, original, beta_fast=float(rope.optional_number("beta_fast") or 32.0),
            beta_slow=float(rope.optional_number("beta_slow") or 1.0),
            explicit_attention_factor=rope.optional_number("attention_factor"),
            mscale=rope.optional_number("mscale"), mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate=rope.flag("truncate"))
    for name in ("low_freq_factor", "high_freq_factor"):
        if name not in rope.fields:
            rope.problem(name, "a positive number, which rope type llama3 needs")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        rope.problem("high_freq_factor", f"a number above low_freq_factor, {low}")
    return Llama3Scaling(factor, float(low), float(high), original)


def read_layers(reader: ConfigReader, default_types: Sequence[str], ropes: Mapping[str, RotaryEmbedding],
                sliding_window: int | None) -> tuple[LayerConfig, ...]:
    """One `LayerConfig` a layer, by `layer_types`; where the file has none, `default_types`.

    Args:
        default_types: `"full_attention"` or `"sliding_attention"`, one a layer.
        ropes: the positions of each of the two.
        sliding_window: of the second.
    """
    types = reader.fields.get("layer_types")
    if types is None:
        types = default_types
    elif not isinstance(types, list) or len(types) != len(default_types) or any(t not in (FULL, SLIDING) for t in types):
        reader.problem("layer_types", f"{len(default_types)} (num_hidden_layers) times {FULL} or {SLIDING}")
        types = default_types
    if SLIDING in types and sliding_window is None:
        reader.problem("sliding_window", f"a positive integer, in use, since there are layers of {SLIDING}")
    return tuple(LayerConfig(ropes[t], sliding_window if t == SLIDING else None) for t in types)


def write_common(config: TransformerConfig, architecture: str, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The `config.json` fields of `read_common`, and `model_type` and `architectures`."""
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        activation: config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # transformers 4
    }


def write_rope(rope: RotaryEmbedding) -> dict[str, Any]:
    """The `config.json` fields of `read_rope`, in the form of transformers 4 and in that of 5."""
    parameters = write_rope_section(rope)
    scaling = {name: value for name, value in parameters.items()
               if name not in ("rope_theta", "partial_rotary_factor")}
    partial = {name: parameters[name] for name in ("partial_rotary_factor",) if name in parameters}
    return {"rope_theta": rope.theta, **partial, "rope_scaling": scaling if rope.scaling is not None else None,
            "rope_parameters": parameters}


def write_rope_section(rope: RotaryEmbedding) -> dict[str, Any]:
    """The object of `read_rope_section`."""
    section: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.rotary_dim is not None:
        share = rope.rotary_dim / rope.head_dim
        # Readers take int(head_dim * share), which must not land just below.
        section["partial_rotary_factor"] = (
            share if int(rope.head_dim * share) == rope.rotary_dim else math.nextafter(share, 1.0))
    match rope.scaling:
        case LinearScaling(factor):
            section |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            section |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                        "original_max_position_embeddings": original}
        case YarnScaling() as yarn:
            optional = {"attention_factor": yarn.explicit_attention_factor, "mscale": yarn.mscale,
                        "mscale_all_dim": yarn.mscale_all_dim}
            section |= {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast,
                        "beta_slow": yarn.beta_slow, "truncate": yarn.truncate,
                        "original_max_position_embeddings": yarn.original_max_position_embeddings,
                        **{name: value for name, value in optional.items() if value is not None}}
    return section


def layer_types(config: TransformerConfig) -> list[str]:
    """`"sliding_attention"` for layers with a window, `"full_attention"` for the others."""
    return [FULL if layer.sliding_window is None else SLIDING for layer in config.layers]


def common_window(config: TransformerConfig) -> int | None:
    """The window of those layers that have one; `None` without any."""
    return next((layer.sliding_window for layer in config.layers if layer.sliding_window is not None), None)
