"""The default loss of a model that is not Megatron's: next-token cross entropy of model(tokens)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_opus.config import ConfigError
from megatron_opus.types import Batch


def plain_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross entropy [B, L], float32, of `model(tokens)` against the labels; 0 where the label is -100.

    `model(tokens)` is the logits [B, L, V], an object that has them as `.logits`, or a tuple that begins with them. The
    model is given `position_ids` where they are not 0 .. L-1, and `attention_mask` where the batch has one. Raises
    ConfigError for a field of the batch that the model's forward pass does not take.
    """
    if batch.document_ids is not None:
        raise ConfigError(
            "document_ids: a plain model cannot keep documents apart by itself; pass token_losses that does"
        )
    taken = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {}
    positions = torch.arange(batch.tokens.shape[1], device=batch.position_ids.device)
    if not torch.equal(batch.position_ids, positions.expand_as(batch.position_ids)):
        given["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        given["attention_mask"] = batch.attention_mask
    for name in given:
        if name not in taken:
            raise ConfigError(
                f"{name}: the batch has {_SAYS[name]}, but {type(model).__name__}.forward takes no {name}; pass "
                "token_losses that uses them"
            )
    if batch.attention_mask is None:
        _refuse_padding(model, batch)
    return _cross_entropy(model(batch.tokens, **given), batch)


_SAYS = {
    "position_ids": "positions other than 0 .. L-1 (windows further on, packed documents)",
    "attention_mask": "padding",
}


def _refuse_padding(model: nn.Module, batch: Batch) -> None:
    """Refuse padding before tokens that count, which they would attend to. Padding after them no causal model sees."""
    positions, tokens = batch.position_ids, batch.tokens
    padded = (positions[:, :1] == positions[:, 1:2]).any(1)
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and pad not in (getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)):
        padded = padded | (tokens[:, 0] == pad)
    after = batch.loss_mask.cumsum(1) > 0
    left = padded & ~after[:, 0] & after[:, -1]
    if left.any():
        row = int(left.nonzero()[0])
        raise ConfigError(
            f"sequence {row} begins with padding (its positions stand still, or its first token is the model's "
            "pad_token_id), which its tokens would attend to; give Batch.attention_mask, 0 at padding, or pad on the "
            "right"
        )


def _cross_entropy(output: Any, batch: Batch) -> Tensor:
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else output)
    expected = f"logits [{batch.tokens.shape[0]}, {batch.tokens.shape[1]}, vocabulary]"
    if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.tokens.shape:
        found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model(tokens): expected {expected}, got {found}; pass token_losses that gives one loss for each token"
        )
    labels = batch.labels.to(logits.device)
    return functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
