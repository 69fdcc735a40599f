"""What a scoring pass asks of the batches that it is given."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_opus.config import ConfigError
from megatron_opus.types import Batch

IGNORED_LABEL = -100  # torch's ignore_index, and so that of transformers: no token, its prediction does not count


def holds_ids(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or x.is_meta)


def checked(batch: Batch, what: str) -> Batch:
    """Return the batch with ids in int64 and `loss_mask` 0 where the label is -100.

    `what` is "candidates" or "proxy". Raises ConfigError for ids that are no integers with values, and for fields whose
    shapes are not those of the tokens [B, L].
    """
    shape = batch.tokens.shape
    if batch.tokens.dim() != 2 or 0 in shape or not holds_ids(batch.tokens):
        raise ConfigError(
            f"{what}.tokens: expected ids [B, L] with at least one sequence and one token, got {batch.tokens.dtype} "
            f"{list(shape)}"
        )
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if value is not None and value.shape != shape:
            raise ConfigError(
                f"{what}.{field.name}: expected the shape of the tokens, {list(shape)}, got {list(value.shape)}"
            )
        if field.name in ("labels", "position_ids") and not holds_ids(value):
            raise ConfigError(f"{what}.{field.name}: expected integers, got {value.dtype} on {value.device}")
    batch = dataclasses.replace(
        batch, tokens=batch.tokens.long(), labels=batch.labels.long(), position_ids=batch.position_ids.long()
    )
    mask = batch.loss_mask.masked_fill(batch.labels == IGNORED_LABEL, 0.0)
    return dataclasses.replace(batch, loss_mask=mask)
