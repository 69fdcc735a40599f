"""Give a run the domain shares that another run has trained on, as a domain schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opus.runs.metrics import read_metrics
from megatron_opus.studies.lab.experiment import LabError

BLOCK = 10  # steps whose shares are averaged: a step of 16 sequences has shares in sixteenths


def matched_overrides(directory: Path) -> tuple[str, ...]:
    """Return the overrides by which a run draws from the domains what the finished run in `directory` trained on.

    Where that run weighted its sequences, the shares are those of the weights. Example: a run whose steps 0 to 9 had
    20% prose on average, and whose steps 10 to 19 had 30%, gives a schedule with 0.2 from step 0 and 0.3 from step 10.
    Raises LabError for a run without recorded shares.
    """
    rows = read_metrics(directory)
    points: dict[str, dict[str, float]] = {}
    for first in range(0, len(rows), BLOCK):
        shares = [_shares(row, directory) for row in rows[first : first + BLOCK]]
        points[f"step {first}"] = {name: sum(s[name] for s in shares) / len(shares) for name in shares[0]}
    return ("data.domain_weights=null", f"data.domain_schedule={json.dumps({'points': points})}")


def _shares(row: Mapping[str, Any], directory: Path) -> dict[str, float]:
    shares: dict[str, float] | None = row.get("weighted_share") or row.get("selected_share")
    if not shares:
        raise LabError(
            f"{directory}: expected selected_share in every step of its metrics, found none at {row['step']}"
        )
    return shares
