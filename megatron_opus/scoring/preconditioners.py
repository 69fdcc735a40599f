"""Preconditioners of all scored layers from optimizer state that is sharded over ranks.

Separable form, one all-reduce for all layers: per layer the row sums [d_out] and column sums [d_in] of the second
moments owned here, on global coordinates, float64. With the state partitioned over data-parallel ranks (ZeRO) the
sums are taken over them; with the weight sharded over tensor-parallel ranks, over those too. Exact form: the whole
local shard of one layer at a time, when that layer is reached in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opus.config import PreconditionerConfig
from megatron_opus.scoring.collectives import Traffic, all_reduce
from megatron_opus.selection.precondition import (
    Exact,
    Identity,
    LayerPreconditioner,
    Separable,
    adam_kappa,
    exact_multiplier,
    fragment_sums,
    separable_factors,
)
from megatron_opus.selection.sketch import indices
from megatron_opus.types import AdamHyper, Groups, OptimizerState, ScoredLayer, SgdHyper


class Preconditioners:
    """`refresh` is collective over the tensor- and data-parallel groups; so is calling it with form `exact`."""

    def __init__(
        self,
        layers: Sequence[ScoredLayer],
        state: OptimizerState,
        config: PreconditionerConfig,
        groups: Groups,
        traffic: Traffic,
        device: torch.device,
    ) -> None:
        self.geometry = ""
        self._layers, self._state, self._config = layers, state, config
        self._groups, self._traffic, self._device = groups, traffic, device
        self._rows = [indices(layer.rows, device) for layer in layers]
        self._cols = [indices(layer.cols, device) for layer in layers]
        self._current: list[LayerPreconditioner] = []
        self._hypers: list[AdamHyper] = []
        self._age = 0

    def refresh(self) -> None:
        """Read the optimizer state for the coming step, unless the last reading is younger than `refresh_every`."""
        if self._current and self.geometry == "adamw-separable" and self._age < self._config.refresh_every:
            self._age += 1
            return
        self._age = 1
        hypers = self._state.hypers([layer.weight for layer in self._layers], self._config.kind)
        self._hypers = [h for h in hypers if isinstance(h, AdamHyper) and h.step > 0]
        if len(self._hypers) < len(hypers):
            # before the first optimizer step there is no second moment: the geometry is SGD's, and the log says so
            self.geometry = "sgd" if isinstance(hypers[0], SgdHyper) else "sgd (no optimizer state yet)"
            self._current = [Identity(kappa=h.lr) for h in hypers]
            return
        self.geometry = f"adamw-{self._config.form}"
        if self._config.form == "exact":
            self._current = [Identity()] * len(self._layers)  # formed layer by layer, in `__call__`
            return
        self._current = self._separable()

    def factors(self, index: int) -> LayerPreconditioner:
        """The part of P that applies to the layer's input alone: `Identity` in the exact form. No communication."""
        return self._current[index]

    def __call__(self, index: int) -> LayerPreconditioner:
        """P of one layer. Form `exact`: gathers this layer's second moment over the data-parallel group."""
        if not self.geometry.endswith("-exact"):
            return self._current[index]
        layer, hyper = self._layers[index], self._hypers[index]
        v = torch.zeros(layer.weight.numel(), dtype=torch.float32, device=self._device)
        for fragment in self._state.second_moment(layer.weight):
            v[fragment.start : fragment.start + fragment.values.numel()] = fragment.values.float()
        if self._state.sharded_over_dp:
            all_reduce(v, self._groups.dp, self._traffic)
        shard = v.view(len(self._rows[index]), len(self._cols[index]))
        return Exact(kappa=adam_kappa(hyper), multiplier=exact_multiplier(shard, hyper))

    def invalidate(self) -> None:
        """Make the next `refresh` read anew. Called when a checkpoint is written: a resumed run has no cache either."""
        self._current = []

    def _separable(self) -> list[LayerPreconditioner]:
        sizes = [layer.d_out + layer.d_in for layer in self._layers]
        sums = torch.zeros(sum(sizes), dtype=torch.float64, device=self._device)
        views = sums.split(sizes)
        for layer, view, rows, cols in zip(self._layers, views, self._rows, self._cols, strict=True):
            if layer.replicated and self._groups.tp_rank != 0:
                continue  # every tensor-parallel rank holds the same state: counted once
            for fragment in self._state.second_moment(layer.weight):
                row_sum, col_sum = fragment_sums(fragment, len(rows), len(cols))
                view[: layer.d_out].index_add_(0, rows, row_sum.to(self._device))
                view[layer.d_out :].index_add_(0, cols, col_sum.to(self._device))
        if self._state.sharded_over_dp:
            all_reduce(sums, self._groups.dp, self._traffic)
        all_reduce(sums, self._groups.tp, self._traffic)
        result: list[LayerPreconditioner] = []
        for layer, view, rows, cols, hyper in zip(
            self._layers, views, self._rows, self._cols, self._hypers, strict=True
        ):
            r, c = separable_factors(view[: layer.d_out], view[layer.d_out :], hyper)
            result.append(Separable(kappa=adam_kappa(hyper), row=_take(r, rows), col=_take(c, cols)))
        return result


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values[index].contiguous()
