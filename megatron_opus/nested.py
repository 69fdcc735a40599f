"""Dotted keys of nested mappings: `{"data": {"path": "embedded"}}` holds "embedded" at the key `data.path`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(node: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return dotted key -> value for every value that is not a mapping. An empty mapping leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{inner}": leaf for inner, leaf in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat


def lookup(node: Any, key: str, default: Any = None) -> Any:
    """Return the value at a dotted key, or `default` where a part of the key is missing."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node
