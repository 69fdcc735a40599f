"""DeepSpeed behind the `TrainEngine` protocol: nothing outside this folder reads an attribute of its engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megatron_opus.backends.engines.base import WholeModelRunner, evaluate, of_all_ranks
from megatron_opus.backends.engines.deepspeed.engine import initialize
from megatron_opus.backends.engines.deepspeed.optimizer_state import DeepSpeedState
from megatron_opus.backends.engines.deepspeed.stepping import take_step
from megatron_opus.backends.engines.losses import sequence_losses, unweighted_losses
from megatron_opus.backends.engines.schedule import learning_rate
from megatron_opus.backends.model.gpt import forward_loss
from megatron_opus.config import RunConfig
from megatron_opus.errors import CheckpointError
from megatron_opus.types import Batch, Groups, StepResult


class DeepSpeedEngine:
    """A DeepSpeed engine at ZeRO stage 0 to 3 as a `TrainEngine`."""

    def __init__(self, model: nn.Module, config: RunConfig, groups: Groups) -> None:
        """Build the engine around an initialised model. Collective.

        Raises ConfigError for batch sizes or a schedule that do not fit.
        """
        schedule = learning_rate(config.optimizer, config.training.train_steps)
        self.deepspeed, optimizer = initialize(model, config, groups, schedule)
        self.groups, self.device = groups, self.deepspeed.device
        self.description = (
            f"{config.training.precision}, ZeRO {config.parallel.zero_stage}, tensor parallel {groups.tp_size} x data "
            f"parallel {groups.dp_size}, {optimizer}"
        )

    @property
    def lr(self) -> float:
        return float(self.deepspeed.get_lr()[0])

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.deepspeed.module
        return module

    def optimizer_state(self) -> DeepSpeedState:
        return DeepSpeedState(self.deepspeed)

    def runner(self) -> WholeModelRunner:
        return WholeModelRunner(self.module, forward_loss, self.device)

    def train_step(self, iterator: Iterator[Batch], *, per_sequence: bool = False) -> StepResult:
        engine, groups = self.deepspeed, self.groups
        micro_batches, expected = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
        lr = self.lr
        engine.train()
        # DeepSpeed divides the loss by the micro-batches; what balances experts enters the graph beside the loss
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1.0 / micro_batches, device=self.device))
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        norm, applied = math.inf, False
        own: list[Tensor] = []
        for index in range(micro_batches):
            batch = next(iterator)
            if len(batch) != expected:
                raise ValueError(f"microbatch {index}: expected {expected} sequences, got {len(batch)}")
            batch = batch.to(self.device)
            token_losses = forward_loss(engine, batch)
            loss = sequence_losses(token_losses, batch.loss_mask).mean()
            if per_sequence:
                own.append(unweighted_losses(token_losses.detach(), batch.loss_mask))
            engine.backward(loss)
            total += loss.detach()
            if index < micro_batches - 1:
                engine.step()
            else:
                norm, applied = take_step(engine)
        total /= micro_batches * groups.dp_size
        if groups.dp is not None:
            dist.all_reduce(total, group=groups.dp)
        gathered = of_all_ranks(torch.cat(own).float(), groups).cpu() if per_sequence else None
        return StepResult(loss=total.item(), grad_norm=norm, lr=lr, skipped=not applied, sequence_loss=gathered)

    def evaluate(self, batches: Mapping[str, Batch], micro_batch_size: int) -> dict[str, float]:
        return evaluate(
            self.runner(),
            batches,
            self.groups,
            micro_batch_size,
            self.device,
            equally_often=any(hasattr(p, "ds_id") for p in self.module.parameters()),
        )

    def save(self, path: Path) -> None:
        self.deepspeed.save_checkpoint(str(path), tag="engine", save_latest=False)

    def rank_state(self) -> dict[str, Any] | None:
        moment = self.deepspeed.step_settings.second_moment
        return None if moment is None else moment.state_dict()

    def load(self, path: Path, rank_state: Mapping[str, Any] | None) -> None:
        loaded, _ = self.deepspeed.load_checkpoint(str(path), tag="engine")
        if loaded is None:
            raise CheckpointError(f"checkpoint {path}: DeepSpeed found nothing to load in {path / 'engine'}")
        rates = self.deepspeed.lr_scheduler.get_last_lr()
        for group, lr in zip(self.deepspeed.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        if rank_state is not None:
            self.deepspeed.step_settings.second_moment.load_state_dict(rank_state)
