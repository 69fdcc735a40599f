"""`megatron_opus.score`: the scoring pass for users with a training loop of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_opus.backends.engines.base import WholeModelRunner
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.backends.model.gpt import forward_loss
from megatron_opus.backends.model.parallel import megatron_groups
from megatron_opus.backends.model.scored_layers import (
    is_megatron,
    megatron_layers,
    plain_layers,
)
from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.layout.model_layout import ModelLayout
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.types import Batch, Groups, Signals


def build_scorer(
    model: nn.Module,
    optimizer: Any,
    *,
    config: SelectionConfig | None = None,
    token_losses: Callable[[nn.Module, Batch], Tensor] | None = None,
    groups: Groups | None = None,
    layout: ModelLayout | None = None,
    device: torch.device | str | None = None,
) -> ScoringPass:
    """Make a scoring pass that is built once and called at every step with (candidates, proxy).

    model: the bare module, not the DeepSpeed engine around it and not a compiled one. A Megatron GPTModel is scored on
    its Column- and RowParallelLinear layers; `groups` default to megatron-core's parallel state, `layout` to the shapes
    and cuts of its own layers, `token_losses` to the model's own loss. Any other model is scored on its nn.Linear
    layers in one process; `token_losses` defaults to the cross entropy of `model(tokens)` (a tensor, or an object with
    `.logits`) [B, T, V] against the labels. `config` says whether the output layer and the token embedding are scored
    (`score_output_layer`, `score_embedding`).
    optimizer: torch Adam / AdamW / SGD, or one of DeepSpeed's Muons, or a DeepSpeed engine at any ZeRO stage.
    config: its `score_length` (512) is the number of tokens of each sequence that are scored.

    Raises ConfigError, UnsupportedOptimizer.
    """
    config = config or SelectionConfig()
    if hasattr(model, "_orig_mod"):
        raise ConfigError("model: hooks do not fire inside a torch.compile'd module; pass the uncompiled model")
    if is_megatron(model):
        groups = groups or megatron_groups()
        token_losses = token_losses or forward_loss
        layers = megatron_layers(model, layout, config)
    else:
        layers = plain_layers(model, config)
    if device is None:
        device = next(model.parameters()).device
    device = torch.device(device)
    return ScoringPass(
        WholeModelRunner(model, token_losses or _plain_token_losses, device),
        layers,
        optimizer_state(optimizer),
        config,
        groups=groups or Groups(),
        device=device,
    )


def score(
    model: nn.Module,
    candidates: Batch | Tensor,
    proxy: Batch | Tensor,
    optimizer: Any,
    *,
    interaction: bool = True,
    **options: Any,
) -> Signals:
    """How far the coming optimizer update would move `model` toward `proxy`, for each candidate sequence.

    candidates, proxy: `Batch`, or token ids [N, L + 1] int64 (inputs are the first L, labels the last L). Under data
    parallelism each rank passes its own share of both. `options` are those of `build_scorer`; call that once instead
    when scoring at every step.

    Returns Signals with alignment [N] and interaction [N, N] (None when not asked for), float64 on the CPU, identical
    on every rank: U = alignment - scale * interaction[:, drawn].sum(1). The model, the optimizer and the RNG are left
    as they were.
    """
    scorer = build_scorer(model, optimizer, **options)
    return scorer(as_batch(candidates), as_batch(proxy), interaction=interaction)


def as_batch(tokens: Batch | Tensor) -> Batch:
    """Token ids [B, L + 1] as a Batch of L inputs and L shifted labels; a Batch as it is."""
    if isinstance(tokens, Batch):
        return tokens
    if tokens.dim() != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise ConfigError(f"tokens: expected ids [B, L + 1] with L >= 1, got {tokens.dtype} {list(tokens.shape)}")
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(
        tokens=inputs,
        labels=labels,
        loss_mask=torch.ones(inputs.shape, dtype=torch.float32, device=tokens.device),
        position_ids=torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs),
    )


def _plain_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    if batch.document_ids is not None:
        raise ConfigError("document_ids: a plain model cannot mask documents by itself; pass token_losses that does")
    output = model(batch.tokens)
    logits = getattr(output, "logits", output)
    return functional.cross_entropy(logits.float().transpose(1, 2), batch.labels, reduction="none")
