"""How much of a model the scores speak for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Holds the `share` of the trainable numbers in matrices (two or more dimensions) that is scored."""

    share: float
    left_out: tuple[str, ...] = ()  # one sentence for each reason
