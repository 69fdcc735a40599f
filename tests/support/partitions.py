"""The table of partitions: how far the scores of every layout that a test runs are from what they should be.

    pytest tests/scoring -n 0 --partition-table=docs/partitions.md

writes it from the very numbers that the tests assert on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import SelectionConfig
from megatron_opus.selection.strategies import build_strategy
from megatron_opus.types import Candidates, Signals

COLUMNS = ("compared with", "layout", "estimator", "alignment", "interaction", "same ids", "tolerance")


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def drawn(align: Tensor, inter: Tensor) -> list[int]:
    """Half of the candidates in draw order, with the default strategy and a fixed generator."""
    n = len(align)
    candidates = Candidates(step=0, sample_ids=np.arange(n), domains=np.zeros(n, np.int32))
    signals = Signals(alignment=align, interaction=inter)
    generator = torch.Generator().manual_seed(5)
    return build_strategy(SelectionConfig()).select(candidates, signals, n // 2, generator).indices.tolist()


class PartitionTable:
    """Rows by (compared with, layout, estimator); repeated ones keep the worst."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], list[Any]] = {}

    def check(
        self,
        found: Mapping[str, Any],
        align: Tensor,
        inter: Tensor | None,
        *,
        against: str,
        layout: str,
        estimator: str,
        tolerance: float,
    ) -> None:
        """Assert that relative deviations are below `tolerance`, and keep them. inter None: alignment only."""
        a = relative(found["align"], align)
        i = None if inter is None else relative(found["inter"], inter)
        same = inter is not None and drawn(found["align"], found["inter"]) == drawn(align, inter)
        row = self.rows.setdefault((against, layout, estimator), [0.0, None, True, tolerance])
        row[0] = max(row[0], a)
        row[1] = row[1] if i is None else max(row[1] or 0.0, i)
        row[2] = row[2] and same if inter is not None else None
        assert a < tolerance, (layout, estimator)
        assert i is None or i < tolerance, (layout, estimator)

    def write(self, path: Path) -> None:
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        for key, (a, i, same, tolerance) in sorted(self.rows.items()):
            ids = "" if same is None else "yes" if same else "no"
            cells = [*key, f"{a:.1e}", "" if i is None else f"{i:.1e}", ids, f"{tolerance:.0e}"]
            lines.append("| " + " | ".join(cells) + " |")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
