"""Nested plain data, as YAML gives it, into typed dataclasses: every key checked, errors that name the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_opus.errors import Refusal


class ConfigError(Refusal, ValueError):
    """A configuration that cannot be run: says what was expected, what was found and what to change."""


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: PyYAML alone reads `1e-4` as a string, and `off` as False."""


Loader.yaml_implicit_resolvers = {
    first: [r for r in resolvers if r[0] != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe as nested dictionaries, what it includes merged below it. Raises ConfigError."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path}: not found") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path}: not valid YAML ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration file {path}: expected sections with keys, got {type(raw).__name__}")
    include = raw.pop("include", None)
    return raw if include is None else _merge(read_yaml(path.parent / include), raw)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def assign(raw: dict[str, Any], path: list[str], value: Any) -> None:
    """Set one dotted key; `data=NAME` is short for `data.path=NAME`."""
    if path == ["data"] and isinstance(value, str):
        path = ["data", "path"]
    node = raw
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join(path)}: {part} is a value ({child!r}), not a section")
        node = child
    node[path[-1]] = value


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += [f"{prefix}{name}", *_known_keys(typing.cast(type, hint), f"{prefix}{name}.")]
        else:
            keys.append(f"{prefix}{name}")
    return keys


def build(cls: type, raw: Any, where: str = "", recipe: type | None = None) -> Any:
    """An instance of the dataclass `cls` from nested plain data; `where` is the dotted path of this section.

    Raises ConfigError naming the key, what was expected and what was found.
    """
    recipe = recipe or cls
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'configuration'}: expected a section with keys, got {raw!r}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown key {where}{key}{_nearest(cls, where, str(key), recipe)}")
        hint = hints[key]
        name = f"{where}{key}"
        values[key] = (
            build(typing.cast(type, hint), value, f"{name}.", recipe)
            if dataclasses.is_dataclass(hint)
            else _check(hint, value, name)
        )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing required key {', '.join(where + m for m in missing)}")
    return cls(**values)


def _nearest(cls: type, where: str, key: str, recipe: type) -> str:
    """The closest key of this section, or of the whole recipe when the key stands in the wrong section."""
    local = difflib.get_close_matches(key, _known_keys(cls), n=1, cutoff=0.6)
    if local:
        return f"; did you mean {where}{local[0]}?"
    everywhere = {k.rsplit(".", 1)[-1]: k for k in _known_keys(recipe)}
    far = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(everywhere), n=1, cutoff=0.6)
    if far:
        return f"; did you mean {everywhere[far[0]]}?"
    return (
        f"; known keys of {where.rstrip('.') or 'the recipe'}: {', '.join(k for k in _known_keys(cls) if '.' not in k)}"
    )


def _check(hint: Any, value: Any, name: str) -> Any:
    """`value` converted to `hint` where YAML is ambiguous (int for float), else ConfigError."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _check(next(o for o in options if o is not type(None)), value, name)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if isinstance(value, bool) or value not in allowed:
            close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
            hint_text = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}{hint_text}")
        return value
    if origin is dict:
        key_type, value_type = typing.get_args(hint)
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: expected a mapping, got {value!r}")
        return {_check(key_type, k, name): _check(value_type, v, f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value
