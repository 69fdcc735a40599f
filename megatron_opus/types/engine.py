"""The engine seam: who owns weights, gradients and optimizer state, and who runs micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opus.types.layers import Groups, OptimizerState
from megatron_opus.types.tokens import Batch


class ScoringMicrobatch(Protocol):
    """One micro-batch of a scoring pass: sequences, hooks on the scored layers, and what is differentiated."""

    batch: Batch

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors at which the backward pass stops: layer outputs, after `objective` all that it depends on."""
        ...

    def observed(self) -> AbstractContextManager[object]:
        """Keep the hooks on the scored layers while the context is open."""
        ...

    def precision(self, *, backward: bool = False) -> AbstractContextManager[object]:
        """Set the precision in which the scoring forward, or its backward pass, computes."""
        ...

    def objective(self, token_losses: Tensor) -> Tensor:
        """Turn token losses [b, T] into the scalar whose activation gradients give the factors of every sequence."""
        ...


class MicrobatchRunner(Protocol):
    """Runs micro-batches through the model for a scoring pass, over as many stages as the model is cut into."""

    chunks: Sequence[torch.nn.Module]  # the pieces of the model on this rank: one, or one for each virtual stage

    def padded(self, sequences: int, size: int, windows: int = 1) -> int:
        """Return to how many sequences a share must be filled up to run in micro-batches of `size`, per window."""
        ...

    def losses(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """Return the token losses [b, T] of every batch without a graph; None on a stage that computes no loss."""
        ...

    def backward(self, micros: Sequence[ScoringMicrobatch]) -> None:
        """Run forward and activation-gradient backward of every micro-batch. Weights are frozen by the caller."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; identical on every rank."""

    loss: float  # mean over the K sequences
    grad_norm: float  # before clipping; inf when the step was skipped
    lr: float  # the rate that the step used
    skipped: bool  # a NaN or Inf gradient: weights, optimizer state and schedule are unchanged
    sequence_loss: Tensor | None = None  # [K] float32, each sequence's own mean, in the order the iterator was filled


class TrainEngine(Protocol):
    """The host that owns weights, gradients and optimizer state: DeepSpeed, or Megatron itself; nobody asks which."""

    groups: Groups
    device: torch.device
    description: str  # for the terminal: engine, precision and which optimizer implementation was taken

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The bare model: its parameters are those that the optimizer updates."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Return a reader of the optimizer state that this rank owns."""
        ...

    def runner(self) -> MicrobatchRunner:
        """Return what runs the micro-batches of a scoring pass."""
        ...

    def train_step(self, iterator: Iterator[Batch], *, per_sequence: bool = False) -> StepResult:
        """Take this rank's micro-batches from `iterator` and update the weights once. Collective.

        `per_sequence` asks for `sequence_loss` too, K numbers once per step. Raises ValueError for a micro-batch of
        another size than `training.micro_batch_size`.
        """
        ...

    def evaluate(self, batches: Mapping[str, Batch], micro_batch_size: int) -> dict[str, float]:
        """Return the mean loss per counted token of each domain, identical on every rank. Collective.

        `batches` holds the same sequences on every rank, of which each data-parallel rank evaluates its share. A domain
        without any counted token is NaN.
        """
        ...

    def save(self, path: Path) -> None:
        """Write weights, optimizer state and schedule below `path`. Collective; a failure raises on its rank alone."""
        ...

    def rank_state(self) -> dict[str, Any] | None:
        """Return what this package keeps beside the host's state on this rank; None where it keeps nothing."""
        ...

    def load(self, path: Path, rank_state: Mapping[str, Any] | None) -> None:
        """Restore what `save` wrote and `rank_state` gave. Collective.

        Raises CheckpointError when nothing can be loaded.
        """
        ...
