#!/usr/bin/env python3
"""Runs side by side: validation loss at the end, tokens and seconds it took.

    python tools/compare_runs.py runs/opus runs/random

The first run is compared with each of the others: by how much its loss differs, and after which share of the other's
update tokens it had reached the other's final loss (interpolated between the evaluations of metrics.jsonl).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_opus.config import ConfigError, load
from megatron_opus.training.metrics import METRICS_FILE, read_metrics


class NotComparable(ValueError):
    """A folder without a run in it, or a run without a validation loss."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    strategy: str
    steps: int
    update_tokens: int
    seconds: float  # all steps together; evaluation and checkpoints not counted
    curves: dict[str, list[tuple[int, float]]]  # validation domain -> (update tokens, loss), ascending

    def final(self, domain: str) -> float:
        return self.curves[domain][-1][1]


def read(directory: Path) -> Run:
    """Raises NotComparable."""
    rows = read_metrics(directory)
    evaluated = [row for row in rows if row.get("validation_loss")]
    if not evaluated:
        what = f"no validation loss in {directory / METRICS_FILE}" if rows else f"no {directory / METRICS_FILE}"
        raise NotComparable(f"{directory}: {what}; expected the folder of a run that has evaluated at least once")
    if evaluated[-1] is not rows[-1]:
        print(f"note: {directory} has gone on since its last evaluation; its figures are of that one", file=sys.stderr)
    last: dict[str, Any] = evaluated[-1]
    return Run(
        name=directory.name,
        strategy=load(directory / "config.yaml").selection.strategy,
        steps=last["step"] + 1,
        update_tokens=last["update_tokens"],
        seconds=sum(row["step_seconds"] for row in rows if row["step"] <= last["step"]),
        curves={
            domain: [(row["update_tokens"], row["validation_loss"][domain]) for row in evaluated]
            for domain in last["validation_loss"]
        },
    )


def tokens_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Update tokens at which `curve` is at `loss` for the first time; None: it never is."""
    previous: tuple[int, float] | None = None
    for tokens, value in curve:
        if value <= loss:
            if previous is None or previous[1] == value:
                return float(tokens)
            return previous[0] + (tokens - previous[0]) * (previous[1] - loss) / (previous[1] - value)
        previous = (tokens, value)
    return None


def table(runs: Sequence[Run]) -> str:
    """A line per run; below, a column per validation domain: difference to the first run, share of tokens needed."""
    first = runs[0]
    domains = [d for d in first.curves if all(d in run.curves for run in runs)]
    width = 2 + max(len(run.name) + len("update tokens first run needed to reach ") for run in runs)

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:<{width}}" + "".join(f"{c:>{max(len(d) + 3, 11)}}" for c, d in zip(cells, domains, strict=True))

    lines = [f"{'run':<{width}}{'strategy':<10}{'steps':>8}{'update tokens':>16}{'seconds':>10}"]
    for run in runs:
        lines.append(
            f"{run.name:<{width}}{run.strategy:<10}{run.steps:>8,}{run.update_tokens:>16,}{run.seconds:>10.1f}"
        )
    lines += ["", line("validation loss, nats per token", domains)]
    lines += [line(run.name, [f"{run.final(d):.4f}" for d in domains]) for run in runs]
    for other in runs[1:]:
        lines.append(line(f"first run - {other.name}", [f"{first.final(d) - other.final(d):+.4f}" for d in domains]))
        shares = [tokens_to_reach(first.curves[d], other.final(d)) for d in domains]
        lines.append(
            line(
                f"update tokens first run needed to reach {other.name}",
                ["never" if share is None else f"{share / other.update_tokens:.0%}" for share in shares],
            )
        )
    for other in runs[1:]:
        if first.update_tokens != other.update_tokens:
            lines.append(f"note: {first.name} and {other.name} trained on different numbers of tokens")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with metrics.jsonl and config.yaml")
    try:
        print(table([read(directory) for directory in parser.parse_args(argv).runs]))
    except (NotComparable, ConfigError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
