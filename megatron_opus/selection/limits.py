"""Floors: a least and a most number of sequences per domain, kept while the K are drawn one by one.

A draw is free until as many places are left as are still owed to domains below their minimum; from there on only those
domains may be drawn. A domain at its maximum may not be drawn unless nothing else is left. So the order in which a
strategy prefers the candidates decides everything that the limits leave open, and any strategy that picks one by one
can keep them.

What the buffer does not hold cannot be owed: a minimum above the number of eligible candidates of its domain is counted
as *unsupplied*, and the maximum of a domain that has to fill places which no other candidate could as *exceeded*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_opus.config import FloorsConfig
from megatron_opus.config.strategies import check_floors, least, most
from megatron_opus.types import Candidates


class DomainLimits:
    """The limits of one step. `blocked` before and `take` after every pick."""

    def __init__(self, domains: np.ndarray, low: Sequence[int], high: Sequence[int], k: int, eligible: Tensor) -> None:
        """domains [N] int, low / high [D], eligible [N] bool; a low above the eligible of its domain is unsupplied."""
        self._domains = torch.from_numpy(np.asarray(domains, dtype=np.int64))
        self._available = torch.bincount(self._domains[eligible], minlength=len(low))
        asked = torch.tensor(low, dtype=torch.int64)
        self._low, self._high = torch.minimum(asked, self._available), torch.tensor(high, dtype=torch.int64)
        self.unsupplied = asked - self._low  # [D] sequences that the buffer could not supply
        self._taken = torch.zeros_like(asked)
        self._left = k

    def blocked(self) -> Tensor:
        """[N] float64: -inf for candidates that may not be the next pick, else 0."""
        owed = (self._low - self._taken).clamp(min=0)
        if int(owed.sum()) >= self._left:
            closed = owed == 0
        else:
            closed = self._taken >= self._high
            if not ((self._available > self._taken) & ~closed).any():
                closed = torch.zeros_like(closed)  # the buffer has nothing else: exceed a maximum
        return torch.zeros(len(self._domains), dtype=torch.float64).masked_fill(closed[self._domains], -math.inf)

    def take(self, position: int) -> None:
        self._taken[self._domains[position]] += 1
        self._left -= 1

    @property
    def exceeded(self) -> Tensor:
        """[D] sequences above the maximum so far."""
        return (self._taken - self._high).clamp(min=0)

    def diagnostics(self) -> dict[str, float]:
        return {
            "floors_unsupplied": float(self.unsupplied.sum()),
            "floors_exceeded": float(self.exceeded.sum()),
            "floors_breached": float((self._low - self._taken).clamp(min=0).sum()),
        }


class Floors:
    """The configured shares for one list of candidate domains. Raises ConfigError for a name that is not among them."""

    def __init__(self, config: FloorsConfig, domains: Sequence[str] = ()) -> None:
        self._config, self._domains = config, tuple(domains)
        self._said: set[str] = set()
        self._notices: list[str] = []
        self.active = bool(config.minimum or config.maximum)

    def limits(self, candidates: Candidates, k: int, eligible: Tensor | None = None) -> DomainLimits | None:
        """For one step's draw of k among the eligible [N] (None: all); None where no floor is configured."""
        if not self.active:
            return None
        check_floors(self._config, k, self._domains)
        everyone = torch.ones(len(candidates), dtype=torch.bool)
        limits = DomainLimits(
            candidates.domains,
            [least(self._config.minimum.get(name, 0.0), k) for name in self._domains],
            [most(self._config.maximum.get(name, 1.0), k) for name in self._domains],
            k,
            everyone if eligible is None else eligible,
        )
        for name, missing in zip(self._domains, limits.unsupplied.tolist(), strict=True):
            if missing and name not in self._said:
                self._said.add(name)
                self._notices.append(
                    f"step {candidates.step}: the minimum of {name} asks for {missing} sequences more than the buffer "
                    "holds (said once; floors_unsupplied in metrics.jsonl); raise its weight in data.domain_weights"
                )
        return limits

    def notices(self) -> list[str]:
        """Lines for the terminal since the last call."""
        said, self._notices = self._notices, []
        return said


def in_order(order: Tensor, k: int, limits: DomainLimits | None) -> Tensor:
    """[k] int64: the first k of `order` (positions, best first) that the limits allow, in the order of the picks."""
    if limits is None:
        return order[:k]
    free = torch.ones(len(order), dtype=torch.bool)  # by rank in `order`
    picks = []
    for _ in range(k):
        allowed = free & (limits.blocked()[order] == 0)
        rank = int(torch.argmax(allowed.to(torch.uint8)))
        free[rank] = False
        picks.append(int(order[rank]))
        limits.take(picks[-1])
    return torch.tensor(picks, dtype=torch.int64)
