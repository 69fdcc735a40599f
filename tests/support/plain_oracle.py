"""Utilities of plain models from gradients of one sequence at a time, in float64: what `score` is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import megatron_opus
from megatron_opus.config import SelectionConfig, SketchConfig
from megatron_opus.selection import reference
from megatron_opus.types import Batch, Signals

LR = 0.1
VOCAB = 97
EXACT = SelectionConfig(sketch=SketchConfig(alignment="direction"))  # no sketch: only rounding is left


def tokens(size: int, length: int = 12, seed: int = 3) -> Tensor:
    """[size, length + 1] ids; the first ones are rarer than the later ones, so that utilities differ."""
    generator = torch.Generator().manual_seed(seed)
    spreads = [5 + (17 * i) % (VOCAB - 5) for i in range(size)]
    return torch.stack([torch.randint(3, spread, (length + 1,), generator=generator) for spread in spreads])


def losses_of(call: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """Turn logits [B, T, V] of a call into token losses [B, T]; written apart from the package's own."""
    return lambda batch: functional.cross_entropy(call(batch).transpose(1, 2), batch.labels, reduction="none")


def alignment(
    call: Callable[[Batch], Tensor], weights: Mapping[str, Tensor], candidates: Batch, proxy: Batch, lr: float = LR
) -> Tensor:
    """[N]: lr <G(z), mean of the proxy's G> over `weights`, each gradient by autograd of one sequence alone."""
    found = [reference.per_sequence_gradients(losses_of(call), batch, weights) for batch in (candidates, proxy)]
    return reference.scores(*found, reference.sgd_preconditioner(lr))[0]


def linear_weights(model: nn.Module, without: tuple[str, ...] = ("lm_head",)) -> dict[str, Tensor]:
    """Weights of the nn.Linear layers, by name, except of those whose last name is in `without`."""
    return {
        name: m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] not in without
    }


def found(model: nn.Module, candidates: Any, proxy: Any, config: SelectionConfig = EXACT, **options: Any) -> Signals:
    """Score with plain SGD at the rate of `alignment`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return megatron_opus.score(model, candidates, proxy, optimizer, config=config, interaction=False, **options)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())
