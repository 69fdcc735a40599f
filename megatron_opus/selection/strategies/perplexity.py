"""Selection by the model's own loss: the K with the highest, the lowest or the most ordinary perplexity.

The ranking is by mean token loss over the scoring window, so no exponential is taken. Ties go to the earlier position
in the buffer; nothing is drawn from the generator.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_opus.selection.limits import Floors, in_order
from megatron_opus.selection.strategies.base import Stateless, draw_uniformly
from megatron_opus.types import Candidates, Selection, SignalName, Signals

Which = Literal["high_ppl", "middle_ppl", "low_ppl"]


class PerplexityStrategy(Stateless):
    """Needs a forward pass only. Candidates with a non-finite loss are never chosen."""

    needs: frozenset[SignalName] = frozenset({"loss"})

    def __init__(self, which: Which, floors: Floors | None = None) -> None:
        super().__init__(floors)
        self._which = which

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        loss = signals.loss
        if loss is None:
            raise ValueError(f"{self._which}: expected signals with losses, got none; run the scoring pass first")
        usable = torch.isfinite(loss)
        if signals.finite is not None:
            usable &= signals.finite
        if int(usable.sum()) < k:
            reason = f"{int(usable.sum())} of {len(loss)} candidates have a finite loss, need {k}"
            return draw_uniformly(candidates, k, generator, self._floors, fallback=reason)
        utility = torch.where(usable, self._utility(loss, usable), torch.nan)
        order = torch.argsort(utility.nan_to_num(-torch.inf), descending=True, stable=True)[: int(usable.sum())]
        limits = None if self._floors is None else self._floors.limits(candidates, k, usable)
        indices = in_order(order, k, limits)
        return Selection(
            indices=indices,
            utility=utility,
            diagnostics={
                "candidate_loss": loss[usable].mean().item(),
                "selected_loss": loss[indices].mean().item(),
                "excluded": float((~usable).sum()),
                **({} if limits is None else limits.diagnostics()),
            },
        )

    def _utility(self, loss: Tensor, usable: Tensor) -> Tensor:
        """[N]: the larger, the sooner chosen."""
        if self._which == "high_ppl":
            return loss
        if self._which == "low_ppl":
            return -loss
        ranks = torch.full_like(loss, torch.nan)
        count = int(usable.sum())
        by_loss = torch.argsort(loss.masked_fill(~usable, torch.inf), stable=True)[:count]
        ranks[by_loss] = torch.arange(count, dtype=loss.dtype)
        return -(ranks - (count - 1) / 2).abs()
