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

DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"
COMMON_DEFAULTS: dict[str, Any] = dict(
    head_dim=None, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0,
    partial_rotary_factor=1.0, bos_token_id=None, eos_token_id=None, dtype="float32", torch_dtype="float32")
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
        self.note(f"{self.path}{name} is {given}; expected {expected}.")

    def note(self, problem: str) -> None:
        """Notes a problem of several fields together."""
        if problem not in self.problems:  # fields are read more than once
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
        return self._read(name, lambda x: x is None or (_is_integer(x) and x > 0), "a positive integer or null")

    def count(self, name: str) -> int:
        """An integer that is not negative."""
        return self._read(name, lambda x: _is_integer(x) and x >= 0, "an integer, at least 0")

    def number(self, name: str, above: float = 0) -> float:
        """A number above `above`."""
        expected = f"a number above {above}" if above else "a positive number"
        return self._read(name, lambda x: _is_number(x) and x > above, expected)

    def optional_number(self, name: str) -> float | None:
        """A positive number or null."""
        return self._read(name, lambda x: x is None or (_is_number(x) and x > 0), "a positive number or null")

    def flag(self, name: str) -> bool:
        """True or false."""
        return self._read(name, lambda x: isinstance(x, bool), "true or false")

    def choice(self, name: str, choices: Iterable[str]) -> str:
        """One of `choices`."""
        choices = tuple(choices)
        return self._read(name, lambda x: x in choices, f"one of {', '.join(choices)}")

    def section(self, name: str, defaults: Mapping[str, Any]) -> ConfigReader:
        """The object in field `name`; an empty one where it is missing or null."""
        fields: Mapping[str, Any] | None = self._read(name, lambda x: x is None or isinstance(x, Mapping), "an object")
        return ConfigReader(fields or {}, defaults, self.problems, f"{self.path}{name}.")

    def refuse(self, name: str, why: str) -> None:
        """Notes a problem if field `name` holds anything but null or false."""
        if self.fields.get(name) not in (None, False):
            self.problem(name, f"none: {why}")

    def require(self, names: Iterable[str], why: str) -> None:
        """Notes a problem for each field that is missing."""
        for name in names:
            if name not in self.fields:
                self.problem(name, f"a number, which {why} needs")

    def token_id(self, name: str) -> int | None:
        """A token id or null."""
        return self._read(name, lambda x: x is None or _is_integer(x), "a token id or null")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        def accepts(x: Any) -> bool:
            return x is None or _is_integer(x) or (isinstance(x, list) and all(map(_is_integer, x)))

        ids = self._read(name, accepts, "a token id, a list of them, or null")
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return (_is_integer(x) or isinstance(x, float)) and abs(x) < 1e300  # JSON as Python reads it has NaN and Infinity


def _quantises_the_cache_alone(quantization: Any) -> bool:
    """Whether it has float8 scales for a KV cache, and nothing to say about weights (compressed-tensors writes so)."""
    match quantization:
        case {"kv_cache_scheme": {"type": "float", "num_bits": 8}}:
            return not quantization.get("config_groups")
    return False


def read_common(reader: ConfigReader, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of a `TransformerConfig` that every family states in the same way."""
    if not _quantises_the_cache_alone(reader.fields.get("quantization_config")):
        reader.refuse("quantization_config", "quantised checkpoints are not supported yet")
    hidden_size, n_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    n_kv_heads = reader.optional_integer("num_key_value_heads") or n_heads
    if n_heads % n_kv_heads:
        reader.problem("num_key_value_heads", f"a divisor of num_attention_heads, {n_heads}")
    head_dim = reader.optional_integer("head_dim")
    if head_dim is None and hidden_size % n_heads:
        reader.problem("hidden_size", f"a multiple of num_attention_heads, {n_heads}, where head_dim is not given")
    stated = [name for name in ("dtype", "torch_dtype") if reader.fields.get(name) is not None]
    dtype = reader.choice(stated[0], DTYPES) if stated else "float32"
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
    section = reader.section(
        "rope_scaling" if reader.fields.get("rope_scaling") else "rope_parameters",
        rope_defaults(common, reader.number("rope_theta", above=1), reader.number("partial_rotary_factor"))
        | {"original_max_position_embeddings": reader.optional_integer("original_max_position_embeddings")
           or common["max_position_embeddings"]})
    return read_rope_section(section, common)


def rope_defaults(common: Mapping[str, Any], theta: float, partial_rotary_factor: float = 1.0) -> dict[str, Any]:
    """What missing fields of a rope's section mean."""
    return dict(rope_theta=theta, partial_rotary_factor=partial_rotary_factor, rope_type="default", type="default",
                factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, truncate=True,
                original_max_position_embeddings=common["max_position_embeddings"])


def read_rope_section(section: ConfigReader, common: Mapping[str, Any]) -> RotaryEmbedding:
    """A rotary embedding from one object with `rope_type`, `rope_theta` and what belongs to the type."""
    for name, value in section.fields.items():
        if isinstance(value, Mapping):
            section.problem(name, "no object here: only gemma3 has positions by layer type")
    theta, scaling = float(section.number("rope_theta", above=1)), _read_scaling(section, common)
    head_dim, share = common["head_dim"], section.number("partial_rotary_factor")
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        section.note(f"head_dim {head_dim} and partial_rotary_factor {share} make {rotary_dim} rotated dimensions; "
                     "expected an even number, at most head_dim.")
        return RotaryEmbedding(2)
    return RotaryEmbedding(head_dim, theta, None if rotary_dim == head_dim else rotary_dim, scaling)


def _read_scaling(section: ConfigReader, common: Mapping[str, Any]) -> RopeScaling | None:
    kind = section.choice("rope_type" if "rope_type" in section.fields else "type", ROPE_TYPES)
    if kind == "default":
        return None
    original = section.integer("original_max_position_embeddings")
    section.require(["factor"], f"rope_type {kind}")
    if kind == "linear":
        return LinearScaling(float(section.number("factor")))
    if kind == "yarn":
        factor = section.optional_number("factor") or common["max_position_embeddings"] / original
        return YarnScaling(
            float(factor), original, beta_fast=float(section.optional_number("beta_fast") or 32),
            beta_slow=float(section.optional_number("beta_slow") or 1),
            explicit_attention_factor=section.optional_number("attention_factor"),
            mscale=section.optional_number("mscale"), mscale_all_dim=section.optional_number("mscale_all_dim"),
            truncate=section.flag("truncate"))
    section.require(["low_freq_factor", "high_freq_factor"], f"rope_type {kind}")
    low, high = float(section.number("low_freq_factor")), float(section.number("high_freq_factor"))
    if low >= high:
        section.problem("high_freq_factor", f"a number above low_freq_factor, {low}")
    return Llama3Scaling(float(section.number("factor")), low, high, original)


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
    elif (not isinstance(types, list) or len(types) != len(default_types)
          or any(kind not in (FULL, SLIDING) for kind in types)):
        reader.problem("layer_types", f"{len(default_types)} (num_hidden_layers) times {FULL} or {SLIDING}")
        types = default_types
    if SLIDING in types and sliding_window is None:
        reader.note(f"{reader.path}sliding_window is not in use, but there are layers of {SLIDING}; "
                    "expected a positive integer.")
    return tuple(LayerConfig(ropes[t], sliding_window if t == SLIDING else None) for t in types)


def write_common(config: TransformerConfig, architecture: str, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The `config.json` fields of `read_common`, and `model_type` and `architectures`."""
    eos = config.eos_token_ids
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
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # transformers 4
    }


def write_rope(rope: RotaryEmbedding) -> dict[str, Any]:
    """The `config.json` fields of `read_rope`, in the form of transformers 4 and in that of 5."""
    parameters = write_rope_section(rope)
    scaling: dict[str, Any] = dict(parameters)
    outside: dict[str, Any] = {name: scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor")
                               if name in parameters}
    return {**outside, "rope_scaling": None if rope.scaling is None else scaling, "rope_parameters": parameters}


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


def sliding_window(config: TransformerConfig) -> int | None:
    """The window of those layers that have one; `None` without any."""
    return next((layer.sliding_window for layer in config.layers if layer.sliding_window is not None), None)
