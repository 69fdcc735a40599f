"""Recipes: YAML in, a checked `RunConfig` out, and back again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_opus.config import checks, schema
from megatron_opus.config.recipe import RunConfig
from megatron_opus.config.schema import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply `key=value` overrides, check every key and every cross-field constraint.

    Raises ConfigError naming the key, the expected and the found value.
    """
    raw = schema.read_yaml(Path(path))
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {override!r}: expected key=value, for example training.train_steps=100")
        try:
            parsed = yaml.load(value, schema.Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({error})") from error
        schema.assign(raw, key.split("."), parsed)
    return from_dict(raw)


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """RunConfig from nested plain data, as YAML gives it. Raises ConfigError."""
    config = schema.build(RunConfig, raw)
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data that `from_dict` turns back into an equal configuration."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def validate(config: RunConfig) -> None:
    """Raise ConfigError for the first combination of values that cannot run, whatever the machine."""
    checks.validate(config)


def validate_world(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError when `world_size` processes cannot be laid out as the recipe asks."""
    checks.validate_world(config, world_size)
