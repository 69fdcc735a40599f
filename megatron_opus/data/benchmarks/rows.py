"""Rows of benchmark files, and their fields with the types that they must have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opus.errors import Refusal
from megatron_opus.rows import RowError, json_lines, parquet_rows

_SHOWN_KEYS = 12


class BenchmarkError(Refusal, ValueError):
    """A benchmark file that cannot be read: names file and line, what was expected and what was found."""


def rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read (line or row from 1, fields) of a benchmark file. Raises BenchmarkError."""
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise BenchmarkError(f"{path}: expected a .jsonl or .parquet file, got suffix {path.suffix!r}")
    try:
        if path.suffix == ".parquet":
            yield from parquet_rows(path)
            return
        with path.open("rb") as stream:
            for line, row in json_lines(path, stream):
                if not isinstance(row, dict):
                    raise BenchmarkError(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
                yield line, row
    except RowError as error:
        raise BenchmarkError(str(error)) from error


class Row:
    """The fields of one row, each asked for with the type that it must have."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def require(self, fields: Sequence[str], benchmark: str) -> None:
        missing = [field for field in fields if field not in self.values]
        if missing:
            raise BenchmarkError(
                f"{self.where}: missing {', '.join(missing)} (found {listed(self.values)}); the rows of this "
                f"{benchmark} file have {', '.join(fields)}"
            )

    def text(self, key: str) -> str:
        return self._text(key, self.values[key])

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.values[key]
        if not isinstance(values, list | tuple):
            raise BenchmarkError(f"{self.where}: {key!r}: expected a list of strings, got {type(values).__name__}")
        return tuple(self._text(key, value) for value in values)

    def labelled(self, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(texts, labels) of `choices: {text: [...], label: [...]}`."""
        value = self.values[key]
        if not isinstance(value, Mapping) or not {"text", "label"} <= value.keys():
            raise BenchmarkError(f"{self.where}: {key!r}: expected an object with the lists text and label")
        inner = Row(self.where, value)
        texts, labels = inner.texts("text"), inner.texts("label")
        if len(texts) != len(labels):
            raise BenchmarkError(f"{self.where}: {key!r}: {len(texts)} texts and {len(labels)} labels")
        return texts, labels

    def number(self, key: str, count: int, first: int = 0) -> int | None:
        """0-based index out of a number that starts at `first`; None for the -1 or "" of hidden answers."""
        value = self.values[key]
        if value in ("", -1, "-1"):
            return None
        digits = isinstance(value, str) and value.isascii() and value.isdigit()
        if isinstance(value, bool) or not (isinstance(value, int) or digits):
            raise BenchmarkError(f"{self.where}: {key!r}: expected a number, got {value!r}")
        gold = int(value) - first
        if not 0 <= gold < count:
            raise BenchmarkError(f"{self.where}: {key!r}: expected {first}..{count - 1 + first}, got {value!r}")
        return gold

    def label(self, key: str, labels: Sequence[str]) -> int | None:
        """Index of the answer's label; None for the "" of hidden answers."""
        value = self.values[key]
        if value == "":
            return None
        if value not in labels:
            raise BenchmarkError(f"{self.where}: {key!r}: expected one of {', '.join(labels)}, got {value!r}")
        return labels.index(value)

    def _text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise BenchmarkError(f"{self.where}: {key!r}: expected a string, got {type(value).__name__}")
        return value


def listed(values: Mapping[str, Any]) -> str:
    keys = list(map(str, values))
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return (", ".join(keys[:_SHOWN_KEYS]) or "no field") + more
