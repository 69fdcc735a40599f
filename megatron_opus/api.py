"""`megatron_opus.score`: the scoring pass for users with a training loop of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_opus.backends.engines.base import WholeModelRunner
from megatron_opus.backends.engines.data_parallel import data_parallel_groups
from megatron_opus.backends.engines.deepspeed.partition import local_shape
from megatron_opus.backends.engines.optimizer_state import optimizer_state
from megatron_opus.backends.model import coverage
from megatron_opus.backends.model.gpt import forward_loss
from megatron_opus.backends.model.parallel import megatron_groups
from megatron_opus.backends.model.plain_layers import bare_model, find_roles, plain_layers
from megatron_opus.backends.model.plain_losses import plain_token_losses
from megatron_opus.backends.model.scored_layers import is_megatron, megatron_layers
from megatron_opus.config import ConfigError, SelectionConfig
from megatron_opus.layout.model_layout import ModelLayout
from megatron_opus.scoring.batches import Vocabulary, holds_ids, require_dense
from megatron_opus.scoring.scoring_pass import ScoringPass
from megatron_opus.types import Batch, Groups, Signals

SMALL_COVERAGE = 0.9


def build_scorer(
    model: nn.Module,
    optimizer: Any,
    *,
    config: SelectionConfig | None = None,
    token_losses: Callable[[nn.Module, Batch], Tensor] | None = None,
    groups: Groups | None = None,
    layout: ModelLayout | None = None,
    device: torch.device | str | None = None,
    wanted: Callable[[str], bool] | None = None,
    verify: bool = True,
) -> ScoringPass:
    """Make a scoring pass that is built once and called at every step with (candidates, proxy).

    model: the model, not a compiled one. DistributedDataParallel and DeepSpeed engines are opened. A Megatron GPTModel
    is scored on its Column- and RowParallelLinear layers; `groups` default to megatron-core's parallel state, `layout`
    to the shapes and cuts of its own layers, `token_losses` to the model's own loss. Any other model is scored on its
    nn.Linear and Conv1D layers; `groups` default to the data-parallel group of the DistributedDataParallel or of the
    DeepSpeed engine, `token_losses` to the cross entropy of `model(tokens)` (see `plain_token_losses`). `config` says
    whether the output layer and the token embedding are scored (`score_output_layer`, `score_embedding`).
    optimizer: torch Adam / AdamW / SGD, or one of DeepSpeed's Muons, or a DeepSpeed engine at any ZeRO stage.
    config: its `score_length` (512) is the number of tokens of each sequence that are scored.
    wanted: takes a module's name and says whether it may be scored; None for all.
    verify: compare the gradients that the first call sees of one candidate with autograd's own; it costs one sequence
    forward and backward, with weight gradients, and raises VerificationError where they differ. At ZeRO 3, which keeps
    no whole gradient, nothing is compared; `ScoringPass.verified` says what was.

    A warning names what is left out when less than 0.9 of the trainable numbers in matrices are scored; every result
    has the share as `coverage`. Raises ConfigError, UnsupportedOptimizer.
    """
    config = SelectionConfig() if config is None else config
    _check_options(config, token_losses, groups, layout, wanted)
    bare = bare_model(model)  # first: it refuses what is no model
    groups = groups or data_parallel_groups(model, optimizer)
    vocabulary: Vocabulary = (None, None)  # Megatron pads its table; its data are checked where they are read
    model = bare
    if is_megatron(model):
        groups = groups or megatron_groups()
        token_losses = token_losses or _megatron_token_losses
        layers = [x for x in megatron_layers(model, layout, config) if wanted is None or wanted(x.name)]
    else:
        layers = plain_layers(model, config, wanted=wanted)
        roles = find_roles(model)
        vocabulary = (_rows(roles.token), _rows(roles.output))
    if device is None:
        device = next((p.device for p in model.parameters()), "cpu")
    device = _usable(device)
    runner = WholeModelRunner(model, token_losses or plain_token_losses, device)
    covered = coverage.coverage(model, layers)
    if covered.share < SMALL_COVERAGE and layers:
        warnings.warn(coverage.warning(covered), stacklevel=2)
    return ScoringPass(
        runner,
        layers,
        optimizer_state(optimizer),
        config,
        groups=groups or Groups(),
        device=device,
        verify=runner if verify and not runner.incomparable else None,
        coverage=covered,
        vocabulary=vocabulary,
    )


def _check_options(config: Any, token_losses: Any, groups: Any, layout: Any, wanted: Any) -> None:
    known = (("config", config, SelectionConfig), ("groups", groups, Groups), ("layout", layout, ModelLayout))
    for name, value, kind in known:
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name}: expected a {kind.__name__}, got {value!r:.80}")
    for name, value in (("token_losses", token_losses), ("wanted", wanted)):
        if value is not None and not callable(value):
            raise ConfigError(f"{name}: expected a function, got {value!r:.80}")


def _rows(weight: nn.Parameter | None) -> int | None:
    return None if weight is None else local_shape(weight)[0]


def _usable(device: Any) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's words for an unknown and an absent device
        raise ConfigError(
            f"device: expected one that torch has here, got {device!r} ({str(error).splitlines()[0]:.120})"
        ) from error


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
    require_dense(tokens, "tokens")
    if tokens.dim() != 2 or tokens.shape[1] < 2 or not holds_ids(tokens):
        raise ConfigError(f"tokens: expected ids [B, L + 1] with L >= 1, got {tokens.dtype} {list(tokens.shape)}")
    tokens = tokens.long()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(
        tokens=inputs,
        labels=labels,
        loss_mask=torch.ones(inputs.shape, dtype=torch.float32, device=tokens.device),
        position_ids=torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs),
    )


def _megatron_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    if batch.attention_mask is not None:
        raise ConfigError(
            "attention_mask: a Megatron model masks by document_ids alone; give padding a document of its own, or pad "
            "on the right with loss_mask 0"
        )
    return forward_loss(model, batch)
