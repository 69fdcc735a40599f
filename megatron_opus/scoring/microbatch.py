"""One micro-batch of a scoring pass, as the engine's runner sees it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.scoring.capture import Capture, CaptureError
from megatron_opus.scoring.fp8 import Fp8
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
        fp8: Fp8 | None = None,
    ) -> None:
        """`tokens` [b] counts the tokens that enter each sequence's mean, over all of its windows; `weights` [b] is 0
        for a sequence that only fills the batch up; `losses` [b] is added to, in place."""
        self.batch, self.capture = batch, capture
        self._tokens, self._weights, self._losses = tokens, weights, losses
        self._precision, self._device, self._fp8 = config.score_precision, device, fp8

    @property
    def leaves(self) -> list[Tensor]:
        return self.capture.leaves

    def observed(self) -> AbstractContextManager[object]:
        return self.capture

    def precision(self, *, backward: bool = False) -> AbstractContextManager[object]:
        if self._fp8 is not None:  # what a layer computed in fp8 it differentiates in fp8, wherever that is called
            return contextlib.nullcontext() if backward else self._fp8.forward()
        # Megatron's linear layers enter autocast in their backward pass by themselves, but on CUDA alone
        if self._precision != "bf16" or (backward and self._device.type != "cpu"):
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def objective(self, token_losses: Tensor) -> Tensor:
        if not isinstance(token_losses, Tensor):
            raise ConfigError(f"token losses: expected a tensor [B, L], got {type(token_losses).__name__}")
        mask = self.batch.loss_mask.to(token_losses.device)
        if token_losses.shape != mask.shape:
            raise ConfigError(
                f"token losses: expected unreduced losses of shape {list(mask.shape)}, got "
                f"{list(token_losses.shape)}; the loss function must not average"
            )
        # where, not only *: a token that does not count may have any loss, NaN included
        means = (torch.where(mask != 0, token_losses, 0.0) * mask).sum(1) / self._tokens
        self._losses += means.detach()
        # the gradient of the sum gives every sequence its own b, since sequences do not mix
        total = (means * self._weights).sum()
        if not total.requires_grad:
            self.capture.check()  # names the layer and its cause
            raise CaptureError(
                "the losses do not depend on any scored layer: expected losses with a graph, got a constant; does "
                "token_losses detach them or run under torch.no_grad()?"
            )
        if self.capture.observing:  # a pipeline's schedule differentiates by itself, with many graphs at a time
            self.capture.leaves[:] = graph_leaves(total)
        return total


def graph_leaves(value: Tensor) -> list[Tensor]:
    """Every tensor that needs a gradient and at which the graph of `value` ends.

    Beside the outputs that the hooks made leaves of, these are tensors that the model itself gave requires_grad, as
    enable_input_require_grads() of transformers does with the embedding's output.
    """
    found: list[Tensor] = []
    seen = {value.grad_fn}
    open_nodes = [value.grad_fn]
    while open_nodes:
        node: Any = open_nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                open_nodes.append(following)
    return found
