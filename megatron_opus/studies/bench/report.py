"""Results of `tools/bench_scoring.py`: text tables, JSON files that grow from run to run, the frontier's picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opus.errors import Refusal
from megatron_opus.files import write_json

Rows = list[dict[str, Any]]


class ReportError(Refusal, ValueError):
    """A file that results cannot be merged into, or a picture that cannot be drawn."""


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: Rows) -> str:
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
    """Before anything is measured. Raises ReportError."""
    if not path.parent.is_dir() or path.is_dir():
        raise ReportError(f"{path}: expected a file in an existing folder; make {path.parent} first")


def read(path: Path) -> dict[str, Any]:
    """Results written before, empty ones where there is no file. Raises ReportError for anything else."""
    if not path.exists():
        return {"runs": [], "rows": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["runs"], list) or not all(isinstance(row, dict) for row in found["rows"]):
            raise ValueError("no lists of runs and rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path}: expected results of an earlier run ({error}); name another file, or move this one away"
        ) from error
    return {"runs": found["runs"], "rows": found["rows"]}


def merged(earlier: Rows, fresh: Rows, keys: Sequence[str]) -> Rows:
    """Rows of both; where all of `keys` agree, the fresh one, in the place of the earlier one."""
    result = {tuple(row.get(k) for k in keys): row for row in earlier}
    result.update({tuple(row.get(k) for k in keys): row for row in fresh})
    return list(result.values())


def write(path: Path, runs: Sequence[Mapping[str, Any]], rows: Rows) -> None:
    """Atomically: a run that is killed leaves the results before it."""
    write_json(path, {"runs": list(runs), "rows": rows})


# --- the picture ----------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """Raises ReportError without matplotlib, before anything is measured."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ReportError(f"the picture needs matplotlib ({error}): pip install -e '.[lab]'") from None
    return pyplot


def draw_frontier(rows: Rows, path: Path) -> None:
    """Tax against 1 - Spearman, a panel for each model and pool; below and left is better. SVG or PNG by the name."""
    plt = pyplot()
    models = list(dict.fromkeys((row["d"], row["layers"], row["T"]) for row in rows))
    pools = list(dict.fromkeys(k.removesuffix(" spearman") for row in rows for k in row if k.endswith(" spearman")))
    kinds = list(dict.fromkeys(row["estimator"].partition(":")[0] for row in rows))
    figure, panels = plt.subplots(
        len(pools),
        len(models),
        figsize=(4.2 * len(models) + 1.5, 3.6 * len(pools)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for i, pool in enumerate(pools):
        for j, model in enumerate(models):
            axes = panels[i][j]
            for number, kind in enumerate(kinds):
                points = [
                    row
                    for row in rows
                    if (row["d"], row["layers"], row["T"]) == model
                    and row["estimator"].partition(":")[0] == kind
                    and f"{pool} spearman" in row
                ]
                _curve(axes, points, pool, kind, f"C{number}")
            axes.set_title(f"d = {model[0]}, {model[1]} layers, T = {model[2]}; {pool} pool", fontsize=9)
            axes.set(xlabel="1 - Spearman", ylabel="tax", xscale="log", yscale="log")
            axes.yaxis.set_major_formatter("{x:.2f}")
            axes.yaxis.set_minor_formatter("{x:.2f}")
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.grid(alpha=0.3, which="both")
    # a kind that one panel lacks another one has
    drawn = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8)
    with plt.rc_context({"svg.hashsalt": "frontier"}):  # the same numbers give the same file
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _curve(axes: Any, points: Rows, pool: str, kind: str, color: str) -> None:
    if not points:
        return
    x = [max(1.0 - row[f"{pool} spearman"], 1e-4) for row in points]  # a logarithm has no place for 0
    y = [row["tax"] for row in points]
    spread = [[row["tax"] - row["low"] for row in points], [row["high"] - row["tax"] for row in points]]
    axes.errorbar(x, y, yerr=spread, fmt="o-", markersize=4, linewidth=1, capsize=2, color=color, label=kind)
    for a, b, row in zip(x, y, points, strict=True):
        size = row["estimator"].partition(":")[2]
        axes.annotate(size, (a, b), xytext=(3, 3), textcoords="offset points", fontsize=6)
