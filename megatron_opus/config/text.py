"""The text of recipes and overrides: YAML 1.2 scalars, no aliases or tags, no key twice."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_opus.config.schema import ConfigError, require, takes_none, without_bounds

# PyYAML alone reads `off` as False, `010` as 8, `1:30` as 90, `1e-4` as text and `2024-01-01` as a date.
SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)
VALUE_TOKENS = (
    yaml.StreamStartToken,
    yaml.StreamEndToken,
    yaml.ScalarToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowSequenceEndToken,
    yaml.FlowMappingStartToken,
    yaml.FlowMappingEndToken,
    yaml.FlowEntryToken,
    yaml.KeyToken,
    yaml.ValueToken,
)


class Loader(yaml.SafeLoader):
    """YAML whose scalars mean what they look like."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: no aliases (*name), anchors (&name) or tags (!name)"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value} stands there twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the text that either this Loader or plain YAML 1.1 would take for something else."""


Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe as nested dictionaries, what it includes merged below it. Raises ConfigError.

    `include` is one file or a list of files, relative to the recipe, of which a later one replaces values of an
    earlier one.
    """
    where = f"configuration file {path}"
    try:
        if not path.is_file():
            raise ConfigError(f"{where}: {'expected a file with text' if path.exists() else 'not found'}")
        chain = (*including, path.resolve())
        require(path.resolve() not in including, f"{where}: includes itself: {' -> '.join(map(str, chain))}")
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected UTF-8 text, got byte {error.object[error.start]:#x}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not valid YAML ({_reason(error)})") from None
    require(isinstance(raw, dict), f"{where}: expected sections with keys, got {type(raw).__name__}")
    merged: dict[str, Any] = {}
    for key, value in raw.items():
        require(value is not None, f"{where}: {key} is empty; give it a value, or leave it out")
    includes = raw.pop("include", [])
    for include in [includes] if isinstance(includes, str) else includes if isinstance(includes, list) else [includes]:
        require(isinstance(include, str), f"{where}: include: expected a file or a list of files, got {include!r}")
        merged = merge(merged, read_yaml(path.parent / include, chain))
    return merge(merged, raw)


def merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `top` says, key by key in nested dictionaries."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_value(text: str, hint: Any = None) -> Any:
    """The value of an override: null, true, false, a number, quoted text, [a list], {a: map}, or the text itself.

    Where `hint`, the type of the key, is text, what was typed is the value; quotes around it and null are read. Raises
    ConfigError for what is none of these.
    """
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    if without_bounds(hint)[0] is str and not quoted:
        return None if text == "null" and takes_none(hint) else text
    require(text.strip() != "", "expected a value after =, or null for none")
    require(text.isprintable(), f"expected printable text, got {text!r}")
    try:
        tokens = [*yaml.scan(text, Loader)]
        for before, after in itertools.pairwise(tokens):
            odd = text[before.end_mark.index : after.start_mark.index].strip()
            if odd or not isinstance(after, VALUE_TOKENS):
                raise ConfigError(f"expected one value without comments, got {text!r}")
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"expected a value, got {text!r} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """In one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
