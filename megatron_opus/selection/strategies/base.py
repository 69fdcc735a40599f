"""What strategies share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_opus.selection.limits import Floors, in_order
from megatron_opus.types import Candidates, Selection, SelectionStrategy, SignalName


class Stateless:
    """The configured domain weights, nothing learnt from losses, nothing to save."""

    wants_domain_loss = False
    wants_seconds = False

    def __init__(self, floors: Floors | None = None) -> None:
        self._floors = floors

    def domain_weights(self, step: int) -> Tensor | None:
        return None

    def scores_at(self, step: int) -> bool:
        return True

    def picks_at(self, step: int) -> bool:
        return True

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        pass

    def observe_seconds(self, choosing: float, updating: float) -> None:
        pass

    def notices(self) -> list[str]:
        return [] if self._floors is None else self._floors.notices()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state of its own, got keys {sorted(state)}")


class Around:
    """Passes everything on to the strategy that chooses; what moves its buffer or its scoring derives from this."""

    def __init__(self, inner: SelectionStrategy) -> None:
        self._inner = inner
        self.needs: frozenset[SignalName] = inner.needs
        self.wants_domain_loss, self.wants_seconds = inner.wants_domain_loss, inner.wants_seconds

    def domain_weights(self, step: int) -> Tensor | None:
        return self._inner.domain_weights(step)

    def scores_at(self, step: int) -> bool:
        return self._inner.scores_at(step)

    def picks_at(self, step: int) -> bool:
        return self._inner.picks_at(step)

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        self._inner.observe(step, domain_loss)

    def observe_seconds(self, choosing: float, updating: float) -> None:
        self._inner.observe_seconds(choosing, updating)

    def notices(self) -> list[str]:
        return self._inner.notices()


def draw_uniformly(
    candidates: Candidates,
    k: int,
    generator: torch.Generator,
    floors: Floors | None,
    fallback: str = "",
    diagnostics: Mapping[str, float] | None = None,
) -> Selection:
    """k of the candidates without looking at them; `fallback` says why, where something better was asked for."""
    if k > len(candidates):
        raise ValueError(f"expected at most {len(candidates)} to select, the size of the buffer, got {k}")
    order = torch.randperm(len(candidates), generator=generator)
    limits = None if floors is None else floors.limits(candidates, k)
    indices = in_order(order, k, limits)
    found = {**(diagnostics or {}), **({} if limits is None else limits.diagnostics())}
    return Selection(indices=indices, diagnostics=found, fallback=fallback)
