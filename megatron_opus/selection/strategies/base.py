"""What strategies share that neither steer the buffer nor remember anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Stateless:
    """The configured domain weights, nothing learnt from losses, nothing to save."""

    def domain_weights(self, step: int) -> Tensor | None:
        return None

    def observe(self, step: int, domain_loss: Mapping[str, float]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state of its own, got keys {sorted(state)}")
