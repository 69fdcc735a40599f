"""Typed settings: dataclasses that check their own fields, and how nested plain data becomes one.

A field's type says what it takes: `Annotated[int, positive(100)]` is a whole number from 1 to 100. A section checks its
fields when it is made, so that `SketchConfig(dim=-1)` in Python is refused exactly as `dim: -1` in a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from megatron_opus.errors import Refusal


class ConfigError(Refusal, ValueError):
    """A configuration that cannot be run: says what was expected, what was found and what to change."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


# --- what a field takes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Numbers from `low` to `high`. NaN and infinity lie in no bound."""

    low: float
    high: float
    too_low: str  # what an error says was expected; NaN counts as too low
    too_high: str
    open_low: bool = False  # `low` itself is refused
    open_high: bool = False
    remedy: str = ""

    def problem(self, value: float) -> str | None:
        """What was expected and found, or None where `value` lies within."""
        if not (value > self.low if self.open_low else value >= self.low):
            return f"expected {self.too_low}, got {value}{self.remedy}"
        if not (value < self.high if self.open_high else value <= self.high):
            return f"expected {self.too_high}, got {value}"
        return None

    def __str__(self) -> str:
        return (
            f"{_short(self.low)} {'<' if self.open_low else '≤'} x {'<' if self.open_high else '≤'} {_short(self.high)}"
        )


@dataclass(frozen=True)
class Matches:
    """Text of one form."""

    pattern: str
    expected: str

    def problem(self, value: str) -> str | None:
        """What was expected and found, or None where all of `value` has the form."""
        return None if re.fullmatch(self.pattern, value) else f"expected {self.expected}, got {value!r}"

    def __str__(self) -> str:
        return self.expected


def positive(most: int) -> Bound:
    return Bound(1, most, "a positive number", f"at most {most:,}")


def at_least(low: float, most: float) -> Bound:
    return Bound(low, most, f">= {low:g}", f"at most {most:,}")


def above(low: float, most: float, remedy: str = "") -> Bound:
    return Bound(low, most, f"> {low:g}", f"at most {most:,}", open_low=True, remedy=remedy)


def within(text: str) -> Bound:
    """The bound that an error quotes as it is written here: `0 <= beta < 1`."""
    low, left, _, right, high = text.split()
    return Bound(float(low), float(high), text, text, open_low=left == "<", open_high=right == "<")


def _short(number: float) -> str:
    return f"{int(number):,}" if float(number).is_integer() else f"{number:g}"


# --- sections -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the dataclasses that make up a recipe; `at` is where the section stands in it."""

    at: ClassVar[str] = ""

    def __init_subclass__(cls, at: str = "") -> None:
        cls.at = at

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, check(hint, getattr(self, name), _dotted(self.at, name)))
        self.check_together()

    def check_together(self) -> None:
        """Raise ConfigError where the values of this section contradict each other."""


def hints(cls: Any) -> dict[str, Any]:
    """Field name -> type, bounds included."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def hint_at(cls: type, keys: list[str]) -> Any:
    """The type of one dotted key, or None where there is no such key."""
    hint: Any = cls
    for key in keys:
        hint = hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
    return hint


def without_bounds(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(type, or for `type | None` the type that is not None; bounds)."""
    if typing.get_origin(hint) is Annotated:
        inner, *bounds = typing.get_args(hint)
        return without_bounds(inner)[0], tuple(bounds)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return without_bounds(next(option for option in typing.get_args(hint) if option is not type(None)))
    return hint, ()


def takes_none(hint: Any) -> bool:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return type(None) in typing.get_args(hint)


def check(hint: Any, value: Any, name: str) -> Any:
    """`value` where it is of type `hint` and within its bounds; a whole number for a float becomes one.

    Raises ConfigError naming the key `name`, what was expected and what was found.
    """
    if value is None and takes_none(hint):
        return None
    hint, bounds = without_bounds(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if not any(type(option) is type(value) and option == value for option in allowed):
            close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
            hint_text = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}{hint_text}")
        return value
    if origin is dict:
        key_type, value_type = typing.get_args(hint)
        require(isinstance(value, Mapping), f"{name}: expected a mapping, got {value!r}")
        return {check(key_type, key, name): check(value_type, held, f"{name}.{key}") for key, held in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    if hint is str and not (value and value.isprintable()):
        raise ConfigError(f"{name}: expected printable text, got {value!r}")
    for bound in bounds:
        if problem := bound.problem(value):
            raise ConfigError(f"{name}: {problem}")
    return value


# --- from plain data ------------------------------------------------------------------------------------------------


def build(cls: type[Section], raw: Any, recipe: type[Section] | None = None) -> Any:
    """An instance of the section `cls` from nested plain data; unknown keys are looked for in all of `recipe`.

    Raises ConfigError naming the key, what was expected and what was found.
    """
    recipe = recipe or cls
    require(isinstance(raw, Mapping), f"{cls.at or 'configuration'}: expected a section with keys, got {raw!r}")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        hint = hints(cls).get(key)
        if hint is None:
            raise ConfigError(f"unknown key {_dotted(cls.at, key)}{_nearest(cls, str(key), recipe)}")
        is_section = isinstance(hint, type) and issubclass(hint, Section)
        values[key] = build(hint, value, recipe) if is_section else value
    missing = [
        _dotted(cls.at, f.name)
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"missing required key {', '.join(missing)}")
    return cls(**values)


def keys_of(cls: type[Section]) -> list[str]:
    """Dotted keys of a section and of those in it."""
    keys = []
    for name, hint in hints(cls).items():
        keys.append(_dotted(cls.at, name))
        if isinstance(hint, type) and issubclass(hint, Section):
            keys += keys_of(hint)
    return keys


def _nearest(cls: type[Section], key: str, recipe: type[Section]) -> str:
    """The closest key of this section, or of the whole recipe when the key stands in the wrong section."""
    for keys in (keys_of(cls), keys_of(recipe)):
        by_name = {dotted.rsplit(".", 1)[-1]: dotted for dotted in reversed(keys)}
        if close := difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_name), n=1, cutoff=0.6):
            return f"; did you mean {by_name[close[0]]}?"
    return f"; known keys of {cls.at or 'the recipe'}: {', '.join(hints(cls))}"


def _dotted(section: str, key: object) -> str:
    return f"{section}.{key}" if section else str(key)
