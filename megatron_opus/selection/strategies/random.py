"""Uniform selection from the same buffer: the baseline that every other strategy is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_opus.types import Candidates, Selection, SignalName, Signals


class RandomStrategy:
    """Needs no signals, so no scoring pass is run."""

    needs: frozenset[SignalName] = frozenset()

    def domain_weights(self, step: int) -> Tensor | None:
        return None

    def select(self, candidates: Candidates, signals: Signals, k: int, generator: torch.Generator) -> Selection:
        if k > len(candidates):
            raise ValueError(f"random: expected at most {len(candidates)} to select, got {k}")
        return Selection(indices=torch.randperm(len(candidates), generator=generator)[:k])

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"random keeps no state of its own, got keys {sorted(state)}")
