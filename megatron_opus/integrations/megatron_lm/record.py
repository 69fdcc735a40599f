"""What a hooked run writes about selection: ledger, metrics.jsonl, and `opus/...` in Megatron's own TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_opus.config import RunConfig, dump
from megatron_opus.files import write_text
from megatron_opus.runs.ledger import LedgerWriter
from megatron_opus.training.metrics import MetricsWriter, scalars


class Record:
    """Written by one rank, a row when its step is over; the evaluation that may follow the step is added to it."""

    def __init__(self, directory: Path, config: RunConfig, domains: tuple[str, ...], first_step: int) -> None:
        """What a run that was killed has written of `first_step` and later steps is dropped."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "config.yaml", dump(config))
        self._metrics = MetricsWriter(directory, first_step=first_step, tensorboard=False)
        self._ledger = LedgerWriter(directory / "ledger", domains)
        self._ledger.truncate(first_step)
        self._row: dict[str, Any] = {}

    def step(self, row: dict[str, Any], decided: Any, events: Any) -> None:
        """Write one step; events: Megatron's TensorBoard writer, or None where it has none."""
        self._ledger.append(*decided)
        self._metrics.write(row)
        self._row = row
        if events is not None:
            for tag, value in scalars(row):
                events.add_scalar(f"opus/{tag}", value, row["step"] + 1)  # Megatron counts its iterations from 1

    def evaluated(self, losses: dict[str, float]) -> None:
        """Add validation losses to the last step's row."""
        if self._row:
            self._row["validation_loss"] = losses
            self._metrics.rewrite(self._row)

    def sync(self) -> None:
        """Put everything on the disk: called before a checkpoint counts."""
        self._ledger.flush()
        self._metrics.sync()

    def close(self) -> None:
        self._ledger.flush()
        self._metrics.close()
