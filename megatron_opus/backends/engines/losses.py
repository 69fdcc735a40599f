"""Losses of sequences and of whole domains, the same numbers for every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opus.backends.model.gpt import evaluation, forward_loss
from megatron_opus.types import Batch, Groups


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
