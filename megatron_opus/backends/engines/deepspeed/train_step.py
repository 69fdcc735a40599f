"""Take one optimizer step with DeepSpeed: the same numbers for every layout.

The loss of a sequence is the mean over its counted tokens, the loss of a step the mean over its K sequences: how the K
are cut into microbatches and data-parallel shares does not enter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.backends.engines.base import StepResult
from megatron_opus.backends.engines.deepspeed.engine import initialize
from megatron_opus.backends.engines.deepspeed.stepping import take_step
from megatron_opus.backends.engines.losses import sequence_losses, unweighted_losses
from megatron_opus.backends.engines.schedule import learning_rate
from megatron_opus.backends.model.gpt import forward_loss
from megatron_opus.config import RunConfig
from megatron_opus.types import Batch, Groups


def build_engine(model: torch.nn.Module, config: RunConfig, groups: Groups) -> tuple[Any, str]:
    """The DeepSpeed engine of this recipe around an initialised model, and which optimizer it uses. Collective.

    `engine.module` is the GPTModel: scoring and evaluation call it directly. `engine.get_lr()[0]` is the learning rate
    of the coming step. Raises ConfigError for batch sizes or a schedule that do not fit.
    """
    return initialize(model, config, groups, learning_rate(config.optimizer, config.training.train_steps))


def train_step(engine: Any, iterator: Iterator[Batch], *, per_sequence: bool = False) -> StepResult:
    """Take this rank's microbatches from `iterator` and update the weights once. Collective.

    Exactly `gradient_accumulation_steps` microbatches of `micro_batch_size` sequences are taken; ValueError for one of
    another size. `per_sequence`: gather `sequence_loss` too, K numbers once per step.
    """
    groups, device = engine.step_settings.groups, engine.device
    micro_batches, expected = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    lr = float(engine.get_lr()[0])
    engine.train()
    total = torch.zeros((), dtype=torch.float32, device=device)
    norm, applied = math.inf, False
    own: list[Tensor] = []
    for index in range(micro_batches):
        batch = next(iterator)
        if len(batch) != expected:
            raise ValueError(f"microbatch {index}: expected {expected} sequences, got {len(batch)}")
        batch = batch.to(device)
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
    gathered = _of_all_ranks(torch.cat(own).float(), groups).cpu() if per_sequence else None
    return StepResult(loss=total.item(), grad_norm=norm, lr=lr, skipped=not applied, sequence_loss=gathered)


def _of_all_ranks(own: Tensor, groups: Groups) -> Tensor:
    """[K / dp] -> [K], identical to the last bit on every rank. Collective."""
    if groups.dp is not None:
        parts = [torch.empty_like(own) for _ in range(groups.dp_size)]
        dist.all_gather(parts, own, group=groups.dp)
        own = torch.cat(parts)
    if groups.tp is not None:  # what is decided from it must not depend on a rank's kernels
        dist.broadcast(own, src=dist.get_global_rank(groups.tp, 0), group=groups.tp)
    return own
