"""Recipes: YAML in, a checked `RunConfig` out, and back again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_opus.config import schema
from megatron_opus.config.checks import validate
from megatron_opus.config.recipe import RunConfig
from megatron_opus.config.schema import ConfigError
from megatron_opus.config.text import Dumper, parse_value, read_yaml


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply `key=value` overrides, check every key and every cross-field constraint.

    `data=NAME` is short for `data.path=NAME`. Raises ConfigError naming the key, the expected and the found value.
    """
    raw = read_yaml(Path(path))
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {override!r}: expected key=value, for example training.train_steps=100")
        keys = ["data", "path"] if key == "data" and not text.startswith("{") else key.split(".")
        try:
            value = parse_value(text, schema.hint_at(RunConfig, keys))
        except ConfigError as error:
            raise ConfigError(f"override {key}: {error}") from None
        _assign(raw, keys, value)
    try:
        return from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{error} (recipe {path})") from None


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """RunConfig from nested plain data, as YAML gives it. Raises ConfigError."""
    config: RunConfig = schema.build(RunConfig, without_removed(raw))
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data that `from_dict` turns back into an equal configuration."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML that `load` turns back into an equal configuration."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False)


def without_removed(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain data of an earlier version without keys that no longer exist.

    A removed key that stands at the one value still there changes nothing and is left out. Raises ConfigError for
    another value.
    """
    selection = raw.get("selection") if isinstance(raw, Mapping) else None
    if not isinstance(selection, Mapping):
        return raw
    sketch = selection.get("sketch")
    if isinstance(sketch, Mapping) and sketch.get("operator") == "tensor_sketch":
        raise ConfigError(
            "selection.sketch.operator: tensor_sketch was removed; use two_stage, which also hashes to any dim, or "
            "two_sided, which is faster"
        )
    if selection.get("layer_weights", "none") != "none":
        raise ConfigError(
            f"selection.layer_weights: {selection['layer_weights']!r} was removed, every layer counts as it is; leave "
            "the key out and start a new run"
        )
    return {**raw, "selection": {key: value for key, value in selection.items() if key != "layer_weights"}}


def _assign(raw: dict[str, Any], path: list[str], value: Any) -> None:
    """Set one dotted key."""
    node = raw
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join(path)}: {part} is a value ({child!r}), not a section")
        node = child
    node[path[-1]] = value
