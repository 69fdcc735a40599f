"""Compare what a run has recorded with the checkpoint that it resumes from: what is missing, and what is torn."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_opus.errors import Refusal
from megatron_opus.runs import checkpoints
from megatron_opus.runs.ledger import LedgerError, ledger_parts, read_part
from megatron_opus.runs.metrics import METRICS_FILE, iter_metrics


class RunRecordError(Refusal, ValueError):
    """A record that cannot be read, so that the run cannot go on with it."""


def compare_record(run_dir: Path) -> list[str]:
    """Say in one line each what a resumed run will find missing, torn or done again. Reads only.

    A run that has completed S steps at its newest checkpoint has rows 0 to S - 1 in its metrics and in its ledger. Rows
    from S on were written after that checkpoint: the run drops them and takes these steps again.

    Raises RunRecordError for a file that cannot be read, and for what is no file or no folder where it should be one.
    """
    _check_kinds(run_dir)
    newest = checkpoints.latest(run_dir / "checkpoints")
    step = 0 if newest is None else int(newest.name.removeprefix("step_").partition(".")[0])
    lines, torn = [], False
    found: list[int] = []
    try:
        for row in iter_metrics(run_dir):
            if row is None:
                torn = True
            else:
                found.append(row["step"])
    except ValueError as error:
        raise RunRecordError(f"--resume: {error}") from error
    metrics = run_dir / METRICS_FILE
    if torn:
        lines.append(f"{metrics}: its last line is torn, as a killed process leaves it; the line is dropped")
    lines += _missing(str(metrics), found, step)
    if back := [after for before, after in itertools.pairwise(found) if after <= before]:
        lines.append(
            f"WARNING: {metrics}: rows come twice or out of order, the first at step {back[0]}. The run goes on; its "
            "record stays as it is unless you stop it and repair the file"
        )
    lines += _missing(str(run_dir / "ledger"), ledger_steps(run_dir / "ledger"), step)
    after = [number for number in found if number >= step]
    if after:
        lines.append(
            f"the record reaches step {max(after)}, the checkpoint step {step}: what lies between is done again"
        )
    return lines


def _check_kinds(run_dir: Path) -> None:
    """Refuse pipes, which one would wait at for ever, links to nowhere, and files and folders in each other's place."""
    for name, kind in (
        (METRICS_FILE, "file"),
        ("config.yaml", "file"),
        ("ledger", "folder"),
        ("checkpoints", "folder"),
    ):
        path = run_dir / name
        if os.path.lexists(path) and not (path.is_file() if kind == "file" else path.is_dir()):
            raise RunRecordError(f"--resume: {path}: expected a {kind}, found something else; move it away")


def ledger_steps(directory: Path) -> list[int]:
    """Give the steps of a ledger in the order of its parts. Raises RunRecordError for a part that cannot be read."""
    found: list[int] = []
    for _, _, path in ledger_parts(directory):
        try:
            found += sorted(set(read_part(path)["step"].to_pylist()))
        except LedgerError as error:
            raise RunRecordError(f"--resume: {error}") from error
    return found


def _missing(what: str, steps: Iterable[int], expected: int) -> list[str]:
    absent = sorted(set(range(expected)) - set(steps))
    if not absent:
        return []
    spans = []
    for _, group in itertools.groupby(enumerate(absent), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        spans.append(f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}")
    shown = ", ".join(spans[:5]) + (" and more" if len(spans) > 5 else "")
    return [
        f"WARNING: {what}: {len(absent)} of {expected} steps before the checkpoint are missing: {shown}. The run goes "
        "on; its record stays without them unless you stop it and bring the file back from a copy"
    ]
