"""One micro-batch of a scoring pass, as the engine's runner sees it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.scoring.capture import Capture, CaptureError
from megatron_opus.types import Batch


class CapturedMicrobatch:
    """Joins the sequences of a micro-batch with the hooks that read them (see `ScoringMicrobatch`)."""

    def __init__(
        self,
        batch: Batch,
        capture: Capture,
        tokens: Tensor,
        weights: Tensor,
        losses: Tensor,
        config: SelectionConfig,
        device: torch.device,
    ) -> None:
        """`tokens` [b] counts the tokens that enter each sequence's mean, over all of its windows; `weights` [b] is 0
        for a sequence that only fills the batch up; `losses` [b] is added to, in place."""
        self.batch, self.capture = batch, capture
        self._tokens, self._weights, self._losses = tokens, weights, losses
        self._precision, self._device = config.score_precision, device

    @property
    def leaves(self) -> list[Tensor]:
        return self.capture.leaves

    def observed(self) -> AbstractContextManager[object]:
        return self.capture

    def precision(self, *, backward: bool = False) -> AbstractContextManager[object]:
        # Megatron's linear layers enter autocast in their backward pass by themselves, but on CUDA alone
        if self._precision == "model" or (backward and self._device.type != "cpu"):
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def objective(self, token_losses: Tensor) -> Tensor:
        mask = self.batch.loss_mask.to(token_losses.device)
        if token_losses.shape != mask.shape:
            raise ConfigError(
                f"token losses: expected unreduced losses of shape {list(mask.shape)}, got "
                f"{list(token_losses.shape)}; the loss function must not average"
            )
        means = (token_losses * mask).sum(1) / self._tokens
        if not token_losses.requires_grad:  # a later stage has no leaf of its own, but an input that is one
            raise CaptureError(
                "the forward pass reached no scored layer; hooks do not fire inside compiled modules: score the "
                "uncompiled model"
            )
        self._losses += means.detach()
        # the gradient of the sum gives every sequence its own b, since sequences do not mix
        return (means * self._weights).sum()
