"""Selection overhead: a real optimizer step with selection against one without, on the clock and in FLOPs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opus import config as configs
from megatron_opus.config import DataConfig, RunConfig, SelectionConfig, TrainingConfig
from megatron_opus.estimates.flops import StepFlops, step_flops
from megatron_opus.selection.strategies.opus import OpusStrategy
from megatron_opus.studies.bench import workbench
from megatron_opus.studies.bench.estimators import Rows
from megatron_opus.studies.bench.workbench import Clock, Pool, Workbench
from megatron_opus.types import Batch, Candidates


def measured(
    work: Workbench,
    pool: Pool,
    selections: dict[str, SelectionConfig],
    *,
    chosen: int,
    micro_batch_size: int,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> Rows:
    """A row for the step without selection and for each estimator's step with it.

    Without: forward, backward, clipping and AdamW's step on the first `chosen` (K) candidates of the pool. With: the
    scoring pass over all N and the proxy, the draw of K, and the same step on those. Both train the model. `FLOPs` is
    the overhead counted from shapes.
    """

    def step(batch: Batch) -> None:
        work.update(batch, micro_batch_size)

    runs: dict[str, Any] = {"without selection": lambda: step(pool.candidates.rows(0, chosen))}
    selecting: dict[str, list[float]] = {name: [] for name in selections}
    for name, selection in selections.items():
        runs[name] = _selected_step(work, pool, selection, chosen, step, selecting[name], clock)
    seconds = workbench.alternate(runs, repeats, work.device, clock)
    base = workbench.ratio(seconds, "without selection", "without selection")["seconds"]
    rows: Rows = [{"step": "without selection", "seconds": base}]
    for name, selection in selections.items():
        found = workbench.ratio(seconds, name, "without selection")
        counted = predicted(work, pool, selection, chosen)
        rows.append(
            {
                "step": name,
                "seconds": found["seconds"],
                "overhead": found["median"] - 1,
                "low": found["low"] - 1,
                "high": found["high"] - 1,
                "selecting": statistics.median(selecting[name][1:]) / base,  # without the round that is not counted
                "FLOPs": counted.overhead,
                "tax in FLOPs": counted.tax,
            }
        )
    return rows


def _selected_step(
    work: Workbench,
    pool: Pool,
    selection: SelectionConfig,
    chosen: int,
    step: Any,
    selecting: list[float],
    clock: Clock,
) -> Any:
    scorer, strategy = work.scorer(selection), OpusStrategy(selection)
    generator = torch.Generator().manual_seed(work.seed)
    n = len(pool.candidates)
    candidates = Candidates(step=0, sample_ids=np.arange(n), domains=np.zeros(n, dtype=np.int32))

    def run() -> None:
        started = clock()
        signals = scorer(pool.candidates, pool.proxy, interaction=selection.redundancy.scale != "off")
        drawn = strategy.select(candidates, signals, chosen, generator).indices.tolist()
        selecting.append(clock() - started)
        step(Batch.cat([pool.candidates.rows(i, i + 1) for i in drawn]))

    return run


def predicted(work: Workbench, pool: Pool, selection: SelectionConfig, chosen: int) -> StepFlops:
    config = RunConfig(
        name="bench",
        model=work.config,
        data=DataConfig(seq_length=work.length),
        training=TrainingConfig(global_batch_size=chosen),
        selection=dataclasses.replace(selection, rho=chosen / len(pool.candidates), proxy_batch_size=len(pool.proxy)),
    )
    return step_flops(config, projections="sums" if work.device.type == "cpu" else "products")


def of_recipes(recipes: Sequence[Path], overrides: Sequence[str]) -> Rows:
    """Counted overhead of each recipe, with its optimizer, its estimator and its savings. Raises ConfigError."""
    rows: Rows = []
    for path in recipes:
        config = configs.load(path, overrides)
        causal, dense = (step_flops(config, attention=a) for a in ("causal", "dense"))
        update = sum(causal.update.values())
        s = config.selection
        rows.append(
            {
                "recipe": config.name,
                "optimizer": config.optimizer.name,
                "L_train": config.data.seq_length,
                "N": config.buffer_size,
                "K": config.training.global_batch_size,
                "L_score": s.score_length * s.score_windows,
                "K_p": s.proxy_batch_size,
                "update PFLOP": update / 1e15,
                **{name: value / update for name, value in causal.selection.items()},
                "overhead": causal.overhead,
                "dense attention": dense.overhead,
                "tax": causal.tax,
            }
        )
    return rows
