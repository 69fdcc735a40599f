"""One optimizer step and one evaluation, the same numbers for every layout.

The loss of a sequence is the mean over its counted tokens, the loss of a step the mean over its K sequences: how the K
are cut into microbatches and data-parallel shares does not enter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.backends.deepspeed import initialize
from megatron_opus.backends.megatron import evaluation, forward_loss
from megatron_opus.backends.stepping import take_step
from megatron_opus.config import RunConfig
from megatron_opus.training.schedule import learning_rate
from megatron_opus.types import Batch, Groups


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; identical on every rank."""

    loss: float  # mean over the K sequences
    grad_norm: float  # before clipping; inf when the step was skipped
    lr: float  # the rate that the step used
    skipped: bool  # a NaN or Inf gradient: weights, optimizer state and schedule are unchanged
    sequence_loss: Tensor | None = None  # [K] float32, each sequence's own mean, in the order the iterator was filled


def build_engine(model: torch.nn.Module, config: RunConfig, groups: Groups) -> tuple[Any, str]:
    """The DeepSpeed engine of this recipe around an initialised model, and which optimizer it uses. Collective.

    `engine.module` is the GPTModel: scoring and evaluation call it directly. `engine.get_lr()[0]` is the learning rate
    of the coming step. Raises ConfigError for batch sizes or a schedule that do not fit.
    """
    return initialize(model, config, groups, learning_rate(config.optimizer, config.training.train_steps))


def sequence_losses(token_losses: Tensor, loss_mask: Tensor) -> Tensor:
    """[B, L], [B, L] -> [B]: sum(loss * mask) / number of counted tokens.

    A mask of 0 and 1 gives the mean. A sequence's weight is carried by its mask values: they scale the sum but not the
    number of tokens. A sequence without any counted token has loss 0.
    """
    counted = (loss_mask != 0).sum(dim=1).clamp(min=1)
    # where, not *: a token that does not count may have any loss, NaN included.
    masked = torch.where(loss_mask != 0, token_losses * loss_mask, torch.zeros((), device=token_losses.device))
    return masked.sum(dim=1) / counted


def unweighted_losses(token_losses: Tensor, loss_mask: Tensor) -> Tensor:
    """[B, L], [B, L] -> [B]: mean over the counted tokens, whatever their weight; NaN where none counts."""
    counted = loss_mask != 0
    return torch.where(counted, token_losses, 0.0).sum(dim=1) / counted.sum(dim=1)


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


def evaluate(model: Any, batches: Mapping[str, Batch], groups: Groups, micro_batch_size: int) -> dict[str, float]:
    """Mean loss per counted token of each domain, identical on every rank. Collective over data-parallel ranks.

    `model`: a GPTModel or the engine around it. `batches`: the same sequences on every rank, of which each
    data-parallel rank evaluates its share. Dropout is off and the model's mode is restored. A domain without any
    counted token is NaN.
    """
    gpt = getattr(model, "module", model)
    parameters = list(gpt.parameters())
    device, partitioned = parameters[0].device, any(hasattr(p, "ds_id") for p in parameters)
    sums = torch.zeros(len(batches), 2, dtype=torch.float64, device=device)  # loss, tokens
    with evaluation(gpt):
        for row, batch in enumerate(batches.values()):
            first, last = (len(batch) * (groups.dp_rank + i) // groups.dp_size for i in (0, 1))
            largest = -(-len(batch) // groups.dp_size)
            for start in range(first, first + largest, micro_batch_size):
                piece = batch.rows(start, min(start + micro_batch_size, last)).to(device)
                if start >= last:
                    if partitioned:  # ZeRO 3 gathers weights in each forward pass: as many on every rank
                        forward_loss(gpt, batch.rows(0, 1).to(device))
                    continue
                counted = piece.loss_mask != 0
                sums[row, 0] += forward_loss(gpt, piece)[counted].double().sum()
                sums[row, 1] += counted.sum()
    if groups.dp is not None:
        dist.all_reduce(sums, group=groups.dp)
    values = sums.tolist()
    return {name: (loss / n if n else math.nan) for name, (loss, n) in zip(batches, values, strict=True)}
