"""One field, one key, one flag."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

import pytest

from maxlike.train.config import TrainConfig
from maxlike.train.settings import add_flags, build, merged, read_yaml, settings_of, write_yaml


@dataclass(frozen=True)
class Engine:
    """An engine.

    Args:
        power: of it, in
            kilowatts.
        kind, fuel: what it burns, and how.
    """

    power: float
    kind: Literal["diesel", "petrol", "none"] = "diesel"
    fuel: str | None = None
    gears: Sequence[int] = (1, 2)

    def __post_init__(self) -> None:
        if self.power < 0:
            raise ValueError("power must be at least 0")


@dataclass(frozen=True)
class Radio:
    """A radio."""

    stations: str | tuple[str, ...] = "all"
    loud: bool = False
    names: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Car:
    """A car.

    Args:
        owner: who has it.
    """

    owner: str
    engine: Engine
    radio: Radio | None = None
    power: int = 3


def by_flags(*argv: str, file: str = "") -> Car:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, Car, ["radio"], {"engine.power": "--kw"})
    return build(Car, merged(read_yaml(file, "car.yaml"), parser.parse_args(argv), Car))


def test_flags_and_file_say_the_same() -> None:
    expected = Car("me", Engine(1e-4, "petrol", None, (3, 4)), Radio(("a", "b"), True, {"a": 1}), 7)
    assert by_flags("--owner", "me", "--kw", "1e-4", "--engine-kind", "petrol", "--engine-gears", "3", "4",
                    "--stations", "a", "b", "--loud", "--names", '{"a": 1}', "--power", "7") == expected
    text = ("owner: me\nengine: {power: 1e-4, kind: petrol, fuel: none, gears: [3, 4]}\n"
            "radio: {stations: [a, b], loud: yes, names: {a: 1}}\npower: 7.0\n")
    assert by_flags(file=text) == expected
    assert build(Car, read_yaml(write_yaml(expected), "again")) == expected
    changed = by_flags("--no-loud", "--engine-fuel", "tar", file=text)  # the others stay as the file has them
    assert changed == Car("me", Engine(1e-4, "petrol", "tar", (3, 4)), Radio(("a", "b"), False, {"a": 1}), 7)
    assert by_flags("--engine-kind", "none", "--engine-fuel", "none", file=text).engine == Engine(
        1e-4, "none", None, (3, 4))


def test_a_section_that_is_not_named_is_not_there() -> None:
    text = "owner: me\nengine: {power: 2}"
    assert by_flags(file=text) == Car("me", Engine(2.0)) and by_flags(file=text).radio is None
    assert by_flags("--loud", file=text).radio == Radio(loud=True)
    assert by_flags(file=text + "\nradio: {}").radio == Radio()
    assert by_flags("--stations", "all-of-them", file=text).radio == Radio("all-of-them")
    assert by_flags("--stations", "one", file=text).radio == Radio(("one",))


@pytest.mark.parametrize(("text", "says"), [
    ("owner: me\nengine: {pwoer: 2}", "no setting engine.pwoer; did you mean engine.power?"),
    ("owner: me\nengine: {power: 2}\nfeul: x", "no setting feul; did you mean engine.fuel?"),
    ("engine: {power: 2}", "owner is missing"),
    ("owner: me", "engine.power is missing"),
    ("owner: me\nengine: {power: fast}", "engine.power must be a number; got 'fast'"),
    ("owner: me\nengine: {power: -1}", "engine: power must be at least 0"),
    ("owner: me\nengine: {power: 1, kind: coal}", "engine.kind must be one of diesel, petrol, none; got 'coal'"),
    ("owner: me\nengine: {power: 1, gears: [1.5]}", "engine.gears must be a list of a whole number"),
    ("owner: me\nengine: {power: true}", "engine.power must be a number; got True"),
    ("owner: me\nengine: {power: 1}\npower: null", "power needs a value"),
    ("owner: me\nengine: {power: 1}\nradio: {loud: perhaps}", "radio.loud must be true or false"),
    ("owner: me\nengine: fast", "engine must be a mapping of settings; got 'fast'"),
    ("- a", "car.yaml must hold settings"),
    ("a: [", "car.yaml is not YAML"),
])  # fmt: skip
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        by_flags(file=text)
    assert says in str(error.value)


def test_help_is_the_docstrings() -> None:
    helps = {setting.key: (setting.help, setting.default) for setting in settings_of(Car)}
    assert helps["engine.power"] == ("of it, in kilowatts", MISSING)
    assert helps["engine.fuel"] == ("what it burns, and how", None)
    assert helps["owner"] == ("who has it", MISSING)


def test_every_setting_of_a_run_has_a_flag_and_its_words() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    settings = list(settings_of(TrainConfig))
    assert {setting.key for setting in settings} >= {"model.path", "optimizer.learning_rate", "lora.rank", "steps"}
    assert [setting.key for setting in settings if not setting.help] == []
    assert parser.parse_args(["--optimizer-learning-rate", "3", "--lora-rank", "4"]) == argparse.Namespace(
        **{"optimizer.learning_rate": "3", "lora.rank": "4"})
    assert "--optimizer-learning-rate" in parser.format_help()
