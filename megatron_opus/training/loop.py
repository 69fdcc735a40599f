"""The training loop: choose, step, record, evaluate, checkpoint. The engine does not know that data is chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opus.config import RunConfig
from megatron_opus.data.corpus import Corpus
from megatron_opus.data.iterator import SelectedBatchIterator
from megatron_opus.errors import Refusal
from megatron_opus.ranks.lost_ranks import Watch
from megatron_opus.ranks.stopping import StopAgreement
from megatron_opus.runs.ledger import LedgerWriter
from megatron_opus.runs.metrics import read_metrics
from megatron_opus.training.driver import SelectionDriver
from megatron_opus.training.metrics import MetricsWriter, ProgressLine, metrics_row
from megatron_opus.types import Groups, TrainEngine


class NonFiniteLoss(Refusal, RuntimeError):
    """Too many consecutive steps had NaN or Inf gradients, or the run ends with losses that are no numbers."""


class TrainingLoop:
    """Runs from wherever `driver.counters.step` stands to `training.train_steps`. Collective.

    Rank 0 alone writes metrics, ledger and the terminal. `save(step)` writes a checkpoint of everything else.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        groups: Groups,
        engine: TrainEngine,
        corpus: Corpus,
        driver: SelectionDriver,
        iterator: SelectedBatchIterator,
        save: Callable[[int], None],
        *,
        stop: StopAgreement,
        watch: Watch,
    ) -> None:
        self.stopped = ""  # why the run ended before its last step
        self._stop, self._watch = stop, watch
        self._config, self._run_dir, self._groups = config, run_dir, groups
        self._engine, self._corpus = engine, corpus
        self._driver, self._iterator, self._save_checkpoint = driver, iterator, save
        self._writes = groups.tp_rank == groups.dp_rank == groups.pp_rank == 0
        self._nonfinite = 0
        self._validation = {
            name: corpus.batch(corpus.validation_ids(name, config.training.eval_sequences))
            for name in corpus.domains["validation"]
        }

    def run(self) -> dict[str, Any]:
        """Train to the end, or until all ranks agree to stop; the last row of metrics.

        A run that had reached its end before gives the row that it had recorded. Raises NonFiniteLoss,
        TooManyFallbacks, CaptureError.
        """
        t, driver, watch = self._config.training, self._driver, self._watch
        record = _Record(self._config, self._run_dir, self._corpus, driver) if self._writes else None
        row: dict[str, Any] = {}
        try:
            while driver.counters.step < t.train_steps and not self.stopped:
                row, decided = self._step()
                self._stop.post()
                completed = driver.counters.step
                if self._due(completed, t.eval_interval):
                    watch.now(f"evaluating after step {completed - 1}")
                    row["validation_loss"] = self._evaluate()
                if record is not None:
                    record.write(row, decided, driver.notices)
                driver.notices.clear()
                self._check_nonfinite(row, decided)
                watch.now(f"agreeing whether to stop after step {completed - 1}")
                reason = self._stop.agreed()
                if completed < t.train_steps:
                    self.stopped = reason
                if self.stopped or self._due(completed, t.checkpoint_interval):
                    watch.now(f"writing the checkpoint after step {completed - 1}")
                    if record is not None:
                        record.sync()  # what a checkpoint stands for is on disk before it counts
                    self._save_checkpoint(completed)
                    driver.after_checkpoint()
        finally:
            if record is not None:
                record.close()  # a failing step must not take the record of the steps before it along
        row = row or next(reversed(read_metrics(self._run_dir)), {})
        if not self.stopped:
            watch.now("looking at the last losses")
            _check_last(row)
        return row

    def _step(self) -> tuple[dict[str, Any], Any]:
        started, worked, step = time.perf_counter(), time.process_time(), self._driver.counters.step
        self._watch.now(f"scoring and selecting the candidates of step {step}")
        decided = self._driver.choose()
        choose_seconds = time.perf_counter() - started
        self._watch.now(f"training step {step}")
        result = self._engine.train_step(self._iterator, per_sequence=self._driver.wants_sequence_loss)
        step_seconds = time.perf_counter() - started
        self._driver.took(choose_seconds, step_seconds - choose_seconds)
        row = metrics_row(
            self._driver,
            self._corpus,
            *decided,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            skipped=result.skipped,
            choose_seconds=choose_seconds,
            step_seconds=step_seconds,
            step_cpu_seconds=time.process_time() - worked,
        )
        if result.sequence_loss is not None:
            self._driver.observe(result.sequence_loss)
        self._driver.counters.step += 1
        return row, decided

    def _due(self, completed: int, interval: int) -> bool:
        return completed == self._config.training.train_steps or (interval > 0 and completed % interval == 0)

    def _evaluate(self) -> dict[str, float]:
        return self._engine.evaluate(self._validation, self._config.training.micro_batch_size)

    def _check_nonfinite(self, row: dict[str, Any], decided: Any) -> None:
        """Steps with a non-finite gradient were not applied; a run of them will not mend itself."""
        limit = self._config.training.max_nonfinite_steps
        self._nonfinite = self._nonfinite + 1 if row["skipped"] else 0
        if self._nonfinite >= limit:
            candidates, _, selection = decided
            ids = candidates.sample_ids[selection.indices.numpy()].tolist()
            raise NonFiniteLoss(
                f"step {row['step']}: {self._nonfinite} consecutive steps had NaN or Inf gradients and were not "
                f"applied (loss {row['loss']}); max_nonfinite_steps is {limit}. The last checkpoint is intact; "
                f"sample ids of this step: {ids}. Lower optimizer.lr or look at these samples"
            )


def _check_last(row: dict[str, Any]) -> None:
    """Raise NonFiniteLoss for a finished run whose last losses are NaN or infinite (null where they were recorded)."""
    losses = {"loss": row.get("loss", 0.0), **row.get("validation_loss", {})}
    broken = [name for name, loss in losses.items() if loss is None or not math.isfinite(loss)]
    if broken:
        raise NonFiniteLoss(
            f"the run has ended, but its last losses are no numbers: {', '.join(broken)}. What it trained cannot be "
            "used: resume a copy of the run from an earlier checkpoint, and lower optimizer.lr"
        )


class _Record:
    """Metrics, ledger and the terminal of rank 0. What a killed run wrote after its last checkpoint is dropped."""

    def __init__(self, config: RunConfig, run_dir: Path, corpus: Corpus, driver: SelectionDriver) -> None:
        first, t = driver.counters.step, config.training
        self._log_interval, self._total = t.log_interval, t.train_steps
        self._metrics = MetricsWriter(run_dir, first_step=first, tensorboard=t.tensorboard)
        self._ledger = LedgerWriter(run_dir / "ledger", corpus.domains["candidates"])
        self._ledger.truncate(first)
        self._line = ProgressLine(t.train_steps, first)

    def write(self, row: dict[str, Any], decided: Any, notices: list[str]) -> None:
        self._ledger.append(*decided)
        self._metrics.write(row)
        completed = row["step"] + 1
        for notice in notices:
            self._line.say(notice)
        if row["skipped"]:
            self._line.say(f"step {row['step']}: NaN or Inf gradient, the update was skipped")
        if "validation_loss" in row:
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in row["validation_loss"].items())
            self._line.say(f"step {completed}/{self._total}  validation loss  {losses}")
        if completed % self._log_interval == 0 or completed == self._total:
            values = {"loss": f"{row['loss']:.3f}"}
            if "entropy_ratio" in row:
                values["entropy"] = f"{row['entropy_ratio']:.2f}"
                values["scoring"] = f"{row['score_seconds'] / row['step_seconds']:.0%}"
            self._line.update(completed, values)

    def sync(self) -> None:
        self._ledger.flush()
        self._metrics.sync()

    def close(self) -> None:
        self._ledger.flush()
        self._metrics.close()
        self._line.close()
