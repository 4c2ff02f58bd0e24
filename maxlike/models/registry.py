"""The model families there are. To add one: a file beside this one with a `Family` (see `family.py`), and its line
here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from maxlike.models import gemma3, llama, mistral, qwen2, qwen3
from maxlike.models.config import TransformerConfig
from maxlike.models.family import Family
from maxlike.models.hf_config import ConfigReader
from maxlike.models.safetensors import CheckpointError

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY)


def family_of(config_json: Mapping[str, Any]) -> Family:
    """The family that reads a `config.json`.

    Raises:
        ValueError: `model_type` is missing or none of ours; lists those that are.
    """
    model_type = config_json.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    given = f"model_type {json.dumps(model_type)} is not supported" if "model_type" in config_json else "no model_type"
    raise ValueError(f"{given}; supported are {supported}.")


def parse_config(folder: Path) -> tuple[TransformerConfig, dict[str, Any]]:
    """The model described by a folder's `config.json`, and that file's contents.

    The tokens that end a text are taken from `generation_config.json` where it names any.

    Raises:
        ValueError: a file is missing or unreadable, the model is not supported, or fields are wrong: all of them.
    """
    config, config_json = parse_config_file(folder / "config.json")
    generation_file = folder / "generation_config.json"
    if generation_file.exists():
        reader = ConfigReader(read_object(generation_file), {})
        eos_token_ids = reader.token_ids("eos_token_id")
        if reader.problems:
            raise CheckpointError(f"{generation_file}: {problem}" for problem in reader.problems)
        config = replace(config, eos_token_ids=eos_token_ids or config.eos_token_ids)
    return config, config_json


def parse_config_file(file: Path) -> tuple[TransformerConfig, dict[str, Any]]:
    """As `parse_config`, of a `config.json` under whatever name, alone.

    Raises:
        ValueError: as `parse_config`.
    """
    config_json = read_object(file)
    try:
        return family_of(config_json).parse(config_json), config_json
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {problem}" for problem in error.problems) from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def unparse_config(config: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a model, readable by transformers 4 and 5.

    Raises:
        ValueError: the model's family has no word for something in `config`; names it.
    """
    family = family_of({"model_type": config.model_type})
    config_json = family.unparse(config)
    read = family.parse(config_json)
    lost = [field.name for field in fields(config) if getattr(read, field.name) != getattr(config, field.name)]
    if lost:
        raise ValueError(f"A config.json of model_type {config.model_type} cannot state this model's "
                         + "; ".join(f"{name} {getattr(config, name)!r}" for name in lost) + ".")
    return config_json


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises `ValueError` where it is not there, or is no JSON object."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is not JSON: {error}.") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds {type(contents).__name__}, not a JSON object.")
    return contents
