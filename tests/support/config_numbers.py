"""The numbers of a recipe: key, type, and bounds."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

from megatron_opus.config import RunConfig
from megatron_opus.config.schema import Section, hints, without_bounds

MAPPINGS = ("domain_weights", "domain_max_epochs", "proxy_weights", "minimum", "maximum")  # their values are numbers


def fields(cls: type[Section] = RunConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, hint in hints(cls).items():
        if isinstance(hint, type) and issubclass(hint, Section):
            yield from fields(hint, (*path, name))
        else:
            yield (*path, name), hint


def numeric() -> list[tuple[tuple[str, ...], type, tuple[Any, ...]]]:
    found = []
    for path, hint in fields():
        plain, bounds = without_bounds(hint)
        if typing.get_origin(plain) is dict:
            plain, bounds = without_bounds(typing.get_args(plain)[1])
        if plain in (int, float):
            found.append((path, plain, bounds))
    return found


def extremes(kind: type, bounds: tuple[Any, ...]) -> list[int | float]:
    """The least and the greatest number within a bound, and for whole numbers an odd one."""
    low, high = bounds[0].low, bounds[0].high
    if kind is int:
        least, most = int(low) + bounds[0].open_low, int(high) - bounds[0].open_high
        return [least, most, max(least, min(most, 7))]
    return [
        math.nextafter(low, math.inf) if bounds[0].open_low else low,
        math.nextafter(high, -math.inf) if bounds[0].open_high else high,
    ]
