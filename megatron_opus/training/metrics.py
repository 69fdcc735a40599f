"""What a run writes while it trains: `metrics.jsonl`, TensorBoard events of the same, one live line on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import torch
from tqdm import tqdm

from megatron_opus.files import write_text
from megatron_opus.nested import flatten
from megatron_opus.runs.metrics import METRICS_FILE, read_metrics
from megatron_opus.training.driver import SelectionDriver, Sequences
from megatron_opus.types import Candidates, Selection, Signals


class MetricsWriter:
    """One JSON object per step. Rows of `first_step` and later, left by a killed run, are dropped when it is opened."""

    def __init__(self, run_dir: Path, *, first_step: int, tensorboard: bool) -> None:
        self._path = run_dir / METRICS_FILE
        _truncate(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._start = 0
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """`row` has an int `step`; nested mappings (losses per domain) become dotted TensorBoard tags."""
        self._start = self._file.tell()  # of the last row
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        self._file.flush()
        if self._events is not None:
            for tag, value in scalars(row):
                self._events.add_scalar(tag, value, row["step"])

    def rewrite(self, row: Mapping[str, Any]) -> None:
        """Write the last row again, to which something has been added."""
        self._file.seek(self._start)
        self._file.truncate()
        self.write(row)

    def sync(self) -> None:
        """Everything written so far is on disk: called before a checkpoint counts."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _truncate(path: Path, first_step: int) -> None:
    rows = [row for row in read_metrics(path.parent) if row["step"] < first_step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _plain(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def scalars(row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Yield (TensorBoard tag, value) of every number in a row of metrics."""
    for tag, value in flatten(row, "/").items():
        if isinstance(value, int | float) and not isinstance(value, bool) and tag != "step":
            yield tag, value


def expert_load(signals: Signals, selection: Selection) -> dict[str, float]:
    """How unevenly experts are taken by the scored tokens of all candidates and of the chosen ones; {} without experts.

    The tokens of the busiest expert of a layer over the mean of its experts, averaged over layers: 1 is even. Of 8
    experts of which each token takes 2, 4 is the largest.
    """
    if signals.expert_load is None:
        return {}

    def busiest(load: torch.Tensor) -> float:
        return float((load.amax(1) / load.mean(1)).mean())

    offered, chosen = signals.expert_load, signals.expert_load[selection.indices]
    return {"expert_load_offered": busiest(offered.sum(0)), "expert_load_chosen": busiest(chosen.sum(0))}


class ProgressLine:
    """A tqdm bar on a terminal; elsewhere (a Slurm log) a plain line at most every `seconds`."""

    def __init__(self, total: int, initial: int, *, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._total, self._seconds, self._last, self._started = total, seconds, 0.0, time.monotonic()
        self._initial = initial
        self._bar = (
            tqdm(total=total, initial=initial, file=self._stream, unit="step", dynamic_ncols=True)
            if self._live
            else None
        )

    def update(self, done: int, values: Mapping[str, str]) -> None:
        text = " ".join(f"{k} {v}" for k, v in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= self._seconds or done == self._total:
            self._last = now
            rate = (now - self._started) / max(1, done - self._initial)
            left = (self._total - done) * rate
            print(
                f"step {done}/{self._total}  {text}  {rate:.2f} s/step  {left:.0f} s left",
                file=self._stream,
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line of its own that the bar does not overwrite."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def metrics_row(
    driver: SelectionDriver,
    corpus: Sequences,
    candidates: Candidates,
    signals: Signals,
    selection: Selection,
    *,
    loss: float,
    grad_norm: float,
    lr: float,
    skipped: bool,
    choose_seconds: float,
    step_seconds: float,
    step_cpu_seconds: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl (validation losses are added where they are measured)."""
    counters = driver.counters
    chosen = candidates.domains[selection.indices.numpy()]
    names = corpus.domains["candidates"]
    share = {name: float(np.mean(chosen == d)) for d, name in enumerate(names)}
    weighted = {}
    if selection.weights is not None:  # what the update is made of: sequences of weight 0 take no part
        parts = np.bincount(chosen, weights=selection.weights.double().numpy(), minlength=len(names))
        weighted = {"weighted_share": dict(zip(names, (parts / parts.sum()).tolist(), strict=True))}
    domains = driver.domain_counters
    return {
        "step": counters.step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped": skipped,
        "update_tokens": counters.update_tokens,
        "candidate_tokens": counters.candidate_tokens,
        "scored_tokens": counters.scored_tokens,
        **selection.diagnostics,
        **expert_load(signals, selection),
        "fallbacks": counters.fallbacks,
        "excluded_total": counters.excluded,
        "geometry": signals.geometry,
        "selected_share": share,
        **weighted,
        "domain_tokens": {name: c["used"] * driver.seq_length for name, c in domains.items()},  # trained on
        "domain_epochs": {name: c["offered"] / c["sequences"] for name, c in domains.items()},  # offered, in passes
        "score_seconds": signals.seconds,
        "score_bytes_sent": signals.bytes_sent,
        "choose_seconds": choose_seconds,  # scoring, and beside it the buffer, the draw and reading what was drawn
        "step_seconds": step_seconds,
        "step_cpu_seconds": step_cpu_seconds,
        "memory_bytes": memory_bytes(),
    }


def memory_bytes() -> int:
    """Peak device memory on a GPU, resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
