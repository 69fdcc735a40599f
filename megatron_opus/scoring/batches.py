"""What a scoring pass asks of the batches that it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opus.config import ConfigError
from megatron_opus.types import Batch

IGNORED_LABEL = -100  # torch's ignore_index, and so that of transformers: no token, its prediction does not count

Vocabulary = tuple[int | None, int | None]  # rows of the token embedding and of the output layer


def holds_ids(x: Tensor) -> bool:
    """Tell whether a tensor is of integers."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def checked(batch: Batch, what: str, vocabulary: Vocabulary = (None, None)) -> Batch:
    """Return the batch with ids in int64 and `loss_mask` 0 where the label is -100.

    `what` is "candidates" or "proxy"; `vocabulary` bounds tokens and labels where it is known. Raises ConfigError for
    fields that are no dense tensors or whose shapes are not those of the tokens [B, L], for ids that are no integers or
    out of bounds, and for a negative loss mask. Reads from the device once.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(f"{what}: expected a Batch, or ids [B, L + 1] for score(), got {type(batch).__name__}")
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if value is not None or field.default is dataclasses.MISSING:
            require_dense(value, f"{what}.{field.name}")
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
            raise ConfigError(f"{what}.{field.name}: expected integers, got {value.dtype}")
    batch = dataclasses.replace(
        batch, tokens=batch.tokens.long(), labels=batch.labels.long(), position_ids=batch.position_ids.long()
    )
    ignored = batch.labels == IGNORED_LABEL
    labels = batch.labels.masked_fill(ignored, 0)
    found = [batch.tokens.min(), labels.min(), batch.tokens.max(), labels.max(), batch.loss_mask.min()]
    lowest, lowest_label, highest, highest_label, weight = torch.stack([x.double() for x in found]).tolist()
    if min(lowest, lowest_label) < 0:
        raise ConfigError(
            f"{what}: expected ids from 0 on, and labels of {IGNORED_LABEL} where nothing is predicted, found "
            f"{min(lowest, lowest_label):.0f}"
        )
    for name, most, bound in (("tokens", highest, vocabulary[0]), ("labels", highest_label, vocabulary[1])):
        if bound is not None and most >= bound:
            raise ConfigError(f"{what}.{name}: expected ids below {bound}, the model's vocabulary, found {most:.0f}")
    if weight < 0:
        raise ConfigError(f"{what}.loss_mask: expected weights of at least 0, found {weight:.4g}")
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


def check_proxy(proxies: Sequence[Batch]) -> None:
    """Raise ConfigError for proxy sequences without any token that counts in their `proxies`, one for each window."""
    counted = torch.stack([x.loss_mask.sum(1) for x in proxies]).sum(0)
    empty = (counted == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"proxy sequences {empty[:8]} have no token that counts in their scoring window; raise "
            "selection.score_length or leave such sequences out of the proxy"
        )
