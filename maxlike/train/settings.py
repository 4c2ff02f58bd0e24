"""Frozen dataclasses from YAML and from flags: one field, one key, one flag.

A field `every_steps` of a section `log` is `log: {every_steps: ...}` in a file and `--log-every-steps` on the command
line; of sections that need no name before their fields', `--every-steps`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import yaml

Config = TypeVar("Config")


@dataclass(frozen=True)
class Setting:
    """One field of a tree of dataclasses.

    Args:
        key: dotted, as `optimizer.learning_rate`.
        kind: its type.
        default: what it is where nothing is said; `dataclasses.MISSING` for none.
        help: what its class's docstring says of it.
    """

    key: str
    kind: Any
    default: Any
    help: str

    @property
    def section(self) -> str:
        """What stands before the last dot."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """What stands behind it."""
        return self.key.rpartition(".")[2]


def settings_of(kind: type, before: str = "") -> Iterator[Setting]:
    """All fields of a dataclass, those of the dataclasses in it in their place."""
    helps = _argument_docs(kind)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if section := _dataclass_in(hints[field.name]):
            yield from settings_of(section, f"{before}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Setting(before + field.name, hints[field.name], default, helps.get(field.name, ""))


def build(kind: type[Config], values: Mapping[str, Any], before: str = "") -> Config:
    """A `kind` with these values, its other fields as they are by default.

    A section that may be `None` is so unless a value is given for something in it.

    Raises:
        ValueError: a key is unknown (names the nearest), a value is of the wrong kind or missing, or the dataclass
            itself refuses it.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{before.rstrip('.') or 'The configuration'} must be a mapping of settings; got {values!r}.")
    for key in values:
        if key not in hints:
            known = [setting.key for setting in settings_of(kind, before)]
            raise ValueError(f"There is no setting {before}{key}{nearest(f'{before}{key}', known)}.")
    given: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, kind)):
        key, hint = before + field.name, hints[field.name]
        section = _dataclass_in(hint)
        if section is None:
            if field.name in values:
                given[field.name] = _converted(values[field.name], hint, key)
        elif values.get(field.name) is not None:
            given[field.name] = build(section, values[field.name], f"{key}.")
        elif section is hint:
            given[field.name] = build(section, {}, f"{key}.")
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{key} is missing: it has no default.")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{before.rstrip('.')}: {error}" if before else str(error)) from error


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The settings in a YAML file's text. Raises `ValueError` where it is no YAML, or no mapping."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{source} must hold settings, as `output: folder`; got {type(values).__name__}.")
    return values or {}


def write_yaml(config: Any) -> str:
    """A configuration as the YAML that `build` reads."""
    return yaml.safe_dump(as_json(config), sort_keys=False)


def as_json(config: Any) -> Any:
    """A configuration as plain mappings, lists and values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def add_flags(parser: argparse.ArgumentParser, kind: type, plain: Collection[str] = (),
              names: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """A flag for each setting of `kind`, in a group for each section; `merged` reads them.

    Args:
        plain: sections whose settings need no `--section-` before their name.
        names: setting -> its flag, where that is another.
    """
    groups: dict[str, Any] = {}
    for setting in settings_of(kind):
        section = setting.section
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        spelling = setting.name if section in plain else setting.key
        flag = names.get(setting.key, "--" + spelling.replace(".", "-").replace("_", "-"))
        options: dict[str, Any] = dict(dest=setting.key, default=argparse.SUPPRESS, help=_help(setting))
        if _is_bool(setting.kind):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(setting)
            if _is_sequence(setting.kind):
                options["nargs"] = "+"
        groups[section].add_argument(flag, **options)


def _metavar(setting: Setting) -> str:
    for part in _options(setting.kind):
        if typing.get_origin(part) is Literal:
            return "{" + ",".join(map(str, typing.get_args(part))) + "}"
    return {int: "N", float: "X"}.get(_options(setting.kind)[0], setting.name.upper())


def merged(values: Mapping[str, Any], args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The settings of a file, those given by flags in their place."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for setting in settings_of(kind):
        if not hasattr(args, setting.key):
            continue
        here = result
        for part in setting.section.split(".") if setting.section else []:
            inner = here.get(part)
            here[part] = dict(inner) if isinstance(inner, dict) else {}
            here = here[part]
        here[setting.name] = value = getattr(args, setting.key)
        if isinstance(value, list) and len(value) == 1 and str in _options(setting.kind) and (
                not re.fullmatch(r"[\w.]+", value[0])):
            here[setting.name] = value[0]  # a word or pattern in place of a list of names
    return result


def nearest(name: str, known: Sequence[str]) -> str:
    """`"; did you mean ...?"` or `""`: for the end of a message about a name that is not known."""
    last = {key.rpartition(".")[2]: key for key in known}
    found = difflib.get_close_matches(name, known, 1) or [
        last[near] for near in difflib.get_close_matches(name.rpartition(".")[2], list(last), 1)]
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(known)}"


def _options(kind: Any) -> list[Any]:
    """The types that a union consists of, `None` left out; of another type, itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [part for part in typing.get_args(kind) if part is not type(None)]
    return [kind]


def _dataclass_in(kind: Any) -> Any:
    return next((part for part in _options(kind) if dataclasses.is_dataclass(part)), None)


def _is_bool(kind: Any) -> bool:
    return bool in _options(kind)


def _is_sequence(kind: Any) -> bool:
    return any(typing.get_origin(part) in (tuple, list, Sequence) for part in _options(kind))


def _converted(value: Any, kind: Any, key: str) -> Any:
    parts = _options(kind)
    if kind is Any:
        return value
    may_be_none = type(None) in typing.get_args(kind)
    if value is None or (may_be_none and isinstance(value, str) and value.lower() in ("none", "null")):
        if not may_be_none:
            raise ValueError(f"{key} needs a value; got none.")
        return None
    for part in parts:
        try:
            return _as(value, part, key)
        except (TypeError, ValueError, KeyError, AttributeError):
            continue
    raise ValueError(f"{key} must be {' or '.join(map(_word, parts))}; got {value!r}.")


def _as(value: Any, kind: Any, key: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value in typing.get_args(kind):
            return value
        raise ValueError
    if origin in (tuple, list, Sequence):
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_as(item, typing.get_args(kind)[0], key) for item in items)
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        found = json.loads(value) if isinstance(value, str) else value
        if not isinstance(found, dict):
            raise TypeError
        return found
    if kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        return value if isinstance(value, bool) else words[value.lower()]
    if isinstance(value, bool | list | dict):
        raise TypeError
    if kind is int and isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    if kind is str and not isinstance(value, str):
        return str(value)  # a folder may be called 1
    return kind(value)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if _is_sequence(kind):
        return f"a list of {_word(typing.get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, "a mapping")


def _help(setting: Setting) -> str:
    default = setting.default
    told = "" if default is dataclasses.MISSING or default in (None, "", ()) else (
        f" (default {'yes' if default is True else 'no' if default is False else default})")
    return f"{setting.help}{told}".replace("%", "%%")


def _argument_docs(kind: type) -> dict[str, str]:
    """What the `Args:` of a docstring say of each."""
    doc = inspect.cleandoc(kind.__doc__ or "")
    body = doc.partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): ((?:.*\n?)(?:^        .*\n?)*)", body, re.MULTILINE):
        for name in names.split(", "):
            found[name] = " ".join(text.split()).rstrip(".").replace("`", "")
    return found
