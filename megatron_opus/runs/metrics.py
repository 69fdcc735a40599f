"""Read `metrics.jsonl` of a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opus.errors import Refusal

METRICS_FILE = "metrics.jsonl"


class MetricsError(Refusal, ValueError):
    """A line of `metrics.jsonl` that is no row, before the last one."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete rows. A torn last line, from a killed process, is left out; any other raises MetricsError."""
    return [row for row in iter_metrics(run_dir) if row is not None]


def iter_metrics(run_dir: Path) -> Iterator[dict[str, Any] | None]:
    """The rows one by one, then None where the last line is torn. Raises MetricsError for any other broken line."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return
    torn = ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if torn:
                raise MetricsError(torn)
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    raise ValueError("expected an object with an integer `step`")
            except (ValueError, RecursionError) as error:
                torn = f"{path}, line {number}: not a row of metrics ({error}); repair or remove it"
                continue
            yield row
    if torn:
        yield None
