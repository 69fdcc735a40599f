"""Write the results of `tools/bench_scoring.py`: a text table, a JSON file, and the picture of the frontier."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opus import style
from megatron_opus.errors import Refusal
from megatron_opus.files import write_json

Rows = list[dict[str, Any]]


class BenchFileError(Refusal, ValueError):
    """A file that results cannot be written to or read from."""


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: Rows) -> str:
    """Lay out rows as a Markdown table. A row without a column has an empty cell there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if 0 < abs(value) < 5e-4 else f"{value:.4f}"


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before anything is measured. Raises BenchFileError."""
    if not path.parent.is_dir() or path.is_dir():
        raise BenchFileError(f"{path}: expected a file in an existing folder; make {path.parent} first")
    if path.exists() and path.suffix == ".json":
        read(path)  # only results of an earlier run are written over


def read(path: Path) -> Rows:
    """Return the rows that `write` left in a file. Raises BenchFileError for anything else."""
    try:
        rows: Rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("rows that are no objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchFileError(
            f"{path}: expected results of tools/bench_scoring.py ({error}); name another file"
        ) from error
    return rows


def write(path: Path, command: Sequence[str], rows: Rows) -> None:
    """Write the command, the machine and the rows of one run."""
    write_json(path, {"command": list(command), "machine": machine(), "rows": rows})


def draw_frontier(rows: Rows, path: Path) -> None:
    """Draw tax against 1 - Spearman with a panel for each model and pool; below and left is better.

    The file's name decides between SVG and PNG. Raises PictureError without matplotlib.
    """
    plt = style.pyplot()
    models = list(dict.fromkeys((row["d"], row["layers"], row["T"]) for row in rows))
    pools = list(dict.fromkeys(k.removesuffix(" spearman") for row in rows for k in row if k.endswith(" spearman")))
    kinds = list(dict.fromkeys(_kind(row) for row in rows))[: style.MOST_LINES]
    size = (3.6 * len(models) + 1.5, 3.1 * len(pools))
    figure, panels = plt.subplots(
        len(pools), len(models), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for pool, line in zip(pools, panels, strict=True):
        for (width, layers, length), axes in zip(models, line, strict=True):
            for place, kind in enumerate(kinds):
                shown = [row for row in rows if (row["d"], row["layers"], row["T"]) == (width, layers, length)]
                points = [row for row in shown if _kind(row) == kind and f"{pool} spearman" in row]
                _draw_kind(axes, points, pool, kind, place)
            axes.set(title=f"{pool} pool: d = {width}, {layers} layers, T = {length}", xscale="log", yscale="log")
            axes.title.set_fontsize(9)
    low, high = panels[0][0].get_ylim()
    style.log_ticks(panels[0][0].yaxis, low, high)  # the panels share their axes
    style.log_ticks(panels[0][0].xaxis, *panels[0][0].get_xlim())
    figure.supxlabel("1 - Spearman correlation with the oracle", fontsize=9)
    figure.supylabel("tax: scoring pass / its forward and backward", fontsize=9)
    drawn: dict[str, Any] = {}  # a kind that one panel lacks another one has
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        drawn.update(zip(labels, handles, strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8)
    with plt.rc_context({"svg.hashsalt": "frontier"}):  # the same numbers give the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _kind(row: dict[str, Any]) -> str:
    kind: str = row["estimator"].partition(":")[0]
    return kind


def _draw_kind(axes: Any, points: Rows, pool: str, kind: str, place: int) -> None:
    """Draw one kind of estimator: a point with quartiles for each size, joined by a line."""
    if not points:
        return
    x = [max(1.0 - row[f"{pool} spearman"], 1e-4) for row in points]  # a logarithm has no place for 0
    y = [row["tax"] for row in points]
    spread = [[row["tax"] - row["low"] for row in points], [row["high"] - row["tax"] for row in points]]
    look = {"color": style.colour(place), "marker": style.marker(place), "markersize": 4, "linewidth": 1, "capsize": 2}
    axes.errorbar(x, y, yerr=spread, label=kind, **look)
    for a, b, row in zip(x, y, points, strict=True):
        size = row["estimator"].partition(":")[2]
        axes.annotate(size, (a, b), xytext=(3, 3), textcoords="offset points", fontsize=6)
