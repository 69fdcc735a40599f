"""What a scoring pass asks of the batches that it is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_opus.config import ConfigError
from megatron_opus.types import Batch

IGNORED_LABEL = -100  # torch's ignore_index, and so that of transformers: no token, its prediction does not count


def checked(batch: Batch, what: str, vocabulary: int | None = None) -> Batch:
    """Return the batch with `loss_mask` 0 where the label is -100.

    `what` is "candidates" or "proxy"; `vocabulary` bounds the ids where it is known. Raises ConfigError for fields that
    are no dense tensors or whose shapes are not those of the tokens [B, L], for ids of another dtype or out of bounds,
    and for a negative loss mask.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(f"{what}: expected a Batch, or ids [B, L + 1] for score(), got {type(batch).__name__}")
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if value is not None or field.default is dataclasses.MISSING:
            require_dense(value, f"{what}.{field.name}")
    shape = batch.tokens.shape
    if batch.tokens.dim() != 2 or 0 in shape or batch.tokens.is_floating_point():
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
    for name in ("tokens", "labels"):
        ids = getattr(batch, name)
        if ids.dtype != torch.int64:
            raise ConfigError(f"{what}.{name}: expected ids of dtype int64, got {ids.dtype}; convert them with .long()")
    ignored = batch.labels == IGNORED_LABEL
    bounds = torch.stack([batch.tokens.min(), batch.labels.masked_fill(ignored, 0).min(), batch.tokens.max()])
    token, label, highest = bounds.tolist()  # one synchronisation
    if token < 0 or label < 0:
        raise ConfigError(
            f"{what}: expected ids from 0 on, and labels of {IGNORED_LABEL} where nothing is predicted, found "
            f"{min(token, label)}"
        )
    if vocabulary is not None and highest >= vocabulary:
        raise ConfigError(f"{what}.tokens: expected ids below {vocabulary}, the rows of the embedding, found {highest}")
    if (batch.loss_mask < 0).any():
        raise ConfigError(f"{what}.loss_mask: expected weights of at least 0, found {float(batch.loss_mask.min()):.4g}")
    mask = batch.loss_mask.masked_fill(ignored, 0.0)
    return dataclasses.replace(batch, loss_mask=mask)


def require_dense(value: Any, what: str) -> None:
    """Raise ConfigError for what is no dense tensor with values of its own."""
    if not isinstance(value, Tensor):
        raise ConfigError(f"{what}: expected a tensor, got {type(value).__name__}")
    kind = ""
    if hasattr(value, "device_mesh"):
        kind = "a DTensor, a part of it on each rank; pass this rank's own (to_local())"
    elif value.is_nested:
        kind = "a nested tensor; pad it, with loss_mask 0 at the padding"
    elif value.layout != torch.strided:
        kind = f"one of layout {value.layout}; pass .to_dense()"
    elif value.is_meta:
        kind = "one on the meta device, which has no values"
    if kind:
        raise ConfigError(f"{what}: expected a dense tensor, got {kind}")
