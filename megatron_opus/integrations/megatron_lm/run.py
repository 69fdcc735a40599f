"""Selection inside Megatron-LM's loop: what happens before and after each of its training steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opus.backends.engines.megatron import training_loop
from megatron_opus.backends.engines.megatron.training_loop import ForwardStep, LoopParts, SequenceLosses
from megatron_opus.config import ConfigError
from megatron_opus.integrations.megatron_lm import settings
from megatron_opus.integrations.megatron_lm.record import Record
from megatron_opus.integrations.megatron_lm.samples import CandidateCursor, Samples, SelectedMicroBatches
from megatron_opus.integrations.megatron_lm.settings import HookConfig
from megatron_opus.scoring.loss_pass import LossPass
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.scoring.verify import gradient_check
from megatron_opus.selection.prefilter import Prefilter
from megatron_opus.selection.strategies import build_strategy, scoring_config
from megatron_opus.training.driver import SelectionDriver
from megatron_opus.training.metrics import metrics_row

VERSION = 1
FOLDER = "opus"  # beside Megatron's checkpoints


class SelectionRun:
    """The selection of one run, from the training step on at which model, optimizer and datasets are there."""

    def __init__(
        self,
        config: HookConfig,
        arguments: Any,
        samples: Samples,
        iterator: SelectedMicroBatches,
        forward_step: ForwardStep,
        model: Any,
        optimizer: Any,
        saved: Mapping[str, Any] | None,
    ) -> None:
        """Build everything. Collective. `arguments` are Megatron's, `saved` what `state` gave for a checkpoint.

        Raises Refusal for what cannot be scored.
        """
        selection = config.selection
        self._config, self._arguments, self._samples, self._iterator = config, arguments, samples, iterator
        self._groups = groups = training_loop.loop_groups()
        recipe = settings.recipe(arguments, config)
        self._updates = arguments.iteration  # optimizer steps taken: those that were not skipped
        parts = training_loop.loop_parts(
            model, optimizer, forward_step, arguments, selection, groups, lambda: self._updates
        )
        k = recipe.training.global_batch_size
        self._ratio = selection.prefilter.pool_ratio
        ceiling = samples.shares * len(samples) / (candidates_of(k, selection.rho, groups.dp_size) * self._ratio)
        strategy = build_strategy(selection, samples.names, samples.shares, ceiling, k)
        scorer, loss_pass = None, None
        if strategy.needs == {"loss"}:
            loss_pass = LossPass(parts.runner, selection, groups=groups, device=parts.device)
        elif strategy.needs:
            scorer = self._scorer(parts)
            samples.proxy_ids(0, selection.proxy_batch_size, recipe.seed)  # refuses a pool that is too small
        self._losses = (
            SequenceLosses(arguments.micro_batch_size, groups, parts.device) if strategy.wants_domain_loss else None
        )
        # a run without selection has trained on the samples before this one
        self._cursor = CandidateCursor(samples, recipe.seed, start=arguments.consumed_train_samples)
        prefilter = Prefilter(selection.prefilter, len(samples.names)) if self._ratio > 1 else None
        self._driver = SelectionDriver(
            recipe, groups, samples, self._cursor, strategy, scorer, iterator, loss_pass, prefilter
        )
        self._driver.counters.step = arguments.iteration
        if saved is not None:
            self._load(saved)
        elif arguments.iteration:
            self.say(f"the checkpoint of iteration {arguments.iteration} holds no selection: selecting begins here")
        self._passes = self._cursor.passes
        self._choosing = (0.0, 0.0, 0.0)  # wall clock and processor time at the start, seconds of choosing
        self._decided: Any = None
        self._before: dict[str, Any] | None = None  # our state before a step that Megatron may break off
        self._broken_off = False
        self.say(
            f"{selection.strategy} takes K of N = K / {selection.rho:g} candidates from {len(samples):,} samples of "
            f"{len(samples.names)} dataset(s): {', '.join(samples.names[:8])}"
            + (f"; the prefilter picks them from {self._ratio} N" if prefilter else "")
        )
        self._record: Record | None = None
        folder = config.output_dir or (str(Path(arguments.save) / FOLDER) if arguments.save else None)
        if folder is None:
            self.say("ledger and metrics are not written: give --save, or output_dir in opus.yaml")
        elif _is_recorder():
            self._record = Record(Path(folder), recipe, samples.names, self._driver.counters.step)

    def _scorer(self, parts: LoopParts) -> ScoringPass:
        verified_by, why_not = gradient_check(parts.runner)
        self.say(
            f"scoring: gradients are not compared with autograd's: {why_not}"
            if verified_by is None
            else "scoring: the first pass compares the gradients of one candidate with autograd's"
        )
        return ScoringPass(
            parts.runner,
            parts.layers,
            parts.state,
            scoring_config(self._config.selection),
            groups=self._groups,
            device=parts.device,
            verify=verified_by,
        )

    def before(self, forward_step: ForwardStep) -> ForwardStep:
        """Choose the sequences of the coming step; returns the forward step that training is to use. Collective."""
        started, worked = time.perf_counter(), time.process_time()
        if getattr(self._arguments, "rerun_mode", "disabled") != "disabled":
            self._before = self._state()
        k = training_loop.micro_batches() * self._arguments.micro_batch_size * self._groups.dp_size
        self._cursor.size = candidates_of(k, self._config.selection.rho, self._groups.dp_size) * self._ratio
        self._decided = self._driver.choose(k)
        if self._cursor.passes > self._passes:
            self._passes = self._cursor.passes
            self.say(f"the {len(self._samples):,} train samples have all been offered; they begin again")
        for line in self._driver.notices:
            self.say(line)
        self._driver.notices.clear()
        self._choosing = (started, worked, time.perf_counter() - started)
        return forward_step if self._losses is None else self._losses.reading(forward_step, self._iterator.masks())

    def after(self, result: tuple[Any, ...], rate: float, events: Any) -> None:
        """Record a step by what Megatron's `train_step` has returned. Collective for strategies that learn."""
        losses, skipped, _, should_exit, _, norm = result[:6]
        if should_exit:  # broken off before the update, to be run again from a checkpoint
            self._broken_off = True
            return
        self._updates += not skipped
        started, worked, choose_seconds = self._choosing
        self._driver.took(choose_seconds, time.perf_counter() - started - choose_seconds)
        if self._record is not None:
            row = metrics_row(
                self._driver,
                self._samples,
                *self._decided,
                loss=float(next(iter(losses.values()))) if losses else float("nan"),
                grad_norm=float("nan") if norm is None else float(norm),
                lr=rate,
                skipped=bool(skipped),
                choose_seconds=choose_seconds,
                step_seconds=time.perf_counter() - started,
                step_cpu_seconds=time.process_time() - worked,
            )
            self._record.step(row, self._decided, events)
        if self._losses is not None:
            self._driver.observe(self._losses.gathered())
        self._driver.counters.step += 1

    @property
    def completed(self) -> int:
        """Iterations of Megatron that are over."""
        return self._driver.counters.step

    def evaluated(self, losses: dict[str, float]) -> None:
        """Add the validation losses of the last step to its row."""
        if self._record is not None:
            self._record.evaluated(losses)

    def state(self) -> dict[str, Any]:
        """Return, for a checkpoint, what decides the next choices; the record of the steps is on disk. Collective.

        After a step that Megatron has broken off, it is the state before that step, which a resumed run takes again.
        """
        if self._record is not None:
            self._record.sync()
        state = self._before if self._broken_off and self._before is not None else self._state()
        self._driver.after_checkpoint()
        return state

    def close(self) -> None:
        if self._record is not None:
            self._record.close()
            self._record = None

    def say(self, line: str) -> None:
        """Print a line where Megatron prints those of its steps, on the last rank."""
        if _is_recorder():
            print(f"opus: {line}", flush=True)

    def _state(self) -> dict[str, Any]:
        return {"version": VERSION, "updates": self._updates, "driver": self._driver.state_dict()}

    def _load(self, saved: Mapping[str, Any]) -> None:
        if saved["version"] != VERSION:
            raise ConfigError(
                f"state of the selection: expected version {VERSION}, got {saved['version']}; resume with the release "
                "of megatron_opus that wrote it, or remove its file to begin selecting anew"
            )
        self._driver.load_state_dict(saved["driver"])
        self._updates = int(saved["updates"])
        offered, now = saved["driver"]["buffer"]["samples"], len(self._samples)
        if offered != now:
            self.say(
                f"the train dataset has {now:,} samples, at the checkpoint it had {offered:,}; Megatron may order it "
                "in another way, so that samples come again: was --train-iters or selection.rho changed?"
            )


def candidates_of(k: int, rho: float, dp_size: int) -> int:
    """Return N = K / rho, at least K and a multiple of the data-parallel ranks, of which each scores N / dp.

    Example: K = 8 at rho 0.3 on 2 ranks gives 26.7, rounded to 26.
    """
    return max(k, dp_size * round(k / rho / dp_size))


def current_rate(optimizer: Any) -> float:
    """Return the learning rate of the coming step, that of the optimizer's first group."""
    groups = optimizer.param_groups
    return float(groups[0]["lr"]) if groups else float("nan")


def _is_recorder() -> bool:
    """Tell whether this is the last rank: it knows the loss, and has Megatron's TensorBoard writer."""
    return dist.get_rank() == dist.get_world_size() - 1
