"""What one run folder says, apart from the ledger: metrics as columns, settings, evaluation, what is missing.

Nothing is written and nothing is guessed: what a folder lacks, or what had to be left out, is a sentence in `notes`.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.config import ConfigError, read_yaml
from megatron_opus.errors import Refusal
from megatron_opus.nested import flatten, lookup
from megatron_opus.runs.checkpoints import CHANGES_FILE
from megatron_opus.runs.metrics import METRICS_FILE, iter_metrics
from megatron_opus.style import MOST_LINES

CONFIG_FILE, LEDGER, EVALUATION_FILE = "config.yaml", "ledger", "evaluation.json"
SHARE, VALIDATION = "selected_share/", "validation_loss/"


class ReportError(Refusal, ValueError):
    """No page can be made: says what was expected, what was found and what to do."""


@dataclass(kw_only=True)
class RunRecord:
    """One run. Columns are float64 [steps], NaN where a row had no number; `/` stands between the keys of a mapping."""

    label: str  # its folder's name, with more of the path where two runs share it
    directory: Path
    settings: dict[str, Any]  # nested, as config.yaml has them; empty: there is none
    step: np.ndarray  # [steps] int64, ascending
    columns: dict[str, np.ndarray]
    evaluated: np.ndarray  # [evaluations] int64: rows in which a validation loss stands
    geometries: Counter[str]
    superseded: int  # rows that a resumed run wrote again
    torn: bool
    evaluation: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    def setting(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key, or `default` where config.yaml has none."""
        return lookup(self.settings, key, default)

    @property
    def strategy(self) -> str:
        """The strategy and what chooses beside it, for example "random, domain bandit, prefilter"."""
        beside = {
            "domain bandit": self.setting("selection.domain_bandit.enabled", False),
            "prefilter": self.setting("selection.prefilter.pool_ratio", 1) != 1,
            "controller": self.setting("selection.controller.enabled", False),
        }
        strategy = str(self.setting("selection.strategy", "unknown"))
        return ", ".join([strategy, *(name for name, on in beside.items() if on)])

    def column(self, name: str) -> np.ndarray | None:
        """[steps] float64, or None where no row has a finite number of that name."""
        values = self.columns.get(name)
        return None if values is None or not np.isfinite(values).any() else values

    def total(self, name: str) -> float:
        values = self.columns.get(name)
        return 0.0 if values is None else float(np.nansum(values))

    def last(self, name: str) -> float | None:
        """The last finite value."""
        values = self.column(name)
        return None if values is None else float(values[np.isfinite(values)][-1])

    @property
    def seconds(self) -> np.ndarray:
        """[steps]: seconds of all steps up to the end of each, scoring included; evaluation and checkpoints are not."""
        passed = self.columns.get("step_seconds")
        return np.full(len(self), math.nan) if passed is None else np.nancumsum(passed)

    @property
    def tokens(self) -> np.ndarray:
        """[steps]: update tokens up to the end of each step; NaN where the rows do not say."""
        return self.columns.get("update_tokens", np.full(len(self), math.nan))

    def named(self, prefix: str) -> list[str]:
        """The names below `prefix`, in the order of the rows."""
        return [name[len(prefix) :] for name in self.columns if name.startswith(prefix)]

    def curve(self, domain: str, x: np.ndarray) -> list[tuple[float, float]]:
        """(x, validation loss) at every evaluation that has one; a non-finite loss stays, as NaN."""
        losses = self.columns[VALIDATION + domain]
        return [(float(x[i]), float(losses[i])) for i in self.evaluated]


def read_records(directories: Sequence[Path]) -> list[RunRecord]:
    """One record for each folder. Raises ReportError for the first one that holds no run."""
    if len(directories) > MOST_LINES:
        raise ReportError(
            f"expected at most {MOST_LINES} runs, whose lines can be told apart, got {len(directories)}; leave some out"
        )
    resolved = [d.resolve() for d in directories]
    for d, count in Counter(resolved).items():
        if count > 1:
            raise ReportError(f"{d}: expected each run once, got it {count} times; name it once")
    return [_read(d, label) for d, label in zip(directories, _labels(resolved), strict=True)]


def _labels(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    for length in range(1, max(len(d.parts) for d in directories) + 1):
        labels = ["/".join(d.parts[-length:]) for d in directories]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(directory: Path, label: str) -> RunRecord:
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        raise ReportError(f"{directory}: expected the folder of a run, found {found}; give runs/<name>")
    parts = {name: (directory / name).exists() for name in (CONFIG_FILE, METRICS_FILE, LEDGER)}
    if not parts[METRICS_FILE] and not parts[LEDGER]:
        raise ReportError(
            f"{directory}: expected the folder of a run with {METRICS_FILE} or {LEDGER}/, found "
            f"{', '.join(sorted(os.listdir(directory))[:5]) or 'an empty folder'}; give runs/<name> of a run that has "
            "taken a step"
        )
    notes = [f"{name} is missing." for name, there in parts.items() if not there]
    settings = _settings(directory, notes)
    rows = _Rows()
    try:
        for row in iter_metrics(directory):
            rows.add(row)
    except ValueError as error:
        raise ReportError(str(error)) from None
    columns = {name: np.frombuffer(values, dtype=np.float64).copy() for name, values in rows.columns.items()}
    step = np.array(rows.steps, dtype=np.int64)
    record = RunRecord(
        label=label,
        directory=directory,
        settings=settings,
        step=step,
        columns=columns,
        evaluated=np.array(rows.evaluated, dtype=np.int64),
        geometries=rows.geometries,
        superseded=rows.superseded,
        torn=rows.torn,
        evaluation=_evaluation(directory, notes),
        notes=notes,
    )
    record.notes += [*_gaps(record, parts[METRICS_FILE]), *_changes(directory)]
    return record


class _Rows:
    """Rows of metrics.jsonl turned into columns while they are read: 8 bytes for each number, not a dictionary."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.columns: dict[str, array[float]] = {}
        self.evaluated: list[int] = []
        self.geometries: Counter[str] = Counter()
        self.superseded = 0
        self.torn = False
        self._geometry: list[str] = []

    def add(self, row: dict[str, Any] | None) -> None:
        if row is None:
            self.torn = True
            return
        while self.steps and self.steps[-1] >= row["step"]:  # a step taken again counts as it was taken last
            self._drop_last()
        self.steps.append(row["step"])
        geometry = row.get("geometry")
        self._geometry.append(geometry if isinstance(geometry, str) else "")
        self.geometries[self._geometry[-1]] += 1
        if isinstance(row.get("validation_loss"), Mapping) and row["validation_loss"]:
            self.evaluated.append(len(self.steps) - 1)
        for name, value in _numbers(row):
            column = self.columns.setdefault(name, array("d"))
            column.extend([math.nan] * (len(self.steps) - 1 - len(column)))
            column.append(value)
        for column in self.columns.values():
            column.extend([math.nan] * (len(self.steps) - len(column)))

    def _drop_last(self) -> None:
        self.steps.pop()
        self.geometries[self._geometry.pop()] -= 1
        if self.evaluated and self.evaluated[-1] == len(self.steps):
            self.evaluated.pop()
        for column in self.columns.values():
            column.pop()
        self.superseded += 1


def _numbers(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        (name, math.nan if value is None else float(value))
        for name, value in flatten(row, "/").items()
        if value is None or isinstance(value, int | float)
    ]


def _settings(directory: Path, notes: list[str]) -> dict[str, Any]:
    if not (directory / CONFIG_FILE).exists():
        return {}
    try:
        return read_yaml(directory / CONFIG_FILE)
    except ConfigError as error:
        notes.append(f"{CONFIG_FILE} cannot be read, so no settings are shown: {error}")
        return {}


def _changes(directory: Path) -> list[str]:
    """A sentence for every setting that was changed at a resume."""
    path = directory / CHANGES_FILE
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [f"From step {row['step']} on {row['key']} is {row['now']!r}; it was {row['was']!r}." for row in rows]


def _evaluation(directory: Path, notes: list[str]) -> dict[str, Any] | None:
    path = directory / EVALUATION_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
    except (ValueError, OSError) as error:
        notes.append(f"{EVALUATION_FILE} cannot be read, so its benchmarks are not shown: {error}")
        return None
    return content


def _gaps(record: RunRecord, has_metrics: bool) -> list[str]:
    if not has_metrics:
        return []
    if not len(record):
        return [f"{METRICS_FILE} holds no complete row: no step has been recorded yet."]
    notes = []
    planned, done = record.setting("training.train_steps"), int(record.step[-1]) + 1
    if isinstance(planned, int) and done < planned:
        notes.append(
            f"Recorded up to step {done:,} of {planned:,}: the run is still going, or was stopped before its end."
        )
    if missing := done - int(record.step[0]) - len(record):
        notes.append(f"{missing:,} steps between the first and the last recorded one have no row in {METRICS_FILE}.")
    if record.step[0] > 0:
        notes.append(f"The record begins at step {int(record.step[0]):,}.")
    if record.superseded:
        notes.append(
            f"{record.superseded:,} rows of {METRICS_FILE} belong to steps that were taken again after a resume; "
            "each step counts as it was taken last."
        )
    if record.torn:
        notes.append(f"The last line of {METRICS_FILE} is torn, as a killed process leaves it, and is left out.")
    if not len(record.evaluated):
        notes.append("No validation loss has been recorded: losses cannot be compared at equal tokens.")
    elif record.evaluated[-1] < len(record) - 1:
        at = int(record.step[record.evaluated[-1]]) + 1
        notes.append(f"The last evaluation was after step {at:,}; the final losses below are from there.")
    return notes
