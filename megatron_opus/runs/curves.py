"""What a finished run's record says: losses over update tokens and over seconds, and where a loss was reached."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opus.config import load
from megatron_opus.errors import Refusal
from megatron_opus.runs.metrics import METRICS_FILE, read_metrics


class NotComparable(Refusal, ValueError):
    """A folder without a run in it, or a run without a validation loss."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    strategy: str
    steps: int
    update_tokens: int
    seconds: float  # all steps together, scoring included; evaluation and checkpoints not counted
    score_seconds: float  # of them, the scoring passes
    curves: dict[str, list[tuple[int, float]]]  # validation domain -> (update tokens, loss), ascending
    clock: list[float]  # seconds at each point of the curves
    cpu_clock: list[float]  # seconds that the processor worked for this process; empty: not recorded
    selected_share: dict[str, float]  # of the domains in what was trained on, mean over steps; empty: not recorded
    entropy_ratio: float | None  # of the first draw, 1 is uniform, mean over steps; None: nothing was drawn by utility
    largest_gradient: float | None  # norm before clipping, without the first twentieth of the steps; None: not recorded

    def final(self, domain: str) -> float:
        return self.curves[domain][-1][1]


def read_run(directory: Path) -> Run:
    """Raises NotComparable."""
    rows = read_metrics(directory)
    evaluated = [row for row in rows if row.get("validation_loss")]
    if not evaluated:
        what = f"no validation loss in {directory / METRICS_FILE}" if rows else f"no {directory / METRICS_FILE}"
        raise NotComparable(f"{directory}: {what}; expected the folder of a run that has evaluated at least once")
    if evaluated[-1] is not rows[-1]:
        print(f"note: {directory} has gone on since its last evaluation; its figures are of that one", file=sys.stderr)
    last: dict[str, Any] = evaluated[-1]
    counted = [row for row in rows if row["step"] <= last["step"]]
    clock, cpu_clock, passed, worked = [], [], 0.0, 0.0
    for row in counted:
        passed += row["step_seconds"]
        worked += row.get("step_cpu_seconds", math.nan)
        if row.get("validation_loss"):
            clock.append(passed)
            cpu_clock.append(worked)
    return Run(
        name=directory.name,
        strategy=load(directory / "config.yaml").selection.strategy,
        steps=last["step"] + 1,
        update_tokens=last["update_tokens"],
        seconds=passed,
        score_seconds=sum(row.get("score_seconds") or 0.0 for row in counted),
        curves={
            domain: [(row["update_tokens"], _number(row["validation_loss"][domain])) for row in evaluated]
            for domain in last["validation_loss"]
        },
        clock=clock,
        cpu_clock=[] if math.isnan(worked) else cpu_clock,
        selected_share=_mean_shares(counted),
        entropy_ratio=_mean([row["entropy_ratio"] for row in counted if row.get("entropy_ratio") is not None]),
        largest_gradient=max(
            (row["grad_norm"] for row in counted[len(counted) // 20 :] if row.get("grad_norm") is not None),
            default=None,
        ),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _mean_shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    shares = [row["selected_share"] for row in rows if row.get("selected_share")]
    return {
        domain: math.fsum(s.get(domain, 0.0) for s in shares) / len(shares)
        for domain in sorted({d for s in shares for d in s})
    }


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss  # JSON has no NaN


def first_reached(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """x at which the curve of (x, loss) is at `loss` for the first time, linear between points; None: it never is."""
    previous: tuple[float, float] | None = None
    for x, value in curve:
        if value <= loss:
            if previous is None or previous[1] == value:
                return float(x)
            return previous[0] + (x - previous[0]) * (previous[1] - loss) / (previous[1] - value)
        previous = (x, value)
    return None
