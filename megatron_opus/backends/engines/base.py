"""What every engine gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; identical on every rank."""

    loss: float  # mean over the K sequences
    grad_norm: float  # before clipping; inf when the step was skipped
    lr: float  # the rate that the step used
    skipped: bool  # a NaN or Inf gradient: weights, optimizer state and schedule are unchanged
    sequence_loss: Tensor | None = None  # [K] float32, each sequence's own mean, in the order the iterator was filled
