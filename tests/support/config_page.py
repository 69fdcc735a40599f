"""docs/config.md: every key of a recipe, from the fields and the comments beside or above them.

python tests/support/config_page.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Any, Literal

from megatron_opus.config import RunConfig
from megatron_opus.config.schema import Section, hints, takes_none, without_bounds

PAGE = Path(__file__).resolve().parents[2] / "docs/config.md"
HEAD = """# Every key of a recipe

A recipe is one YAML file. `include` names a file, or a list of files, that it starts from. The recipe's own keys
replace theirs, and `key=value` on the command line replaces both: `selection.sketch.dim=4096`. A value is `null`,
`true`, `false`, a number, `[a list]`, `{a: map}`, or text. For a key that takes text, what you type is the value. Every
run writes all keys to `config.yaml` in its folder. A value out of its range is refused with the key and the range.

The tables are made from the source by `python tests/support/config_page.py`. Values of the published recipes and their
reasons stand in `configs/base/pretrain.yaml`.
"""


def comments(cls: type) -> dict[str, str]:
    """Field name -> the comment beside it, or the lines of comment directly above it."""
    lines = inspect.getsource(cls).splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = lines[node.end_lineno - 1][node.end_col_offset :].strip()  # type: ignore[operator]
            above: list[str] = []
            line = node.lineno - 2
            while lines[line].strip().startswith("#"):
                above.insert(0, lines[line].strip().lstrip("# "))
                line -= 1
            found[node.target.id] = " ".join([*above, *([beside.lstrip("# ")] if beside else [])])
    return found


def takes(hint: Any) -> str:
    """What a field takes, in words."""
    plain, bounds = without_bounds(hint)
    if typing.get_origin(plain) is Literal:
        text = ", ".join(f"`{option}`" for option in typing.get_args(plain))
    elif typing.get_origin(plain) is dict:
        text = f"names with {takes(typing.get_args(plain)[1])}"
    else:
        text = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[plain]
    text = ", ".join([text, *(str(bound) for bound in bounds)])
    return f"{text}, or `null`" if takes_none(hint) else text


def default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    return f"`{json.dumps(value).strip(chr(34))}`"


def rows(cls: type[Section]) -> list[str]:
    table, said, below = [], comments(cls), []
    for field in dataclasses.fields(cls):
        hint = hints(cls)[field.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            below += ["", f"## `{hint.at}`", "", f"{(hint.__doc__ or '').strip()}", "", *rows(hint)]
            continue
        table.append(f"| `{field.name}` | {default(field)} | {takes(hint)} | {said[field.name]} |")
    return ["| key | default | takes | what it does |", "|---|---|---|---|", *table, *below]


def page() -> str:
    text = "\n".join([HEAD, *rows(RunConfig)])
    return "\n".join(line.strip() if line.startswith("    ") else line for line in text.splitlines()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
