"""Filter-then-Weight: keep the K whose updates build up a target update, then weigh them (after arXiv 2604.00001).

An implementation of the published description, not a reproduction: the full text was not at hand. With the update
u_i = P G(i) of each candidate and the proxy gradient g_V, what is minimised over non-negative weights is

    || sum_i w_i u_i - s g_V ||^2 = w^T K w - 2 s c^T w + const,   K_ij = <u_i, u_j>,  c_i = <u_i, g_V>

so the geometry is the optimizer's: the sum of *preconditioned* updates is matched to the direction that lowers the
target loss fastest. The description has P g_V in place of s g_V: `selection.target: update` makes c_i = <u_i, P g_V>,
which was not told from g_V in training (docs/evidence.md). The unknown scale s drops out, since w is proportional to it
and the weights are normalised to mean 1.

Stage 1, filter: matching pursuit. The next pick has the largest (c_i - (K w)_i) / |u_i|, the correlation of its update
with what is not explained yet; its coefficient max(0, c_i - (K w)_i) / K_ii is taken off the residual. K are picked
even when nothing useful is left, because the step has K places.
Stage 2, weight: non-negative least squares on the K x K Gram matrix (nnls.py). Weights multiply per-sequence losses;
a sequence of weight 0 takes part in the step without effect.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import FilterThenWeightConfig
from megatron_opus.selection.limits import DomainLimits, Floors
from megatron_opus.selection.nnls import kkt_violation, nnls
from megatron_opus.selection.strategies.base import Stateless, draw_uniformly
from megatron_opus.types import Candidates, Selection, SignalName, Signals


class FilterThenWeightStrategy(Stateless):
    """Needs alignment [N] and interaction [N, N]; draws nothing from the generator unless it falls back."""

    needs: frozenset[SignalName] = frozenset({"ghost"})

    def __init__(self, config: FilterThenWeightConfig, floors: Floors | None = None) -> None:
        super().__init__(floors)
        self._config = config

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        if signals.alignment is None or signals.interaction is None:
            raise ValueError(
                "filter_then_weight: expected signals with alignment and interaction; run the scoring pass with both"
            )
        align, inter = signals.alignment, signals.interaction
        diagonal = inter.diagonal()
        usable = torch.isfinite(align) & torch.isfinite(diagonal) & (diagonal > 0)
        if signals.finite is not None:
            usable &= signals.finite
        if int(usable.sum()) < k:
            reason = f"{int(usable.sum())} of {len(align)} candidates have finite, non-zero updates, need {k}"
            return draw_uniformly(candidates, k, generator, self._floors, fallback=reason)
        if not (align[usable] > 0).any():
            reason = f"none of {int(usable.sum())} candidates is aligned with the target"
            return draw_uniformly(candidates, k, generator, self._floors, fallback=reason)
        limits = None if self._floors is None else self._floors.limits(candidates, k, usable)
        order, explained = matching_pursuit(align, inter, k, usable, limits)
        kept = order.numpy()
        gram, target = inter.numpy()[np.ix_(kept, kept)], align.numpy()[kept]
        raw, sweeps = nnls(gram, target, max_sweeps=self._config.max_sweeps, tolerance=self._config.tolerance)
        # all zero where the limits left only candidates that point away from the target
        weights = raw * (k / raw.sum()) if raw.sum() > 0 else np.ones(k)
        return Selection(
            indices=order,
            weights=torch.from_numpy(weights).float(),
            utility=torch.where(usable, align / diagonal.sqrt(), math.nan),
            redundancy=torch.where(usable, explained, 0.0),
            diagnostics={
                "effective_sequences": float(weights.sum() ** 2 / np.square(weights).sum()),
                "weight_max": float(weights.max()),
                "weight_zero_share": float((weights == 0).mean()),
                "nnls_sweeps": float(sweeps),
                "nnls_violation": kkt_violation(gram, target, raw),
                "excluded": float((~usable).sum()),
                **({} if limits is None else limits.diagnostics()),
            },
        )


def matching_pursuit(
    align: Tensor, inter: Tensor, k: int, usable: Tensor, limits: DomainLimits | None = None
) -> tuple[Tensor, Tensor]:
    """(order [k] int64, explained [N] float64): greedy picks by the correlation of each update with the residual.

    explained: what earlier picks had taken off the normalised correlation of a candidate, at its own pick or the end.
    """
    norm = torch.where(usable, inter.diagonal(), 1.0).sqrt()
    residual = torch.where(usable, align, 0.0)
    start = residual / norm
    open_ = torch.zeros_like(align).masked_fill(~usable, -math.inf)
    explained = torch.zeros_like(align)
    order = torch.empty(k, dtype=torch.int64)
    for i in range(k):
        closed = open_ if limits is None else open_ + limits.blocked()
        chosen = int(torch.argmax(residual / norm + closed))
        order[i] = chosen
        explained[chosen] = start[chosen] - residual[chosen] / norm[chosen]
        open_[chosen] = -math.inf
        if limits is not None:
            limits.take(chosen)
        coefficient = (residual[chosen] / norm[chosen] ** 2).clamp(min=0)
        residual = residual - coefficient * torch.where(usable, inter[:, chosen], 0.0)
    final = start - residual / norm
    final[order] = explained[order]
    return order, final
