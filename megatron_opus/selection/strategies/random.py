"""Uniform selection from the same buffer: the baseline that every other strategy is measured against."""

from __future__ import annotations

import torch

from megatron_opus.selection.strategies.base import Stateless, draw_uniformly
from megatron_opus.types import Candidates, Selection, SignalName, Signals


class RandomStrategy(Stateless):
    """Needs no signals, so no scoring pass is run."""

    needs: frozenset[SignalName] = frozenset()

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        return draw_uniformly(candidates, k, generator, self._floors)
